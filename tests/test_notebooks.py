"""Every library notebook runs from top to bottom."""
import os
import signal

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))


LONG = {"02_kaggle_from_token_to_submission", "05_serve_and_stream"}  # minutes on a busy machine


@pytest.mark.parametrize("notebook", [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in NOTEBOOKS], ids=lambda p: p.stem)
def test_notebook(notebook, monkeypatch):
    from nbdev.test import test_nb

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # nbdev replaces the handler of Ctrl-C
    here = os.getcwd()
    try:
        passed, _ = test_nb(notebook, skip_flags=["notest", "slow", "gpu"], basepath=ROOT)
    finally:
        os.chdir(here)
    assert passed, f"{notebook.name} failed; the traceback is above"
