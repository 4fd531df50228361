"What a recipe can switch on: mixing, two stages, a random row of each period; and that nothing changes where it is off."
import numpy as np
import pandas as pd
import pytest

from hms_brain.augment import mix_windows
from hms_brain.batches import SineCache, Windows, central_rows, shown_rows, split_rows
from hms_brain.catalog import OFFSETS, label_runs, read_train, spread_runs
from hms_brain.core import VOTE_COLUMNS, InputError, rng_for
from hms_brain.dataset import plan_rows
from hms_brain.recipe import AUGMENTATIONS, Recipe
from hms_brain.steps import vote_loss
from hms_brain.train import tired
from test_dataset import make_data
from test_train import Stop, fit, stop_after, weights

import torch


class Uneven(SineCache):
    "Every second window has twelve votes."
    def __init__(self, n=48):
        super().__init__(n)
        self.index.loc[::2, list(VOTE_COLUMNS)] *= 4


class Periods(SineCache):
    "Four overlapping rows in each period of equal votes."
    def __init__(self, n=96):
        super().__init__(n)
        period = np.arange(n) // 4
        self.label = period % 6
        votes = 3 * np.eye(6, dtype=int)[self.label]
        self.index = self.index.assign(run_id=period, patient_id=period // 6 % 4, fold=period // 6 % 4, **{OFFSETS[0]: 2.0 * (np.arange(n) % 4)}, **dict(zip(VOTE_COLUMNS, votes.T)))


def test_mixed_windows_are_sums():
    rng = rng_for(0, "mix")
    a, b = ((rng.normal(size=(3, 19, 50)).astype(np.float32), rng.random((3, 3, 8, 8), dtype=np.float32)) for _ in range(2))
    a[1][0, 0], b[1][1, 1] = -1, -1
    eeg, image = mix_windows(a, b, np.array([1, 0.25, 0.5]))
    np.testing.assert_allclose(eeg, np.stack([a[0][0], 0.25 * a[0][1] + 0.75 * b[0][1], 0.5 * (a[0][2] + b[0][2])]), rtol=1e-5)
    assert eeg.dtype == image.dtype == np.float32
    assert np.array_equal(image[0, 0], b[1][0, 0]) and np.array_equal(image[1, 1], a[1][1, 1]) and image.min() >= 0


def test_the_mixed_loss_is_the_loss_of_both_in_their_shares():
    cache = Uneven()
    split = split_rows(cache, balance=0.5)
    plain, mixed = Windows(cache, split), Windows(cache, split, mixup=0.4)
    items = list(range(len(plain)))
    logits = torch.tensor(rng_for(1, "logits").normal(size=(len(items), 6)))
    batch, shares = mixed.__getitems__(items), mixed.share
    def gradient(target, weight):
        z = logits.clone().requires_grad_()
        vote_loss(z, torch.as_tensor(target), torch.as_tensor(weight)).backward()
        return z.grad.numpy()
    own, other = (gradient(plain.target[rows], plain.weight[rows] * s) for rows, s in ((mixed.order, shares), (mixed.partner, 1 - shares)))
    np.testing.assert_allclose(gradient(batch["target"].double(), batch["weight"].double()), own + other, rtol=1e-4, atol=1e-8)
    assert (0.5 <= shares).all() and sorted(mixed.partner) == sorted(mixed.order) and np.array_equal(plain.order, mixed.order)


def test_partners_are_a_function_of_seed_and_epoch():
    cache = SineCache()
    split = split_rows(cache)
    mixes = [Windows(cache, split, seed, epoch, mixup=0.4) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len({tuple(m.partner) for m in mixes}) == 3 and np.array_equal(mixes[0].share, mixes[3].share)
    one = [mixes[0].__getitems__([5]), mixes[3].__getitems__([2, 5, 9])]
    assert torch.equal(one[0]["eeg"][0], one[1]["eeg"][1]) and torch.equal(one[0]["target"][0], one[1]["target"][1])


def test_one_row_of_each_period(tmp_path):
    cache, recipe = Periods(), Recipe(per_period=True, **dict.fromkeys(AUGMENTATIONS, 0))
    split = recipe.split(cache)
    assert len(split.train) == 18 and len(split.valid) == 6 and (np.bincount(cache.index.run_id[split.train]) <= 1).all()
    seen = []
    for epoch in range(40):
        windows = recipe.windows(cache, split, epoch)
        shown = windows.shown[windows.order]
        assert np.array_equal(cache.index.run_id[shown], cache.index.run_id[windows.order])
        assert np.array_equal(shown, recipe.windows(cache, split, epoch).shown[windows.order])
        seen.append(np.sort(shown))
    assert len({tuple(s) for s in seen}) > 35 and set(np.concatenate(seen)) == set(np.flatnonzero(cache.index.fold != 0))
    batch = windows.__getitems__([0])
    np.testing.assert_array_equal(batch["eeg"][0], cache.batch([shown[0]])[0][0])
    with pytest.raises(InputError, match="no periods"):
        recipe.split(SineCache())
    whole = fit(tmp_path / "whole", cache, epochs=2, per_period=True)
    assert whole.info["data"]["train_windows"] == 18


def test_abstained_rows_are_never_shown():
    cache = Periods()
    cache.index.loc[cache.index.index % 4 < 3, "abstain"] = True
    split = split_rows(cache, per_period=True)
    assert all((shown_rows(split, 0, epoch)[split.train] % 4 == 3).all() for epoch in range(5))
    assert set(split.valid % 4) == {1}  # the middle, the earlier of two, whether or not it abstained


def test_a_cache_of_more_rows_has_the_same_folds_and_representatives(tmp_path):
    data = make_data(tmp_path / "data")
    runs, more, every = (plan_rows(data, rows, folds=3) for rows in ("runs", 3, "all"))
    assert len(runs) < len(more) <= len(every) and more.groupby("run_id").size().max() <= 3
    for table in (more, every):
        assert table.groupby("patient_id").fold.first().equals(runs.groupby("patient_id").fold.first())
        rows = central_rows(table, np.arange(len(table)))
        assert table.label_id[rows].tolist() == runs.label_id.tolist()
    with pytest.raises(InputError, match="3 or more"):
        spread_runs(read_train(data), 2)


@pytest.mark.parametrize("n", [3, 4, 5, 9])
def test_spread_rows(n):
    rows = pd.DataFrame({"eeg_id": 1, "label_id": range(37), OFFSETS[0]: 2.0 * np.arange(37), "patient_id": 1} | dict.fromkeys(VOTE_COLUMNS, 1))
    few = spread_runs(rows, n)
    assert len(few) <= n and {0, 36} <= set(few.label_id) and set(label_runs(rows).label_id) <= set(few.label_id)
    assert np.diff(few[OFFSETS[0]]).max() <= 2 * 74 / (n - 1)


def test_two_stages(tmp_path):
    run = fit(tmp_path / "r", Uneven(), epochs=2, stage2_epochs=3, stage2_rate=1e-4, patience=0)
    assert list(run.history.stage) == [1, 1, 2, 2, 2] and run.history.learning_rate[2:].max() <= 1e-4 < run.history.learning_rate[:2].max()
    assert len(set(run.history.prior_kl)) == 1  # one yardstick
    assert run.metrics["val_kl"] == pytest.approx(run.history.val_kl.min()) and run.metrics["windows"] == 12
    one = fit(tmp_path / "one", Uneven(), epochs=2)
    pd.testing.assert_frame_equal(run.history.iloc[:2].drop(columns="seconds"), one.history.drop(columns="seconds"))
    with pytest.raises(InputError, match="lower stage2_votes"):
        fit(tmp_path / "none", Uneven(), stage2_epochs=1, stage2_votes=13)


def test_a_second_stage_sees_only_windows_with_many_votes(tmp_path, monkeypatch):
    seen, plain = [], Windows.__getitems__
    monkeypatch.setattr(Windows, "__getitems__", lambda self, items: seen.append((self.epoch, self.order[items])) or plain(self, items))
    cache = Uneven()
    fit(tmp_path / "r", cache, epochs=1, stage2_epochs=1, stage2_votes=10)
    votes = cache.index[list(VOTE_COLUMNS)].sum(axis=1)
    many = [set(votes[np.concatenate([rows for e, rows in seen if e == epoch])]) for epoch in (0, 1)]
    assert many == [{3, 12}, {12}]


def test_a_second_stage_that_helps_nothing_leaves_the_first(tmp_path):
    how = dict(epochs=2, clip_norm=1e9, ema=0.0)
    two, one = fit(tmp_path / "two", Uneven(), stage2_epochs=1, stage2_rate=10.0, **how), fit(tmp_path / "one", Uneven(), **how)
    assert two.history.val_kl[2] > two.history.val_kl[:2].min() and two.metrics["best_epoch"] <= 2 and weights(two) == weights(one)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_resumed_across_the_border(tmp_path, cut):
    how = dict(epochs=2, stage2_epochs=2, mixup=0.3, ema=0.9)
    whole = fit(tmp_path / "whole", Uneven(), **how)
    with pytest.raises(Stop):
        fit(tmp_path / "cut", Uneven(), say=stop_after(cut), **how)
    resumed = fit(tmp_path / "cut", Uneven(), resume=True, **how)
    assert weights(resumed) == weights(whole) and resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))


