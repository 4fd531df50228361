"""Jobs: whole recordings as `hms scan` has them, taken up where they were left, and a disk that refuses for a while."""
import hashlib
import sqlite3
import threading
import time
from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from test_service import count, npy, refused, wait_for_job

from hms_brain.audit import AuditLog, read_log
from hms_brain import scan as scan_module
from hms_brain.core import CLASSES, DiskError, InputError, atomic_path, sha256_file
from hms_brain.events import find_events
from hms_brain.exports import write_edf
from hms_brain.predict import Predictor
from hms_brain.records import read_recording
from hms_brain.scan import Stopped, scan_file
from hms_brain.scan_files import describe
from hms_brain.service import scans
from hms_brain.service.engine import Engine
from hms_brain.service.jobs import Ledger, LedgerError, do_one, work_through
from hms_brain.service.tokens import Terms
from hms_brain.service.web import NPY, create_app
from hms_brain.simulate import simulate_recording


@pytest.fixture(scope="module")
def minutes(tmp_path_factory):
    "Ten minutes with a minute that is missing."
    path = tmp_path_factory.mktemp("minutes") / "a.edf"
    recording = simulate_recording(seed=6, pattern="seizure", duration=600)
    recording.signal[:, 60_000:72_000] = np.nan
    write_edf(path, recording)
    return path


@pytest.fixture(scope="module")
def scan(minutes, tmp_path_factory):
    return scan_file(minutes, tmp_path_factory.mktemp("scan") / "out", Predictor(threads=1))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A minute and a half, without a gap: 21 windows."
    path = tmp_path_factory.mktemp("short") / "a.edf"
    write_edf(path, simulate_recording(seed=3, pattern="lpd", duration=90))
    return path


def service(folder, **more):
    return TestClient(create_app(Terms(rate=1e6), threads=1, jobs=folder, **more), base_url="http://127.0.0.1", raise_server_exceptions=False)


def same(result, scan):
    "A result says what a scan of the same recording says."
    windows = result["windows"]
    assert windows["at"] == scan.table["at"].tolist() and windows["abstained"] == scan.table.abstained.tolist()
    for c in CLASSES: np.testing.assert_allclose(windows[c], scan.table[c], atol=5.1e-5)
    for name in ("reasons", "quality"): assert [windows["texts"][name][i] for i in windows[name]] == scan.table[name].tolist()
    events = find_events(scan.table, scan.step)
    assert result["summary"] == scan.summary() and [e["kind"] for e in result["events"]] == [e.kind for e in events]
    assert [list(row) for row in describe(scan, events)["burden"]] == result["described"]["burden"]


def test_a_job_is_a_scan(minutes, scan, tmp_path):
    "Through HTTP: the whole recording, its windows in metrics, drift and the audit log."
    log = AuditLog(tmp_path / "audit.jsonl")
    with service(tmp_path / "jobs", audit=log) as client:
        job = wait_for_job(client, client.post("/jobs", files={"file": ("Miller.edf", minutes.read_bytes())}).json()["id"])
        metrics, engine = client.get("/metrics").text, client.app.state.engine
    result = job["result"]
    same(result, scan)
    assert job["state"] == "done" and len(scan.table) > 250 and result["recording"]["duration"] == 600 and result["recording"]["fs"] == 200 and len(result["recording"]["channels"]) >= 19
    assert result["bundle"] == engine.predictor.bundle.identity() and result["preprocess"] == engine.predictor.preprocess.version and result["input_sha256"] == sha256_file(minutes)
    assert "Research use only" in result["notice"] and "Trained on simulated EEG only." in result["warnings"] and result["seconds"] > 0 and result["scan"]["state"] == "done"
    assert any(result["windows"]["gap"]) and set(np.flatnonzero(result["windows"]["gap"])) <= set(np.flatnonzero(result["windows"]["abstained"]))
    counted = {c: count(metrics, "hms_predictions_total", predicted=c) for c in (*CLASSES, "abstained")}
    assert counted == {**{c: scan.summary()[c] for c in CLASSES}, "abstained": scan.summary()["abstained"]}
    last = list(read_log(tmp_path / "audit.jsonl"))[-1]
    assert (last["kind"], last["input_sha256"], last["bundle_sha256"], last["summary"]) == ("answer", result["input_sha256"], engine.predictor.bundle.sha256, scan.summary())
    assert engine.drift is None or len(engine.drift.recent) == 1


