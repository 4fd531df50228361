"""hms_brain.scan, events, annotate, reports, archive: whole recordings."""
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import edf

from hms_brain import scan as scanning
from hms_brain.annotate import annotate_edf
from hms_brain.core import CHANNELS, CLASSES, InputError, read_json, write_json
from hms_brain.elsewhere import store_elsewhere
from hms_brain.events import Event, active_windows, burden, class_runs, find_events, score_events, status
from hms_brain.exports import write_edf
from hms_brain.predict import Predictor, predict_file
from hms_brain.preprocess import Stretch
from hms_brain.quality import Screen, check_window
from hms_brain.records import read_recording
from hms_brain.scan_files import write_scan
from hms_brain.scan import Scan, plan_scan, scan_file
from hms_brain.simulate import simulate_recording

TOLERANCE = 1e-5  # of a probability, between a scan and a single answer


@pytest.fixture(scope="module")
def predictor():
    return Predictor(threads=1)


@pytest.fixture(scope="module")
def eeg():
    "Seven minutes: half a minute of mains, a burst, an electrode that dies."
    r = simulate_recording(seed=5, pattern="seizure", duration=420, patient=2)
    x = r.signal.copy()
    x[:19, 30_000:36_000] += 400 * np.sin(2 * np.pi * 50 / 200 * np.arange(6000, dtype=np.float32))
    x[:19, 50_000:51_000] *= 40
    x[5, 60_000:] = 0
    return dataclasses.replace(r, signal=x)


def compare(file, table, rows, predictor):
    "Rows of a scan against single answers."
    for i in rows:
        row = table.iloc[i]
        alone, _ = predict_file(file, predictor, at=float(row["at"]))
        assert max(abs(row[c] - p) for c, p in alone.probabilities.items()) <= TOLERANCE, row["at"]
        assert bool(row.abstained) == alone.abstained and (row.predicted or None) == alone.predicted
        window = {f["kind"] for f in alone.quality} - {"resampled", "nan", "missing_ekg", "interpolated", "renamed"}
        assert set(row.quality.split()) >= window - {"gap"}, (row.quality, window)


@pytest.mark.parametrize("fs", [200, 256])
def test_a_scan_is_single_answers(tmp_path, eeg, predictor, fs):
    "At the ends, at the borders of blocks, in mains, in the burst, where the electrode dies; at another rate as well."
    file = tmp_path / "a.edf"
    write_edf(file, eeg if fs == 200 else store_elsewhere(eeg, fs, montage="referential"))
    scan = scan_file(file, tmp_path / "out", predictor, step=10, block=130, threads=1)
    assert scan.table["at"].tolist() == list(range(25, 396, 10)) and len(plan_scan(420, 10, 130).blocks) == 3
    assert "mains" in " ".join(scan.table.quality) and "flat" in " ".join(scan.table.quality)
    compare(file, scan.table, [0, 12, 13, 14, 25, 26, 27, 31, 37], predictor)


@pytest.mark.parametrize(("seed", "pattern"), [(0, "gpd"), (1, "seizure"), (2, "lrda"), (3, "other")])
def test_shared_columns_change_less_than_a_hundredth(tmp_path, predictor, seed, pattern):
    "Steps of 2 s interpolate the fine panels; a gap in the middle keeps its own."
    r = simulate_recording(seed, pattern, 200)
    r.signal[:, 18_000:18_800] = np.nan
    stretch = {dense: Stretch(predictor.preprocess, r.eeg, 0, (0, 30_000), dense) for dense in (False, True)}
    firsts = range(0, 30_001, 2000)
    alone, shared = ([predictor.preprocess.cut(stretch[dense], first, 40_000) for first in firsts] for dense in (False, True))
    same = [np.array_equal(a.image, b.image) for a, b in zip(alone, shared)]
    assert any(same) and not all(same) and all(np.array_equal(a.eeg, b.eeg) and np.array_equal(a.image < 0, b.image < 0) for a, b in zip(alone, shared))
    assert np.abs(predictor.probabilities(alone) - predictor.probabilities(shared)).max() <= 0.01


