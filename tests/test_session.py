"""A visitor's session: how a scan ended is said everywhere, looks do not disturb one another, what cannot be matched can be mended."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

import hms_brain.session
from hms_brain.bundle import MANIFEST, seal_files
from hms_brain.core import CHANNELS, CLASSES, EKG, FS, InputError
from hms_brain.elsewhere import Stored
from hms_brain.events import Event
from hms_brain.exports import write_edf
from hms_brain.pages import open_reader
from hms_brain.records import read_recording
from hms_brain.results import report_html, similar, without_copy, write_downloads
from hms_brain.scan import Scan
from hms_brain.scan_files import describe, unfinished, write_annotated, write_scan
from hms_brain.session import KINDS, PACKED, Session, Sessions, pack_rows, progress, scan_session
from hms_brain.simulate import simulate_recording

NAMES = [*CHANNELS, EKG]
VISIT = """import sys
from hms_brain.session import Sessions
folder = (sessions := Sessions()).folder()
(folder / "upload.edf").write_bytes(b"a patient's")
print(folder, flush=True)
sys.stdin.read()"""


@pytest.fixture(scope="module")
def two_minutes():
    "Two simulated minutes."
    return simulate_recording(seed=1, patient=1, pattern="lpd", duration=120)


@pytest.fixture
def recorded(two_minutes, tmp_path):
    "A file of them, and a reader."
    write_edf(tmp_path / "a.edf", two_minutes)
    return open_reader(tmp_path / "a.edf", tmp_path)


def table_of(n, step=2.0, seizure=()):
    "A made-up scan: all other, but for some windows."
    at = 25 + step * np.arange(n)
    table = pd.DataFrame({"at": at, **{c: 0.04 for c in CLASSES}, "predicted": "other", "abstained": False, "reasons": "", "quality": ""})
    table["other"] = 0.8
    table.loc[list(seizure), ["seizure", "other", "predicted"]] = (0.8, 0.04, "seizure")
    return table


def scan_of(state, n=300, seizure=(), error=""):
    about = {"format": 1, "state": state, "error": error, "step": 2.0, "gaps": [], "reading": {}, "bundle": {"name": "made-up", "sha256": "0" * 64, "simulated": True},
             "recording": {"id": "0123456789abcdef", "duration": 7200.0, "reference": "referential", "channel_map": {}, "issues": []}}
    return Scan(about, table_of(n, seizure=seizure))


def test_what_a_killed_app_leaves_goes_with_the_next(tmp_path, monkeypatch):
    "The uploads of an app that lives stay."
    start = lambda: subprocess.Popen([sys.executable, "-c", VISIT], env=os.environ | {"TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with start() as lives, start() as dies:
        kept, left = (Path(app.stdout.readline().strip()) for app in (lives, dies))
        dies.kill(); dies.wait()
        assert (kept / "upload.edf").is_file() and (left / "upload.edf").is_file()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        Sessions().close_all()
        assert (kept / "upload.edf").is_file() and not left.parent.exists()
        lives.communicate()
    assert not list(tmp_path.iterdir())


def test_sessions_share_a_network_until_the_bundle_changes(tmp_path, two_minutes, monkeypatch):
    "Every network of its own would keep tens of megabytes."
    write_edf(tmp_path / "a.edf", two_minutes)
    def seen():
        session = Session(tmp_path, open_reader(tmp_path / "a.edf", tmp_path), step=30.0)
        scan_session(session)
        assert session.state == "done"
        return session.predictor
    first = seen()
    assert first is seen()
    other = Path(shutil.copytree(first.bundle.folder, tmp_path / "other"))
    card = other / "card.md"
    card.write_text(card.read_text() + "Another.\n")
    (other / MANIFEST).write_bytes(seal_files({p.name: p.read_bytes() for p in other.iterdir() if p.name != MANIFEST}))
    monkeypatch.setattr(hms_brain.session, "default_bundle", lambda: other)
    assert (second := seen()) is not first and second.bundle.folder == other


@pytest.mark.parametrize("state, words", [("running", "still running at 0:10:24 of 2:00:00."), ("stopped", "was stopped at 0:10:24 of 2:00:00."), ("failed", "failed at 0:10:24 of 2:00:00: the disk is gone.")])
def test_an_unfinished_scan_says_so_in_every_file(tmp_path, state, words):
    scan = scan_of(state, error="the disk is gone." if state == "failed" else "")
    assert words in unfinished(scan) and "was not looked at" in unfinished(scan)
    write_scan(tmp_path, scan)
    summary = json.loads((tmp_path / "summary.json").read_text())["summary"]
    assert (summary["state"], summary["covered_s"]) == (state, 624.0)
    told = describe(scan, [])
    assert words in dict(told["facts"])["scan"] and "in the first 0:10:24" in told["status"]
    page = (tmp_path / "report.html").read_text()
    assert words in page and "None so far" in page
    sz = pd.read_csv(tmp_path / "recording_szcore.tsv", sep="\t", keep_default_na=False)
    assert sz[["onset", "duration", "eventType", "recordingDuration"]].values.tolist() == [[0.0, 624.0, "bckg", 7200.0]], "no background where nobody looked"
    assert words in json.loads((tmp_path / "recording_desc-hms_events.json").read_text())["Description"]


def test_a_finished_scan_does_not(tmp_path):
    scan = scan_of("done")
    write_scan(tmp_path, scan)
    assert unfinished(scan) == "" and "state" not in json.loads((tmp_path / "summary.json").read_text())["summary"]
    assert "so far" not in (tmp_path / "report.html").read_text() and "not looked at" not in (tmp_path / "report.html").read_text()
    assert pd.read_csv(tmp_path / "recording_szcore.tsv", sep="\t").duration.tolist() == [7200.0]


def test_before_the_first_window_nothing_is_background(tmp_path):
    write_scan(tmp_path, scan_of("failed", 0, error="x"))
    assert len(pd.read_csv(tmp_path / "recording_szcore.tsv", sep="\t")) == 0


def test_the_annotated_copy_notes_where_a_scan_ended(tmp_path, two_minutes):
    write_edf(tmp_path / "a.edf", two_minutes)
    write_annotated(tmp_path / "b.edf", tmp_path / "a.edf", [Event("lpd", 10, 30, .8, .9, 20)], 40.0)
    assert b"+40.000\x150.000\x14hms: not looked at from here on\x14" in (tmp_path / "b.edf").read_bytes()


def halted(session, after, error=None):
    "Scan, and stop or fail after some rows."
    tell = session.tell
    def once(rows):
        tell(rows)
        if len(session.rows) >= after:
            if error: raise error
            session.halt.set()
    session.tell = once
    scan_session(session)
    return session


def test_a_session_that_was_stopped_or_failed(recorded, tmp_path):
    stopped = halted(Session(tmp_path, recorded, step=1.0), 1)
    failed = halted(Session(tmp_path, recorded, step=1.0), 1, InputError("cannot be read any more", "Doe_John.vhdr"))
    assert (stopped.state, failed.state) == ("stopped", "failed") and 0 < len(stopped.rows) < len(stopped.plan.firsts)
    assert "The scan was stopped at 0:01:28 of 0:02:00" in report_html(stopped), "64 windows: a task of them"
    assert "The scan failed at 0:01:28 of 0:02:00: cannot be read any more." in report_html(failed)
    files = {Path(f).name: Path(f) for f in write_downloads(failed, tmp_path / "files")}
    assert json.loads(files["summary.json"].read_text())["summary"]["state"] == "failed"
    assert "Doe_John" not in files["report.html"].read_text() + report_html(failed) + str(progress(failed)), "the name of a file may be a patient's"


def test_windows_like_it_at_small_steps(tmp_path):
    "Where windows share their frames the features are there too, and are those of a window asked alone."
    write_edf(tmp_path / "a.edf", simulate_recording(seed=1, patient=1, pattern="lpd", duration=200))
    reader = open_reader(tmp_path / "a.edf", tmp_path)
    session, apart = Session(tmp_path, reader, step=2.0), Session(tmp_path, reader, step=10.0)
    for s in (session, apart): scan_session(s)
    assert set(session.places) == {r["at"] for r in session.rows if not r["abstained"]} and len(session.places) >= 30
    for at in apart.places:
        if at in session.places: np.testing.assert_allclose(session.places[at], apart.places[at], rtol=0.05, atol=0.05)
    found = similar(session, session.rows[0]["at"])
    assert found and "No other window" not in report_html(session)


def test_a_recording_with_one_place_says_that_there_is_no_other(tmp_path):
    write_edf(tmp_path / "a.edf", simulate_recording(seed=1, patient=1, pattern="lpd", duration=70))
    session = Session(tmp_path, open_reader(tmp_path / "a.edf", tmp_path), step=2.0)
    scan_session(session)
    assert session.events and "No other window that was judged lies 50 s or more away." in report_html(session)


def test_another_look_leaves_the_earlier_one_its_copy(tmp_path, two_minutes):
    "A mapping without EKG has a row less: a session of the old mapping goes on reading its own numbers."
    np.savez(tmp_path / "a.npz", signal=two_minutes.signal, fs=200, channels=np.array(NAMES))
    first = open_reader(tmp_path / "a.npz", tmp_path)
    before = first.part(10, 10).signal
    second = open_reader(tmp_path / "a.npz", tmp_path, {EKG: ""})
    assert len(second.part(10, 10).signal) == 19 and np.array_equal(first.part(10, 10).signal, before)
    assert len(list(tmp_path.glob("*.f32"))) == 2
    session, part = Session(tmp_path, second), first.part
    del first
    assert np.array_equal(part(10, 10).signal, before), "whoever can read it may"
    del part
    assert len(list(tmp_path.glob("*.f32"))) == 1
    del second, session
    assert not list(tmp_path.glob("*.f32")), "copies go with their readers"


def test_the_annotated_copy_has_the_unit_and_the_mapping_of_the_visitor(tmp_path, two_minutes):
    "Numbers that are millivolts, two channels exchanged."
    x = two_minutes.signal / 1000
    swap = {"Fp1": "O2", "O2": "Fp1"}
    np.savez(tmp_path / "a.npz", signal=x, fs=200, channels=np.array(NAMES))
    reader = open_reader(tmp_path / "a.npz", tmp_path, swap, "mV")
    session = Session(tmp_path, reader, step=30.0)
    scan_session(session)
    assert session.state == "done", session.error
    files = {Path(f).name: Path(f) for f in write_downloads(session, tmp_path / "files")}
    copy = read_recording(files["recording_annotated.edf"])
    want = two_minutes.signal.copy()
    want[[0, 18]] = want[[18, 0]]
    assert np.abs(copy.signal - want).max() < 1.0


def test_a_copy_that_is_left_out_is_named(recorded):
    assert without_copy(recorded) == ""
    long = dataclasses.replace(recorded, look=dataclasses.replace(recorded.look, file_duration=5 * 3600.0))
    assert without_copy(long) == "" and "4 h 00 min" in without_copy(dataclasses.replace(long, kind="npy"))


@pytest.fixture
def desk():
    "What the buttons do, and its sessions."
    pytest.importorskip("gradio", reason="the app needs its extra")
    from hms_brain.app import Desk
    sessions = Sessions()
    yield Desk(sessions, "viewer/")
    sessions.close_all()


def given(desk, path):
    "The draft, what is shown, the table and whether it can begin, of an upload."
    draft, shown, table, start, *_ = desk.open([shutil.copy(path, desk.sessions.folder() / path.name)], {})
    return draft, shown, table, start["interactive"]


def test_too_short_is_said_where_the_recording_is_checked(desk, tmp_path, two_minutes):
    for seconds, ready in ((9, False), (10, True)):
        np.savez(tmp_path / "a.npz", signal=two_minutes.signal[:, :int(seconds * FS)], fs=200, channels=np.array(NAMES))
        _, shown, _, can = given(desk, tmp_path / "a.npz")
        assert can == ready and ("the recording is 9 s long; at least 10 s are needed" in shown) == (not ready)


@pytest.mark.parametrize("kind", ["csv", "mat", "edf"])
def test_odd_names_are_offered_and_can_be_mended(desk, tmp_path, two_minutes, kind):
    odd, file, x = [f"lead {k}" for k in range(20)], tmp_path / f"a.{kind}", two_minutes.signal[:, :int(20 * FS)]
    if kind == "csv": pd.DataFrame(x.T, columns=odd).assign(time=np.arange(x.shape[1]) / FS).to_csv(file, index=False)
    elif kind == "mat":
        places = np.array([(name,) for name in odd], dtype=[("labels", "O")])
        savemat(file, {"EEG": dict(setname="x", nbchan=20.0, pnts=float(x.shape[1]), trials=1.0, srate=200.0, xmin=0.0, xmax=x.shape[1] / 200, data=x, chanlocs=places, event=[], epoch=[], ref="common", icawinv=[], icasphere=[], icaweights=[])})
    else: write_edf(file, Stored(x, 200.0, odd))
    draft, shown, table, ready = given(desk, file)
    assert not ready and "cannot be used as it is" in shown
    assert [label for label, _ in table][:20] == odd or [label for label, _ in table][1:21] == odd, table
    mended = [[label, NAMES[odd.index(label)] if label in odd else to] for label, to in table]
    _, shown, table, ready, *_ = desk.apply(draft, mended, "unit: µV")
    assert ready["interactive"] and "19 of 19" in shown, shown


def test_ones_own_labels_stay_when_the_recording_is_scanned_again(desk, tmp_path, two_minutes, monkeypatch):
    monkeypatch.setattr("hms_brain.app.begin", lambda session: None)
    write_edf(tmp_path / "a.edf", two_minutes)
    draft, *_ = given(desk, tmp_path / "a.edf")
    session = desk.sessions.get(desk.start(draft, "a window every 30 s")[0]["token"])
    session.labels, session.high = [{"at": 60.0, "label": "gpd"}], 0.7
    again = desk.sessions.get(desk.start(draft, "a window every 10 s")[0]["token"])
    assert again is not session and (again.labels, again.high) == ([{"at": 60.0, "label": "gpd"}], 0.7)
    other = desk.sessions.get(desk.start(desk.open_sample(draft)[0], "a window every 10 s")[0]["token"])
    assert other.labels == []


def test_rows_as_the_screen_takes_them():
    rows = [{"at": 25.0, **{c: 0.0 for c in CLASSES}, "lpd": 1.0, "abstained": False, "reasons": "", "quality": "mains clipped short"},
            {"at": 35.0, **{c: 1 / 6 for c in CLASSES}, "abstained": True, "reasons": "unit: wrong unit? the median; flat: 19 of 19", "quality": "flat unit"}]
    packed = np.frombuffer(pack_rows(rows, ()), PACKED)
    bit = {kind: 1 << k for k, kind in enumerate(KINDS)}
    assert packed["votes"][0].tolist() == [0, 255, 0, 0, 0, 0] and packed["status"].tolist() == [0, 2] and PACKED.itemsize == 11
    assert packed["noticed"].tolist() == [bit["mains"] | bit["clipped"], bit["flat"] | bit["unit"]] and packed["why"].tolist() == [0, bit["flat"] | bit["unit"]]
