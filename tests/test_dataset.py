"""The cache of model inputs: what goes in comes out, whole or not at all, and damage is found."""
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hms_brain import dataset
from hms_brain.catalog import label_runs, read_train
from hms_brain.core import CHANNELS, EKG, VOTE_COLUMNS, InputError, rng_for, sha256_file
from hms_brain.dataset import IMAGE_VALUES, WindowCache, encode_image, plan_rows, prepare, read_window
from hms_brain.preprocess import ModelInput, Preprocess
from hms_brain.records import read_context, read_recording
from hms_brain.spectrogram import spectrogram_columns

LABELS = ["Seizure", "LPD", "GPD", "LRDA", "GRDA", "Other"]


def make_data(folder: Path, n_eegs: int = 6, seed: int = 0) -> Path:
    "A folder in the HMS layout: noise and a sine, two EEGs per patient, two labelled periods per EEG."
    rng, rows = rng_for(seed, "data"), []
    for sub in ("train_eegs", "train_spectrograms"):
        (folder / sub).mkdir(parents=True)
    for i in range(n_eegs):
        x = rng.normal(0, 20, (12000, 20)) + 30 * np.sin(2 * np.pi * (1 + i % 6) * np.arange(12000) / 200)[:, None]
        pd.DataFrame(x.astype("float32"), columns=[*CHANNELS, EKG]).to_parquet(folder / f"train_eegs/{100 + i}.parquet")
        power = rng.lognormal(0, 1, (310, 400)).astype("float32")
        pd.DataFrame({"time": np.arange(1, 621, 2), **dict(zip(spectrogram_columns()[1:], power.T))}).to_parquet(folder / f"train_spectrograms/{200 + i}.parquet")
        for j, offset in enumerate((0.0, 2.0, 8.0)):
            v = np.zeros(6, int)
            v[(i + (j == 2)) % 6] = (2, 5, 14)[i % 3]
            rows.append(dict(eeg_id=100 + i, eeg_sub_id=j, eeg_label_offset_seconds=offset, spectrogram_id=200 + i, spectrogram_sub_id=j, spectrogram_label_offset_seconds=offset,
                             label_id=10 * i + j, patient_id=i // 2, expert_consensus=LABELS[v.argmax()], **dict(zip(VOTE_COLUMNS, v))))
    pd.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    return folder


@dataclass(frozen=True)
class Quick:
    "A stand-in for `Preprocess` that costs nothing: for tests of the cache, not of what is in it."
    gain: float = 1.0

    def to_dict(self):
        return {"version": "quick", "gain": self.gain}

    def __call__(self, recording, at=None, context=None):
        image = np.full((3, 224, 224), -1, np.float32)
        if context is not None:
            image[:, ::2] = np.resize(np.tanh(context[1]), (112, 224))
        return ModelInput(recording.eeg * np.float32(self.gain), image, np.ones(10000, bool), (), False, (), at)


def make(data, out, **kw):
    return prepare(data, out, **dict(preprocess=Quick(), folds=3, fold_seed=0, workers=1, shard_size=4, progress=False) | kw)


def content(folder):
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("hms") / "toy")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    make(data, folder)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    "A copy that a test may damage."
    import shutil
    shutil.copytree(made, tmp_path / "cache", copy_function=shutil.copy2)
    return tmp_path / "cache"


def test_what_goes_in_comes_out(data, tmp_path):
    make(data, tmp_path / "real", preprocess=Preprocess())
    cache = WindowCache(tmp_path / "real")
    runs = label_runs(read_train(data))
    assert len(cache) == len(runs) == 12 and cache.manifest["preprocess"] == Preprocess().to_dict() and cache.manifest["simulated"] is False and cache.manifest["without_context"] == 0
    eeg, image, votes = cache.batch(np.arange(12))
    assert {a.dtype for a in (eeg, image, votes)} == {np.dtype("float32")}
    np.testing.assert_array_equal(votes, runs[list(VOTE_COLUMNS)])
    for i, row in enumerate(runs.to_dict("records")):
        path = data / f"train_eegs/{row['eeg_id']}.parquet"
        rec = read_recording(path, start=row["eeg_label_offset_seconds"], duration=50, sandbox=False)
        times, power = read_context(data / f"train_spectrograms/{row['spectrogram_id']}.parquet", sandbox=False)
        inside = (times >= row["spectrogram_label_offset_seconds"]) & (times < row["spectrogram_label_offset_seconds"] + 600)
        x = Preprocess()(rec, 25.0, (times[inside], power[..., inside], row["spectrogram_label_offset_seconds"] + 275))
        np.testing.assert_allclose(eeg[i], x.eeg, rtol=2**-10, atol=1e-6)
        np.testing.assert_allclose(image[i], x.image, atol=.5 / 254 + 1e-6)
        assert ((image[i] == -1) == (x.image == -1)).all() and (image[i, 0] >= 0).mean() > .9
        assert cache.index["abstain"][i] == x.abstain and cache.index["context"][i] == "file"


def test_index(made):
    index = WindowCache(made).index
    assert set(dataset.INDEX_COLUMNS) < set(index.columns) and not index.isna().any().any()
    assert (index.groupby("patient_id")["fold"].nunique() == 1).all() and index["fold"].nunique() == 3
    assert index["shard"].tolist() == [i // 4 for i in range(12)] and index["row"].tolist() == [i % 4 for i in range(12)]


def test_batches_in_any_order(made):
    cache = WindowCache(made, verify=False)
    everything = cache.batch(np.arange(12))
    eeg, nothing, _ = cache.only(("eeg",)).batch(np.arange(12))
    nothing_either, image, _ = cache.only(("image",)).batch(np.arange(12))
    assert nothing.shape == (12, 3, 224, 0) and nothing_either.shape == (12, 19, 0)
    np.testing.assert_array_equal(eeg, everything[0])
    np.testing.assert_array_equal(image, everything[1])
    order = np.array([11, 0, 5, 5, 3])
    for whole, part in zip(everything, cache.batch(order)):
        np.testing.assert_array_equal(whole[order], part)
    for whole, one in zip(everything, cache[-1]):
        np.testing.assert_array_equal(whole[-1], one)
    with pytest.raises(IndexError):
        cache[12]
    seen = np.concatenate([b[3] for b in cache.batches(5, seed=1, epoch=2)])
    assert sorted(seen) == list(range(12)) and not (seen == np.arange(12)).all()
    assert (seen == np.concatenate([b[3] for b in cache.batches(7, seed=1, epoch=2)])).all()
    assert not (seen == np.concatenate([b[3] for b in cache.batches(5, seed=1, epoch=3)])).all()


def test_subset_and_pickle(made):
    cache = WindowCache(made, verify=False)
    part = cache.subset(cache.index["fold"] == 1)
    rows = np.flatnonzero(cache.index["fold"] == 1)
    np.testing.assert_array_equal(part.batch(range(len(part)))[0], cache.batch(rows)[0])
    np.testing.assert_array_equal(part.votes, cache.votes[rows])
    assert part.subset([0]).index["run_id"].tolist() == [cache.index["run_id"][rows[0]]]
    blob = pickle.dumps(cache)
    assert len(blob) < 50_000  # a worker gets the folder, not the arrays
    np.testing.assert_array_equal(pickle.loads(blob)[3][0], cache[3][0])


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (3, 7), elements=st.one_of(st.just(-1.0), st.floats(0, 1, width=32))))
def test_image_code(image):
    back = IMAGE_VALUES[encode_image(image)]
    assert ((back == -1) == (image == -1)).all() and np.abs(back - image).max() <= .5 / 254 + 1e-6


