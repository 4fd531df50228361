"""Shared fixtures. Real EEG is not part of the project: tests that need it look beside the clone and say why they skip."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("HMS_REAL", ROOT.parent / "shared" / "real"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture(scope="session")
def real() -> Path:
    "Folder of real EEG; skips where it is absent."
    if not REAL.is_dir():
        pytest.skip(f"no real EEG at {REAL.name}: these files may not be redistributed (set HMS_REAL to their folder)")
    return REAL
