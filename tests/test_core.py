"The small tools that every other room uses."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_info

from hms_brain.core import InputError, load_frame, parallel_map, save_frame, with_progress


def test_a_folder_without_a_name_has_one():
    assert str(InputError("is a folder", Path(), "give a file")) == ".: is a folder; give a file"


def blas_threads(_) -> set[int]:
    np.linalg.svd(np.ones((3, 3)))
    return {pool["num_threads"] for pool in threadpool_info()}


def test_workers_keep_to_one_core_each():
    assert set().union(*parallel_map(blas_threads, range(2), workers=2)) == {1}


def test_progress_is_text_where_papermill_runs(monkeypatch, capsys):
    "A widget would not be seen in its log."
    import tqdm.auto
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda *a, **k: pytest.fail("a widget was asked for"))
    monkeypatch.setenv("HMS_RUN", "x")
    assert list(with_progress([1, 2], 2, "work")) == [1, 2] and "work: 100%" in capsys.readouterr().err


def flips(path, n=300):
    "Write the file with one bit of its pages changed, so often; yield each time."
    good, rng = path.read_bytes(), np.random.default_rng(0)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for at, bit in zip(rng.integers(4, footer, n), rng.integers(8, size=n)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:])
        yield at
    path.write_bytes(good)


def test_a_flipped_bit_in_a_page_is_found(tmp_path):
    "In tables of ours, and in recordings that were written with checksums; a flip that is not refused changed nothing."
    from hms_brain.records import read_recording
    from hms_brain.simset import write_eeg
    from hms_brain.simulate import simulate

    rng, path, eeg = np.random.default_rng(0), tmp_path / "oof.parquet", tmp_path / "1.parquet"
    frame = pd.DataFrame({"row": np.arange(500), "p": rng.random(500), "who": ["a", "b"] * 250})
    save_frame(path, frame)
    refused = 0
    for _ in flips(path):
        try: assert load_frame(path).equals(frame)
        except InputError as e: refused += "oof.parquet: is not readable as parquet" in str(e)
    assert refused > 290
    write_eeg(eeg, simulate(0, "gpd", 12), 0, 12)
    signal = read_recording(eeg, sandbox=False).signal
    for _ in flips(eeg, 30):
        try: assert np.array_equal(read_recording(eeg, sandbox=False).signal, signal)
        except InputError as e: assert "damaged parquet" in str(e)