def test_image_code_refuses():
    for bad in (np.nan, 1.5, -.5, np.inf):
        with pytest.raises(ValueError):
            encode_image(np.array([bad]))


def test_workers_do_not_change_a_byte(data, made, tmp_path):
    make(data, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(made)


def test_second_call_makes_nothing(data, cache, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("shards/*")}
    monkeypatch.setattr(dataset, "read_window", lambda *a: pytest.fail("it was made anew"))
    make(data, cache)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("shards/*")} == before


def test_every_damage_is_found_and_mended(data, made, cache):
    pristine = content(made)
    rng = rng_for(0, "damage")
    for name in pristine:
        path, original = cache / name, (made / name).read_bytes()
        for how in ("flip", "cut", "gone"):
            raw = bytearray(original)
            if how == "flip":
                raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
            path.write_bytes(raw if how != "cut" else raw[:len(raw) // 2])
            if how == "gone":
                path.unlink()
            with pytest.raises(InputError) as e:
                WindowCache(cache)
            assert "\n" not in str(e.value) and (name in str(e.value) or name == "manifest.json"), (name, how, str(e.value))
        make(data, cache)
        assert content(cache) == pristine
    WindowCache(cache)


def test_rejected_and_mended(tmp_path):
    data = make_data(tmp_path / "toy", 4)
    good = (data / "train_eegs/101.parquet").read_bytes()
    (data / "train_eegs/101.parquet").write_bytes(good[:5000])
    (data / "train_eegs/102.parquet").unlink()
    (data / "train_spectrograms/203.parquet").unlink()
    cache = make(data, tmp_path / "c", folds=2)
    rejected = pd.read_csv(tmp_path / "c/rejected.csv")
    assert rejected["eeg_id"].tolist() == [101, 101, 102, 102] and rejected["reason"].str.len().min() > 10
    assert cache.index["eeg_id"].tolist() == [100, 100, 103, 103] and cache.index["context"].str.contains("203")[2]
    assert (cache[2][1] == -1).all() and cache.manifest["without_context"] == 2
    kept = sha256_file(tmp_path / "c/shards/eeg-00001.npy")
    (data / "train_eegs/101.parquet").write_bytes(good)
    cache = make(data, tmp_path / "c", folds=2)
    assert cache.index["eeg_id"].tolist() == [100, 100, 101, 101, 103, 103]
    assert sha256_file(tmp_path / "c/shards/eeg-00001.npy") == kept
    WindowCache(tmp_path / "c")


def test_nothing_usable(tmp_path):
    data = make_data(tmp_path / "toy", 4)
    for p in (data / "train_eegs").iterdir():
        p.write_bytes(b"no")
    with pytest.raises(InputError, match="none of 8 windows") as e:
        make(data, tmp_path / "c", folds=2)
    assert "\n" not in str(e.value) and not (tmp_path / "c/manifest.json").exists() and (tmp_path / "c/rejected.csv").exists()


def test_other_settings_are_refused(data, cache):
    before = content(cache)
    other = Quick(2.0)
    with pytest.raises(InputError, match="other preprocessing"):
        make(data, cache, preprocess=other)
    assert content(cache) == before
    assert make(data, cache, preprocess=other, overwrite=True).manifest["preprocess"]["gain"] == 2
    WindowCache(cache)


def test_plan(data, tmp_path):
    whole = plan_rows(data, folds=3)
    some = plan_rows(data, folds=3, limit=5)
    assert len(some) == 5 and some.merge(whole, how="left", indicator=True)["_merge"].eq("both").all()
    assert len(plan_rows(data, "all", folds=3)) == 18
    own = label_runs(read_train(data)).iloc[2:9]
    assert plan_rows(data, own, folds=2)["run_id"].tolist() == list(range(2, 9))
    for kw, words in ((dict(folds=4), "3 patients cannot fill 4"), (dict(folds=3, limit=-1), "limit"), (dict(rows="some"), "neither")):
        with pytest.raises(InputError, match=words):
            plan_rows(data, **kw)
    with pytest.raises(InputError, match="is not there"):
        make(tmp_path, tmp_path / "c")
    with pytest.raises(InputError, match="no finished cache"):
        WindowCache(tmp_path)


def test_shrunk_cache_leaves_nothing_behind(data, cache):
    make(data, cache, limit=3)
    assert len(WindowCache(cache)) == 3 and sorted(p.name for p in (cache / "shards").iterdir()) == ["eeg-00000.npy", "image-00000.npy", "rows-00000.json"]


def test_full_disk(data, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="GB are needed"):
        make(data, tmp_path / "c")
    assert not (tmp_path / "c").exists()


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[3])
from hms_brain import dataset
from test_dataset import Quick
slow = dataset.save_array
def save(*a): time.sleep(.05); return slow(*a)
dataset.save_array = save
dataset.prepare(sys.argv[1], sys.argv[2], Quick(), folds=3, fold_seed=0, workers=1, shard_size=2, progress=False)
"""


@pytest.mark.fault
def test_killed_prepare_leaves_no_half_shard(data, tmp_path):
    make(data, tmp_path / "whole", shard_size=2)
    for k in (0, 1, 3):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(data), str(tmp_path / "c"), str(Path(__file__).parent)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        limit = time.time() + 60
        while len(list((tmp_path / "c/shards").glob("rows-*"))) <= k and child.poll() is None and time.time() < limit:
            time.sleep(.005)
        time.sleep(.02 * k)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.returncode == -9 and not (tmp_path / "c/manifest.json").exists()
        for p in (tmp_path / "c/shards").glob("[!.]*"):
            assert sha256_file(p) == sha256_file(tmp_path / "whole/shards" / p.name)
    make(data, tmp_path / "c", shard_size=2)
    assert content(tmp_path / "c") == content(tmp_path / "whole")


def test_one_real_example(real, tmp_path):
    train = read_train(real / "hms")
    runs = label_runs(train[train["eeg_id"] == 1628180742])
    assert len(runs) == 1 and runs["n_rows"][0] == 9
    x, note = read_window(real / "hms", runs.iloc[0].to_dict(), Preprocess())
    assert note == "file" and not x.abstain and np.isfinite(x.eeg).all() and (x.image[0] >= 0).mean() > .9
    assert 5 < np.sqrt((x.eeg**2).mean()) < 200


@pytest.mark.slow
def test_reading_is_fast(made):
    cache = WindowCache(made, verify=False)
    cache.batch(range(12))
    start = time.process_time()
    for _ in range(5):
        cache.batch(range(12))
    assert (time.process_time() - start) / 60 < .02
