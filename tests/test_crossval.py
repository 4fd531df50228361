"Out-of-fold answers are out of fold; the audit fails where it must; blends are fitted on other folds."
import numpy as np
import pandas as pd
import pytest

from hms_brain import batches, crossval as module
from hms_brain.batches import SineCache, split_rows
from hms_brain.core import CLASSES, VOTE_COLUMNS, InputError, read_json, rng_for
from hms_brain.crossval import PROBABILITIES, audit, blend, crossval, crossval_table, fit_blend, out_of_fold, same_training, shuffled
from hms_brain.metrics import kl_divergence
from hms_brain.recipe import Recipe
from hms_brain.train import Run, train

SMALL = {"stem": 4, "width": 16, "hidden": 8}
RECIPE = Recipe(epochs=1, batch_size=12, patience=0)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crossval") / "cv"
    return folder, crossval(SineCache(), RECIPE, folder=folder, model_settings=SMALL, threads=1, say=None)


def test_every_window_once_and_by_the_model_of_its_fold(done):
    folder, oof = done
    assert sorted(oof.eeg_id) == list(range(48)) and np.allclose(oof[PROBABILITIES].sum(axis=1), 1)
    for fold, part in oof.groupby("fold"):
        run = Run.load(folder / f"fold-{fold}")
        assert run.recipe.fold == fold and run.info["data"]["train_windows"] == 36
        np.testing.assert_array_equal(part[PROBABILITIES], run.validation[PROBABILITIES])
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "oof.parquet"), oof)
    assert read_json(folder / "audit.json")["passed"] and read_json(folder / "run.json")["status"] == "ok"


def test_table_by_hand(done):
    _, oof = done
    table = crossval_table(oof, n_boot=20).set_index(["by", "value"])
    assert table.loc[("all", ""), "kl"] == pytest.approx(oof.kl.mean()) and table.loc[("fold", 2), "windows"] == 12
    seizures = oof[oof[VOTE_COLUMNS[0]] == 3]
    assert table.loc[("class", CLASSES[0]), "kl"] == pytest.approx(seizures.kl.mean())
    assert set(table.index.get_level_values("by")) == {"all", "fold", "stratum", "class"} and np.isfinite(table.kl).all()


def test_finished_folds_are_kept(done, monkeypatch):
    folder, oof = done
    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(crossval(SineCache(), RECIPE, folder=folder, model_settings=SMALL, check=False), oof)
    with pytest.raises(BaseException, match="trained again"): crossval(SineCache(), RECIPE, folder=folder, model_settings=SMALL | {"width": 8}, check=False)
    other = SineCache()
    other.index.loc[other.index.fold == 3, VOTE_COLUMNS[0]] = 9
    with pytest.raises(BaseException, match="trained again"): crossval(other, RECIPE, folder=folder, model_settings=SMALL, check=False)  # another data set
    with pytest.raises(InputError, match="same fold"): out_of_fold([Run.load(folder / "fold-0")] * 2)


def test_the_audit_finds_leaks(tmp_path, monkeypatch):
    cache = SineCache()
    assert same_training(cache, RECIPE)
    everything = lambda cache, *a: (lambda s: batches.Split(s.train, s.valid, s.abstain, batches.soft_votes(batches.votes_of(cache, np.arange(len(cache)))).mean(0), s.weight))(split_rows(cache, *a))
    monkeypatch.setattr("hms_brain.recipe.split_rows", everything)  # the prior of all patients
    assert not same_training(cache, RECIPE)
    monkeypatch.setattr("hms_brain.recipe.split_rows", lambda cache, *a: (lambda s: batches.Split(np.arange(len(cache)), s.valid, s.abstain, s.prior, s.weight))(split_rows(cache, *a)))
    assert not same_training(cache, RECIPE)  # held-out windows among those trained on
    found = audit(cache, RECIPE, tmp_path / "control", SMALL)
    assert not found["passed"] and found["shared_patients"] == 1


def test_shuffled_votes_keep_their_numbers():
    cache = SineCache()
    split = split_rows(cache, 1)
    mixed = shuffled(cache, split)
    votes, other = (c.index[list(VOTE_COLUMNS)].to_numpy() for c in (cache, mixed))
    assert np.array_equal(votes[split.valid], other[split.valid]) and np.array_equal(votes[split.train].sum(0), other[split.train].sum(0))
    assert (votes[split.train] != other[split.train]).any(1).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_votes_teach_nothing(tmp_path, seed):
    "The same training that learns the true votes does not beat the constant prior with shuffled ones; the held-out patients choose no epoch."
    cache, recipe = SineCache(), Recipe(epochs=10, batch_size=6, learning_rate=1e-2, ema=0.8, patience=0, keep="last", seed=seed)
    true, mixed = (train(c, recipe, folder=tmp_path / name, model_settings=SMALL, threads=1, say=None).metrics for name, c in (("true", cache), ("mixed", shuffled(cache, recipe.split(cache), seed))))
    assert true["val_kl"] < true["prior_kl"] - 0.2 and mixed["val_kl"] > mixed["prior_kl"] - 0.01


def test_a_blend_finds_weights_and_bias():
    rng = rng_for(1, "blend")
    parts = rng.dirichlet(np.ones(6), (2, 800))
    bias = np.array([0.6, 0, 0, -0.4, 0, -0.2])
    mixed = (0.7 * parts[0] + 0.3 * parts[1]) * np.exp(bias)
    found = fit_blend(parts, mixed / mixed.sum(1, keepdims=True))
    np.testing.assert_allclose(found.weights, [0.7, 0.3], atol=0.01)
    np.testing.assert_allclose(found.bias, bias - bias.mean(), atol=0.02)


def test_a_blend_does_not_see_its_fold():
    rng = rng_for(2, "blend")
    p, y, fold = rng.dirichlet(np.ones(6), (2, 300)), rng.dirichlet(np.ones(6), 300), np.arange(300) % 3
    before = blend(p, y, fold)[0]
    y[fold == 1] = np.eye(6)[0]
    after, blends = blend(p, y, fold)
    np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
    assert not np.allclose(before[fold == 0], after[fold == 0]) and set(blends) == {0, 1, 2}
    assert kl_divergence(y, after) > 0