def test_the_unit_of_a_job(short, tmp_path):
    "What the caller says of the samples holds for the whole recording, and for the process that takes the job up."
    eeg = read_recording(short).eeg
    with service(tmp_path) as client:
        assert "unknown unit" in refused(client.post("/jobs?unit=furlong", files={"file": ("a.npy", npy(eeg))}), 422)
        assert not list(tmp_path.glob("*/*"))
        ids = [client.post("/jobs", params=unit, files={"file": ("a.npy", npy(x))}).json()["id"] for unit, x in (({}, eeg), ({"unit": "nV"}, eeg * 1e3), ({"unit": "nV"}, eeg))]
        told, said, quiet = (wait_for_job(client, id)["result"] for id in ids)
    np.testing.assert_allclose([said["windows"][c] for c in CLASSES], [told["windows"][c] for c in CLASSES], atol=1e-3)
    assert not any(said["windows"]["abstained"]) and all(quiet["windows"]["abstained"])  # as nanovolts it would be no EEG
    assert said["input_sha256"] == hashlib.sha256(npy(eeg * 1e3)).hexdigest()


@pytest.mark.parametrize("seconds, state, windows", [(9, "failed", None), (10, "done", 1), (49, "done", 1), (60, "done", 6)])
def test_short_recordings(tmp_path, seconds, state, windows):
    eeg = np.nan_to_num(simulate_recording(seed=3, pattern="lpd", duration=seconds).eeg)
    with service(tmp_path) as client: job = wait_for_job(client, client.post("/jobs", files={"file": ("a.npy", npy(eeg))}).json()["id"])
    assert job["state"] == state
    if windows: assert len(job["result"]["windows"]["at"]) == windows
    else: assert job["result"] == {"error": "the recording is 9 s long; at least 10 s are needed"}


def test_a_scan_goes_on_where_it_was_left(short, tmp_path):
    predictor, seen, left = Predictor(threads=1), [], []
    def tell(rows):
        if len(seen) >= 8: raise Stopped
        seen.extend(rows)
    again = partial(scan_file, short, tmp_path / "scan", predictor, block=16.0, threads=1)
    with pytest.raises(Stopped): again(tell=tell)
    done = again(tell=left.extend)
    assert [len(seen), len(left)] == [8, 13]
    pd.testing.assert_frame_equal(done.table, scan_file(short, tmp_path / "whole", predictor, block=16.0).table)


def test_a_scan_begins_where_one_was_killed_at_once(short, tmp_path):
    "Half a ledger is in nobody's way; anything else is."
    for name in (".scan.4711.tmp.json", "notes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{")
    assert len(scan_file(short, tmp_path / ".scan.4711.tmp.json").table) == 21
    with pytest.raises(InputError, match="in the way"): scan_file(short, tmp_path / "notes.txt")


def test_the_end_of_the_service_fails_no_job(minutes, scan, tmp_path):
    "It waits for the next start, which does it; the interruption was no try. Requests are answered beside it."
    with service(tmp_path) as client:
        id = client.post("/jobs", files={"file": ("a.edf", minutes.read_bytes())}).json()["id"]
        while not client.app.state.ledger.count()["running"]: time.sleep(0.01)
        eeg = np.nan_to_num(simulate_recording(seed=3, pattern="lpd", duration=50).eeg)
        assert client.post("/predict", content=npy(eeg), headers={"content-type": NPY}).status_code == 200 and client.app.state.ledger.count()["running"] == 1
    ledger = client.app.state.ledger
    assert ledger.run("SELECT state, tries FROM jobs") == [("waiting", 0)]
    ledger.close()
    with service(tmp_path) as client: same(wait_for_job(client, id)["result"], scan)
    client.app.state.ledger.close()


def test_a_block_that_cannot_be_kept_fails_no_job(short, tmp_path, monkeypatch):
    ledger, engine = Ledger(tmp_path / "jobs"), Engine(threads=1)
    path = ledger.place() / "recording0.edf"
    path.write_bytes(short.read_bytes())
    id, save = ledger.add(path), scan_module.save_frame
    def full(path, frame):
        with atomic_path(path): raise OSError(28, "No space left on device")
    monkeypatch.setattr(scan_module, "save_frame", full)
    work = lambda path: scans.scan_job(path, engine, threading.Event())
    with pytest.raises(DiskError, match="No space left"): do_one(ledger, work, wait=0)
    assert ledger.run("SELECT state, tries FROM jobs") == [("waiting", 0)]
    monkeypatch.setattr(scan_module, "save_frame", save)
    assert do_one(ledger, work, wait=0) and ledger.find(id)["state"] == "done"
    engine.close()
    ledger.close()


