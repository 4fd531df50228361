"""Drift, audit log, alerts: false alarms counted, lines broken, processes killed, messages caught on loopback servers."""
import asyncio
import dataclasses
import hashlib
import hmac
import json
import os
import shutil
import signal
import smtplib
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ks_2samp

from hms_brain import watch
from hms_brain.audit import AuditLog, log_name, read_log, verify_log
from hms_brain.batches import SineCache
from hms_brain.bundle import FILES, MANIFEST, Bundle, default_bundle, seal_files
from hms_brain.core import CLASSES, InputError, get_settings, rng_for
from hms_brain.drift import ANSWERS, FALSE_ALARMS, FEATURES, DriftMonitor, Reference, drift_limit, fit_reference, ks_distance, measure_window
from hms_brain.monitor import Metrics

SPREAD = np.array([.41, .3, .8, .5, 1.0, .1, 0.0])  # SD among patients, in the order of FEATURES; .41 was measured on 800 simulated windows


def crowd(n, *words, gain=1.0):
    "Simulated features of n windows: skewed, tied and correlated ones among them."
    rng = rng_for(0, *words)
    z = rng.normal(size=(n, len(FEATURES)))
    z[:, 1] = .6 * z[:, 0] + .8 * z[:, 1]
    z[:, 4] = np.exp(z[:, 4])
    x = z * SPREAD + (3 + np.log(gain), .8, 0, -3, 2, .2, 0)
    x[:, 6] = (rng.random(n) < .05) / 19
    return [dict(zip(FEATURES, map(float, row))) for row in x], [None if rng.random() < .02 else CLASSES[i] for i in rng.choice(6, n, p=(.17, .17, .15, .12, .13, .26))]


@pytest.fixture(scope="module")
def reference():
    return Reference.fit(*crowd(800, "reference"))


def test_distance_is_scipys(reference):
    for k, name in enumerate(FEATURES):
        q, x = reference.quantiles[name], np.array([row[name] for row in crowd(100, "new", k)[0]])
        assert ks_distance(q, x) == pytest.approx(ks_2samp(q, x).statistic, abs=1e-12)


def test_false_alarms_are_as_rare_as_stated(reference):
    "Single looks at independent hundreds: the largest of 4,000 x 14 distances stays below a limit that each may pass with alpha = 7e-7."
    rng, worst = rng_for(1, "looks"), 0.0
    rows, answers = crowd(20_000, "clean")
    table = {name: np.array([r[name] for r in rows]) for name in FEATURES}
    given = np.array([a or "abstained" for a in answers])
    for _ in range(400):
        at = rng.choice(len(rows), 100, replace=False)
        worst = max(worst, *(ks_distance(q, table[name][at]) for name, q in reference.quantiles.items()), *(abs((given[at] == a).mean() - reference.shares[a]) for a in ANSWERS))
    assert worst < drift_limit(100, reference.n)
    assert FALSE_ALARMS <= .01


@pytest.mark.parametrize("seed", range(3))
def test_clean_windows_are_silent_and_twice_the_gain_is_not(reference, seed):
    monitor = DriftMonitor(reference)
    for i, (row, answer) in enumerate(zip(*crowd(1000, "stream", seed))):
        monitor.add(row, answer, f"{i}")
        assert i % 5 or not any(r["drifted"] for r in monitor.look())
    for i, (row, answer) in enumerate(zip(*crowd(100, "louder", seed, gain=2))):
        monitor.add(row, answer, f"louder {i}")
        if drifted := [r["what"] for r in monitor.look() if r["drifted"]]: break
    assert drifted == ["amplitude"] and i < 99


def test_an_answer_that_becomes_common_is_drift(reference):
    monitor = DriftMonitor(reference)
    for i, row in enumerate(crowd(100, "same")[0]): monitor.add(row, "seizure", f"{i}")
    assert "answer seizure" in [r["what"] for r in monitor.look() if r["drifted"]]


