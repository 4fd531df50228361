"""The app as a reader meets it: a real process, a real browser, no network but the loopback."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, WAIT_MS, needs_browser
from hms_brain.catalog import train_schema
from hms_brain.core import CHANNELS, CLASSES, FS, InputError
from hms_brain.pages import open_reader, page, pack_page, unpack_page
from hms_brain.predict import predict_file
from hms_brain.records import read_recording
from hms_brain.scan_files import write_bids
from hms_brain.results import peak_time, report_html, write_downloads
from hms_brain.session import PACKED, Session, explain_at, predict_at, progress, scan_session
from hms_brain.simulate import simulate_recording

SHOTS = ROOT / "outputs/reports/app"
LONG_S = max(600, WAIT_MS // 1000)  # of a scan


def edf(path, signal, fs, labels, onsets=None):
    "A plain EDF, or an EDF+D when onsets of its one-second records are given."
    n_seconds, n = signal.shape[1] // fs, len(labels)
    stamped = onsets is not None
    names, samples = [*labels, *(["EDF Annotations"] if stamped else [])], [fs] * n + [15] * stamped
    put = lambda value, width: str(value).encode("latin-1")[:width].ljust(width)
    each = lambda values, width: b"".join(put(v, width) for v in values)
    m, mark = n + stamped, [1] * stamped
    head = put("0", 8) + put("X X X X", 80) + put("Startdate X X X X", 80) + b"01.01.2000.00.00" + put(256 * (m + 1), 8) + put("EDF+D" if stamped else "", 44) + put(n_seconds, 8) + put(1, 8) + put(m, 4)
    head += each(names, 16) + put("", 80 * m) + each(["uV"] * n + [""] * stamped, 8) + each([-1000] * n + [-1 * x for x in mark], 8) + each([1000] * n + mark, 8)
    head += each([-32767] * n + [-32768] * stamped, 8) + each([32767] * n + [32767] * stamped, 8) + put("", 80 * m) + each(samples, 8) + put("", 32 * m)
    steps = np.clip(np.round(np.nan_to_num(signal) * 32.767), -32767, 32767).astype("<i2")
    with open(path, "wb") as f:
        f.write(head)
        for k in range(n_seconds):
            f.write(steps[:, k * fs:(k + 1) * fs].tobytes())
            if stamped: f.write(f"+{onsets[k]}\x14\x14\0".encode().ljust(30, b"\0"))
    return path


def gap_file(path, eeg, seconds, gap):
    "An EDF+D of so many seconds of data, a gap of so many in the middle."
    x = np.tile(eeg, (1, -(-int(seconds * FS) // eeg.shape[1])))[:, :int(seconds * FS)]
    onsets = np.arange(seconds) + gap * (np.arange(seconds) >= seconds // 2)
    return edf(path, x, int(FS), [*CHANNELS, "ECG EKG"], onsets)


@pytest.fixture(scope="module")
def eeg():
    "Ten simulated minutes."
    return read_recording(ROOT / "hms_brain/assets/sample.edf", sandbox=False).signal


START = "from hms_brain.cli import main; main()"


@contextmanager
def running_app(folder, program=START):
    "A running app: its address, its process and where its files lie."
    pytest.importorskip("gradio", reason="the app needs its extra")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "HMS_SYSTEM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, "app", "--port", str(port)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try: httpx.get(address, timeout=20); break
        except httpx.TransportError:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.3)
    try: yield address, process, folder
    finally:
        process.terminate()
        process.wait(60)
    assert not list(folder.glob("hms_app_*")), "files stay behind"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "One for the tests that need nothing special."
    with running_app(tmp_path_factory.mktemp("app")) as it: yield it


@contextmanager
def opened_page(browser, address):
    "A page of the app; fails when anything asks beyond the loopback, or a script stumbles."
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light", accept_downloads=True)
    page, foreign, broken = context.new_page(), [], []
    near = lambda url: re.match(r"(http://127\.0\.0\.1|blob:http://127\.0\.0\.1|data)[:/]", url)
    context.expose_function("a", lambda: broken.append("a name ran"))
    context.route("**/*", lambda route: route.continue_() if near(route.request.url) else route.abort())
    page.on("request", lambda request: None if near(request.url) else foreign.append(request.url))
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda e: broken.append(str(e)))
    page.on("dialog", lambda d: (broken.append(f"dialog {d.message}"), d.dismiss()))
    page.goto(address)
    page.locator("#sample").wait_for()
    try: yield page
    finally: context.close()
    assert foreign == [] and broken == []


@pytest.fixture
def tab(browser, server):
    "A page of the shared app."
    with opened_page(browser, server[0]) as page: yield page


def give(tab, *files):
    "Upload through the file chooser, as a hand would."
    with tab.expect_file_chooser() as chooser: tab.locator("#upload button").first.click()
    chooser.value.set_files([str(f) for f in files])


def wait_for(what, seconds=60):
    "Until it is true."
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "never true"
        time.sleep(0.05)


def until(frame, expression, timeout=WAIT_MS / 1000):
    "Wait until an expression is true. The page's policy forbids eval, so it is asked from outside."
    end = time.monotonic() + timeout
    while not frame.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        frame.page.wait_for_timeout(100)


def start(tab, step="a window every 30 s"):
    "Choose a step, begin, and wait until the reader is there."
    tab.locator("#step input").click()
    tab.get_by_role("option", name=step).click()
    tab.locator("#start").click()
    tab.frame_locator("iframe.hms-viewer").locator("#lanes").wait_for()
    frame = next(f for f in tab.frames if "/viewer/" in f.url)
    until(frame, "Boolean(window.hmsReader && hmsReader.view.about)")
    return frame


def finished(frame):
    "Wait for the end of the scan."
    until(frame, "!['running', 'waiting'].includes(hmsReader.rows.state)", timeout=LONG_S)
    assert frame.evaluate("hmsReader.rows.state") == "done"


def beside(frame, words):
    "Wait until a sentence stands beside the page; it is drawn with the next frame."
    until(frame, f"document.getElementById('why').textContent.startsWith({json.dumps(words)})", timeout=30)


def press(frame, key):
    frame.locator("body").press(key)


def drawn(frame):
    "Wait until the page on the screen is complete."
    until(frame, "hmsReader.chunks.has([Math.floor(hmsReader.view.at / 10), hmsReader.view.filter, hmsReader.view.mains].join('|'))"
                 " && [...hmsReader.chunks.values(), ...hmsReader.tiles.values()].every(c => c.data)")


FILES = ("probabilities.csv", "burden.csv", "summary.json", "report.html", "report.pdf", "recording_szcore.tsv", "recording_annotated.edf", "bids.zip", "peak.html", "peak.json", "labels.csv")


def numbers(path):
    "Every sample of an EDF as it is stored, its notes left out: (records, samples)."
    raw = Path(path).read_bytes()
    n, size, count = int(raw[252:256]), int(raw[184:192]), int(raw[236:244])
    names, each = [raw[256 + 16 * k:272 + 16 * k].strip() for k in range(n)], [int(raw[256 + 216 * n + 8 * k:264 + 216 * n + 8 * k]) for k in range(n)]
    kept = np.repeat([b"Annotations" not in x for x in names], each)
    return np.frombuffer(raw[size:], "<i2").reshape(count, sum(each))[:, kept]


def opened(files, source, duration):
    "Each file to take home is what it claims to be."
    table = pd.read_csv(files["probabilities.csv"], keep_default_na=False)
    assert np.allclose(table[list(CLASSES)].sum(axis=1), 1, atol=1e-6) and set(table.predicted) <= {*CLASSES, ""} and table["at"].is_monotonic_increasing
    assert (table.predicted == "").equals(table.abstained.astype(bool))
    hours = pd.read_csv(files["burden.csv"])
    assert list(hours)[:2] == ["hour", "judged"] and len(hours) == -(-int(table["at"].max()) // 3600)
    summary = json.loads(files["summary.json"].read_text())
    assert summary["events"] and summary["bundle"]["simulated"] is True and "Research use only" in summary["notice"]
    for name in ("report.html", "peak.html"):
        html = files[name].read_text()
        assert "simulated EEG only" in html and not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", html)
    pdf = files["report.pdf"].read_bytes()
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 1
    sz = pd.read_csv(files["recording_szcore.tsv"], sep="\t")
    assert list(sz) == ["onset", "duration", "eventType", "confidence", "channels", "dateTime", "recordingDuration"]
    assert set(sz.eventType) <= {"sz", "bckg"} and (sz.recordingDuration == duration).all() and ((sz.onset + sz.duration) <= duration).all()
    assert np.array_equal(numbers(files["recording_annotated.edf"]), numbers(source)), "not a sample changed"
    assert b"hms: " in files["recording_annotated.edf"].read_bytes()
    valid_bids(files["bids.zip"], len(summary["events"]), duration)


def valid_bids(archive, n_events, duration):
    "The rules of BIDS for a derivative with events: names, description, columns, sidecar."
    with zipfile.ZipFile(archive) as z: inside = {name: z.read(name).decode() for name in z.namelist()}
    about = json.loads(inside.pop("dataset_description.json"))
    assert "Research use only" in inside.pop("README")
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"][0]["Name"] and {"Name", "BIDSVersion"} <= set(about)
    pattern = r"sub-([a-zA-Z0-9]+)/eeg/sub-\1_task-[a-zA-Z0-9]+_desc-[a-zA-Z0-9]+_events\.(tsv|json)"
    assert len(inside) == 2 and all(re.fullmatch(pattern, name) for name in inside)
    tsv, sidecar = (next(text for name, text in inside.items() if name.endswith(end)) for end in (".tsv", ".json"))
    rows = [line.split("\t") for line in tsv.splitlines()]
    assert rows[0][:2] == ["onset", "duration"] and len(rows) == 1 + n_events and len(set(rows[0])) == len(rows[0])
    assert set(rows[0]) <= set(json.loads(sidecar)) and set(r[2] for r in rows[1:]) <= set(json.loads(sidecar)["trial_type"]["Levels"])
    assert all(0 <= float(r[0]) and float(r[0]) + float(r[1]) <= duration + 1e-3 for r in rows[1:])


def drawn_alone(browser, pages):
    "Pages show their figures with the network cut."
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 1600})
    wrong = []
    context.on("weberror", lambda e: wrong.append(str(e.error)))
    context.on("requestfailed", lambda r: wrong.append(r.url))
    for path in pages:
        page = context.new_page()
        page.goto(path.as_uri())
        page.locator(".main-svg").first.wait_for()
        page.screenshot(path=SHOTS / f"file_{path.stem}.png")
    assert wrong == []
    context.close()


@pytest.fixture(scope="module")
def looked(tmp_path_factory, eeg):
    "Two minutes with a gap of half a minute between them, scanned: session and source."
    folder = tmp_path_factory.mktemp("looked")
    source = gap_file(folder / "recording.edf", eeg, 120, 30)
    session = Session(folder, open_reader(source, folder), step=10.0)
    scan_session(session)
    assert progress(session) | {"error": ""} == {"state": "done", "done": 11, "total": 11, "left": None, "error": ""}
    return session, source


def test_the_service_has_the_page_beside_it():
    "The same page at /app, behind its own guards; the service is as ever; nobody else can reach it."
    from hms_brain.service.web import running_service
    with running_service("--app", HMS_SYSTEM_THREADS="1") as (url, _), httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        page = http.get("/app/")
        assert page.is_success and "content-security-policy" in page.headers and "gradio" in page.text
        assert http.get("/app/gradio_api/startup-events").is_success and http.get("/app/viewer/nothing").status_code == 404
        assert http.get("/health").json()["status"] == "ok" and http.get("/gradio_api/info").status_code == 404
        assert http.get("/app/", headers={"host": "evil.example"}).status_code == 400
    for words, reason in ((("--host", "0.0.0.0"), "no users and passwords"), (("--bundle", "x"), "bundle of the settings")):
        ran = subprocess.run([sys.executable, "-c", "from hms_brain.cli import main; main()", "serve", "--app", *words], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 2 and reason in ran.stderr, ran.stderr


def test_files_without_a_browser(looked, tmp_path):
    session, source = looked
    session.labels = [{"at": 60.0, "label": "gpd"}]
    files = {Path(f).name: Path(f) for f in write_downloads(session, tmp_path)}
    assert sorted(files) == sorted(FILES)
    opened(files, source, 150)
    text = report_html(session)
    assert "Windows like it" in text and "rules of ACNS 2021" in text and "Research use only" in text
    assert "not judged: missing" in text or "not judged: gap" in text, "why windows were not asked"
    assert [r["at"] for r in session.rows if r["abstained"]] == [55.0, 65.0, 75.0, 85.0, 95.0], "more than a fifth of them is missing"


def test_the_bids_validator_is_content(looked, tmp_path):
    "The reference validator finds no error and nothing to recommend, but that a program names no authors."
    validator = shutil.which("bids-validator-deno", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if validator is None: pytest.skip("no BIDS validator (pip install bids-validator-deno)")
    session, _ = looked
    assert session.events
    write_bids(tmp_path / "bids", session.events, session.scan)
    ran = subprocess.run([validator, str(tmp_path / "bids"), "--format", "json"], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["summary"]["totalFiles"] == 4 and {i["code"] for i in report["issues"]["issues"]} <= {"TOO_FEW_AUTHORS"}, report["issues"]


def test_threshold_reaches_every_file(looked, tmp_path):
    session, _ = looked
    session.high = 0.99
    try:
        files = {Path(f).name: Path(f) for f in write_downloads(session, tmp_path)}
        assert json.loads(files["summary.json"].read_text())["events"] == [] and "probability of 0.99" in files["report.html"].read_text()
        assert pd.read_csv(files["burden.csv"]).lpd.sum() == 0 and peak_time(session) is None and "probability of 0.99" in report_html(session)
    finally: session.high = 0.5


def test_explanation_names_the_side(looked):
    found = explain_at(looked[0], 30.0, step=10.0)
    sides = {line["name"]: sum(line["evidence"]) for line in found["lines"]}
    assert found["label"] == "lpd" and len(found["lines"][0]["evidence"]) == 5
    assert sides["LL"] + sides["LP"] > sides["RL"] + sides["RP"], "the pattern is on the left"


def test_nothing_to_report_yet(tmp_path, eeg):
    session = Session(tmp_path, open_reader(edf(tmp_path / "a.edf", eeg[:, :int(60 * FS)], int(FS), [*CHANNELS, "ECG EKG"]), tmp_path))
    with pytest.raises(InputError, match="nothing has been read yet"): report_html(session)
    with pytest.raises(InputError, match="nothing has been read yet"): write_downloads(session, tmp_path / "files")


@needs_browser
@pytest.mark.slow
def test_sample_from_open_to_report(tab, tmp_path):
    assert "stays on this computer" in tab.inner_text("body") and "simulated EEG only" in tab.inner_text("body") and "Research use only" in tab.inner_text("body")
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "1_open.png")
    tab.locator("#sample").click()
    tab.get_by_text("Sampling rate").wait_for()
    facts = tab.inner_text("#facts")
    assert "10 min 00 s" in facts and "200 Hz" in facts and "19 of 19" in facts and "none" in facts
    tab.screenshot(path=SHOTS / "2_check.png")
    frame = start(tab)
    finished(frame)
    until(frame, "hmsReader.events.length > 0")
    assert "LPD" in frame.inner_text("#events")
    before = frame.locator("#events tr").count()
    frame.locator("#threshold").fill("0.95")
    until(frame, "hmsReader.events.length === 0")
    frame.locator("#threshold").fill("0.5")
    until(frame, f"hmsReader.events.length === {before}")
    tab.screenshot(path=SHOTS / "3_overview.png")
    every_key(tab, frame)
    report(tab, tmp_path)


def every_key(tab, frame):
    "Each key does what the help says."
    state = lambda what: frame.evaluate(f"hmsReader.{what}")
    press(frame, "Enter")
    assert state("view.mode") == "page"
    press(frame, "Home"); assert state("view.at") == 0
    press(frame, "PageDown"); press(frame, "PageDown"); assert state("view.at") == 20
    press(frame, "PageUp"); assert state("view.at") == 10
    press(frame, "ArrowRight"); assert state("view.at") == 11
    press(frame, "Shift+ArrowRight"); press(frame, "ArrowLeft"); assert state("view.at") == 20
    press(frame, "End"); assert state("view.at") == 590
    press(frame, "p"); event = state("events")[0]
    assert event["start"] <= state("view.at") + 5 < event["stop"]
    press(frame, "Home"); press(frame, "n"); assert event["start"] <= state("view.at") + 5 < event["stop"]
    drawn(frame)
    tab.screenshot(path=SHOTS / "4_page.png")
    for key, what, by in (("m", "montage", 1), ("+", "sensitivity", -1), ("-", "sensitivity", 1), ("-", "sensitivity", 1), ("f", "filter", 1)):
        old = state(f"view.{what}"); press(frame, key); assert state(f"view.{what}") - old == by, key
    press(frame, "+"); drawn(frame)
    frame.locator("#filter").select_option(label="0.5 Hz up"); drawn(frame)
    assert state("view.filter") == 7
    frame.locator("#filter").select_option(label="0.5–40 Hz"); drawn(frame)
    for _ in range(3): press(frame, "PageDown")
    for k, label in enumerate(CLASSES):
        press(frame, str(k + 1))
        assert [x["label"] for x in state("labels")] == [label], "one label per place: the last"
    press(frame, "PageDown"); press(frame, "2"); press(frame, "3"); press(frame, "u")
    assert [x["label"] for x in state("labels")] == ["other", "lpd"], "what was there before returns"
    press(frame, "u"); assert [x["label"] for x in state("labels")] == ["other"]
    press(frame, "2"); press(frame, "PageDown"); press(frame, "1"); press(frame, "Control+z")
    assert [x["label"] for x in state("labels")] == ["other", "lpd"]
    press(frame, "n"); press(frame, "o"); until(frame, "hmsReader.view.why !== null")
    assert len(state("view.why.lines")) == 5 and "speaks for" in frame.inner_text("#toast")
    tab.wait_for_timeout(300)
    tab.screenshot(path=SHOTS / "4_explanation.png")
    press(frame, "o"); assert state("view.why") is None
    press(frame, "?"); assert frame.locator("#keys").is_visible()
    press(frame, "?"); assert not frame.locator("#keys").is_visible()
    press(frame, "c"); assert state("view.safe") is True
    press(frame, "d"); assert frame.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.wait_for_function("document.body.classList.contains('dark')")
    tab.set_viewport_size({"width": 1920, "height": 1080}); drawn(frame); tab.wait_for_timeout(500)
    tab.screenshot(path=SHOTS / "4_page_dark.png")
    press(frame, "d"); tab.set_viewport_size({"width": 1280, "height": 800})
    press(frame, "Escape"); assert state("view.mode") == "overview"


def report(tab, folder):
    "Screen 5, and each file opened."
    tab.get_by_role("tab", name="4 Report").click()
    tab.get_by_text("Burden per hour").wait_for()
    text = tab.inner_text("#report")
    assert "judged" in text and "LPD" in text and re.search("continuous|abundant|frequent", text) and "Research use only" in text and "rules of ACNS 2021" in text
    tab.wait_for_timeout(500)
    tab.screenshot(path=SHOTS / "5_report.png", full_page=True)
    tab.locator("#make").click()
    got = {}
    for name in FILES:
        link = tab.locator(f'#files a[download="{name}"]').first
        link.wait_for()
        with tab.expect_download() as coming: link.click()
        coming.value.save_as(folder / name)
        got[name] = folder / name
    tab.screenshot(path=SHOTS / "5_files.png", full_page=True)
    opened(got, ROOT / "hms_brain/assets/sample.edf", 600)
    assert json.loads(got["peak.json"].read_text())["predicted"] == "lpd"
    mine = train_schema().validate(pd.read_csv(got["labels.csv"]))
    assert mine.expert_consensus.tolist() == ["Other", "LPD"]
    tab.evaluate("document.body.classList.add('dark')")
    for name in ("4 Report", "2 Check", "1 Open"):
        tab.get_by_role("tab", name=name).click()
        tab.wait_for_timeout(600)
        tab.screenshot(path=SHOTS / f"dark_{name[0]}.png", full_page=True)
    drawn_alone(tab.context.browser, [got["report.html"], got["peak.html"]])


@needs_browser
def test_real_recording(tab, real):
    give(tab, real / "edf/eeg_burst_eg.edf")
    tab.get_by_text("Sampling rate").wait_for()
    assert "256 Hz" in tab.inner_text("#facts") and "resampled" in tab.inner_text("#facts")
    frame = start(tab)
    press(frame, "Enter"); drawn(frame)
    tab.wait_for_timeout(800)
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "real_page.png")
    finished(frame)
    assert frame.evaluate("hmsReader.rows.n") > 0


@needs_browser
@pytest.mark.parametrize("seconds", [600, pytest.param(7200, marks=pytest.mark.slow)])
def test_gap(tab, tmp_path, eeg, seconds):
    give(tab, gap_file(tmp_path / "gap.edf", eeg, seconds, 90))
    tab.get_by_text("Sampling rate").wait_for()
    assert "1, 1 min 30 s without data" in tab.inner_text("#facts")
    frame = start(tab)
    assert frame.evaluate("hmsReader.view.about.gaps") == [[seconds / 2, seconds / 2 + 90]]
    finished(frame)
    table = np.frombuffer(bytes(frame.evaluate("[...hmsReader.rows.bytes]")), np.uint8).view(PACKED)
    assert set(table["status"].tolist()) == {0, 1}, "judged outside the gap, not in it, and the gap is no poor signal"
    assert frame.evaluate("hmsReader.view.about.ekg_gain") < 0.1, "a gap in the middle does not blow up the EKG"
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "gap_overview.png")
    press(frame, "Enter")
    frame.evaluate(f"document.getElementById('strip').clientWidth && (hmsReader.view.at = {seconds / 2 - 5})"); press(frame, "ArrowRight"); drawn(frame)
    tab.screenshot(path=SHOTS / "gap_page.png")
    press(frame, "Home")
    for key, k in (("n", 0), ("n", 1), ("p", 0), ("n", 1)):
        press(frame, key)
        event = frame.evaluate(f"hmsReader.events[{k}]")
        assert event["start"] <= frame.evaluate("hmsReader.view.at") + 5 < event["stop"], (key, k)


def mend(tab, row, name, electrode):
    "Type an electrode beside a label, and see it stand there. Only rows in sight exist."
    given, to = (tab.locator(f'#mapping [role="gridcell"][data-row="{row}"][data-col="{k}"]') for k in (0, 1))
    tab.locator('#mapping [role="gridcell"]').first.hover()
    while not to.count():
        tab.mouse.wheel(0, 60)
        tab.wait_for_timeout(300)
    assert given.inner_text().strip() == name
    cell = to.locator("textarea")
    while not cell.count():  # the table may still be on the move
        to.dblclick()
        tab.wait_for_timeout(500)
    cell.fill(electrode)
    to.locator("textarea").press("Enter")
    to.get_by_text(electrode, exact=True).wait_for()


@pytest.mark.slow
@needs_browser
def test_mapping_is_mended_and_names_are_text(tab, tmp_path, eeg):
    "Names that would run as scripts are shown as they are; a channel with an odd name gets its place back."
    evil = ["<script src=//a>", "<svg onload=a()>", '"><b onclick=a()', "{{7*7}}"]  # sixteen letters at most
    labels = [*CHANNELS, "ECG EKG"]
    for i, name in zip((0, 3, 7, 12), evil): labels[i] = name
    give(tab, edf(tmp_path / "evil.edf", eeg[:, :int(60 * FS)], int(FS), labels))
    tab.get_by_text("cannot be used as it is").wait_for()
    assert "missing" in tab.inner_text("#facts") and not tab.locator("#start").is_enabled()
    for row, name, electrode in zip((0, 3, 7, 12), evil, ("Fp1", "P3", "O1", "F4")): mend(tab, row, name, electrode)
    tab.locator("#apply").click()
    tab.get_by_text("19 of 19").wait_for()
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "2_mended.png")
    frame = start(tab)
    finished(frame)
    press(frame, "Enter"); drawn(frame)
    hosts = [f.url for f in tab.frames]
    assert all(url.startswith("http://127.0.0.1") for url in hosts) and tab.locator("svg[onload], b[onclick], script[src$='//a']").count() == 0


@needs_browser
def test_cancel(tab, tmp_path, eeg):
    give(tab, gap_file(tmp_path / "long.edf", eeg, 1200, 10))
    tab.get_by_text("Sampling rate").wait_for()
    frame = start(tab, "a window every 2 s")
    until(frame, "hmsReader.rows.n > 0", timeout=LONG_S)
    assert "left" in frame.inner_text("#left")
    frame.locator("#cancel").click()
    until(frame, "hmsReader.rows.state === 'stopped'")
    assert frame.evaluate("hmsReader.rows.n > 0 && hmsReader.rows.n < hmsReader.rows.total")
    frame.locator("#threshold").fill("0.95")
    until(frame, "hmsReader.events.length === 0")
    tab.wait_for_timeout(3000)
    assert re.fullmatch(r"Stopped at 0:\d\d:\d\d of 0:20:10: what lies behind was not looked at.", frame.inner_text("#left")) and frame.locator("#left").is_visible()
    assert frame.inner_text("#events") == "nothing above the threshold so far" and not frame.locator("#cancel").is_visible()
    press(frame, "Enter"); press(frame, "End")
    beside(frame, "Not looked at: the scan ended before.")
    SHOTS.mkdir(parents=True, exist_ok=True)
    press(frame, "Escape"); tab.screenshot(path=SHOTS / "stopped.png")
    tab.get_by_role("tab", name="4 Report").click()
    tab.get_by_text("The scan was stopped at").first.wait_for()


@needs_browser
def test_a_failed_scan_looks_like_one(tab, tmp_path, eeg):
    "The reason stays on the screen, with the time; what was found stays too."
    give(tab, edf(tmp_path / "a.edf", eeg[:, :int(120 * FS)], int(FS), [*CHANNELS, "ECG EKG"]))
    tab.get_by_text("Sampling rate").wait_for()
    def fail(route):
        reply = route.fetch()
        about = json.loads(reply.headers["x-scan"])
        route.fulfill(response=reply, headers=reply.headers | {"x-scan": json.dumps(about | {"state": "failed" if about["done"] else about["state"], "left": None, "error": "recording.edf: cannot be read any more"})})
    tab.route("**/viewer/scan*", fail)
    frame = start(tab, "a window every 10 s")
    until(frame, "hmsReader.rows.state === 'failed'", timeout=LONG_S)
    tab.wait_for_timeout(3000)
    assert re.fullmatch(r"Failed at 0:\d\d:\d\d of 0:02:00: recording.edf: cannot be read any more", frame.inner_text("#left")) and frame.locator("#left").is_visible()


@needs_browser
def test_every_event_is_reached(tab, tmp_path, eeg):
    "Two that begin three seconds apart, two at the same time, one at the end: n and p stop at each, and p in the middle of one goes to its beginning."
    give(tab, edf(tmp_path / "a.edf", eeg[:, :int(300 * FS)], int(FS), [*CHANNELS, "ECG EKG"]))
    tab.get_by_text("Sampling rate").wait_for()
    begins = [20, 23, 80, 80, 285]
    made = [{"kind": c, "start": a, "stop": a + 15, "confidence": 0.8, "peak": 0.9, "active": 15} for c, a in zip(CLASSES, begins)]
    tab.route("**/viewer/events*", lambda route: route.fulfill(json={"events": made}))
    frame = start(tab)
    until(frame, "hmsReader.events.length === 5")
    press(frame, "Enter"); press(frame, "Home")
    def at(key):
        press(frame, key)
        return frame.evaluate("hmsReader.view.at")
    assert [at("n") for _ in range(6)] == [20, 23, 80, 80, 285, 285]
    assert [at("p") for _ in range(5)] == [80, 80, 23, 20, 20]
    assert at("n") == 23 and [at("ArrowRight") for _ in range(3)][-1] == 26 and at("p") == 23


@needs_browser
def test_quality_is_seen(tab, tmp_path, eeg):
    "Three faults in the first two minutes, a dead last minute: each in its row of the strip, and in words beside the page."
    x, second = np.nan_to_num(eeg[:, :int(240 * FS)]).copy(), np.arange(int(240 * FS)) / FS
    early = second < 120
    x[3, early] = 0
    x[7] = np.where(early, np.clip(x[7], *np.percentile(x[7], (10, 90))), x[7])
    x[10] += np.where(early, 300 * np.sin(2 * np.pi * 50 * second), 0)
    x[:, second >= 160] = 0
    give(tab, edf(tmp_path / "faults.edf", x, int(FS), [*CHANNELS, "ECG EKG"]))
    tab.get_by_text("Sampling rate").wait_for()
    frame = start(tab, "a window every 10 s")
    finished(frame)
    until(frame, "Boolean(document.getElementById('lanes').kept)")
    tab.wait_for_timeout(300)
    share = frame.evaluate("""(() => { const c = document.getElementById('lanes'), n = c.clientWidth - 88, g = c.kept.getContext('2d');
        return [0, 1, 2].map(k => { const d = g.getImageData(74, c.clientHeight - 62 + 2 + 11 * k + 2, n, 1).data; let seen = 0; for (let i = 3; i < d.length; i += 4) seen += d[i] > 0; return seen / n; }); })()""")
    assert 0.5 < share[0] <= 0.9 and 0.2 < share[1] < 0.6 and 0.2 < share[2] < 0.6, share
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "quality.png")
    press(frame, "Enter"); press(frame, "Home")
    for _ in range(6): press(frame, "PageDown")
    beside(frame, "Noticed: ")
    said = frame.inner_text("#why")
    assert all(w in said for w in ("flat electrodes", "clipping", "mains hum")), said
    press(frame, "End"); press(frame, "PageUp"); press(frame, "PageUp")
    beside(frame, "Poor signal: the model was not asked (flat electrodes")


@needs_browser
@pytest.mark.slow
def test_another_file_empties_the_tabs(tab, tmp_path, eeg):
    "Reader, report, files and unit of the recording before are gone when the next one is opened, and when it cannot be."
    files = [edf(tmp_path / f"{k}.edf", eeg[:, :int(n * FS)], int(FS), [*CHANNELS, "ECG EKG"]) for k, n in (("a", 120), ("b", 90))]
    (tmp_path / "c.edf").write_bytes(b"\x89PNG not an EEG")
    give(tab, files[0])
    tab.get_by_text("2 min 00 s").wait_for()
    frame = start(tab)
    finished(frame)
    tab.get_by_role("tab", name="4 Report").click()
    tab.get_by_text("Burden per hour").wait_for()
    tab.locator("#make").click()
    tab.locator('#files a[download="summary.json"]').first.wait_for()
    for file, seen in ((files[1], "1 min 30 s"), (tmp_path / "c.edf", "is a PNG image")):
        tab.get_by_role("tab", name="1 Open").click()
        tab.locator('#upload button[aria-label*="lear"]').first.click()
        give(tab, file)
        tab.get_by_text(seen).wait_for()
        for name in ("3 Read", "4 Report"): assert tab.get_by_role("tab", name=name).is_disabled(), name
        assert tab.locator("iframe.hms-viewer").count() == 0 and "Burden" not in (tab.locator("#report").text_content() or "") and tab.locator("#files a").count() == 0


@needs_browser
def test_not_a_recording(tab, tmp_path):
    (tmp_path / "a.edf").write_bytes(b"\x89PNG not an EEG")
    give(tab, tmp_path / "a.edf")
    tab.get_by_text("is a PNG image").wait_for()
    assert not tab.locator("#start").is_enabled()


def test_doors(server):
    "Foreign hosts and origins stay outside; nothing is said without a session; policies are there."
    address, _, _ = server
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80"):
        assert httpx.get(address, headers={"Host": host}).status_code == 400
    for origin in ("http://evil.example", "null"):
        assert httpx.post(f"{address}/gradio_api/upload", headers={"Origin": origin}, files={"files": b"0"}).status_code == 403
    for path in ("about", "page", "tile?k=0", "scan", "events", "labels", "explain"):
        reply = httpx.get(f"{address}/viewer/{path}", headers={"X-Session": "x" * 32})
        assert reply.status_code == 403 and reply.headers["content-type"] == "application/problem+json" and len(reply.content) < 1024
    assert "'unsafe-inline'" not in httpx.get(f"{address}/viewer/").headers["content-security-policy"].split("style-src")[0]
    assert "default-src 'self'" in httpx.get(address).headers["content-security-policy"]
    assert httpx.get(f"{address}/openapi.json").status_code == 404


def test_an_upload_cut_off_leaves_nothing(server):
    "Half of a file, then silence; a whole one stays."
    address, _, folder = server
    host, port = address.removeprefix("http://").split(":")
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="night.edf"\r\n\r\n'
    with socket.create_connection((host, int(port))) as s:
        s.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: multipart/form-data; boundary=edge\r\nContent-Length: 9000000\r\n\r\n".encode() + head + bytes(3_000_000))
        files = lambda: [f for f in folder.glob("hms_app_*/uploads/*") if f.is_file()]
        wait_for(files)
    wait_for(lambda: not files())
    done = httpx.post(f"{address}/gradio_api/upload", files={"files": ("whole.edf", b"0" * 1000)}, timeout=60)
    assert done.status_code == 200 and Path(done.json()[0]).read_bytes() == b"0" * 1000 and not files()


def test_one_byte_too_many(tmp_path, monkeypatch):
    "A file as large as allowed is taken; one byte more: 413, and nothing of it is left."
    pytest.importorskip("gradio", reason="the app needs its extra")
    from fastapi.testclient import TestClient
    from hms_brain import app
    from hms_brain.session import Sessions
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"): monkeypatch.setenv(name, "")  # is set by the app
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app, "LIMIT", 1 << 20)
    sessions = Sessions()
    left = lambda: [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    with TestClient(app.create_app(sessions), base_url="http://127.0.0.1") as client:
        send = lambda n: client.post("/gradio_api/upload", files={"files": ("a.edf", b"0" * n)}).status_code
        for n in ((1 << 20) + 1, 3 << 20): assert (send(n), left()) == (413, []), n
        assert (send(1 << 20), left()) == (200, [1 << 20])
        assert (send((1 << 20) + 1), left()) == (413, [1 << 20])
    sessions.close_all()
    assert left() == []


def test_page_is_the_same_for_every_format(tmp_path, eeg):
    "A page read in place equals one from a copy, whatever the unit says."
    x = eeg[:, :int(120 * FS)]
    np.save(tmp_path / "a.npy", np.nan_to_num(x))
    a, b = open_reader(edf(tmp_path / "a.edf", x, int(FS), [*CHANNELS, "ECG EKG"]), tmp_path), open_reader(tmp_path / "a.npy", tmp_path)
    for start in (-4.0, 0.0, 55.0, 117.0):
        p, q = page(a, start, 10.0), page(b, start, 10.0)
        assert np.array_equal(np.isnan(p), np.isnan(q)) and np.nanmax(np.abs(p - q)) < 0.2
        assert np.nanmax(np.abs(unpack_page(pack_page(p)) - p)) <= max(0.02, np.nanmax(np.abs(p)) / 32767)


def resident(pid):
    "Memory of a process and of all below it, MiB."
    try:
        mine = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
        below = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (OSError, TypeError): return 0.0  # it has just ended
    return mine + sum(map(resident, below))


@contextmanager
def watched(process):
    "The largest memory of an app and its decoders within the block, MiB, in a list."
    most, done = [0.0], threading.Event()
    def look():
        while not done.wait(0.2): most[0] = max(most[0], resident(process.pid))
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try: yield most
    finally: done.set(); thread.join()


def turns(tab, frame, n, keys=("PageDown",), pause=150):
    "Milliseconds from a key to the finished page, n times."
    frame.evaluate("hmsReader.turns.length = 0")
    for k in range(n): press(frame, keys[k % len(keys)]); tab.wait_for_timeout(pause)
    return np.array(frame.evaluate("hmsReader.turns"))


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    "A day: the sample, 144 times."
    sample, path = (ROOT / "hms_brain/assets/sample.edf").read_bytes(), tmp_path_factory.mktemp("day") / "day.edf"
    size = 256 * (int(sample[252:256]) + 1)
    with open(path, "wb") as f:
        f.write(sample[:236] + str(int(sample[236:244]) * 144).encode().ljust(8) + sample[244:size])
        for _ in range(144): f.write(sample[size:])
    yield path
    path.unlink()


def of_a_day(tab, day, step):
    "Upload it and begin."
    tab.context.unroute_all()  # interception would hold the whole upload in memory; requests are still noted
    give(tab, day)
    tab.get_by_text("24 h 00 min 00 s").wait_for()
    frame = start(tab, step)
    press(frame, "Enter"); drawn(frame)
    return frame


def said_of(name, **times):
    "Page turns in words, on the screen and beside the pictures."
    text = "page turns, ms: " + "; ".join(f"{k} median {np.median(v):.0f}, 95 % {np.percentile(v, 95):.0f}" if np.ndim(v) else f"{k} {v:.0f}" for k, v in times.items())
    print(text)
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / name).write_text(text + "\n")


@needs_browser
@pytest.mark.slow
def test_a_day(tab, server, day):
    "24 hours: a page turn within 50 ms, little memory of the app and its decoder, nothing read before it is needed."
    with watched(server[1]) as memory:
        frame = of_a_day(tab, day, "a window every 30 s")
        until(frame, "hmsReader.rows.n >= 240", timeout=LONG_S)
        busy = turns(tab, frame, 30)
        frame.locator("#cancel").click()
        until(frame, "hmsReader.rows.state === 'stopped'")
        drawn(frame)
        tab.wait_for_timeout(2000)
        quiet, back = turns(tab, frame, 40), turns(tab, frame, 20, ("PageUp",))
        press(frame, "End"); drawn(frame)
    said_of("day.txt", forward=quiet, back=back, **{"beside a scan": busy, "most memory, MiB": memory[0]})
    tab.screenshot(path=SHOTS / "day_page.png")
    assert len(quiet) >= 36 and len(back) >= 18 and np.percentile(quiet, 95) <= 50 and np.percentile(back, 95) <= 50
    assert 300 < memory[0] <= 1536


ALL_AT_ONCE = """
import numpy as np
from hms_brain import session as s
from hms_brain.core import CLASSES
def answered(session):
    rng, rows = np.random.default_rng(0), []
    for i, first in enumerate(session.plan.firsts.tolist()):
        votes = dict(zip(CLASSES, rng.dirichlet(np.where(np.arange(6) == i // 150 % 6, 12.0, 0.5)).tolist()))
        rows.append({"at": first / 200 + 25, **votes, "predicted": max(votes, key=votes.get), "abstained": False, "reasons": "", "quality": "muscle mains" if i % 7 else ""})
    session.tell(rows)
s.read_through = answered
""" + START


@needs_browser
@pytest.mark.slow
def test_a_day_of_answers(browser, day, tmp_path):
    "24 hours with a window every 2 s, all answered (by dice): every answer and hundreds of events beside the page, and it turns within 50 ms."
    with running_app(tmp_path, ALL_AT_ONCE) as (address, process, _), opened_page(browser, address) as tab, watched(process) as memory:
        frame = of_a_day(tab, day, "a window every 2 s")
        finished(frame)
        assert frame.evaluate("hmsReader.rows.n") == 43_176 and frame.evaluate("hmsReader.events.length") > 200
        drawn(frame)
        tab.wait_for_timeout(2000)
        forward, back, event = turns(tab, frame, 60), turns(tab, frame, 40, ("PageUp",)), turns(tab, frame, 20, ("n",), 400)
        tab.screenshot(path=SHOTS / "day_of_answers.png")
    said_of("day_of_answers.txt", forward=forward, back=back, **{"to an event": event, "most memory, MiB": memory[0]})
    assert len(forward) >= 54 and len(back) >= 36 and np.percentile(forward, 95) <= 50 and np.percentile(back, 95) <= 50
    assert memory[0] <= 1536
