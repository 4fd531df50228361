"""Shared fixtures. Real EEG is not part of the project: tests that need it look beside the clone and say why they skip."""
import os
import shutil
import socket
import sys
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("HMS_REAL", ROOT.parent / "shared" / "real"))
CHROMIUM = os.environ.get("HMS_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WAIT_MS = int(os.environ.get("HMS_BROWSER_WAIT", "240")) * 1000  # a busy machine starts kernels slowly
needs_browser = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium (set HMS_CHROMIUM to its path)")


def free_port() -> int:
    "A port that nobody listened on a moment ago."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pytest_sessionfinish():
    "A worker that takes long to end is killed: what it has covered is written before."
    if "coverage" in sys.modules and (running := sys.modules["coverage"].Coverage.current()): running.save()


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory):
    "What notebooks and killed services leave in the temporary folder goes when the tests end."
    tmp_path_factory.getbasetemp(), get_temp_dir()  # those of pytest and multiprocessing stay where they are
    folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="hms_tests_")
    os.chmod(folder, 0o711)  # some tests run as another user
    yield
    shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture(scope="module")
def browser():
    "Debian's chromium. It goes with its module: while playwright runs, nothing else can run an event loop."
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