def test_a_gain_moves_the_amplitude_alone():
    x = rng_for(0, "eeg").normal(size=(19, 10000)).cumsum(1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    once, twice = measure_window(x), measure_window(2 * x)
    assert twice["amplitude"] - once["amplitude"] == pytest.approx(np.log(2), abs=1e-3)
    assert all(abs(twice[k] - once[k]) < .01 for k in FEATURES if k != "amplitude")


@pytest.mark.parametrize("spoil", [lambda d: d.pop("n"), lambda d: d["quantiles"].pop("slope"), lambda d: d["quantiles"]["slope"].reverse(), lambda d: d["shares"].update(lpd=2.0), lambda d: d["quantiles"].update(slope=["x"] * 201)])
def test_a_damaged_reference_is_refused(reference, spoil):
    value = json.loads(json.dumps(reference.to_dict()))
    spoil(value)
    with pytest.raises(InputError, match=r"drift\.json"): Reference.from_dict(value)


def test_the_reference_of_a_run(tmp_path):
    cache = SineCache(60)
    p = {f"p_{c}": np.eye(6)[np.arange(60) % 6][:, k] for k, c in enumerate(CLASSES)}
    held = cache.index.assign(**p, abstain=np.arange(60) == 5)[::-1]
    run = SimpleNamespace(validation=held, info={"data": {"checksum": cache.manifest.get("checksum")}})
    found = fit_reference(run, cache)
    assert found.n == 60 and found.shares["seizure"] == pytest.approx(10 / 60) and found.shares["abstained"] == pytest.approx(1 / 60)
    assert found.quantiles["amplitude"][-1] == max(measure_window(cache.batch([i])[0][0])["amplitude"] for i in range(60))
    run.validation = held[:49]
    assert fit_reference(run, cache) is None
    run.info["data"]["checksum"] = "another"
    with pytest.raises(InputError, match="is not what the run was trained on"): fit_reference(run, cache)


def test_the_reference_travels_in_the_bundle(tmp_path, reference):
    files = {name: (default_bundle() / name).read_bytes() for name in FILES}
    whole = files | {"drift.json": json.dumps(reference.to_dict()).encode()}
    def written(name, files, seal):
        (tmp_path / name).mkdir()
        for file, data in (files | {"manifest.json": seal_files(seal)}).items(): (tmp_path / name / file).write_bytes(data)
        return tmp_path / name
    assert Reference.from_dict(Bundle.load(written("whole", whole, whole)).drift).n == reference.n
    assert Bundle.load(written("older", files, files)).drift is None
    for name, there, sealed, said in (("lost", files, whole, "is missing"), ("added", whole, files, "was changed|damaged|belong"), ("changed", whole | {"drift.json": b"{}"}, whole, "was changed")):
        with pytest.raises(InputError, match=f"(drift|manifest)[.]json: .*({said})"): Bundle.load(written(name, there, sealed))


# the audit log

def test_every_changed_byte_is_found(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=b"k" * 32)
    for i in range(6): log.add("answer", i=i, text="ü\n\"")
    data, rng = (tmp_path / "a.jsonl").read_bytes(), rng_for(0, "bytes")
    ends = np.cumsum([len(line) for line in data.splitlines(keepends=True)])
    for at in rng.choice(len(data) - 1, 200, replace=False):
        if data[at:at + 1] == b"\n": continue
        (tmp_path / "b.jsonl").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        n = int(np.searchsorted(ends, at, side="right")) + 1
        with pytest.raises(InputError, match=f"line {n} "): verify_log(tmp_path / "b.jsonl", b"k" * 32)
    with pytest.raises(InputError, match="line 1 was changed"): verify_log(tmp_path / "a.jsonl", b"another key")
    with pytest.raises(InputError, match="last line was changed"): AuditLog(tmp_path / "b.jsonl", b"another key").add("x")
    with pytest.raises(ValueError, match="name of the log"): log.add("x", prev="0")


def test_lines_that_move_are_found(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl")
    for i in range(4): log.add("answer", i=i)
    a, b, c, d = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    for lines, n in (((a, c, b, d), 2), ((b, c, d), 1), ((a, b, b, c, d), 3), ((a, b, d), 3)):
        (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
        with pytest.raises(InputError, match=f"line {n} does not follow"): verify_log(tmp_path / "b.jsonl")


def test_threads_and_processes_share_a_log(tmp_path):
    path = tmp_path / "a.jsonl"
    logs = [AuditLog(path), AuditLog(path)]
    threads = [threading.Thread(target=lambda log=log: [log.add("x") for _ in range(8)]) for log in logs * 2]
    for t in threads: t.start()
    for t in threads: t.join()
    assert verify_log(path)[0] == 32


def test_a_secret_has_a_log_of_its_own(tmp_path):
    "A service that ran open and is then given a secret starts, and neither log spoils the other."
    for key in (b"", b"x" * 32, b"y" * 32, b""):
        log = AuditLog(tmp_path / log_name("service", key), key)
        log.add("start")
        log.close()
    assert [verify_log(tmp_path / log_name("service", key), key)[0] for key in (b"", b"x" * 32, b"y" * 32)] == [2, 1, 1]


WRITER = "import sys; from hms_brain.audit import AuditLog\nlog = AuditLog(sys.argv[1])\nwhile True: print(log.add('answer', text='x' * 3000)['n'], flush=True)"


@pytest.mark.fault
def test_twenty_kills_lose_nothing_that_was_confirmed(tmp_path):
    confirmed, rng = [], rng_for(0, "kills")
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a.jsonl")], stdout=subprocess.PIPE, text=True)
        confirmed.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0, .1))
        process.send_signal(signal.SIGKILL)
        confirmed += [int(line) for line in process.communicate()[0].split("\n")[:-1]]
    records = list(read_log(tmp_path / "a.jsonl"))
    assert {n: records[n]["kind"] for n in confirmed} == dict.fromkeys(confirmed, "answer") and len(set(confirmed)) == len(confirmed)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "a.jsonl")
    log.add("x")
    with monkeypatch.context() as m:
        real = os.write
        m.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
        with pytest.raises(InputError, match="free some space"): log.add("y")
    log.add("z")
    assert [r["kind"] for r in read_log(tmp_path / "a.jsonl")] == ["x", "mended", "z"]


