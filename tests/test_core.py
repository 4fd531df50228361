"The small tools that every other room uses."

from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from hms_brain.core import InputError, parallel_map, with_progress


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
