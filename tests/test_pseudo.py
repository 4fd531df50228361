"Pseudo-labels come from models that saw neither the patient nor anybody by whom the pupil is judged."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hms_brain.batches import PSEUDO, SineCache, Windows
from hms_brain.catalog import soft_votes
from hms_brain.core import VOTE_COLUMNS, InputError, read_json
from hms_brain.crossval import crossval
from hms_brain.pseudo import Labels, pseudo_labels, without_folds
from hms_brain.recipe import Recipe
from hms_brain.train import Run

SMALL = {"stem": 4, "width": 16, "hidden": 8}
RECIPE = Recipe(epochs=1, batch_size=12, patience=0, pseudo=0.9)


def teach(folder, cache):
    return pseudo_labels(cache, RECIPE, folder=folder, model_settings=SMALL, threads=1, say=None)


def pupil(folder, cache, labels, fold):
    from hms_brain.train import train
    return train(labels.cache(cache, fold), replace(RECIPE, fold=fold), folder=folder, model_settings=SMALL, threads=1, say=None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "The labels, and by trace whose windows each teacher's training fetched."
    folder, trace, fetch = tmp_path_factory.mktemp("pseudo") / "teachers", [], Windows.__getitems__
    def watched(self, items):
        trace.append(set(self.cache.index.patient_id.to_numpy()[self.shown[self.order[items]]]))
        return fetch(self, items)
    Windows.__getitems__ = watched
    try: labels = teach(folder, SineCache())
    finally: Windows.__getitems__ = fetch
    return folder, labels, trace


def test_whom_each_teacher_saw(taught):
    "By trace: not what the table says, but whose windows were fetched in the training."
    folder, labels, trace = taught
    steps = len(trace) // 6
    fetched = {name: set.union(*trace[k * steps:(k + 1) * steps]) for k, name in enumerate(labels.saw)}
    assert {name: sorted(who) for name, who in fetched.items()} == labels.saw == read_json(folder / "saw.json")
    patients = SineCache().index.groupby("fold").patient_id.agg(set)
    for row in labels.table.itertuples():
        assert row.patient_id not in fetched[row.teacher] and not fetched[row.teacher] & patients[row.for_fold] and row.fold != row.for_fold
    assert len(labels.table) == 48 * 3 and labels.table.groupby(["for_fold", "row"]).size().eq(1).all()
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "pseudo.parquet"), labels.table)


def test_labels_are_the_teachers_answers(taught):
    folder, labels, _ = taught
    part = labels.table.query("for_fold == 2 and fold == 0")
    run = Run.load(folder / "without-0-2")
    np.testing.assert_array_equal(part[PSEUDO], run.validation[run.validation.eeg_id.isin(part.row)][[c.replace("pseudo", "p") for c in PSEUDO]])
    assert run.recipe.keep == "last" and run.recipe.pseudo == 0 and run.metrics["best_epoch"] == run.metrics["epochs"]


def test_targets_are_the_mixture(taught):
    _, labels, _ = taught
    cache = labels.cache(SineCache(), 1)
    recipe = replace(RECIPE, fold=1)
    windows = recipe.windows(cache, recipe.split(cache), 0)
    rows = windows.order[:5]
    wanted = 0.1 * soft_votes(SineCache().index.loc[rows, list(VOTE_COLUMNS)]) + 0.9 * labels.table.query("for_fold == 1").set_index("row").loc[rows, PSEUDO].to_numpy()
    np.testing.assert_allclose(windows.__getitems__([0, 1, 2, 3, 4])["target"], wanted, atol=1e-6)
    with pytest.raises(InputError, match="no pseudo-labels"):
        recipe.windows(SineCache(), recipe.split(SineCache()), 0)


class Poisoned(SineCache):
    "One fold's signals and votes are rubbish."
    def __init__(self, fold):
        super().__init__()
        self.bad = (self.index.fold == fold).to_numpy()
        self.index.loc[self.bad, list(VOTE_COLUMNS)] = [0, 0, 0, 0, 0, 7]

    def batch(self, rows):
        eeg, image, _ = super().batch(rows)
        eeg[self.bad[np.asarray(rows)]] *= -100
        return eeg, image, self.index[list(VOTE_COLUMNS)].to_numpy(np.float32)[np.asarray(rows)]


def test_poison_does_not_travel(taught, tmp_path):
    "Rubbish in fold 3 leaves every label of its pupil, and the pupil's weights, as they were; the labels of other pupils change."
    _, clean, _ = taught
    dirty = teach(tmp_path / "teachers", Poisoned(3))
    of = lambda labels, fold: labels.table.query("for_fold == @fold")[PSEUDO].to_numpy()
    np.testing.assert_array_equal(of(clean, 3), of(dirty, 3))
    assert not np.array_equal(of(clean, 0), of(dirty, 0))
    a, b = pupil(tmp_path / "a", SineCache(), clean, 3), pupil(tmp_path / "b", Poisoned(3), dirty, 3)
    assert a.metrics["weights_sha256"] == b.metrics["weights_sha256"] and a.metrics["val_kl"] != b.metrics["val_kl"]


def test_the_usual_out_of_fold_labels_would_leak(taught, tmp_path):
    "The control: labels from the models of a plain cross-validation are refused."
    _, labels, _ = taught
    cache = SineCache()
    plain = {f"fold-{f}": sorted(set(range(4)) - {f}) for f in range(4)}
    naive = Labels(labels.table.assign(teacher=[f"fold-{f}" for f in labels.table.fold]), plain)
    with pytest.raises(InputError, match="must not speak"):
        naive.check(cache)
    labels.check(cache)


def test_a_changed_data_set_is_refused(taught, tmp_path):
    import shutil
    folder, _, _ = taught
    shutil.copytree(folder, tmp_path / "teachers")
    cache = SineCache()
    cache.index.loc[cache.index.fold == 2, list(VOTE_COLUMNS)] = [0, 0, 0, 0, 0, 7]
    with pytest.raises(InputError, match="rows_sha256 differs"):
        teach(tmp_path / "teachers", cache)


def test_cross_validated_pupils(taught, tmp_path):
    _, labels, _ = taught
    cache = SineCache()
    oof = crossval(cache, RECIPE, folder=tmp_path / "cv", model_settings=SMALL, threads=1, say=None, view=lambda fold: labels.cache(cache, fold))
    assert len(oof) == 48 and not set(PSEUDO) & set(oof) and read_json(tmp_path / "cv/audit.json")["passed"]
    two = SineCache(12)
    with pytest.raises(InputError, match="three folds"):
        teach(tmp_path / "few", two)
    assert set(without_folds(cache, (1, 3)).index.query("fold == 0").patient_id) == {1, 3}


def test_an_answer_for_a_period_holds_for_its_rows(tmp_path):
    from test_recipe import Periods
    cache, recipe = Periods(), replace(RECIPE, per_period=True)
    labels = pseudo_labels(cache, recipe, folder=tmp_path / "teachers", model_settings=SMALL, threads=1, say=None)
    table = labels.table.assign(period=cache.index.run_id.to_numpy()[labels.table.row])
    assert len(table) == 3 * len(cache) and table.groupby(["for_fold", "period"])[PSEUDO].nunique().eq(1).all(axis=None)
    view = replace(recipe, fold=2)
    windows = view.windows(labels.cache(cache, 2), view.split(cache), 0)
    assert windows.__getitems__([0, 1])["target"].isfinite().all()