def test_the_command(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl")
    log.add("x"); log.add("y")
    run = lambda: subprocess.run([sys.executable, "-c", "from hms_brain.cli import main; main()", "audit", str(tmp_path / "a.jsonl")], capture_output=True, text=True)
    assert run().stdout == f"2 records, none changed\nhead {verify_log(tmp_path / 'a.jsonl')[1]}\n"
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b'"x"', b'"z"'))
    done = run()
    assert done.returncode == 2 and "line 1 was changed" in done.stderr and done.stderr.count("\n") == 1


def test_a_line_without_end_is_a_changed_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(InputError, match="line 1 was changed"): verify_log(tmp_path / "a.jsonl")


# alerts

@pytest.fixture
def hook():
    "A web server that keeps what is posted; it fails as often as it is told to."
    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            code = self.server.codes.pop(0) if self.server.codes else 200
            self.server.got.append((code, self.headers.get("X-HMS-Signature"), body))
            self.send_response(code)
            if code == 307: self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
        def log_message(self, *_): pass
    server = HTTPServer(("127.0.0.1", 0), Keep)
    server.got, server.codes = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


EVENT = {"kind": "fired", "rule": "Errors", "severity": "critical", "id": "Errors-1"}


def test_webhook_is_signed_and_tried_again(hook):
    hook.codes = [500, 307]
    url = f"http://127.0.0.1:{hook.server_port}/"
    assert watch.deliver({"webhook": lambda e: watch.send_webhook(url, e, b"secret")}, wait=0)(EVENT) == []
    assert [code for code, *_ in hook.got] == [500, 307, 200]
    _, signature, body = hook.got[-1]
    assert json.loads(body) == EVENT and signature == "sha256=" + hmac.new(b"secret", body, hashlib.sha256).hexdigest()
    hook.codes = [500] * 3
    assert watch.deliver({"webhook": lambda e: watch.send_webhook(url, e)}, wait=0)(EVENT) == ["webhook: HTTPError"]
    with pytest.raises(InputError): watch.send_webhook("file:///etc/passwd", EVENT)


