"The training loop: learns, repeats itself, survives interruption, holds patients apart, tells the truth about failures."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import rel_entr

from hms_brain.augment import augment_window, crop_window, mask_image, mirror_window, narrow, shift_window
from hms_brain.batches import SineCache, Windows, split_rows
from hms_brain.core import CLASSES, VOTE_COLUMNS, InputError, read_json, rng_for, sha256_file
from hms_brain.models.core import create_model
from hms_brain.steps import learning_rate_at, pinned, vote_loss
from hms_brain.checkpoints import Training, newest_checkpoint
from hms_brain.recipe import AUGMENTATIONS, Recipe
from hms_brain.train import Run, predict_rows, train

SMALL = {"stem": 4, "width": 16, "hidden": 8, "dropout": 0.1}


def fit(folder, cache=None, say=None, resume=False, **recipe):
    recipe = Recipe(**{"epochs": 2, "batch_size": 12, "learning_rate": 3e-3} | recipe)
    return train(cache or SineCache(), recipe, folder=folder, model_settings=SMALL, threads=1, say=say, resume=resume)


def weights(run):
    return sha256_file(run.folder / "model.safetensors")


class Stop(BaseException):
    pass


def stop_after(epochs):
    def say(line):
        if int(line.split()[1].split("/")[0]) == epochs:
            raise Stop
    return say


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs") / "whole", epochs=3)


def test_learns_what_can_be_learned(tmp_path):
    run = fit(tmp_path / "r", epochs=12, batch_size=6, learning_rate=1e-2, ema=0.8, patience=0)
    assert run.metrics["val_kl"] < run.metrics["prior_kl"] - 0.3
    assert run.history.train_loss.iloc[-1] < run.history.train_loss.iloc[0]


def test_what_a_run_leaves(run):
    again = Run.load(run.folder)
    assert again.status == "ok" and again.recipe == run.recipe and again.info["data"]["simulated"] is True
    assert list(run.history) == ["epoch", "stage", "learning_rate", "train_loss", "val_kl", "prior_kl", "seconds"] and len(run.history) == 3
    table = run.validation
    p = table[[f"p_{c}" for c in CLASSES]].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-9)
    assert set(table.patient_id) == {0} and set(VOTE_COLUMNS) <= set(table)
    y = table[list(VOTE_COLUMNS)].to_numpy() / 3
    assert run.metrics["val_kl"] == pytest.approx(rel_entr(y, p).sum(1).mean())
    assert run.metrics["val_kl"] == pytest.approx(run.history.val_kl.min())
    np.testing.assert_allclose(predict_rows(run.model(), SineCache(), table.eeg_id[:12].to_numpy()), p[:12], atol=1e-5)
    np.testing.assert_allclose(run.prior, 1 / 6)
    names = {f.name for f in run.folder.rglob("*") if f.is_file()}
    assert names == {"run.json", "history.csv", "metrics.json", "validation.parquet", "model.safetensors", "list.json", "epoch-0002.safetensors", "epoch-0003.safetensors"}


def test_same_command_same_weights(run, tmp_path):
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert weights(fit(tmp_path / "again", epochs=3)) == weights(run)
    assert weights(fit(tmp_path / "other", epochs=3, seed=1)) != weights(run)


@pytest.mark.parametrize("epochs", [1, 2])
def test_resumed_weights_are_those_of_the_uninterrupted_run(run, tmp_path, epochs):
    with pytest.raises(Stop):
        fit(tmp_path / "cut", epochs=3, say=stop_after(epochs))
    assert Run.load(tmp_path / "cut").status == "failed"
    with pytest.raises(InputError, match="finish the training"):
        Run.load(tmp_path / "cut").metrics  # noqa: B018
    resumed = fit(tmp_path / "cut", epochs=3, resume=True)
    assert resumed.status == "ok" and weights(resumed) == weights(run)
    assert resumed.history.drop(columns="seconds").equals(run.history.drop(columns="seconds"))