@pytest.mark.parametrize("step", [2, 1.5])
def test_shared_frames_change_less_than_a_hundredth(tmp_path, eeg, predictor, step):
    "Steps of 2 s ask the first half of the network once; of 1.5 s four times. Mains and a gap are in it; at the edge of a burst the interpolated panels differ by more."
    assert predictor.bundle.halves
    file, x = tmp_path / "a.edf", eeg.signal[:, 18_000:50_000].copy()
    x[:, 4000:4600] = np.nan
    write_edf(file, dataclasses.replace(eeg, signal=x))
    table, worst = scan_file(file, tmp_path / "out", predictor, step=step, threads=1).table, 0.0
    for i in range(0, len(table), 5):
        row, (alone, _) = table.iloc[i], predict_file(file, predictor, at=float(table["at"].iloc[i]))
        assert bool(row.abstained) == alone.abstained
        worst = max(worst, *(abs(row[c] - p) for c, p in alone.probabilities.items()))
    assert 1e-7 < worst <= 0.01, worst


def test_gaps_are_rows(tmp_path, eeg, predictor):
    "EDF+D: what has no data is told, and is the same as a single answer."
    onsets = [float(k) for k in range(150)] + [270.0 + k for k in range(150)]
    file = tmp_path / "d.edf"
    file.write_bytes(edf(eeg.eeg[:, :60_000], labels=CHANNELS, reserved="EDF+D", onsets=onsets))
    scan = scan_file(file, tmp_path / "out", predictor, step=5, block=100, threads=1)
    assert scan.duration == 420 and scan.gaps == [(150.0, 270.0)] and len(scan.table) == 75
    lost = scan.table[(scan.table["at"] > 175) & (scan.table["at"] < 245)]
    assert lost.abstained.all() and lost.reasons.str.contains("no sample in the window").all()
    assert np.isfinite(scan.table[list(CLASSES)].to_numpy()).all()
    compare(file, scan.table, [0, 20, 24, 26, 30, 44, 49, 74], predictor)


def test_what_cannot_be_read_is_a_row(tmp_path, eeg, predictor):
    "A stretch beyond every range is set aside; the rest is scanned."
    x = eeg.eeg.copy()
    x[3, 40_000:41_000] = 3e5
    file = tmp_path / "wild.edf"
    file.write_bytes(edf(x, labels=CHANNELS, span=4e5))
    with pytest.raises(InputError, match="no EEG exceeds"): read_recording(file)
    scan = scan_file(file, tmp_path / "out", predictor, step=10, threads=1)
    lost = scan.table[scan.table.reasons.str.contains("unreadable: channel P3")]
    assert 1 <= len(lost) <= 16 and lost["at"].between(140, 260).all() and not scan.table.abstained.iloc[[0, -1]].any()