def test_patience_is_of_each_stage(tmp_path):
    still = dict(learning_rate=1e-9, stage2_rate=1e-9, ema=0.0) | dict.fromkeys(AUGMENTATIONS, 0)
    run = fit(tmp_path / "r", Uneven(), epochs=6, stage2_epochs=6, patience=2, **still)
    assert 2 < (run.history.stage == 1).sum() < 6 and 2 < (run.history.stage == 2).sum() < 6
    rows = [{"val_kl": v} for v in (3, 1, 2, 2)]
    assert tired(rows, 2) and not tired(rows[:3], 2) and not tired(rows, 0) and not tired([], 1)


def test_the_last_weights_ask_nobody(tmp_path):
    run = fit(tmp_path / "r", epochs=3, keep="last", patience=0)
    assert run.metrics["best_epoch"] == 3 and run.metrics["val_kl"] == pytest.approx(run.history.val_kl.iloc[-1])


@pytest.mark.parametrize("wrong", [{"mixup": -1}, {"pseudo": 1.5}, {"keep": "first"}, {"stage2_rate": 0.0}, {"stage2_epochs": -1}, {"keep": "last"},
                                   {"limit": -5}, {"patience": -1}, {"epochs": "3"}, {"epochs": 1.5}, {"batch_size": None}, {"per_period": 1}, {"mixup": float("nan")}, {"mirror": "x"}])
def test_wrong_fields(wrong):
    with pytest.raises(InputError):
        Recipe(**wrong)


def test_numbers_of_any_kind():
    assert Recipe(epochs=np.int64(3), learning_rate=1, mixup=np.float32(0.5)).epochs == 3


def test_fp16_needs_a_gpu(tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="needs a GPU"):
        fit(tmp_path / "r", precision="fp16")


def test_two_precisions_in_one_process(tmp_path):
    assert weights(fit(tmp_path / "a", epochs=1, precision="bf16")) != weights(fit(tmp_path / "b", epochs=1))