def test_frozen_parts_are_resumed_too(tmp_path):
    settings = {"eeg_settings": SMALL, "image_settings": {"widths": [4, 4, 8], "width": 16}, "frozen": True}
    recipe = Recipe(model="fusion", epochs=2, batch_size=12)

    def go(name, say=None, resume=False):
        return train(SineCache(24), recipe, folder=tmp_path / name, model_settings=settings, threads=1, say=say, resume=resume)

    with pytest.raises(Stop):
        go("cut", stop_after(1))
    whole, cut = go("whole"), go("cut", resume=True)
    assert weights(cut) == weights(whole)
    torch.manual_seed(recipe.seed)
    fresh, trained = create_model("fusion", **settings).state_dict(), whole.model().state_dict()
    assert {k.split(".")[0] for k in fresh if not torch.equal(fresh[k], trained[k])} == {"project", "queries", "joint", "head", "bias"}


def test_a_rotten_checkpoint_is_passed_over(run, tmp_path):
    with pytest.raises(Stop):
        fit(tmp_path / "cut", epochs=3, say=stop_after(2))
    newest = newest_checkpoint(tmp_path / "cut")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert newest_checkpoint(tmp_path / "cut").name == "epoch-0001.safetensors"
    assert weights(fit(tmp_path / "cut", epochs=3, resume=True)) == weights(run)


def test_resume_refuses_another_training(run):
    with pytest.raises(InputError, match="recipe differs"):
        fit(run.folder, epochs=4, resume=True)
    with pytest.raises(InputError, match="rows_sha256 differs"):
        fit(run.folder, SineCache(96), epochs=3, resume=True)
    with pytest.raises(InputError, match="holds a training already"):
        fit(run.folder, epochs=3)
    assert Run.load(run.folder).status == "ok"


def test_changed_weights_are_noticed(run, tmp_path):
    import shutil
    shutil.copytree(run.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="was changed"):
        Run.load(tmp_path / "copy").model()


class Poisoned(SineCache):
    "The held-out patient's signals and votes are not what they were."
    def __init__(self, n=48):
        super().__init__(n)
        held = (self.index.fold == 0).to_numpy()
        self.index.loc[held, list(VOTE_COLUMNS)] = [0, 0, 0, 0, 0, 7]

    def batch(self, rows):
        eeg, image, votes = super().batch(rows)
        eeg[(self.index.fold == 0).to_numpy()[np.asarray(rows)]] *= 100
        return eeg, image, votes


def test_held_out_patients_do_not_reach_the_weights(tmp_path):
    clean, poisoned = fit(tmp_path / "a", epochs=1), fit(tmp_path / "b", Poisoned(), epochs=1)
    assert weights(clean) == weights(poisoned) and clean.metrics["val_kl"] != poisoned.metrics["val_kl"]
    np.testing.assert_array_equal(clean.prior, poisoned.prior)


def test_a_patient_on_both_sides_is_refused(tmp_path):
    cache = SineCache()
    cache.index["patient_id"] = 0
    with pytest.raises(InputError, match="both sides"):
        fit(tmp_path / "r", cache)
    assert not (tmp_path / "r").exists()


def test_abstained_windows_are_not_trained_on_and_get_the_prior(tmp_path):
    cache = SineCache()
    cache.index.loc[[0, 7, 8], "abstain"] = True  # row 0 is held out
    split = split_rows(cache)
    assert not {7, 8} & set(split.train) and 0 in split.valid
    run = fit(tmp_path / "r", cache, epochs=1)
    np.testing.assert_allclose(run.validation.iloc[0][[f"p_{c}" for c in CLASSES]].to_numpy(float), run.prior)
    assert run.metrics["abstained"] == 1