def test_what_speaks_no_http_ends_no_watch():
    "Another program has the port of the webhook, or of the service."
    class Shell(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"SSH-2.0-here\r\n")
            while self.request.recv(1 << 16): pass  # until the other side gives up
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Shell) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert watch.fetch_samples(url) is None
        assert watch.deliver({"webhook": lambda e: watch.send_webhook(url, e)}, wait=0)(EVENT) == ["webhook: BadStatusLine"]
        server.shutdown()


@pytest.fixture
def postbox():
    "An SMTP server without TLS that keeps the mail."
    class Smtp(socketserver.StreamRequestHandler):
        def handle(self):
            say = lambda text: self.wfile.write(f"{text}\r\n".encode())
            say("220 here")
            while line := self.rfile.readline().decode().strip():
                word = line.split()[0].upper()
                if word == "DATA":
                    say("354 go on")
                    lines = []
                    while (text := self.rfile.readline()) != b".\r\n": lines.append(text)
                    self.server.got.append(b"".join(lines).decode())
                self.server.said.append(word)
                say("221 bye" if word == "QUIT" else "250 fine")
                if word == "QUIT": return
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp)
    server.got, server.said = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_mail(postbox):
    at = f"127.0.0.1:{postbox.server_address[1]}"
    watch.send_mail(at, "hms@ward.example", ["a@ward.example", "b@ward.example"], EVENT)
    assert "Subject: [hms critical] Errors fired" in postbox.got[0] and "id: Errors-1" in postbox.got[0]
    with pytest.raises(smtplib.SMTPException, match="no TLS"): watch.send_mail(at, "hms@ward.example", ["a@ward.example"], EVENT, ("user", "password"))
    assert "AUTH" not in postbox.said and len(postbox.got) == 1


def test_channels_of_the_settings(monkeypatch, hook, postbox):
    for key, value in {"WEBHOOK": f"http://127.0.0.1:{hook.server_port}/", "SMTP": f"127.0.0.1:{postbox.server_address[1]}", "MAIL_FROM": "hms@ward.example", "MAIL_TO": "a@ward.example"}.items(): monkeypatch.setenv(f"HMS_MONITORING_{key}", value)
    get_settings.cache_clear()
    try:
        assert watch.deliver(watch.channels(), wait=0)(EVENT) == [] and len(hook.got) == len(postbox.got) == 1
        monkeypatch.setenv("HMS_MONITORING_MAIL_TO", "")
        get_settings.cache_clear()
        with pytest.raises(InputError, match="mail needs"): watch.channels()
    finally: get_settings.cache_clear()


def test_from_metrics_to_history(tmp_path, hook):
    "A service that fails, a webhook that fails too: both are in the history."
    log, metrics = AuditLog(tmp_path / "alerts.jsonl"), Metrics()
    metrics.ready.set(1)
    url = f"http://127.0.0.1:{hook.server_port}/"
    w = watch.Watch(log, tell=watch.deliver({"webhook": lambda e: watch.send_webhook(url, e)}, wait=0))
    look = lambda t: [(e["kind"], e["rule"]) for e in w.look(watch.read_samples(metrics.text().decode()), t)]
    assert look(0) == []
    metrics.compare([{"what": "amplitude", "distance": .5, "psi": 2.0, "drifted": True}])
    hook.codes = [500] * 3
    assert look(15) == [("fired", "Drift")] and look(30) == []
    metrics.compare([])
    assert look(45) == [("ended", "Drift")]
    alert, = watch.alerts(log)
    assert alert["state"] == "ended" and alert["undelivered"] == 1 and [c for c, *_ in hook.got] == [500, 500, 500, 200]
    assert verify_log(tmp_path / "alerts.jsonl")[0] == 3


