"""Nothing of a patient leaves: names in every field of a header, in annotations, file names and folders, looked for in every byte of every output."""
import base64
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal
from conftest import ROOT
from test_cli import hms, one_line
from test_formats import edf

from hms_brain.annotate import annotate_edf, deidentify_edf
from hms_brain.app import take_in, understood
import hms_brain
from hms_brain.core import CHANNELS, TELLS, InputError, read_json
from hms_brain.exports import write_csv, write_report
from hms_brain.formats.edf import read_header, record_onsets
from hms_brain.pages import open_reader
from hms_brain.predict import Predictor, predict_file
from hms_brain.records import read_recording
from hms_brain.scan_files import write_scan_pdf, write_table
from hms_brain.results import report_html, write_archive, write_downloads
from hms_brain.scan import Scan
from hms_brain.session import Session, Sessions, explain_at, progress, scan_session
from hms_brain.simulate import simulate_recording

FIELDS = {"patient": "MRN-77Okapi41 F 02-MAY-1951 Zebulonia_Quaggason", "recording": "Startdate 13-JUL-2031 Adm-Numbat99 Tech.Axolotly Equip-Kudu4711"}
COLUMNS = {"transducer": "of Pangolina", "filter": "by Narwhalix"}
DATE, TIME, NOTE, RESERVED, NAME, WARD = "13.07.31", "17.43.59", "Wombatina came", "for Tapirelli!", "Capybarsky_Ocelotine", "ward_of_Binturong"
CANARIES = ("MRN-77Okapi41", "02-MAY-1951", "1951-05-02", "Zebulonia", "Quaggason", "13-JUL-2031", "2031-07-13", "Numbat99", "Axolotly", "Kudu4711", "Pangolina", "Narwhalix", "Tapirelli",
            DATE, TIME, "17:43:59", "Wombatina", "Capybarsky", "Ocelotine", "Binturong")


# the search

def encoded(word):
    "A word as bytes in the ways it may stand in a file; base64 at each of its three places."
    text = word.encode()
    yield from (text.lower(), text.lower().decode().encode("utf-16-le"), text.hex().encode(), "".join(f"%{b:02x}" for b in text).encode())
    for shift in range(3): yield base64.b64encode(b"\0" * shift + text)[-(-8 * shift // 6):8 * (shift + len(text)) // 6].lower()


NEEDLES = {word: list(encoded(word)) for word in CANARIES}


def inside(data):
    "The bytes of a file, and those that are packed in it: members of archives, streams of PDFs, tables, data bases."
    yield data
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            for name in z.namelist(): yield name.encode(); yield from inside(z.read(name))
    if data.startswith(b"%PDF"):
        for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.S):
            try: plain = zlib.decompress(stream)
            except zlib.error: continue
            yield plain
            yield b"".join(re.findall(rb"\((.*?)\)", plain))  # letters of a line stand apart, each at its place
    if data.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(data))
        yield f"{table.schema.metadata} {table.schema.names}".encode()
        yield table.to_pandas(ignore_metadata=True).select_dtypes(exclude="number").to_csv().encode()
    if data.startswith(b"SQLite format 3"):
        db = sqlite3.connect(":memory:")
        db.deserialize(data[:18] + b"\1\1" + data[20:])  # not as a write-ahead log, which memory has not
        yield "\n".join(db.iterdump()).encode()


def hits(*sources):
    "Canaries in texts, bytes and files, and in the names of files below a folder: (where, word)."
    found = []
    for source in sources:
        if isinstance(source, Path) and source.is_dir():
            for path in sorted(source.rglob("*")):
                found += [(f"name of {path.name}", w) for _, w in hits(str(path.relative_to(source)))]
                if path.is_file(): found += hits(path)
            continue
        where, data = (source.name, source.read_bytes()) if isinstance(source, Path) else ("text", source if isinstance(source, bytes) else str(source).encode())
        for part in map(bytes.lower, inside(data)): found += [(where, word) for word, needles in NEEDLES.items() if any(n in part for n in needles)]
    return sorted(set(found))