def test_a_failing_run_says_so(tmp_path):
    class Broken(SineCache):
        def batch(self, rows): raise OSError("the disk is gone")
    with pytest.raises(OSError):
        fit(tmp_path / "r", Broken())
    record = read_json(tmp_path / "r" / "run.json")
    assert record["status"] == "failed" and "the disk is gone" in record["error"]


def test_nan_stops_the_training(tmp_path):
    class Bad(SineCache):
        def batch(self, rows):
            eeg, image, votes = super().batch(rows)
            return eeg * np.nan, image, votes
    with pytest.raises(RuntimeError, match="loss is nan"):
        fit(tmp_path / "r", Bad())


def test_patience_stops(tmp_path):
    run = fit(tmp_path / "r", epochs=6, learning_rate=1e-9, patience=2, ema=0.0, **dict.fromkeys(AUGMENTATIONS, 0))
    assert len(run.history) < 6 and run.metrics["best_epoch"] == len(run.history) - 2


def test_order_is_a_function_of_seed_and_epoch():
    cache = SineCache()
    split = split_rows(cache)
    orders = {(s, e): tuple(Windows(cache, split, seed=s, epoch=e).order) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 6 and all(sorted(o) == list(split.train) for o in orders.values())
    assert orders[1, 2] == tuple(Windows(cache, split, seed=1, epoch=2).order)


def test_weights_and_targets():
    cache = SineCache()
    cache.index.loc[12:, list(VOTE_COLUMNS)] *= 10
    windows = Windows(cache, split_rows(cache), smoothing=0.5, vote_cap=10)
    batch = windows.__getitems__(list(range(len(windows))))
    assert float(batch["weight"].mean()) == pytest.approx(1)
    assert float(batch["weight"].max() / batch["weight"].min()) == pytest.approx(10 / 3) if (cache.index.loc[windows.order].seizure_vote.eq(3)).any() else True
    np.testing.assert_allclose(batch["target"].sum(1), 1, atol=1e-6)
    assert float(batch["target"].min()) > 0


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_loss_is_the_competitions_kl(seed, n):
    rng = np.random.default_rng(seed)
    votes, logits, weight = rng.integers(0, 5, (n, 6)) + np.eye(6, dtype=int)[rng.integers(6, size=n)], rng.normal(0, 3, (n, 6)), rng.random(n)
    y = votes / votes.sum(1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ours = float(vote_loss(*(torch.tensor(x) for x in (logits, y, weight))))
    assert ours == pytest.approx((weight * rel_entr(y, p).sum(1)).mean(), rel=1e-4, abs=1e-6)


def test_pinned_leaves_torch_as_it_was():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pinned(1, 0): pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally: torch.use_deterministic_algorithms(False)


def test_learning_rate_rises_and_falls():
    rates = [learning_rate_at(s, 100, 1e-3, 0.1) for s in range(100)]
    assert max(rates) == pytest.approx(1e-3) and np.argmax(rates) == 9 and 0 <= rates[-1] < 1e-5
    assert all(np.diff(rates[:10]) > 0) and all(np.diff(rates[10:]) < 0)
    assert learning_rate_at(0, 1, 1e-3, 0.1) == 1e-3


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_augmentation_keeps_shapes_and_inputs(seed):
    rng = np.random.default_rng(seed)
    eeg, image = rng.normal(size=(19, 10000)).astype(np.float32), rng.random((3, 224, 224), dtype=np.float32)
    before = eeg.copy(), image.copy()
    louder = augment_window(eeg, image, rng_for(seed))[1]
    assert louder.dtype == np.float32 and (((louder >= 0) & (louder <= 1)) | (louder == -1)).all()
    new, picture = augment_window(eeg, image, rng_for(seed), gain=0, shift=60.0 if seed % 3 == 0 else 1.0)
    assert new.shape == eeg.shape and picture.shape == image.shape and new.dtype == picture.dtype == np.float32
    assert np.isfinite(new).all() and np.array_equal(eeg, before[0]) and np.array_equal(image, before[1])
    assert np.isin(picture[picture >= 0], image).all() and set(np.unique(picture[picture < 0])) <= {-1.0}


def test_every_augmentation_does_something_and_can_be_switched_off():
    rng = rng_for(3, "every")
    eeg, image = rng.normal(0, 30, (19, 10000)).astype(np.float32), rng.random((3, 224, 224), dtype=np.float32)
    eeg[4], off = 0, dict.fromkeys(AUGMENTATIONS, 0.0)
    for name in AUGMENTATIONS:
        new, picture = augment_window(eeg, image, rng_for(5), **(off | {name: 1.0}))
        assert not (np.array_equal(new, eeg) and np.array_equal(picture, image)), name
        if name in ("invert", "contact", "band", "drop"): assert np.array_equal(picture, image), name
    assert np.array_equal(augment_window(eeg, image, rng_for(5), **(off | {"invert": 1.0}))[0], -eeg)


def test_a_narrower_band_leaves_absent_samples_absent():
    eeg = rng_for(0, "band").normal(0, 30, (19, 10000)).astype(np.float32)
    short = crop_window(eeg, np.zeros((3, 224, 224), np.float32), 10)[0]
    assert np.array_equal(narrow(short, 1, 12) == 0, short == 0) and narrow(short, 1, 12).dtype == np.float32
    power = np.abs(np.fft.rfft(narrow(eeg, 2, 10))) ** 2 / np.abs(np.fft.rfft(eeg)) ** 2
    at = lambda hz: float(np.median(power[:, round(hz * 50) - 20:round(hz * 50) + 20]))
    assert at(4.5) > 0.8 and 0.15 < at(10) < 0.35 and at(18) < 1e-2


def test_a_short_window_may_keep_its_context():
    image = rng_for(0, "image").random((3, 224, 224), dtype=np.float32)
    alone, around = (crop_window(np.ones((19, 10000), np.float32), image, 10, context)[1] for context in (None, 600))
    assert (alone[0] >= 0).mean() < 0.05 and np.array_equal(around[0], image[0])
    assert np.array_equal(alone[1:], around[1:])


def test_holes_in_the_image():
    image = rng_for(0, "image").random((3, 224, 224), dtype=np.float32)
    before, shares = image.copy(), []
    for seed in range(40):
        holes = mask_image(image, rng_for(seed), 1.0) < 0
        regions = holes.reshape(3, 4, 56, 224)
        assert (regions == regions[:, :1]).all()  # the same for all four regions, so sides stay comparable
        assert (mask_image(image, rng_for(seed), 1.0)[~holes] == image[~holes]).all()
        assert holes[0, :, 0].all() and holes[0, :, -1].all()
        shares.append(holes.mean((1, 2)))
    assert (np.max(shares, 0)[1:] < 0.4).all() and 0.5 < np.mean(shares, 0)[0] < 0.95
    assert np.array_equal(mask_image(image, rng_for(0), 0.0), image) and np.array_equal(image, before)
    assert 0.15 < np.mean([(mask_image(image, rng_for(s), 0.25)[1] < 0).any() for s in range(200)]) < 0.3


def test_mirroring_the_image_swaps_the_regions():
    image = np.repeat(np.arange(4), 56)[None, :, None] * np.ones((3, 1, 224))
    swapped = mirror_window(np.zeros((19, 4)), image)[1]
    assert [int(swapped[0, r * 56, 0]) for r in range(4)] == [1, 0, 3, 2]  # LL RL LP RP
    assert not shift_window(np.ones((19, 10)), 10).any() and not shift_window(np.ones((19, 10)), -12).any()


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"precision": "fp8"}])
def test_recipes_are_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_other_runs_are_not_trainings(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "ok"}))
    with pytest.raises(InputError, match="not the run of a training"):
        Run.load(tmp_path)
    with pytest.raises(InputError, match=r"run\.json"):
        Run.load(tmp_path / "nowhere")