class Faulty:
    "A data base that refuses some statements for a while."
    def __init__(self, db, word, times, error):
        self.db, self.word, self.times, self.error, self.refused = db, word, times, error, Counter()

    def execute(self, statement, values=()):
        if self.word in statement and self.refused[self.word] < self.times:
            self.refused[self.word] += 1
            raise self.error
        return self.db.execute(statement, values)

    def close(self): self.db.close()


def accepted(ledger, text="a"):
    path = ledger.place() / "recording0.txt"
    path.write_text(text)
    return ledger.add(path)


def test_a_result_waits_for_room(tmp_path):
    ledger, works = Ledger(tmp_path), []
    id = accepted(ledger)
    ledger.db = Faulty(ledger.db, "SET state = ?", 3, sqlite3.OperationalError("database or disk is full"))
    def work(path):
        works.append(path)
        return {"text": path.read_text()}
    assert do_one(ledger, work, wait=0.01)
    assert ledger.find(id)["result"] == {"text": "a"} and len(works) == 1 and ledger.db.refused["SET state = ?"] == 3
    ledger.close()


@pytest.mark.parametrize("error", [sqlite3.DatabaseError("database disk image is malformed"), RuntimeError("something else")])
def test_nothing_ends_the_work(tmp_path, error):
    "Whatever the data base says, the next job is taken when it says no more."
    ledger, wake, stop = Ledger(tmp_path), threading.Event(), threading.Event()
    ledger.db = Faulty(ledger.db, "RETURNING id, file", 2, error)
    thread = threading.Thread(target=work_through, args=(ledger, lambda path: {"text": path.read_text()}, wake, stop))
    thread.start()
    id, end = accepted(ledger), time.monotonic() + 30
    while ledger.find(id)["state"] != "done" and time.monotonic() < end: wake.set(); time.sleep(0.02)
    assert ledger.find(id)["result"] == {"text": "a"} and ledger.db.refused["RETURNING id, file"] == 2
    stop.set(); wake.set(); thread.join()
    ledger.close()


def test_a_ledger_that_refuses_is_our_fault(tmp_path):
    "503 and when to come back, not 422 and not 500."
    with service(tmp_path / "jobs") as client:
        ledger = client.app.state.ledger
        db, folder = ledger.db, ledger.folder
        ledger.db = Faulty(db, "SELECT", 100, sqlite3.DatabaseError("database disk image is malformed"))
        for path in ("/jobs/0123456789abcdef", "/metrics"):
            answer = client.get(path)
            refused(answer, 503)
            assert answer.headers["retry-after"] == "60"
        ledger.db, ledger.folder = db, tmp_path / "nowhere"
        for path in ("/jobs", "/predict/file"): refused(client.post(path, files={"file": ("a.npy", b"x")}), 503)
        ledger.folder = folder
        ledger.db = Faulty(db, "INSERT", 1, sqlite3.OperationalError("database or disk is full"))
        refused(client.post("/jobs", files={"file": ("a.npy", b"x")}), 503)
        assert not [p for p in folder.iterdir() if p.is_dir()]


def test_names_leave_the_ledger_with_the_job(tmp_path):
    "Files of one recording keep their names while it waits; then these are in no byte of the ledger."
    ledger = Ledger(tmp_path)
    for end in (lambda id: ledger.finish(ledger.take()[0], "done", {}), ledger.forget):
        path = ledger.place() / "Capybarsky.vhdr"
        path.write_text("a")
        id = ledger.add(path)
        assert any(b"Capybarsky" in p.read_bytes() for p in tmp_path.glob("jobs.sqlite*"))
        assert end(id)
        assert not any(b"Capybarsky" in p.read_bytes() for p in tmp_path.glob("jobs.sqlite*"))
    ledger.close()


def test_a_fault_in_the_log_names_no_file(tmp_path, caplog):
    "Where it happened is told, its words are not: they may hold the name of a file, which may be a patient's."
    ledger, name = Ledger(tmp_path), "Capybarsky.vhdr"
    id = accepted(ledger)
    def work(path): raise FileNotFoundError(2, "No such file", name)
    assert do_one(ledger, work) and ledger.find(id)["result"] == {"error": "an internal error"}
    assert "FileNotFoundError at" in caplog.text and "in work" in caplog.text and "Capybarsky" not in caplog.text
    ledger.close()
