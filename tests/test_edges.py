"""A signal at the edge has one outcome, whichever way it comes in: refused, abstained or flagged."""
import json

import numpy as np
import pandas as pd
import pytest
from test_service import client, eeg, npy  # noqa: F401  fixtures
from typer.testing import CliRunner

from hms_brain.cli import app
from hms_brain.core import CHANNELS, CLASSES, EKG, InputError
from hms_brain.pages import open_reader
from hms_brain.predict import Predictor
from hms_brain.records import from_arrays
from hms_brain.scan import scan_file
from hms_brain.service.web import NPY
from hms_brain.session import Session, predict_at, scan_session

TIME = np.arange(10_000)
EDGES = {"sound": lambda x: x, "flat": lambda x: x * 0, "missing": lambda x: x * np.nan, "volts": lambda x: x * 1e-6, "five dead": lambda x: np.where(np.arange(19)[:, None] < 5, 0, x),
         "gap": lambda x: np.where(TIME < 600, np.nan, x), "half missing": lambda x: np.where(TIME < 5000, np.nan, x), "mains": lambda x: x + 400 * np.sin(2 * np.pi * 60 / 200 * TIME),
         "noise": lambda x: np.random.default_rng(0).normal(0, 30, x.shape), "infinite": lambda x: np.where(TIME == 5, np.inf, x), "impossible": lambda x: x * 1e5, "clipped": lambda x: np.clip(x, -3, 3), "one second": lambda x: x[:, :200]}


def outcome(p, reasons, kinds):
    return np.array(p), list(reasons), set(kinds) - {"missing_ekg", "nan", "amplitude"}  # notes of the reading, which a scan has once


def told(answer):
    "The outcome in an answer of any way that gives one whole."
    return outcome([answer["probabilities"][c] for c in CLASSES], answer["reasons"], [f["kind"] for f in answer["quality"]])


def row(row):
    "The outcome in a row of a scan."
    return outcome([row[c] for c in CLASSES], row["reasons"].split("; ") if row["reasons"] else [], row["quality"].split())


def by_service(ask, x):
    "Array, JSON and batch."
    yield ask("/predict", content=npy(x), headers={"content-type": NPY})
    if np.isinf(x).any(): return
    sample = {"eeg_data": [[None if np.isnan(v) else v for v in row] for row in x.tolist()]}
    yield ask("/predict", json=sample)
    yield ask("/predict_batch", json={"samples": [sample]})


def by_command(file):
    done = CliRunner().invoke(app, ["predict", str(file), "--json"])
    if isinstance(done.exception, InputError): raise done.exception
    assert done.exit_code == 0, done.output
    return told(json.loads(done.stdout))


def by_scan(file, folder):
    scan = scan_file(file, folder)
    return row(scan.table.iloc[0])


def by_app(file, folder):
    "What the app shows for the window, and what its scan says."
    folder.mkdir()
    session = Session(folder, open_reader(file, folder))
    one = told(predict_at(session, 25.0).to_dict())
    scan_session(session)
    if session.state == "failed": raise InputError(session.error)
    return one, row(session.table.iloc[0])


@pytest.mark.parametrize("name", EDGES)
def test_one_outcome(client, eeg, tmp_path, name):  # noqa: F811
    x, file = EDGES[name](eeg).astype(np.float32), tmp_path / "night.parquet"
    pd.DataFrame({**dict(zip(CHANNELS, x)), EKG: np.zeros(x.shape[1], np.float32)}).to_parquet(file)
    try: want = told(Predictor(threads=1)(from_arrays(x, 200, CHANNELS)).to_dict())
    except InputError: want = None
    answers = list(by_service(client.post, x))
    if want is None:
        assert {a.status_code for a in answers} == {422}
        for way in (by_command, lambda f: by_scan(f, tmp_path / "scan"), lambda f: by_app(f, tmp_path / "app")):
            with pytest.raises(InputError): way(file)
        return
    assert {a.status_code for a in answers} == {200}
    found = [told(a.json().get("predictions", [a.json()])[0]) for a in answers] + [by_command(file), by_scan(file, tmp_path / "scan"), *by_app(file, tmp_path / "app")]
    for p, reasons, kinds in found:
        np.testing.assert_allclose(p, want[0], atol=1e-6)
        assert reasons == want[1] and kinds == want[2]
