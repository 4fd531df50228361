"""Dashboards: figures hold the numbers of their tables; the launcher lets nobody in who has no token; a real browser finds figures, no error, and nothing from elsewhere."""
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("ipywidgets", reason="dashboards need the extra dash")
pytest.importorskip("voila", reason="dashboards need the extra dash")

import httpx  # noqa: E402

from conftest import ROOT, WAIT_MS, needs_browser  # noqa: E402
from hms_brain.audit import AuditLog  # noqa: E402
from hms_brain.bundle import MANIFEST, default_bundle, seal_files  # noqa: E402
from hms_brain.core import CHANNELS, CLASSES, VOTE_COLUMNS, InputError, rng_for, write_json  # noqa: E402
from hms_brain.dash import PAGES, Room, allowed_hosts, dash_config, dash_token, dashboards, take_port, without_token  # noqa: E402
from hms_brain.evaluate import evaluate, load_answers  # noqa: E402
from hms_brain.explorer import events_at, explorer, list_recordings, scan_text  # noqa: E402
from hms_brain.panels import MIME, figure_bundle, grid, list_answers, list_runs, plot_compared, plot_pace, run_rows  # noqa: E402
from hms_brain.plots import plot_probabilities, plot_scan  # noqa: E402
from hms_brain.views import VIEWS, Performance, System, Training, score_answers  # noqa: E402
from hms_brain.watch import acknowledge, alerts  # noqa: E402

SHOTS = ROOT / "outputs/reports/dash"


def numbers(place):
    "Names and y values of the traces in a frame."
    return {t.get("name"): t.get("y") for t in place.outputs[0]["data"][MIME]["data"]}