def test_short_and_odd(tmp_path, eeg, predictor):
    for seconds, n in ((12, 1), (50, 1), (53, 2)):
        file = tmp_path / f"{seconds}.edf"
        write_edf(file, dataclasses.replace(eeg, signal=eeg.signal[:, :seconds * 200]))
        scan = scan_file(file, tmp_path / f"out{seconds}", predictor, threads=1)
        assert len(scan.table) == n
        compare(file, scan.table, range(n), predictor) if seconds != 12 else None
    with pytest.raises(InputError, match="a step of"): scan_file(file, tmp_path / "x", predictor, step=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a scan"): scan_file(file, tmp_path / "mine", predictor)


def test_an_interruption_loses_one_block(tmp_path, eeg, predictor, monkeypatch):
    file, calls = tmp_path / "a.edf", []
    write_edf(file, eeg)
    whole = scan_file(file, tmp_path / "whole", predictor, step=20, block=100, threads=1)
    real = scanning.answer_block

    def once(*args, **kw):
        calls.append(args[2][0])
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(scanning, "answer_block", once)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 blocks are kept"): scan_file(file, tmp_path / "out", predictor, step=20, block=100, threads=1)
    with pytest.raises(InputError, match="holds no finished scan"): Scan.load(tmp_path / "out")
    block = tmp_path / "out" / "blocks" / "00001.parquet"
    block.write_bytes(block.read_bytes()[:-9])  # a damaged one is made again
    again = scan_file(file, tmp_path / "out", predictor, step=20, block=100, threads=1)
    assert calls[3:] == [calls[1], calls[2], calls[2] + 20_000]
    pd.testing.assert_frame_equal(again.table, whole.table)
    other = tmp_path / "b.edf"
    write_edf(other, dataclasses.replace(eeg, signal=eeg.signal * np.float32(0.9)))
    with pytest.raises(InputError, match="of another recording"): scan_file(other, tmp_path / "out", predictor, step=20, block=100)


def test_a_finished_scan_without_its_table_says_so(tmp_path):
    write_json(tmp_path / "scan.json", {"format": 1, "state": "done"})
    with pytest.raises(InputError, match=r"scan\.parquet: is not there"): Scan.load(tmp_path)
    (tmp_path / "scan.parquet").write_bytes(b"half")
    with pytest.raises(InputError, match=r"scan\.parquet: is not readable.*scan again"): Scan.load(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("group", [False, True], ids=["alone", "with its decoder"])
def test_killed_scan_goes_on(tmp_path, eeg, predictor, monkeypatch, group):
    "kill -9 at any moment leaves a folder that the same call completes, and nothing of the recording: the decoder tidies up, or whoever decodes next."
    file, out = tmp_path / "a.edf", tmp_path / "out"
    write_edf(file, eeg)
    code = f"from hms_brain.scan import scan_file; scan_file({str(file)!r}, {str(out)!r}, step=5, block=50, threads=1)"
    (temporary := tmp_path / "t").mkdir()
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(temporary)}, start_new_session=True)
    while child.poll() is None and not list(out.glob("blocks/0000[1-9]*")): time.sleep(0.05)
    assert list(temporary.glob("hms_decode_*"))
    if group: os.killpg(child.pid, signal.SIGKILL)
    else: child.send_signal(signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 30
    while not group and list(temporary.glob("hms_decode_*")) and time.monotonic() < end: time.sleep(0.05)
    assert bool(list(temporary.glob("hms_decode_*"))) == group
    kept = set(read_json(out / "scan.json")["blocks"])
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    again = scan_file(file, out, predictor, step=5, block=50, threads=1)
    assert kept and again.table["at"].tolist() == list(range(25, 396, 5)) and not list(out.glob("**/.*tmp*"))
    assert not list(temporary.glob("hms_decode_*"))


@pytest.mark.fault
def test_an_interrupted_command_says_what_is_kept(tmp_path, eeg):
    "Ctrl-C, as a terminal sends it: to the command and to its child."
    file, out, temporary = tmp_path / "a.edf", tmp_path / "out", tmp_path / "t"
    write_edf(file, eeg)
    temporary.mkdir()
    hms = subprocess.Popen([str(Path(sys.executable).parent / "hms"), "scan", str(file), "-o", str(out), "--step", "0.5"], env=os.environ | {"TMPDIR": str(temporary)},
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    while hms.poll() is None and not (out / "scan.json").is_file(): time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(hms.pid, signal.SIGINT)
    said = hms.communicate(timeout=60)[1]
    assert hms.returncode == 130 and "blocks are kept in" in said.splitlines()[-1] and "Traceback" not in said
    assert not list(temporary.glob("hms_decode_*"))


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path, eeg):
    "A day of 19 channels: at most 1.5 GiB, reader and network included."
    psutil = pytest.importorskip("psutil")
    file = tmp_path / "day.edf"
    part = edf(eeg.eeg, labels=CHANNELS, n_records=86_400)
    head = 256 * (len(CHANNELS) + 1)
    with open(file, "wb") as f:
        f.write(part[:head])
        for _ in range(86_400 // 420 + 1): f.write(part[head:])
        f.truncate(head + 86_400 * 2 * 200 * 19)
    code = f"from hms_brain.scan import scan_file; s = scan_file({str(file)!r}, {str(tmp_path / 'out')!r}, step=120, threads=2); assert len(s.table) == 720"
    scan, peaks = subprocess.Popen([sys.executable, "-c", code]), {}
    while scan.poll() is None:
        for p in (scan.pid, *(child.pid for child in psutil.Process(scan.pid).children(recursive=True))):
            with suppress(OSError, StopIteration): peaks[p] = 1024 * next(int(line.split()[1]) for line in open(f"/proc/{p}/status") if line.startswith("VmHWM"))  # getrusage would count what forked it
        time.sleep(0.05)
    assert scan.returncode == 0 and len(peaks) > 1
    reader = max(size for p, size in peaks.items() if p != scan.pid)
    print(f"scan {peaks[scan.pid] / 2**20:.0f} MiB, its reader {reader / 2**20:.0f} MiB")
    assert peaks[scan.pid] + reader <= 1.5 * 2**30


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["other", "gpd", "seizure"]))
def test_the_screen_never_contradicts(seed, pattern):
    x = simulate_recording(seed, pattern, 70).eeg
    screen = Screen(x)
    for second in range(0, 21, 5):
        if screen(200 * second): assert check_window(x[:, 200 * second:200 * second + 10_000]).flags == ()