def test_a_full_disk_does_not_silence_the_alert_about_it(tmp_path, hook, monkeypatch, capsys):
    "The history cannot be written: the alert leaves all the same and says so, and the watch goes on."
    log, metrics, url = AuditLog(tmp_path / "alerts.jsonl"), Metrics(), f"http://127.0.0.1:{hook.server_port}/"
    metrics.ready.set(1)
    metrics.disk.labels("jobs").set(2**20)
    monkeypatch.setattr(watch, "fetch_samples", lambda *_: watch.read_samples(metrics.text().decode()))
    monkeypatch.setattr(watch, "channels", lambda: {"webhook": lambda e: watch.send_webhook(url, e), "pager": lambda e: 1 / 0})
    monkeypatch.setattr(watch, "deliver", lambda channels, deliver=watch.deliver: deliver(channels, wait=0))
    monkeypatch.setattr(watch, "RULES", [dataclasses.replace(r, hold=0) for r in watch.RULES])
    monkeypatch.setattr(watch.Watch.__init__, "__defaults__", (watch.RULES, watch.Watch.__init__.__defaults__[1]))
    with monkeypatch.context() as m:
        def full(*_): raise OSError(28, "No space left on device")
        m.setattr(os, "write", full)
        watch.run_watch("http://here", log, every=0, looks=2)
    (_, _, body), = hook.got
    event = json.loads(body)
    assert (event["kind"], event["rule"]) == ("fired", "DiskFull") and "No space left" in event["unwritten"] and "this is not in the history" in capsys.readouterr().out
    assert watch.alerts(log) == []


def test_a_running_service_is_watched(tmp_path):
    from hms_brain.service.web import running_service

    with running_service(HMS_SYSTEM_THREADS="1") as (url, _):
        log = AuditLog(tmp_path / "alerts.jsonl")
        watch.run_watch(url, log, every=0, looks=2, say=lambda _: None)
        names = {name for name, _ in watch.fetch_samples(url)}
        assert watch.alerts(log) == [] and {"hms_ready", "hms_disk_free_bytes"} <= names
    assert watch.fetch_samples(url) is None


def test_a_service_compares_and_writes_down(tmp_path, reference):
    from fastapi.testclient import TestClient

    from hms_brain.service.engine import Engine
    from hms_brain.service.web import create_app

    app = create_app(threads=1, jobs=tmp_path / "jobs", audit=AuditLog(tmp_path / "service.jsonl"))
    engine: Engine = app.state.engine
    engine.predictor.bundle = dataclasses.replace(engine.predictor.bundle, drift=reference.to_dict())
    engine.greet(engine.predictor)
    eeg = (rng_for(0, "service").normal(size=(19, 2000)).cumsum(1) * 2).round(1)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answers = [client.post("/predict", json={"eeg_data": (eeg + k).tolist()}).json() for k in range(2)]
        for i, (row, answer) in enumerate(zip(*crowd(60, "louder", gain=4))): engine.drift.add(row, answer, f"{i}")
        samples = watch.read_samples(client.get("/metrics").text)
    assert watch.Extreme("hms_drifted", "max", {"what": "amplitude"}).value(samples, {}) == 1
    records = list(read_log(tmp_path / "service.jsonl"))
    assert [r["kind"] for r in records] == ["model", "model", "answer", "answer"]
    assert [r["input_sha256"] for r in records[2:]] == [a["input_sha256"] for a in answers]
    assert "eeg" not in (tmp_path / "service.jsonl").read_text()


def test_a_bundle_that_cannot_be_compared_changes_nothing(tmp_path, reference):
    "Neither the model nor its reference; one without a reference takes the distances of the last with it."
    from hms_brain.service.engine import Engine

    place = tmp_path / "bundle"
    shutil.copytree(default_bundle(), place)
    def written(drift):
        (place / "drift.json").unlink(missing_ok=True)
        if drift: (place / "drift.json").write_text(json.dumps(drift))
        (place / MANIFEST).write_bytes(seal_files({p.name: p.read_bytes() for p in place.iterdir() if p.name != MANIFEST}))
    written(reference.to_dict())
    engine = Engine(place, threads=1)
    predictor, drift = engine.predictor, engine.drift
    written({"n": 60, "of": "another release"})
    with pytest.raises(InputError, match=r"drift\.json"): asyncio.run(engine.reload())
    assert engine.predictor is predictor and engine.drift is drift
    engine.metrics.compare([{"what": "amplitude", "distance": .5, "psi": 2.0, "drifted": True}])
    written(None)
    asyncio.run(engine.reload())
    assert engine.predictor is not predictor and engine.drift is None and "amplitude" not in engine.metrics.text().decode()
    engine.close()
