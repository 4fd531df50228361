"""The main job on real EEG. Nothing here is trained on, tuned to or chosen by these files."""
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from conftest import REAL
from hms_brain.core import CLASSES, InputError
from hms_brain.predict import Predictor, predict_file
from hms_brain.records import read_context, read_recording
from test_cli import hms, one_line

pytestmark = pytest.mark.real
NOT_EEG = ("spectrogram", "votes", "test.csv", "submission", "attributes", "README", "train.csv")
EEGS = [p for p in sorted(REAL.rglob("*")) if p.is_file() and p.suffix in (".parquet", ".mat", ".edf") and "_bad" not in str(p) and not any(w in str(p) for w in NOT_EEG)]
BAD = sorted(p for folder in ("edf_bad", "parquet_bad") for p in (REAL / folder).glob("*"))
TABLES = [p for p in sorted(REAL.rglob("*")) if p.is_file() and (p.suffix in (".csv", ".zip", ".json", ".md") or "spectrogram" in str(p) or "expert_votes" in p.name) and "_bad" not in str(p)]
UNUSABLE = {"edfio_short_psg": "Fp1|electrode", "mne_test_uneven_samp": "Fp1|electrode", "PN00-5_sample": "at least 10 s", "chb01_01_sample": "at least 10 s"}


@pytest.fixture(scope="module")
def predictor():
    return Predictor(threads=1)


def check(answer):
    p = np.array(list(answer["probabilities"].values()))
    assert list(answer["probabilities"]) == list(CLASSES) and np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1) < 1e-9
    assert set(answer) >= {"predicted", "quality", "abstained", "bundle", "warnings"}
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize("path", EEGS, ids=lambda p: p.stem)
def test_every_eeg_is_answered(path, predictor, real):
    if path.stem in UNUSABLE:
        with pytest.raises(InputError, match=UNUSABLE[path.stem]) as caught: predict_file(path, predictor)
        assert path.name in str(caught.value)
        return
    prediction, recording = predict_file(path, predictor)
    check(prediction.to_dict())
    assert recording.eeg.shape[0] == 19 and recording.fs == 200


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.name)
def test_bad_files_are_refused_or_repaired(path, predictor, real):
    try: prediction, recording = predict_file(path, predictor)
    except InputError as e: assert "\n" not in str(e) and path.name in str(e)
    else:
        check(prediction.to_dict())
        assert recording.issues


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_tables_are_named(path, real):
    with pytest.raises(InputError) as caught: read_recording(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_command_line(real, tmp_path):
    path = real / "iiic/segments/LPD_sample1.mat"
    check(json.loads(hms("predict", path, "--json").stdout))
    assert "spectrogram" in one_line(hms("predict", real / "hms/train_spectrograms/353733.parquet", "--json"))
    for bad in BAD:
        result = hms("predict", bad, "--json")
        if result.returncode: one_line(result)
        else: check(json.loads(result.stdout))


def test_context_of_the_test_pair(real, predictor):
    eeg, spectrogram = real / "hms/test_eegs/3911565283.parquet", real / "hms/test_spectrograms/853520.parquet"
    alone, _ = predict_file(eeg, predictor)
    both, _ = predict_file(eeg, predictor, context=spectrogram)
    check(both.to_dict())
    kinds = [f["kind"] for f in alone.quality]
    assert "no_context" in kinds and "no_context" not in [f["kind"] for f in both.quality]


def test_a_file_that_holds_its_context_is_read_with_it(real, predictor):
    path = real / "iiic/rated/K_Sample11.mat"
    alone, given = predict_file(path, predictor)[0], predict_file(path, predictor, context=path)[0]
    assert alone.probabilities == given.probabilities
    assert "no_context" not in {f["kind"] for f in alone.quality} and "short" in {f["kind"] for f in alone.quality}


def test_spectrogram_command(real, tmp_path):
    "Kaggle's own file from Kaggle's own EEG, through the command line."
    out = tmp_path / "s.parquet"
    assert hms("spectrogram", real / "hms/train_eegs/1628180742.parquet", "--start", 1, "-o", out).returncode == 0
    ours, theirs = pd.read_parquet(out), pd.read_parquet(real / "hms/train_spectrograms/353733.parquet")
    assert list(ours.columns) == list(theirs.columns)
    theirs = theirs.set_index("time").loc[ours.time + 276].reset_index(drop=True)
    second = ours.time + 1
    for region in ("LL", "RL", "LP", "RP"):
        names = [c for c in ours if c.startswith(region)]
        delta = np.abs(np.log(ours[names].to_numpy()) - np.log(theirs[names].to_numpy())).mean(1)
        assert delta[(second >= 2) & (second <= 88)].mean() <= 0.01
        assert delta[(second >= 22) & (second <= 68)].mean() <= 0.006


def test_the_table_is_read_from_its_zip(real):
    from hms_brain.catalog import label_runs, patient_folds, read_train

    runs = label_runs(read_train(real / "hms/train.csv.zip"))
    folds = patient_folds(runs, 5, seed=0)
    assert len(runs) == 21490 and pd.concat([runs.patient_id, folds], axis=1).drop_duplicates().patient_id.is_unique
    assert zipfile.is_zipfile(real / "hms/train.csv.zip")


def test_context_is_four_regions(real):
    times, power = read_context(real / "hms/train_spectrograms/1000086677.parquet")
    assert power.shape == (4, 100, len(times)) and np.isnan(power).any()


def test_the_packaged_model_carries_to_recorded_windows(real, predictor):
    "Far better than chance and than a constant, and no class is never given. The figures are in nbs/tutorials."
    from hms_brain.catalog import soft_votes
    from hms_brain.core import VOTE_COLUMNS
    from hms_brain.metrics import kl_divergence

    windows = pd.concat([pd.read_csv(f).assign(folder=f.parent) for f in sorted((real / "iiic").glob("*/votes.csv"))])
    p = np.array([list(predict_file(w.folder / f"{w.segment}.mat", predictor)[0].probabilities.values()) for w in windows.itertuples()])
    votes = windows[list(VOTE_COLUMNS)].to_numpy(float)
    y, leader = soft_votes(votes), votes.argmax(axis=1)
    assert kl_divergence(y, p) <= 0.70 and (p.argmax(axis=1) == leader).sum() >= 16
    assert set(p.argmax(axis=1)) == set(range(6))
    assert kl_divergence(y, p) < kl_divergence(y, np.full_like(p, 1 / 6)) - 0.5
    agreed = y.max(axis=1) == 1
    for k in range(6): assert p[agreed & (leader == k), k].mean() > 0.3, CLASSES[k]