# events

def table_of(p, step=2.0, abstained=(), kind="seizure"):
    t = pd.DataFrame({"at": 25 + step * np.arange(len(p)), **{c: 0.0 for c in CLASSES}, "abstained": False, "reasons": "", "predicted": "other", "quality": ""})
    t[kind] = p
    t.loc[list(abstained), "abstained"] = True
    return t


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_runs_by_brute_force(p):
    expected, k = [], 0
    while k < len(p):
        stop = k
        while stop < len(p) and p[stop] >= 0.35: stop += 1
        if stop - k >= 5 and any(v >= 0.5 for v in p[k:stop]): expected.append((k, stop))
        k = max(stop, k + 1)
    table = table_of(p)
    assert class_runs(table, "seizure", 2.0) == expected
    assert active_windows(table, 2.0)["seizure"].sum() == sum(b - a for a, b in expected)
    events = find_events(table, 2.0)
    assert sum(e.active for e in events) == 2 * sum(b - a for a, b in expected)
    assert all(b.start - a.stop >= 90 for a, b in zip(events, events[1:]))


def test_events_at_their_limits():
    p = np.zeros(2000)
    p[100:400] = 0.9
    assert status(table_of(p), 2.0)["met"] and status(table_of(p), 2.0)["longest_run"] == 600
    p[250] = 0.1
    assert not status(table_of(p), 2.0)["met"]  # broken, and 9.97 of 60 min
    p[1000:1070] = 0.9
    assert status(table_of(p), 2.0)["met"] and len(find_events(table_of(p), 2.0)) == 2
    assert np.isnan(burden(table_of(p, abstained=range(2000)), 2.0).seizure).all()
    assert find_events(table_of(p, abstained=range(100, 400)), 2.0)[0].start == 25 + 2000 - 1
    assert find_events(table_of([]), 2.0) == []


def test_scores_know_the_rules(tmp_path):
    pytest.importorskip("timescoring")
    ours = [Event("seizure", 1000, 1040, 0.9, 1, 40), Event("lpd", 10, 20, 0.9, 1, 10)]
    s = score_events([(1045, 1060)], ours, 86_400)["event"]
    assert (s["sensitivity"], s["precision"], s["fp_per_24h"]) == (1, 1, 0)  # begins 30 s before at most
    s = score_events([(1075, 1090)], ours, 86_400)["event"]
    assert (s["sensitivity"], s["fp_per_24h"]) == (0, 1)
    (tmp_path / "ref.tsv").write_text("onset\tduration\teventType\n1000\t30\tsz_foc_ia\n5\t9\tbckg\n")
    assert score_events(tmp_path / "ref.tsv", ours, 86_400)["reference_events"] == 1
    (tmp_path / "bad.tsv").write_text("time\n1\n")
    with pytest.raises(InputError, match="onset and duration"): score_events(tmp_path / "bad.tsv", ours, 100)
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(InputError, match="is not a table"): score_events(tmp_path / "empty.tsv", ours, 100)


# annotated copies