def person(seconds=60, kind="edf+c", seed=3, **values):
    "An EDF whose every free field names somebody."
    x = np.nan_to_num(simulate_recording(seed=seed, pattern="lpd", duration=seconds).eeg)
    onsets = {"edf+c": [float(k) for k in range(seconds)], "edf+d": [float(k + 7 * (k > seconds // 2)) for k in range(seconds)]}.get(kind)
    data = bytearray(edf(x, labels=CHANNELS, reserved={"edf+c": "EDF+C", "edf+d": "EDF+D"}.get(kind, ""), onsets=onsets, bdf=kind == "bdf", date=DATE, **(COLUMNS | values)))
    for at, width, text in ((8, 80, FIELDS["patient"]), (88, 80, FIELDS["recording"]), (176, 8, TIME)): data[at:at + width] = f"{text:<{width}}".encode()
    if onsets: data[197:236] = f"{RESERVED:<39}".encode()
    return bytes(data).replace(b"\x14Zebulon Quagga\x14", f"\x14{NOTE}\x14".encode()).replace(b"Zebulon Quagga", RESERVED.encode())


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    "A folder that is a canary itself, with one minute of somebody."
    folder = tmp_path_factory.mktemp("in") / WARD
    folder.mkdir()
    (folder / f"{NAME}.edf").write_bytes(person())
    return folder


@pytest.fixture(scope="module")
def patient(ward):
    return ward / f"{NAME}.edf"


# controls: the search finds what is there

def test_control_every_canary_of_the_recording_is_found(patient):
    words = {w for _, w in hits(patient, str(patient))}
    assert words == set(CANARIES) - {"1951-05-02", "2031-07-13", "17:43:59"}, "the three are other ways to write what is there"


@pytest.mark.parametrize("word", CANARIES)
def test_control_no_format_hides_a_canary(tmp_path, word):
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    table = pd.DataFrame({"a": [f"so {word} said"]})
    for name in ("a.csv", "a.tsv", "a.parquet"): write_table(tmp_path / name, table)
    write_archive(tmp_path / "a.zip", tmp_path)
    page = Figure()
    page.text(0, 0, word)
    with PdfPages(tmp_path / "a.pdf") as pdf: pdf.savefig(page)
    with PdfPages(tmp_path / "b.pdf", metadata={"Title": word}) as pdf: pdf.savefig(Figure())
    (tmp_path / "a.txt").write_bytes(base64.b64encode(f"so {word} said".encode()))
    (tmp_path / "b.json").write_text(json.dumps({"x": word.upper()}))
    with sqlite3.connect(tmp_path / "a.sqlite") as db: db.execute("CREATE TABLE t (x TEXT)"), db.execute("INSERT INTO t VALUES (?)", (word,))
    (tmp_path / f"{word}.bin").write_bytes(b"")
    assert {w for w, _ in hits(tmp_path)} == {"a.csv", "a.tsv", "a.parquet", "a.zip", "a.pdf", "b.pdf", "a.txt", "b.json", "a.sqlite", f"name of {word}.bin"}


def test_control_a_title_on_a_report_is_found(patient, tmp_path):
    prediction, recording = predict_file(patient, Predictor(threads=1))
    write_report(tmp_path / "r.html", prediction, recording, title=FIELDS["patient"])
    write_csv(tmp_path / "r.csv", [dataclasses.replace(prediction, bundle=prediction.bundle | {"name": NAME})])
    assert {(f, w) for f, w in hits(tmp_path)} >= {("r.html", "Zebulonia"), ("r.html", "Quaggason"), ("r.csv", "Ocelotine")}


# what is asked once

def test_predict(patient, tmp_path):
    for form in ("html", "csv", "json"):
        done = hms("predict", patient, "-o", tmp_path / f"r.{form}")
        assert done.returncode == 0 and hits(done.stdout, done.stderr) == []
    answer, spectrogram = hms("predict", patient, "--json"), hms("spectrogram", patient, "-o", tmp_path / "s.parquet")
    assert answer.returncode == spectrogram.returncode == 0 and hits(answer.stdout, answer.stderr, spectrogram.stdout, spectrogram.stderr, tmp_path) == []


@pytest.mark.parametrize("kind", ["edf", "edf+c", "edf+d", "bdf"])
def test_a_recording_in_python(tmp_path, kind):
    (tmp_path / NAME).write_bytes(person(20, kind))
    r = read_recording(tmp_path / NAME, sandbox=False)
    assert hits(repr(r), json.dumps(r.to_dict()), r.summary().to_string()) == []


# whole recordings

def test_scan_with_every_export(patient, tmp_path):
    done = hms("scan", patient, "-o", tmp_path / "out", "--step", 10, "--annotated", "--json")
    assert done.returncode == 0, done.stderr
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= {"scan.json", "scan.parquet", "probabilities.csv", "burden.csv", "summary.json", "report.html", "report.pdf", "recording_annotated.edf", "recording_szcore.tsv", "recording_desc-hms_events.tsv"}
    assert hits(done.stdout, done.stderr, tmp_path / "out") == []
    a, b = read_recording(patient, sandbox=False), read_recording(tmp_path / "out/recording_annotated.edf", sandbox=False)
    assert_array_equal(a.signal, b.signal)
    scan = Scan.load(tmp_path / "out")
    write_scan_pdf(tmp_path / "control.pdf", dataclasses.replace(scan, about=scan.about | {"bundle": scan.about["bundle"] | {"name": NAME}}), [])
    assert hits(tmp_path / "control.pdf"), "a name on the printed page would have been found"


@pytest.mark.slow
def test_scan_of_an_archive(ward, tmp_path):
    "Two are scanned, one cannot be read; none is named, unless asked for."
    shutil.copytree(ward, tmp_path / "in" / WARD)
    (tmp_path / "in" / WARD / "Ocelotine_2.edf").write_bytes(person(50, "edf", seed=4))
    (tmp_path / "in" / WARD / f"{NAME}_broken.edf").write_bytes(person(20)[:3000])
    words = ("scan", tmp_path / "in", "-o", tmp_path / "out", "--step", 20, "--annotated")
    done = hms(*words, timeout=300)
    assert done.returncode == 1 and "1 recordings were set aside" in done.stderr
    assert read_json(tmp_path / "out/archive.json")["counts"] == {"done": 2, "set_aside": 1, "waiting": 0}
    assert hits(done.stdout, done.stderr, tmp_path / "out") == []
    named = hms(*words, "--names", timeout=300)
    ledger = read_json(tmp_path / "out/archive.json")["recordings"].values()
    assert named.returncode == 1 and {e["file"]: e["state"] for e in ledger} == {f"{NAME}.edf": "done", "Ocelotine_2.edf": "done", f"{NAME}_broken.edf": "set_aside"}
    assert {f for f, _ in hits(tmp_path / "out")} == {"archive.json"}


def test_the_apps_files(patient, tmp_path):
    "From the upload to what is taken home, and what its reader is told."
    from starlette.testclient import TestClient

    from hms_brain.viewer import viewer_app

    upload = tmp_path / "up" / WARD / f"{NAME}.edf"
    upload.parent.mkdir(parents=True)
    shutil.copy(patient, upload)
    sessions = Sessions()
    try:
        folder = sessions.folder()
        reader = open_reader(take_in([str(upload)], folder), folder)
        session = Session(folder, reader, step=10.0)
        sessions.add(session)
        session.labels = [{"at": 30.0, "label": "lpd"}]
        scan_session(session)
        files = write_downloads(session, tmp_path / "home")
        assert progress(session)["state"] == "done" and len(files) == 11
        told = [understood(reader), reader.look.to_dict(), reader.issues, report_html(session), explain_at(session, 30.0, step=10.0)]
        with TestClient(viewer_app(sessions), headers={"x-session": session.token}) as http:
            told += [(r.headers, r.content) for r in (http.get(f"/{name}") for name in ("about", "page", "tile", "scan", "events", "labels", "page?start=x"))]
            assert http.get("/about").status_code == 200
        assert hits(*told, folder) == [("recording.edf", w) for w in sorted({w for _, w in hits(patient)})], "the upload itself, until the session ends"
        assert hits(tmp_path / "home") == []
    finally: sessions.close_all()
    assert not sessions.root.exists()


# the service

def brainvision(seconds=60):
    "Three files that name each other and somebody: header, samples, markers."
    x = np.nan_to_num(simulate_recording(seed=3, pattern="lpd", duration=seconds).eeg)
    names = [f"{NAME}{end}" for end in (".eeg", ".vhdr", ".vmrk")]
    head = ["Brain Vision Data Exchange Header File Version 1.0", "[Common Infos]", "Codepage=UTF-8", f"DataFile={names[0]}", f"MarkerFile={names[2]}", "DataFormat=BINARY", "DataOrientation=MULTIPLEXED", f"NumberOfChannels={len(x)}", "SamplingInterval=5000",
            "[Binary Infos]", "BinaryFormat=IEEE_FLOAT_32", "[Channel Infos]", *(f"Ch{i + 1}={c},,1,µV" for i, c in enumerate(CHANNELS)), "[Comment]", f"{FIELDS['patient']} {NOTE}"]
    marks = ["Brain Vision Data Exchange Marker File, Version 1.0", "[Common Infos]", "Codepage=UTF-8", f"DataFile={names[0]}", "[Marker Infos]", "Mk1=New Segment,,1,1,0,20310713174359000000", f"Mk2=Comment,{NOTE},200,1,0"]
    return list(zip(names, (x.T.astype("<f4").tobytes(), "\n".join(head).encode(), "\n".join(marks).encode())))


def test_the_service(patient, tmp_path):
    "Answers, jobs, errors, metrics, what it says on standard error, the audit log and the ledger."
    httpx = pytest.importorskip("httpx")
    from test_service import wait_for_job

    from hms_brain.service.web import running_service

    good, bad = patient.read_bytes(), bytearray(patient.read_bytes())
    bad[244:252] = b"Ocelotin"
    env = {"HMS_SYSTEM_THREADS": "1", "HMS_PATHS_JOBS": str(tmp_path / "jobs"), "HMS_PATHS_AUDIT": str(tmp_path / "audit")}
    told = []
    with running_service(log=tmp_path / "stderr", **env) as (url, process):
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            def send(route, data, name=patient.name):
                answer = http.post(route, files={"file": (name, data)})
                told.append((answer.headers, answer.content))
                return answer
            assert send("/predict/file", good).status_code == 200
            assert {send("/predict/file", x, n).status_code for x, n in ((bytes(bad), patient.name), (good[:3000], patient.name), (FIELDS["patient"].encode(), f"{NAME}.csv"), (good, f"{NAME}.exe"))} == {200, 422}
            assert send("/predict/file?unit=Ocelotine", good).status_code == 422
            several = http.post("/jobs", files=[("file", part) for part in brainvision()])
            told.append(several.content)
            jobs = [*(send("/jobs", x).json()["id"] for x in (good, bytes(bad))), several.json()["id"]]
            ended = [wait_for_job(http, id) for id in jobs]
            assert [j["state"] for j in ended] == ["done", "failed", "done"], ended
            process.send_signal(signal.SIGHUP)  # it says on standard error which model answers from now on
            end = time.monotonic() + 60
            while not (tmp_path / "stderr").stat().st_size and time.monotonic() < end: time.sleep(0.1)
            told += [ended, http.get("/metrics").text, http.get("/model").text, http.get(f"/{NAME}").text, http.get(f"/jobs/{NAME}").text]
        process.terminate()
        told += process.communicate(timeout=60)
    assert all((tmp_path / name).stat().st_size > 0 for name in ("audit/service.jsonl", "jobs/jobs.sqlite", "stderr"))
    assert hits(*told, tmp_path) == []


# notebooks and trackers

@pytest.mark.slow
def test_the_notebook_of_an_explanation(patient, tmp_path):
    pytest.importorskip("papermill")
    (tmp_path / "settings.ini").write_text("[system]\nthreads = 1\n")
    done = hms("explain", "-p", f"file={patient}", "-p", f"bundle={ROOT / 'hms_brain/assets/bundle'}", "-p", "methods=", "-p", "step=10", "-p", "out=out", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"run.json", "06_explain.ipynb", "explain.html"}
    assert hits(done.stdout, done.stderr, tmp_path / "out") == []


@pytest.mark.slow
def test_a_training_and_its_trackers(tmp_path):
    "Names in the metadata of every file of a data set: cache, run, notebooks, bundle, TensorBoard and MLflow know none."
    pytest.importorskip("mlflow")
    (tmp_path / "settings.ini").write_text("[system]\nworkers = 1\nthreads = 1\n")
    assert hms("simulate", "data", "--patients", 6, "--workers", 1, cwd=tmp_path).returncode == 0
    for path in (tmp_path / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"patient": FIELDS["patient"], "pandas": json.dumps({"columns": [], "note": NOTE})}), path)
        assert hits(path)
    prepared = hms("prepare", "-p", "data=data", "-p", "cache=cache", "-p", "folds=2", "-p", "limit=24", cwd=tmp_path)
    trained = hms("train", "-p", "cache=cache", "-p", "epochs=1", "-p", "batch_size=8", "-p", "track=tensorboard,mlflow", "-p", "out=outputs/runs/one", cwd=tmp_path, timeout=300)
    assert (prepared.returncode, trained.returncode) == (0, 0), prepared.stderr + trained.stderr
    assert (tmp_path / "outputs/runs/mlflow.db").is_file() and (tmp_path / "outputs/runs/one/03_train.ipynb").is_file()
    assert hits(prepared.stdout, prepared.stderr, trained.stdout, trained.stderr, tmp_path / "cache", tmp_path / "outputs") == []


# de-identified copies

@pytest.mark.parametrize("kind", ["edf", "edf+c", "edf+d", "bdf"])
def test_deidentified_copies(tmp_path, kind):
    source, copy, kept = (tmp_path / f"{n}.edf" for n in (NAME, "nobody", "kept"))
    source.write_bytes(person(20, kind))
    deidentify_edf(source, copy)
    deidentify_edf(source, kept, keep=True)
    a, b = source.read_bytes(), copy.read_bytes()
    assert hits(copy) == [] and len(a) == len(b)
    assert b[8:88].decode().split() == ["X"] * 4 and b[88:168].decode().split() == ["Startdate", *"XXXX"] and b[168:184] == b"01.01.8500.00.00" and b[:8] == a[:8]
    header = read_header(copy)
    assert header == dataclasses.replace(read_header(source), issues=header.issues) and header.issues == ()
    numbers = np.frombuffer(a[header.offset:], np.uint8).reshape(header.n_records, -1), np.frombuffer(b[header.offset:], np.uint8).reshape(header.n_records, -1)
    signals = header.record_bytes - sum(header.samples[i] for i in header.annotations) * header.width
    assert_array_equal(numbers[0][:, :signals], numbers[1][:, :signals])
    assert kept.read_bytes()[header.offset:] == a[header.offset:], "with --keep-annotations every byte behind the header is the same"
    assert {w for _, w in hits(kept)} == ({"Wombatina"} if header.annotations else set())
    if header.annotations: assert_array_equal(record_onsets(source, read_header(source)), record_onsets(copy, header))


def test_a_filter_may_stay_and_nothing_else(tmp_path):
    filters = ["HP:0.1Hz LP:75Hz N:50Hz", "HP: DC; LP: 410 Hz", "HP:0.1Hz Zebulonia", "N " * 39, *["Narwhalix"] * 15]
    (tmp_path / "a.edf").write_bytes(person(20, filter=filters))
    deidentify_edf(tmp_path / "a.edf", tmp_path / "b.edf")
    data = (tmp_path / "b.edf").read_bytes()
    at = 256 + 20 * (16 + 80 + 5 * 8)
    assert [data[at + 80 * i:at + 80 * (i + 1)].decode().strip() for i in range(20)] == [*filters[:2], "", filters[3].strip(), *[""] * 16]


def test_other_readers_open_a_deidentified_copy(patient, tmp_path):
    edfio = pytest.importorskip("edfio")
    deidentify_edf(patient, tmp_path / "b.edf")
    shown = edfio.read_edf(tmp_path / "b.edf")
    assert (shown.patient.name, shown.patient.code, shown.recording.investigator_technician_code, shown.annotations) == ("X", "X", "X", ())
    with pytest.raises(ValueError, match=r"(?i)date"): shown.recording.startdate  # noqa: B018
    assert (shown.starttime.hour, shown.starttime.minute) == (0, 0)


def test_a_cut_recording_loses_its_last_piece_only(tmp_path):
    whole = person(20)
    (tmp_path / "a.edf").write_bytes(whole[:-700])
    deidentify_edf(tmp_path / "a.edf", tmp_path / "b.edf")
    header = read_header(tmp_path / "b.edf")
    assert header.n_records == 19 and header.issues == () and hits(tmp_path / "b.edf") == []


def test_the_command(patient, tmp_path):
    out = tmp_path / "nobody.edf"
    done = hms("deidentify", patient, "-o", out)
    assert done.returncode == 0 and "annotations dropped" in done.stdout and hits(done.stdout, done.stderr, tmp_path) == []
    before = out.read_bytes()
    assert "is there already" in one_line(hms("deidentify", patient, "-o", out)) and out.read_bytes() == before
    (tmp_path / "a.csv").write_text("Fp1,F3\n1,2\n")
    assert "is not EDF or BDF" in one_line(hms("deidentify", tmp_path / "a.csv", "-o", tmp_path / "b.edf"))
    assert "annotations kept" in hms("deidentify", patient, "-o", tmp_path / "kept.edf", "--keep-annotations").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "kept.edf", "nobody.edf"]


def test_an_annotated_copy_keeps_earlier_notes_only_when_told(patient, tmp_path):
    for name, keep in (("a.edf", False), ("b.edf", True)): annotate_edf(patient, tmp_path / name, [(2.0, 1.0, "hms: lpd 0.9")], keep=keep)
    assert hits(tmp_path / "a.edf") == [] and {w for _, w in hits(tmp_path / "b.edf")} == {"Wombatina"}
    assert all(b"hms: lpd 0.9" in (tmp_path / n).read_bytes() for n in ("a.edf", "b.edf"))


def test_a_copy_that_fails_leaves_nothing(patient, tmp_path, monkeypatch):
    def full(*_): raise OSError(28, os.strerror(28))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"): deidentify_edf(patient, tmp_path / "b.edf")
    assert list(tmp_path.iterdir()) == []


def test_no_library_tells_what_it_runs(tmp_path):
    "ONNX Runtime leaves what it would send in the folders for temporary and cached files; with us it leaves nothing, without us it would."
    script = "import sys, time; {}; import onnxruntime as ort; ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']); time.sleep(1)"
    model = str(Path(hms_brain.__file__).parent / "assets/bundle/model.onnx")
    def left(folder, first):
        folder.mkdir()
        env = {k: v for k, v in os.environ.items() if k not in (*TELLS, "CI")} | dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"), str(folder))
        subprocess.run([sys.executable, "-c", script.format(first), model], check=True, env=env, cwd=folder)
        return [p.name for p in folder.rglob("*") if p.is_file()]
    assert left(tmp_path / "ours", "import hms_brain.core") == []
    assert left(tmp_path / "bare", "pass"), "this version tells nobody: nothing was shown"