def write_run(folder, kl, status="ok", pid=None, epochs=4, **recipe):
    "A training's folder with answers of 60 windows of 20 patients."
    folder.mkdir(parents=True)
    n = len(kl)
    pd.DataFrame({"epoch": range(1, n + 1), "learning_rate": np.linspace(1e-3, 1e-5, n), "train_loss": kl, "val_kl": kl, "prior_kl": 1.1, "seconds": 20.0}).to_csv(folder / "history.csv", index=False)
    write_json(folder / "run.json", {"kind": "train", "status": status, "pid": pid or os.getpid(), "started": f"2026-01-01T10:00:0{n}+00:00", "seed": 0, "recipe": {"model": "specnet", "epochs": epochs} | recipe, "data": {"train_windows": 100, "simulated": True}})
    rng = rng_for(0, "answers")
    truth = rng.dirichlet(np.full(6, .4), 60)
    votes, p = np.array([rng.multinomial(8, t) for t in truth]), .3 / 6 + .7 * truth
    pd.DataFrame({"label_id": range(60), **dict(zip(VOTE_COLUMNS, votes.T)), **{f"p_{c}": v for c, v in zip(CLASSES, p.T)}, "patient_id": np.arange(60) // 3}).to_parquet(folder / "validation.parquet")


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "first", [.9, .7, .6, .55])
    write_run(tmp_path / "second", [.8, .5], status="running", batch_size=8)
    return tmp_path


def test_a_table_of_runs_says_what_their_files_say(runs):
    table = list_runs(runs)
    assert set(table.run) == {"first", "second"} and dict(zip(table.run, table.kl)) == {"first": .55, "second": .5}
    rows = {r["run"]: r for r in run_rows(table)}
    assert rows["second"]["state"] == "running, about 40 s left" and rows["first"]["state"] == "finished" and rows["first"]["windows per s"] == "5.0"
    write_run(runs / "third", [.8], status="running", pid=2**22 + 12345)
    assert "failed" in {r["run"]: r for r in run_rows(list_runs(runs))}["third"]["state"]
    (runs / "third/history.csv").write_text("epoch,val")  # in the middle of being written
    assert set(list_runs(runs).run) >= {"first", "second"}


def test_training_shows_curves_and_differences(runs):
    page = Training(runs, "first,second")
    assert {k: decoded(v).tolist() for k, v in numbers(page.curves).items()} == {"first": [.9, .7, .6, .55], "second": [.8, .5]}
    assert "recipe.batch_size" in page.difference.value and "60 shared windows of 20 patients" in page.difference.value and page.gaps.outputs
    page.choice.value = ["first"]
    assert "constant answer" in numbers(page.curves) and page.gaps.outputs == () and page.difference.value == ""


def decoded(y):
    "A trace's numbers: plotly packs arrays in base64."
    import base64
    return np.asarray(y) if not isinstance(y, dict) else np.frombuffer(base64.b64decode(y["bdata"]), {"f8": "<f8", "f4": "<f4", "i1": "i1", "i2": "<i2"}[y["dtype"]])


def test_training_follows_the_folder(runs):
    page = Training(runs, "second")
    before = page.curves.outputs
    page.look()
    assert page.curves.outputs is before  # nothing new, nothing drawn
    history = pd.read_csv(runs / "second/history.csv")
    pd.concat([history, history.iloc[-1:].assign(epoch=3, val_kl=.4)]).to_csv(runs / "second/history.csv", index=False)
    page.look()
    assert page.choice.value == ("second",) and decoded(numbers(page.curves)["held-out patients"])[-1] == .4


def test_performance_shows_what_evaluate_says(runs):
    page = Performance(runs, "first")
    result = evaluate(load_answers(runs / "first"), 200)
    assert f"<b>{result['kl']:.3f}</b>" in page.head.value and "trained on simulated EEG" in page.head.value and "<b>20</b>patients" in page.head.value
    for k, name in enumerate(VIEWS):
        page.tabs.selected_index = k
        _, said, *frames = page.places[name].children
        assert frames[0].outputs or (name == "Experts" and "names no experts" in said.value), name
    z = page.places["Confusion"].children[2].outputs[0]["data"][MIME]["data"][0]["z"]
    assert np.allclose(decoded(z).reshape(6, 6), np.round(100 * np.array(result["confusion"]["row"]), 1))


def write_read(folder):
    "A table of 200 windows of 40 patients that five named experts have read, and a model."
    rng = rng_for(1, "raters")
    truth = rng.integers(0, 6, 200)
    raters = {f"expert_{k:02d}": np.where(rng.random(200) < .7, truth, rng.integers(0, 6, 200)) for k in range(5)}
    p = .3 / 6 + .7 * np.eye(6)[np.where(rng.random(200) < .8, truth, rng.integers(0, 6, 200))]
    folder.mkdir(parents=True)
    pd.DataFrame({**raters, **{f"p_{c}": v for c, v in zip(CLASSES, p.T)}, "patient_id": np.arange(200) // 5}).to_csv(folder / "predictions.csv", index=False)


def test_experts_are_shown_where_they_are_known(tmp_path):
    write_read(tmp_path / "read")
    page = Performance(tmp_path)
    page.tabs.selected_index = list(VIEWS).index("Experts")
    _, said, under, index = page.places["Experts"].children
    experts = score_answers(tmp_path / "read")[1]
    assert said.value == "" and np.allclose(decoded(under.outputs[0]["data"][MIME]["data"][0]["y"]), [experts["roc"][c]["estimate"] for c in CLASSES]) and index.outputs


def test_empty_pages_say_what_to_run(tmp_path):
    assert "hms train" in Training(tmp_path).table.value and any("hms train" in getattr(c, "value", "") for c in Performance(tmp_path).widget.children)
    page = System("http://127.0.0.1:9", tmp_path / "alerts.jsonl")
    assert "hms serve" in page.service.value and "hms watch" in page.history.value and page.load.outputs and not (tmp_path / "alerts.jsonl").exists()


def test_an_alert_is_acknowledged_once_and_stays_in_the_history(tmp_path):
    log = AuditLog(tmp_path / "alerts.jsonl")
    for k in (1, 2): log.add("fired", id=f"Drift-{k}", rule="Drift", severity="warning", value=1.0, limit=.5, words="<img src=x onerror=alert(1)>")
    acknowledge(log, "Drift-1", "Kim")
    page = System("http://127.0.0.1:9", log.path)
    assert page.which.options == ("Drift-2",) and "<img" not in page.history.value
    page.by.value = " "
    page.button.click()
    assert "write your name" in page.message.value and [a["by"] for a in alerts(log)] == [None, "Kim"]
    page.by.value, page.remark.value = "Lee", "seen"
    page.button.click()
    assert [(a["by"], a["state"]) for a in alerts(log)] == [("Lee", "acknowledged"), ("Kim", "acknowledged")] and page.which.options == ()


def test_looking_again_opens_no_more_files(tmp_path):
    "A page that looks every five seconds is open for days."
    psutil = pytest.importorskip("psutil")
    log = AuditLog(tmp_path / "alerts.jsonl")
    log.add("fired", id="Drift-1", rule="Drift", severity="warning", value=1.0, limit=.5, words="the windows have moved")
    page, opened = System("http://127.0.0.1:9", log.path), psutil.Process().num_fds()
    page.by.value = "Kim"
    page.button.click()
    for _ in range(5): page.list_alerts()
    assert "seen by Kim" in page.message.value and psutil.Process().num_fds() == opened
    log.close()


def test_names_of_files_are_no_markup(runs):
    (runs / "first").rename(runs / "<img src=x>")
    assert "<img" not in Training(runs, "<img src=x>,second").table.value and "<img" not in grid([{"<img src=x>": "<b>"}])


def test_the_explorer_shows_what_the_predictor_says(tmp_path):
    e = explorer(ROOT / "hms_brain/assets/sample.edf", at=120)
    answer = e.predictor()(*e.window())
    assert e.c["message"].value == "" and e.c["at"].value == 120
    assert e.c["votes"].outputs[0]["data"][MIME]["data"] == figure_bundle(plot_probabilities(answer.probabilities))[MIME]["data"]
    assert e.c["timeline"].outputs[0]["data"][MIME]["data"] == figure_bundle(plot_scan(e.scan.table, e.scan.duration, e.events))[MIME]["data"]
    assert "trained on simulated EEG" in e.c["said"].value and "trained on simulated EEG" in e.c["head"].value
    e.c["explain"].click()
    assert "bar" in {t["type"] for t in e.c["reasons"].outputs[0]["data"][MIME]["data"]}
    e.c["montage"].value = "transverse"
    assert "F7-Fp1" in numbers(e.c["page"])
    e.c["on"].click()
    assert e.c["at"].value == 130 and e.c["reasons"].outputs == ()  # of another window


def test_a_scan_finds_its_recording_by_the_bytes(tmp_path):
    "Whatever the file is called now; another of the same length is not taken for it."
    from hms_brain.exports import write_edf
    from hms_brain.scan import scan_file
    from hms_brain.simulate import simulate_recording
    (tmp_path / "in").mkdir()
    for k, name in enumerate(("first", "second")): write_edf(tmp_path / f"in/{name}.edf", simulate_recording(seed=k, pattern="gpd", duration=60))
    scan_file(tmp_path / "in/first.edf", tmp_path / "scans/one", step=20)
    (tmp_path / "in/first.edf").rename(tmp_path / "in/third.edf")
    found = {e["name"]: e["file"] for e in list_recordings(tmp_path / "in", tmp_path / "scans")}
    assert found.pop("scan one") == tmp_path / "in/third.edf" and len(found) == 3
    (tmp_path / "in/third.edf").unlink()
    assert {e["name"]: e["file"] for e in list_recordings(tmp_path / "in", tmp_path / "scans")}["scan one"] is None


def test_app_files_and_dashboard_find_the_same_events():
    "One slider, one meaning: where the probability hovers between two lower levels, the wrong one joins what is apart."
    from hms_brain.events import find_events
    from hms_brain.scan_files import describe, levels
    p = np.tile([.05, .05, .05, .05, .05, .75], (60, 1))
    for a, b, height in ((5, 15, .97), (15, 18, .38), (18, 28, .97), (40, 50, .66), (50, 53, .3)): p[a:b] = [height, *[(1 - height) / 5] * 5]
    table = pd.DataFrame({"at": 25 + 10. * np.arange(60), **{f"p_{c}": v for c, v in zip(CLASSES, p.T)}, **dict(zip(CLASSES, p.T)), "abstained": False, "reasons": ""})
    scan = SimpleNamespace(table=table, step=10., duration=640., gaps=(), state="done", about={"recording": {"id": "x", "reference": "", "issues": []}, "bundle": {"simulated": True}})
    for threshold in (.35, .4, .5, .6, .95): assert events_at(scan, threshold) == find_events(table, 10., **levels(threshold)), threshold
    assert events_at(scan, .6) != find_events(table, 10., high=.6, low=.42) and len(events_at(scan, .35)) == 2
    told = [scan_text(scan, events_at(scan, t), t)[1] for t in (.5, .95)]
    for text, t in zip(told, (.5, .95)):
        expected = describe(scan, events_at(scan, t), t)
        assert escape(expected["rule"]) in text and all(escape(cell) in text for row in expected["burden"] for cell in row)
    assert describe(scan, [], .5)["burden"] != describe(scan, [], .95)["burden"]


def test_who_only_looks_is_not_counted():
    "Latency, rate and shares of the work, whoever polls /metrics and /health beside it."
    from hms_brain.monitor import Metrics
    from hms_brain.panels import service_sample
    from hms_brain.watch import read_samples
    metrics, look = Metrics(), lambda: read_samples(metrics.text().decode())
    before = look()
    def asked(route, status, seconds, times):
        for _ in range(times):
            metrics.requests.labels(route, "GET", status).inc()
            metrics.seconds.labels(route).observe(seconds)
    asked("/predict", "200", .3, 9)
    asked("/predict/file", "500", 9., 1)
    alone = service_sample(look(), before, 10.)
    assert alone["requests"] == 1 and alone["errors"] == .1 and alone["p50"] > 100 and alone["p99"] < 1000
    for route in ("/metrics", "/health", "/health/ready"): asked(route, "200", .001, 100)
    assert service_sample(look(), before, 10.) == alone


def test_jupyterlab_refuses_an_address_of_others(monkeypatch):
    from hms_brain.core import get_settings
    from hms_brain.operate import lab
    started = []
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    try:
        for host in ("0.0.0.0", "192.168.1.2", "::", "127.0.0.1"):
            monkeypatch.setenv("HMS_DEPLOYMENT_HOST", host)
            get_settings.cache_clear()
            if host == "127.0.0.1": lab()
            else:
                with pytest.raises(InputError, match="could run code here"): lab()
    finally: get_settings.cache_clear()
    assert len(started) == 1 and "--ServerApp.ip=127.0.0.1" in started[0][1]


def test_a_patient_is_chosen_first(tmp_path, monkeypatch):
    "EEGs of a data set are offered patient by patient, beside every format that can be read."
    from hms_brain.simulate import simulate_recording
    x = simulate_recording(seed=3, pattern="lpd", duration=50)
    (tmp_path / "raw/train_eegs").mkdir(parents=True)
    for eeg in (11, 12, 21): pd.DataFrame(x.eeg.T, columns=CHANNELS).assign(EKG=np.float32(0)).to_parquet(tmp_path / f"raw/train_eegs/{eeg}.parquet")
    (tmp_path / "raw/train.csv").write_text("eeg_id,patient_id\n21,2\n12,1\n11,1\n11,1\n31,3\n")
    for name in ("a.rec", "b.BDF", "c.npy", "d.vhdr", "d.eeg", "notes.txt", "test.csv", "e.csv"): (tmp_path / name).write_text("")
    monkeypatch.setenv("HMS_DASH_RECORDINGS", str(tmp_path))
    monkeypatch.setenv("HMS_PATHS_REPORTS", str(tmp_path))
    e = explorer(chosen="patient 1 of raw, EEG 12")
    assert e.c["of"].options == ("recordings", "patient 1 of raw", "patient 2 of raw") and e.c["of"].layout.display != "none"
    assert [n for n, _ in e.c["recording"].options] == ["EEG 11", "EEG 12"] and e.c["recording"].label == "EEG 12" and e.reader.path.stem == "12"
    e.c["of"].value = "patient 2 of raw"
    assert e.c["recording"].label == "EEG 21" and e.reader.path.stem == "21" and e.c["page"].outputs and e.c["message"].value == ""
    e.c["of"].value = "recordings"
    assert [n for n, _ in e.c["recording"].options][1:] == ["a.rec", "b.BDF", "c.npy", "d.vhdr", "e.csv"] and e.reader.path.name == "sample.edf"
    alone = explorer(ROOT / "hms_brain/assets/sample.edf").c
    assert alone["of"].layout.display == "none" and {alone[n].layout.display for n in ("recording", "model", "montage", "threshold")} == {None}


def test_a_recording_that_is_none_ends_in_a_line(tmp_path):
    (tmp_path / "bad.edf").write_bytes(b"no EEG at all")
    e = explorer(tmp_path / "bad.edf")
    assert "bad" in e.c["message"].value and e.c["page"].outputs == ()
    with pytest.raises(InputError, match="unknown montage"): explorer(tmp_path / "bad.edf", montage="x")


def test_the_last_recording_does_not_stand_under_the_name_of_the_next(tmp_path):
    (tmp_path / "bad.edf").write_bytes(b"no EEG at all")
    e = explorer(ROOT / "hms_brain/assets/sample.edf")
    assert e.c["page"].outputs and e.c["votes"].outputs and e.scan
    e.sources.append({"name": "bad", "file": tmp_path / "bad.edf", "scan": None, "of": "recordings"})
    e.c["recording"].options = [("sample", 0), ("bad", 1)]
    e.c["recording"].value = 1
    assert "bad" in e.c["message"].value and e.reader is None and e.scan is None
    assert {name: e.c[name].outputs for name in ("page", "votes", "regions", "timeline")} == dict.fromkeys(("page", "votes", "regions", "timeline"), ())
    assert e.c["said"].value == e.c["head"].value == e.c["lists"].value == ""


def test_the_launcher_is_closed_by_default(monkeypatch):
    config = dash_config("127.0.0.1", 8050, "t" * 32, allowed_hosts("127.0.0.1"))
    assert config["Voila"]["token"] == "t" * 32 and config["Voila"]["open_browser"] is False and config["Voila"]["port_retries"] == 0
    assert config["Voila"]["tornado_settings"]["allow_remote_access"] is False and "default-src 'self'" in config["Voila"]["tornado_settings"]["headers"]["Content-Security-Policy"]
    assert config["VoilaConfiguration"]["show_tracebacks"] is False and config["VoilaConfiguration"]["preheat_kernel"] is True and config["VoilaConfiguration"]["file_allowlist"] == []
    assert config["VoilaExecutor"]["timeout"] is None, "the page of a kernel that waited longer for its visitor would stay empty"
    assert without_token("/training", "run=a%2Cb&token=t&x=1") == "/training?run=a%2Cb&x=1" and without_token("/training", "token=t") == "/training"
    assert len({dash_token() for _ in range(20)}) == 20
    monkeypatch.setenv("HMS_DASH_TOKEN", "short")
    with pytest.raises(InputError, match="16 or more"): dash_token()
    for host in ("0.0.0.0", "192.168.1.2", "::"):
        with pytest.raises(InputError, match="can be reached by others"): allowed_hosts(host)
    assert take_port("127.0.0.1", 0) > 0


def test_pages_that_are_asked_for_at_once_share_the_places():
    "A kernel takes its time to start; whoever asks meanwhile finds its place taken."
    class Kernels(dict):
        async def start_kernel(self, name):
            await asyncio.sleep(.02)
            self[name] = 0
            return name
        def notify_connect(self, name): self[name] += 1
        def kernel_model(self, name): return {"connections": self[name]}
        async def shutdown_kernel(self, name): del self[name]
    async def visit(room, name):
        if not await room.make(): return False
        await room.kernels.start_kernel(name)
        return True
    async def visits():
        room = Room(Kernels(), most=2)
        said = await asyncio.gather(*(visit(room, name) for name in "abcde"))
        for name in room.kernels: room.kernels.notify_connect(name)
        room.kernels["a"] = 0  # its page is closed
        return said, await asyncio.gather(*(visit(room, name) for name in "fgh")), sorted(room.kernels)
    assert asyncio.run(visits()) == ([True, True, False, False, False], [True, False, False], ["b", "f"])


def test_pages_travel_in_the_package_and_link_nothing():
    import tomllib
    kept = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hms_brain"]
    assert {"dashboards/*.ipynb", "dashboards/template/*"} <= set(kept) and {f"{p}.ipynb" for p in PAGES} == {p.name for p in (ROOT / "hms_brain/dashboards").glob("*.ipynb")}
    for path in (dashboards() / "template").iterdir(): assert not re.search(r"https?://|//cdn", path.read_text()), path.name


def test_no_kernel_of_a_dashboard_knows_torch():
    script = "import sys; sys.modules['torch'] = None\n" + "import hms_brain.views, hms_brain.explorer, hms_brain.dash"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# What follows starts the real command.

def flatter_bundle(place):
    "The packaged bundle, half as sure."
    shutil.copytree(default_bundle(), place)
    (place / "bundle.json").write_text((place / "bundle.json").read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    (place / MANIFEST).write_bytes(seal_files({p.name: p.read_bytes() for p in place.iterdir() if p.name != MANIFEST}))


@pytest.fixture(scope="module")
def service():
    "A running `hms serve`: its address."
    from hms_brain.service.web import running_service
    with running_service(HMS_SYSTEM_THREADS="1") as (url, _): yield url


@pytest.fixture(scope="module")
def home(tmp_path_factory, service):
    "A workbench of its own with two runs, a table that experts have read, an alert, and a service."
    folder = tmp_path_factory.mktemp("workbench")
    (folder / "settings.ini").write_text(f"[system]\nworkers = 1\nthreads = 1\n[deployment]\nservice_port = {service.rpartition(':')[2]}\n")
    write_read(folder / "outputs/runs/read")
    write_run(folder / "outputs/runs/first", [.9, .7, .6, .55])
    write_run(folder / "outputs/runs/second", [.8, .5], batch_size=8)
    flatter_bundle(folder / "outputs/runs/first/bundle")
    AuditLog(folder / "outputs/audit/alerts.jsonl").add("fired", id="Drift-1", rule="Drift", severity="warning", value=1.0, limit=.5, words="the windows have moved")
    return folder


def words(*more):
    return [sys.executable, "-c", "from hms_brain.cli import main; main()", "dash", "--port", "0", *more]


@pytest.fixture(scope="module")
def served(home):
    "A running `hms dash`: address without and with the token, process."
    env = {k: v for k, v in os.environ.items() if not k.startswith("HMS_")} | {"PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    with open(home / "log", "w") as log: process = subprocess.Popen(words(), env=env, cwd=home, stdout=subprocess.PIPE, stderr=log, text=True)
    entry = process.stdout.readline().strip()
    assert "?token=" in entry, (home / "log").read_text()
    base = entry.partition("/?")[0]
    for _ in range(600):
        try: httpx.get(base, timeout=20); break
        except httpx.TransportError: time.sleep(.3)
    yield base, entry, process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, "no graceful end"
    assert not list(home.glob("voila_*")), "files stay behind"
    psutil = pytest.importorskip("psutil")
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if any(str(home) in word for word in p.info["cmdline"] or ())]
    assert left == [], "kernels stay behind"


@pytest.fixture
def tab(browser, served):
    "Opens a page; fails when anything asks beyond the loopback, a script stumbles or an answer is an error."
    context, foreign, broken = browser.new_context(viewport={"width": 1280, "height": 1000}), [], []
    def gate(route):
        if re.match(r"http://127\.0\.0\.1[:/]", route.request.url): route.continue_()
        else: foreign.append(route.request.url); route.abort()
    context.route("**/*", gate)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(("http://127.0.0.1", "blob:", "data:")) else None)
    page.on("websocket", lambda s: foreign.append(s.url) if not s.url.startswith("ws://127.0.0.1") else None)
    page.on("pageerror", lambda e: broken.append(str(e)))
    page.on("response", lambda r: broken.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    yield page
    context.close()
    assert foreign == [] and broken == []


SEEN = "[...document.querySelectorAll('.js-plotly-plot')].filter(f => f.clientHeight > 150 && f.querySelectorAll('.main-svg').length && f.querySelector('.scatterlayer path, .barlayer path, .heatmaplayer image'))"


def opened(tab, served, name, scheme="light", figures=1, query="", said="Research use only", shot=""):
    "Open a dashboard and wait for its figures and its last words; no cell may have failed."
    tab.emulate_media(color_scheme=scheme)
    tab.goto(f"{served[0]}/{name}?{query}token={served[1].partition('token=')[2]}")
    assert "token" not in tab.url
    tab.wait_for_function(f"{SEEN}.length >= {figures}")
    tab.get_by_text(said).first.wait_for()
    assert tab.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr'], .hms-note.bad").count() == 0
    tab.wait_for_timeout(1500)
    picture(tab, shot or f"{name}_{scheme}")
    return tab.inner_text("body")


def picture(tab, name):
    "The whole page, kept."
    SHOTS.mkdir(parents=True, exist_ok=True)
    tall = tab.evaluate("document.getElementById('rendered_cells').scrollHeight")
    tab.set_viewport_size({"width": 1280, "height": min(int(tall) + 120, 4000)})
    tab.wait_for_timeout(700)
    tab.screenshot(path=SHOTS / f"{name}.png")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name, figures, said", [("training", 2, "simulated EEG"), ("performance", 1, "trained on simulated EEG"), ("recording", 4, "at a threshold of 0.50"), ("system", 2, "Drift")])
def test_every_dashboard_shows_its_figures(served, tab, name, figures, said, scheme):
    text = opened(tab, served, name, scheme, figures, said=said)
    assert "simulated EEG" in text or name == "system"
    assert said in text and "Research use only" in text
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark"), background


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_of_the_performance_shows_its_figures(served, tab, scheme):
    "Of answers beside which experts stand: every tab is opened, each has a figure, none a line of trouble."
    opened(tab, served, "performance", scheme, query="run=read&", said="model", shot=f"performance_read_{scheme}")
    for k, name in enumerate(VIEWS):
        tab.locator(".lm-TabBar-tab", has_text=re.compile(f"^{name}$")).click()
        tab.wait_for_function(f"{SEEN}.length == {2 if name == 'Experts' else 1}")
        assert tab.locator(".hms-note.bad").count() == 0 and tab.locator(".widget-tab-contents .hms-note:visible").count() == 0, name
        assert tab.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']").count() == 0, name
        picture(tab, f"performance_{k}_{name.replace(' ', '_').lower()}_{scheme}")


def ask_service(url, k):
    "A window of its own of simulated EEG, as a client sends it."
    from io import BytesIO

    from hms_brain.simulate import simulate_recording
    body = BytesIO()
    np.save(body, simulate_recording(seed=k, patient=k, pattern=CLASSES[k % 5], duration=50).eeg.astype(np.float32))
    return httpx.post(f"{url}/predict", content=body.getvalue(), headers={"Content-Type": "application/x-npy"}, timeout=60).status_code


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_system_shows_a_service_at_work(served, tab, service, scheme):
    "Latency, errors, classes, drift and rules of a service that is asked while one looks."
    assert [ask_service(service, k) for k in range(40)] == [200] * 40
    assert httpx.post(f"{service}/predict", content=b"x", headers={"Content-Type": "application/x-npy"}).status_code in (400, 422)
    opened(tab, served, "system", scheme, figures=3, said="Since it began", shot=f"system_before_{scheme}")
    lines = "Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].flatMap(f => f.data.map(t => [t.name || f.layout.xaxis.title?.text || f.layout.yaxis.title?.text || '', t.y])))"
    end = time.monotonic() + WAIT_MS / 1000
    while not any(v for v in tab.evaluate(f"Array.from({lines}['99 %'] || [])")):
        assert ask_service(service, 100 + int(time.monotonic())) == 200 and time.monotonic() < end
        tab.wait_for_timeout(1000)
    shown = tab.evaluate(lines)
    assert {"all", "median", "99 %", "internal errors", "turned away"} <= set(shown) and any("distance from the held-out" in k for k in shown), list(shown)
    assert not any(v for v in tab.evaluate(f"Array.from({lines}['internal errors'])"))
    text = tab.inner_text("body")
    for words in ("takes requests", "Since it began", "/predict", "Alert rules", "SlowAnswers", "Drift"): assert words in text, words
    assert "no verdict" not in text and tab.locator(".hms-note.bad").count() == 0
    picture(tab, f"system_service_{scheme}")


@pytest.mark.slow
@needs_browser
def test_curves_grow_while_one_looks(served, tab, home):
    text = opened(tab, served, "training", figures=2)
    assert "0.500" in text and "0.123" not in text
    path = home / "outputs/runs/second/history.csv"
    history = pd.read_csv(path)
    pd.concat([history, history.iloc[-1:].assign(epoch=3, val_kl=.123)]).to_csv(path, index=False)
    tab.get_by_text("0.123").first.wait_for()


@pytest.mark.slow
@needs_browser
def test_an_alert_is_acknowledged_in_the_browser(served, tab, home):
    opened(tab, served, "system")
    tab.locator("input[type=text]").nth(0).fill("Kim")
    tab.locator("input[type=text]").nth(0).press("Tab")
    tab.get_by_role("button", name="Acknowledge").click()
    tab.get_by_text("Drift-1: seen by Kim.").wait_for()
    assert alerts(AuditLog(home / "outputs/audit/alerts.jsonl"))[0]["by"] == "Kim"


def knobs(page):
    "Move the explorer's montage, window, threshold and model, and see the page follow; ask why."
    choose = lambda name, option: page.locator(".widget-dropdown", has_text=name).locator("select").select_option(option)
    readout = lambda name: page.locator(".widget-slider", has_text=name).locator(".widget-readout")
    page.locator("text=Fp1-F7").first.wait_for()
    choose("montage", "average")
    page.locator("text=Fp1-AVG").first.wait_for()
    page.get_by_role("button", name="10 s ▶").click()
    readout("window").get_by_text("310", exact=True).wait_for()
    page.locator(".js-plotly-plot").get_by_text("315", exact=True).first.wait_for()
    readout("threshold").fill("0.95")
    readout("threshold").press("Enter")
    page.get_by_text("at a threshold of 0.95").first.wait_for()
    said = page.locator("h2", has_text="of the votes")
    before, end = said.inner_text(), time.monotonic() + WAIT_MS / 1000
    choose("model", "first")  # half as sure
    while said.inner_text() == before:
        assert time.monotonic() < end, before
        page.wait_for_timeout(200)
    page.get_by_role("button", name="Explain this answer").click()
    page.locator("text=what speaks for").first.wait_for()


@pytest.mark.slow
@needs_browser
def test_the_explorer_works_in_voila(served, tab):
    opened(tab, served, "recording", figures=4)
    knobs(tab)
    tab.screenshot(path=SHOTS / "explorer_voila.png")


@pytest.mark.slow
@needs_browser
def test_names_run_nothing_in_the_browser(served, tab, home):
    "A name that would run as a script, for a run, an alert and a recording: shown as it is, in tables, lists and figures."
    evil, hits, log = "<img src=x onerror=hit()>", [], home / "outputs/audit/alerts.jsonl"
    tab.context.expose_function("hit", lambda: hits.append("hit"))
    before = log.read_bytes()
    write_run(home / "outputs/runs" / evil, [.9, .6])
    AuditLog(log).add("fired", id=f"{evil}-1", rule=evil, severity=evil, value=1.0, limit=.5, words=f"{evil}<script>hit()</script>")
    (home / "data").mkdir(exist_ok=True)
    shutil.copy(ROOT / "hms_brain/assets/sample.edf", home / "data" / f"{evil}.edf")
    try:
        for name, query, figures in (("training", "run={},first&", 3), ("performance", "run={}&", 1), ("system", "", 1), ("recording", "recording={}&", 4)):
            opened(tab, served, name, figures=figures, query=query.format(quote(evil)), shot=f"evil_{name}")
            assert evil in tab.content().replace("&lt;", "<").replace("&gt;", ">") and tab.locator("img[onerror], body script:text-is('hit()')").count() == 0, name
    finally:
        shutil.rmtree(home / "outputs/runs" / evil)
        (home / "data" / f"{evil}.edf").unlink()
        log.write_bytes(before)
    assert hits == []


@pytest.mark.slow
def test_nobody_comes_without_the_token(served):
    base, entry, _ = served
    token = entry.partition("token=")[2]
    for path in (*PAGES, ""):
        reply = httpx.get(f"{base}/{path}", follow_redirects=False, timeout=30)
        assert reply.status_code == 302 and "/login" in reply.headers["location"]
        assert httpx.get(f"{base}/{path}?token={token}", headers={"Host": "evil.example"}, timeout=30).status_code == 403
    assert httpx.get(f"{base}/training?token={token}x", follow_redirects=False, timeout=30).headers["location"].startswith("/login")
    assert httpx.get(f"{base}/training?token={token}", follow_redirects=False, timeout=30).headers["location"] == "/training"
    for path in ("voila/files/training.ipynb", "voila/render/training.ipynb", "voila/tree", "voila/api/contents/", "api/kernels"):
        assert httpx.get(f"{base}/{path}?token={token}", timeout=30).status_code == 404, path


def run_in_lab(page, base, token, name):
    "Open a notebook in JupyterLab and run all of it."
    page.goto(f"{base}/lab/tree/{name}.ipynb?reset&token={token}")
    page.locator(".jp-Notebook").first.wait_for()
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # what is run before there is a kernel is dropped
    page.locator("#jp-MainMenu .lm-MenuBar-item", has_text="Run").click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()


@pytest.mark.slow
@needs_browser
def test_the_same_notebooks_work_in_jupyterlab(home, browser, tmp_path):
    "The four dashboards, run in one JupyterLab as a reader would run them."
    for name in PAGES: shutil.copy(dashboards() / f"{name}.ipynb", tmp_path)
    port, token = take_port("127.0.0.1", 0), "lab-" + "t" * 20
    base = f"http://127.0.0.1:{port}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HMS_ROOT": str(home), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={tmp_path}", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    context, foreign = browser.new_context(viewport={"width": 1400, "height": 2400}), []
    try:
        for _ in range(600):
            try: httpx.get(f"{base}/api", timeout=20); break
            except httpx.TransportError: time.sleep(.3)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(("http://127.0.0.1", "blob:", "data:")) else None)
        for name, figures, said in (("recording", 4, "at a threshold of 0.50"), ("training", 2, "simulated EEG"), ("performance", 1, "trained on simulated EEG"), ("system", 2, "Since it began")):
            run_in_lab(page, base, token, name)
            page.get_by_text(said).first.wait_for()
            page.wait_for_function(f"{SEEN}.length >= {figures}")
            if name == "recording": knobs(page)
            page.wait_for_timeout(1000)
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / f"lab_{name}.png")
            assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr'], .hms-note.bad").count() == 0 and foreign == [], name
    finally:
        context.pages[0].screenshot(path=SHOTS / "lab_last.png")
        context.close()
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_there_are_no_more_kernels_than_allowed(served):
    "Twenty openings in a row by somebody who never connects: refused in a line, the memory stays bounded."
    psutil = pytest.importorskip("psutil")
    base, entry, process = served
    jar, seen = httpx.Client(timeout=240), []
    jar.get(entry, follow_redirects=False)
    for _ in range(20):
        reply = jar.get(f"{base}/system")
        seen.append(reply.status_code)
        kernels = [p for p in psutil.Process(process.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(p.cmdline())]
        assert len(kernels) <= 8
    assert seen[-1] == 503 and seen.count(200) <= 4 and "Close one" in reply.text
    assert sum(p.memory_info().rss for p in kernels) + psutil.Process(process.pid).memory_info().rss < 2 << 30