@pytest.mark.parametrize("kind", ["edf", "edf+c", "edf+d", "bdf"])
def test_annotated_copies_are_bit_equal(tmp_path, kind):
    import mne
    x = np.random.default_rng(0).normal(0, 30, (19, 20 * 200))
    onsets = {"edf+c": [float(k) for k in range(20)], "edf+d": [float(k + 7 * (k > 9)) for k in range(20)]}.get(kind)
    source, copy = tmp_path / f"a.{kind[:3]}", tmp_path / f"b.{kind[:3]}"
    source.write_bytes(edf(x, labels=CHANNELS, reserved={"edf+c": "EDF+C", "edf+d": "EDF+D"}.get(kind, ""), onsets=onsets, bdf=kind == "bdf"))
    notes = [(2.5 + k / 10, 1.0, f"hms: gpd {k}") for k in range(120)]
    annotate_edf(source, copy, notes)
    a, b = read_recording(source, sandbox=False), read_recording(copy, sandbox=False)
    np.testing.assert_array_equal(a.signal, b.signal)
    assert a.file_duration == b.file_duration and a.channels == b.channels
    if kind == "edf+d": return  # MNE joins the parts of EDF+D
    raw = (mne.io.read_raw_bdf if kind == "bdf" else mne.io.read_raw_edf)(copy, verbose="error")
    found = [(o, d) for o, d, t in zip(raw.annotations.onset, raw.annotations.duration, raw.annotations.description) if t.startswith("hms: gpd")]
    np.testing.assert_allclose(found, [(o, d) for o, d, _ in notes], atol=1e-3)


def test_reports_are_complete_and_harmless(tmp_path):
    table = table_of(np.r_[np.zeros(100), np.full(50, 0.9), np.zeros(100)], abstained=range(200, 220))
    about = {"step": 2.0, "gaps": [(425, 465)], "bundle": {"name": "<script>b", "sha256": "0" * 64, "simulated": True},
             "recording": {"file": "<script>alert(1)</script>.edf", "id": "1" * 16, "duration": 550.0, "reference": "referential", "channel_map": {}, "issues": [{"kind": "renamed", "detail": "<img src=x>"}]}}
    about["recording"]["file"] = about["recording"]["file"].replace("/", "")
    files = {p.suffix: p for p in write_scan(tmp_path, Scan(about, table))}
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html and "<img src=x>" not in html and "Research use only" in html and "medical-grade" not in html
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and files[".csv"].exists()
    summary = read_json(tmp_path / "summary.json")
    assert summary["status"]["longest_run"] == 100 and len(summary["events"]) == 1
    assert len(pd.read_csv(tmp_path / "probabilities.csv")) == 250


# archives

def test_without_dask_one_recording_does_not_stop_the_others(tmp_path, monkeypatch):
    from hms_brain import archive
    for name in "abc": (tmp_path / f"{name}.edf").write_bytes(b"x")

    def scan_one(job):
        if job["path"].endswith("b.edf"): raise ZeroDivisionError(f"in {job['path']}")
        return {"state": "done", "summary": {}}

    monkeypatch.setattr(archive, "find_spec", lambda name: None)
    monkeypatch.setattr(archive, "scan_one", scan_one)
    ledger = archive.scan_archive(tmp_path, tmp_path / "out", names=True)
    assert ledger["counts"] == {"done": 2, "set_aside": 1, "waiting": 0}
    assert {e["file"]: e.get("reason") for e in ledger["recordings"].values()}["b.edf"] == "ZeroDivisionError: in the recording"


