"""Nothing of a held-out patient may reach what is fitted on the others."""
import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hms_brain.catalog import label_runs, patient_folds, read_train, soft_votes
from hms_brain.core import VOTE_COLUMNS, InputError, rng_for
from hms_brain.dataset import WindowCache
from test_catalog import make_table
from hms_brain.preprocess import Preprocess
from test_dataset import Quick, make, make_data


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.sampled_from([1, 3, 14])), min_size=4, max_size=60), st.integers(2, 5), st.integers(0, 9))
def test_folds_are_disjoint(segments, n_folds, seed):
    runs = label_runs(make_table([(1000 * p + i, p, 0, np.eye(6, dtype=int)[c] * n) for i, (p, c, n) in enumerate(segments)]))
    try:
        folds = patient_folds(runs, n_folds, seed)
    except InputError as e:
        assert "patients" in str(e)
        return
    assert (runs.groupby("patient_id")["patient_id"].size().index == sorted(runs["patient_id"].unique())).all()
    assert (folds.groupby(runs["patient_id"]).nunique() == 1).all() and sorted(folds.unique()) == list(range(n_folds))


def test_real_folds_share_no_patient_eeg_or_spectrogram(real):
    runs = label_runs(read_train(real / "hms"))
    for seed in (0, 1):
        folds = patient_folds(runs, 5, seed)
        for key in ("patient_id", "eeg_id", "spectrogram_id"):
            assert (folds.groupby(runs[key]).nunique() == 1).all()


def fingerprint(cache: WindowCache) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in cache.batch(range(len(cache))))).hexdigest()


@pytest.mark.parametrize("poison", ["signal", "spectrogram", "votes"])
def test_poisoned_patient_leaves_the_others_unchanged(tmp_path, poison):
    clean, dirty = make_data(tmp_path / "clean"), make_data(tmp_path / "dirty")
    patient = 2
    for eeg in (104, 105):
        if poison == "signal":
            x = pd.read_parquet(dirty / f"train_eegs/{eeg}.parquet")
            (x * 0 + rng_for(9, "poison").normal(0, 5000, x.shape)).astype("float32").to_parquet(dirty / f"train_eegs/{eeg}.parquet")
        if poison == "spectrogram":
            x = pd.read_parquet(dirty / f"train_spectrograms/{eeg + 100}.parquet")
            x.loc[:, x.columns[1:]] = np.float32(1e6)
            x.to_parquet(dirty / f"train_spectrograms/{eeg + 100}.parquet")
    if poison == "votes":
        t = pd.read_csv(dirty / "train.csv")
        mine = t["patient_id"] == patient
        t.loc[mine, list(VOTE_COLUMNS)] = np.roll(t.loc[mine, list(VOTE_COLUMNS)], 2, axis=1)
        t.loc[mine, "expert_consensus"] = np.array(["Seizure", "LPD", "GPD", "LRDA", "GRDA", "Other"])[t.loc[mine, list(VOTE_COLUMNS)].to_numpy().argmax(1)]
        t.to_csv(dirty / "train.csv", index=False)
    preprocess = Preprocess() if poison == "signal" else Quick()
    caches = [make(folder, tmp_path / f"cache-{folder.name}", preprocess=preprocess) for folder in (clean, dirty)]
    train = [c.subset(c.index["patient_id"] != patient) for c in caches]
    held = [c.subset(c.index["patient_id"] == patient) for c in caches]
    assert fingerprint(train[0]) == fingerprint(train[1])
    assert fingerprint(held[0]) != fingerprint(held[1])  # the poison was really there
    np.testing.assert_array_equal(soft_votes(train[0].index), soft_votes(train[1].index))
