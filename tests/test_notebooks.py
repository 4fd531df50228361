"""Every library notebook runs from top to bottom."""
import os
import signal
import sys

import pytest

from conftest import ROOT
from hms_brain.formats.sandbox import MAGIC, READERS, SUFFIXES
from hms_brain.models.core import MODELS

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))


LONG = {"02_kaggle_from_token_to_submission", "05_serve_and_stream"}  # minutes on a busy machine


def forget_drafts():
    "A notebook that defines a model or a reader registers its own; what runs after it in this process wants the package's."
    for name, cls in list(MODELS.items()):
        if cls.__module__.startswith("hms_brain"): continue
        del MODELS[name]
        if own := getattr(sys.modules.get(f"hms_brain.models.{name}"), cls.__name__, None): MODELS.register(name)(own)
    for name in [n for n, reader in READERS.items() if callable(reader)]: del READERS[name], SUFFIXES[name]
    MAGIC[:] = [(magic, name) for magic, name in MAGIC if name in READERS]


@pytest.mark.parametrize("notebook", [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in NOTEBOOKS], ids=lambda p: p.stem)
def test_notebook(notebook, monkeypatch):
    from nbdev.test import test_nb

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # nbdev replaces the handler of Ctrl-C
    here = os.getcwd()
    try:
        passed, _ = test_nb(notebook, skip_flags=["notest", "slow", "gpu"], basepath=ROOT)
    finally:
        os.chdir(here)
        forget_drafts()
    assert passed, f"{notebook.name} failed; the traceback is above"