@pytest.mark.fault
def test_a_killed_worker_loses_nothing(tmp_path, eeg):
    "Twenty recordings, each once, although a worker is killed between them; what cannot be read is set aside."
    psutil, archive = pytest.importorskip("psutil"), pytest.importorskip("hms_brain.archive")
    pytest.importorskip("distributed")
    (tmp_path / "in").mkdir()
    for k in range(20): write_edf(tmp_path / "in" / f"{k:02d}.edf", dataclasses.replace(eeg, signal=eeg.signal[:, :24_000] * np.float32(1 - k / 50)))
    (tmp_path / "in" / "poison.edf").write_bytes(b"0       " + b"?" * 500)
    killed, over = [], threading.Event()

    def kill():
        while not killed and not over.wait(0.05):
            if len(list((tmp_path / "out").glob("*/scan.parquet"))) < 3: continue
            busy = [p for p in psutil.Process(os.getpid()).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
            if busy:
                busy[-1].kill()
                killed.append(busy[-1].pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try: ledger = archive.scan_archive(tmp_path / "in", tmp_path / "out", step=2, workers=2, names=True)
    finally: over.set()
    assert killed and ledger["counts"] == {"done": 20, "set_aside": 1, "waiting": 0}
    told = {e["file"]: e for e in ledger["recordings"].values()}
    assert len(told) == 21 and "damaged" in told["poison.edf"]["reason"]
    for folder, entry in ledger["recordings"].items():
        if entry["state"] == "done": assert Scan.load(tmp_path / "out" / folder).table["at"].tolist() == list(range(25, 96, 2))
    before = {p: p.stat().st_mtime_ns for p in Path(tmp_path / "out").rglob("scan.parquet")}
    archive.scan_archive(tmp_path / "in", tmp_path / "out", step=2, workers=1)
    assert len(before) == 20 and before == {p: p.stat().st_mtime_ns for p in Path(tmp_path / "out").rglob("scan.parquet")}


@pytest.mark.slow
def test_a_cluster_by_its_address(tmp_path, eeg):
    "The command on a scheduler and two workers that somebody else started; an address where nobody listens is told in one line."
    pytest.importorskip("distributed")
    bin = Path(sys.executable).parent
    for k in range(4): write_edf(tmp_path / "in" / f"{k}.edf", dataclasses.replace(eeg, signal=eeg.signal[:, :12_000] * np.float32(1 - k / 50)))
    scan = lambda address: subprocess.run([bin / "hms", "scan", tmp_path / "in", "-o", tmp_path / "out", "--cluster", address, "--json"], capture_output=True, text=True, timeout=300)
    nobody = scan("tcp://127.0.0.1:9")
    assert nobody.returncode == 2 and "does not answer" in nobody.stderr and "Traceback" not in nobody.stderr
    told = tmp_path / "scheduler.json"
    start = lambda *words: subprocess.Popen([bin / "dask", *words, "--scheduler-file", told, "--no-dashboard"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cluster = [start("scheduler", "--host", "127.0.0.1", "--port", "0"), *(start("worker", "--nthreads", "1", "--host", "127.0.0.1") for _ in range(2))]
    try:
        deadline = time.monotonic() + 60
        while not told.is_file() and time.monotonic() < deadline: time.sleep(0.1)
        done = scan(read_json(told)["address"])
    finally:
        for process in cluster: process.terminate()
        for process in cluster: process.wait(30)
    assert done.returncode == 0, done.stderr
    ledger = read_json(tmp_path / "out" / "archive.json")
    assert ledger["counts"] == {"done": 4, "set_aside": 0, "waiting": 0}
    assert all(len(Scan.load(tmp_path / "out" / folder).table) == 6 for folder in ledger["recordings"])


# rates

def same_class(sources, predictor, firsts):
    "Share of windows with the same answer at every rate, for recordings of one signal."
    inputs = [[predictor.preprocess(r, at=at) for at in firsts] for r in sources]
    answers = [predictor.probabilities(x) for x in inputs]
    return min(float((answers[0].argmax(1) == p.argmax(1)).mean()) for p in answers[1:])


def at_rate(r, fs):
    from scipy.signal import resample_poly
    up, down = {(200, 256): (32, 25), (200, 500): (5, 2), (256, 200): (25, 32), (256, 500): (125, 64)}[(int(r.fs), fs)]
    return dataclasses.replace(r, signal=resample_poly(np.nan_to_num(r.signal), up, down, axis=1).astype(np.float32), fs=float(fs))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpd", "seizure"])
def test_rates_give_the_same_class(predictor, pattern):
    "Ten simulated minutes at 200, 256 and 500 Hz."
    r = simulate_recording(5, pattern, 600)
    r = dataclasses.replace(r, signal=np.nan_to_num(r.signal))
    assert same_class([r, at_rate(r, 256), at_rate(r, 500)], predictor, range(25, 575, 10)) >= 0.98


def test_a_recorded_eeg_at_three_rates(real, predictor):
    "A public recording at its own 256 Hz, and resampled by scipy to 200 and 500 Hz."
    r = read_recording(real / "edf/eeg_burst_eg.edf", fs=None)
    assert r.fs == 256
    r = dataclasses.replace(r, signal=np.nan_to_num(r.signal))
    half = min(25.0, r.duration / 2)
    firsts = np.arange(half, r.duration - half + 1e-6, 2)
    assert same_class([r, at_rate(r, 200), at_rate(r, 500)], predictor, firsts) >= 0.98
