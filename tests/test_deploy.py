"""What stands in deploy/: rules, dashboards, containers. No container engine is needed; what only an engine could show is said in deploy/README.md."""
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from conftest import ROOT, free_port
from hms_brain.core import DEFAULTS
from hms_brain.watch import RULES, rules_text

DEPLOY = ROOT / "deploy"
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: Debian's package prometheus has it")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: Debian's package prometheus has it")


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yml").read_text())


def stages():
    "Stage -> (parent, instructions), of the Dockerfile."
    found, name = {}, None
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM": found[name := rest.split(" AS ")[1]] = (rest.split(" AS ")[0], [])
        elif name and word and not line.startswith("#"): found[name][1].append((word, rest))
    return found


def chain(target):
    "The instructions of a target with those of its parents, and of the stages it copies from, in the order they run."
    parent, own = stages()[target]
    before = chain(parent) if parent in stages() else []
    copied = [step for word, rest in own if (m := re.match(r"--from=(\S+)", rest)) for step in chain(m[1])]
    return copied + before + own


# Prometheus and Grafana

def sample_names():
    "Every sample that a service may show, by name."
    from hms_brain.monitor import Metrics

    metrics = Metrics()
    names = {s.name for f in metrics.registry.collect() for s in f.samples}
    for family in metrics.registry.collect():
        kinds = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}[family.type]
        names |= {family.name + k for k in kinds}
    return names | {"up"}


WORDS = {"sum", "by", "increase", "rate", "histogram_quantile", "max", "min", "and", "or", "on", "absent"}


def metrics_of(expr):
    "Names of series in an expression, with the labels that it selects."
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return {w for w in re.findall(r"[a-zA-Z_:][\w:]*", bare) if w not in WORDS}, set(labels)


def expressions():
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
    board = json.loads((DEPLOY / "grafana/dashboards/hms.json").read_text())
    return [(r["alert"], r["expr"]) for r in rules] + [(p["title"], t["expr"]) for p in board["panels"] for t in p["targets"]]


@pytest.mark.parametrize("title, expr", expressions(), ids=lambda v: v if " " not in v else None)
def test_expressions_name_what_exists(title, expr):
    names, labels = metrics_of(expr)
    assert names and names <= sample_names(), names - sample_names()
    assert labels <= {"route", "status", "predicted", "job"}


def test_the_check_of_expressions_can_fail():
    names, _ = metrics_of('sum by (le) (rate(hms_requests_seconds_bucket{route="a"}[5m])) / hms_ready')
    assert names == {"hms_requests_seconds_bucket", "hms_ready"} and not names <= sample_names()


def test_rules_are_those_of_the_package():
    assert (DEPLOY / "prometheus/rules.yml").read_text() == rules_text(), "run make format"
    assert {r.name for r in RULES} >= {"SlowAnswers", "Errors", "Drift", "Abstention", "SeizureBurden", "DiskFull"}


def test_dashboard_and_datasource_fit():
    board = json.loads((DEPLOY / "grafana/dashboards/hms.json").read_text())
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    folder = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/hms.yml").read_text())["providers"][0]["options"]["path"]
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert {p["datasource"]["uid"] for p in board["panels"]} == {source["uid"]} and source["url"] == "http://prometheus:9090"
    assert f"./grafana/dashboards:{folder}:ro" in compose["grafana"]["volumes"]
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])


@needs_promtool
def test_promtool_accepts(tmp_path):
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    (tmp_path / "token").write_text("x")
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/metrics_token", str(tmp_path / "token")))
    shutil.copy(DEPLOY / "prometheus/rules.yml", tmp_path)
    assert "/run/secrets/metrics_token" in text
    done = subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(RULES) + 1} rules found" in done.stdout, done.stdout + done.stderr


STORIES = {  # rule -> series that break it, minute by minute
    "Errors": {'hms_requests_total{status="200"}': "0+100x90", 'hms_requests_total{status="500"}': "0+5x90"},
    "TurnedAway": {'hms_requests_total{status="200"}': "0+100x90", 'hms_requests_total{status="429"}': "0+50x90"},
    "Abstention": {'hms_predictions_total{predicted="abstained"}': "0+50x90", 'hms_predictions_total{predicted="lpd"}': "0+50x90"},
    "SeizureBurden": {'hms_predictions_total{predicted="seizure"}': "0+50x90", 'hms_predictions_total{predicted="lpd"}': "0+50x90"},
    "SlowAnswers": {f'hms_request_seconds_bucket{{route="/predict",le="{le}"}}': f"0+{n}x90" for le, n in (("1.6", 50), ("3.2", 100), ("+Inf", 100))} | {'hms_request_seconds_count{route="/predict"}': "0+100x90"},
    "Drift": {'hms_drifted{what="amplitude"}': "1x90", 'hms_drifted{what="slope"}': "0x90"},
    "DiskFull": {'hms_disk_free_bytes{folder="jobs"}': "1000x90"},
    "NotReady": {"hms_ready": "0x90"}}
CALM = {'hms_requests_total{status="200"}': "0+100x90", 'hms_predictions_total{predicted="lpd"}': "0+100x90", 'hms_drifted{what="amplitude"}': "0x90", 'hms_disk_free_bytes{folder="jobs"}': "1e12x90", "hms_ready": "1x90"}


@needs_promtool
@pytest.mark.parametrize("rule", [*STORIES, "none"])
def test_rules_fire_on_their_story_alone(rule, tmp_path):
    series = {'up{job="hms",instance="serve:8000"}': "1x90"} | STORIES.get(rule, CALM)
    spec = next((r for r in RULES if r.name == rule), None)
    alert = {"eval_time": "80m", "alertname": rule if spec else "Errors", "exp_alerts": [{"exp_labels": {"severity": spec.severity}, "exp_annotations": {"summary": spec.words}}] if spec else []}
    quiet = [{"eval_time": "80m", "alertname": r.name, "exp_alerts": []} for r in RULES if r.name != rule]
    story = {"rule_files": [str(DEPLOY / "prometheus/rules.yml")], "evaluation_interval": "1m", "tests": [{"interval": "1m", "input_series": [{"series": k, "values": v} for k, v in series.items()], "alert_rule_test": [alert, *quiet]}]}
    (tmp_path / "story.yml").write_text(yaml.safe_dump(story))
    done = subprocess.run(["promtool", "test", "rules", "story.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(url, **query):
    with urlopen(f"{url}?{urlencode(query)}", timeout=5) as reply: return json.load(reply)["data"]


@needs_prometheus
def test_prometheus_reads_a_service(tmp_path):
    "The file of deploy/, with another target and token, on a service that asks for tokens."
    from hms_brain.service.tokens import make_token
    from hms_brain.service.web import running_service

    secret = "a secret of more than thirty-two bytes"
    with running_service(HMS_SYSTEM_THREADS="1", HMS_DEPLOYMENT_AUTH="on", HMS_SECRET=secret) as (service, _):
        (tmp_path / "token").write_text(make_token(secret.encode(), ("metrics",), subject="prometheus"))
        config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
        config["global"]["scrape_interval"] = config["global"]["evaluation_interval"] = "1s"
        job = config["scrape_configs"][0]
        job["authorization"]["credentials_file"], job["static_configs"] = str(tmp_path / "token"), [{"targets": [service.removeprefix("http://")]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(DEPLOY / "prometheus/rules.yml", tmp_path)
        url = f"http://127.0.0.1:{(port := free_port())}"
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                try:
                    if (found := ask(f"{url}/api/v1/query", query="hms_ready")["result"]): break
                except (URLError, OSError): pass
                time.sleep(.5)
            assert found[0]["metric"]["job"] == "hms" and found[0]["value"][1] == "1", (tmp_path / "log").read_text()[-2000:]
            time.sleep(3)
            rules = ask(f"{url}/api/v1/rules")["groups"][0]["rules"]
            assert [r["name"] for r in rules] == ["Down", *(r.name for r in RULES)] and {r["health"] for r in rules} == {"ok"}
            assert {r["state"] for r in rules} == {"inactive"}
            for title, expr in expressions(): assert ask(f"{url}/api/v1/query", query=expr)["resultType"] in ("vector", "scalar"), title
        finally:
            process.terminate()
            process.wait(30)


# containers

def test_every_container_is_locked_down(compose):
    for name, s in compose["services"].items():
        assert s["read_only"] and s["cap_drop"] == ["ALL"] and s["security_opt"] == ["no-new-privileges:true"], name
        assert s["user"].startswith("${HMS_UID:?") and not s.get("privileged") and "cap_add" not in s, name
        assert s["mem_limit"] and s["pids_limit"] and s["profiles"], name
        assert all(p.startswith("127.0.0.1:") for p in s.get("ports", [])), name
        assert ("network_mode" in s) != bool(s.get("ports")) or name == "watch", name
        assert not any("docker.sock" in v for v in s.get("volumes", [])), name
    assert {p for s in compose["services"].values() for p in s["profiles"]} == {"core", "dash", "monitor", "track", "dev"}


def test_every_container_says_how_it_is(compose):
    for name, s in compose["services"].items():
        target = s.get("build", {}).get("target")
        assert "healthcheck" in s or any(word == "HEALTHCHECK" for word, _ in chain(target)), name


def test_what_shares_the_network_listens_here_only(compose):
    for name, s in compose["services"].items():
        if s.get("network_mode") == "host": assert "HMS_DEPLOYMENT_HOST" not in s.get("environment", {}) and "0.0.0.0" not in str(s.get("command")), name
    assert DEFAULTS["deployment"]["host"] == "127.0.0.1"


def test_a_name_means_one_thing(compose):
    "Profile, service, target and command: serve, app and dash are what hms serve, hms app and hms dash are."
    services = compose["services"]
    runs = lambda s: " ".join(s["command"]) if "command" in s else " ".join(json.loads(word_of(s["build"]["target"], "CMD")))
    for name in ("serve", "app", "dash"): assert services[name]["build"]["target"] == name and runs(services[name]).endswith(f"hms {name}") and word_of(name, "CMD") == f'["hms", "{name}"]', name
    assert runs(services["lab"]) == "hms lab" and services["lab"]["profiles"] == ["dev"]
    assert {n for n, s in services.items() if "dash" in s["profiles"]} == {"app", "dash"} and {n for n, s in services.items() if "core" in s["profiles"]} == {"serve"}
    assert {s["build"]["target"] for s in services.values() if "build" in s} == {"serve", "app", "dash", "train"}


def test_dashboards_see_what_the_service_writes(compose):
    "Alerts and metrics: one folder, one token, one port."
    dash, watch, serve = (compose["services"][n] for n in ("dash", "watch", "serve"))
    assert "./state/outputs:/srv/hms/outputs" in dash["volumes"] and "./state/outputs:/srv/hms/outputs" in watch["volumes"] and DEFAULTS["paths"]["audit"] == "outputs/audit"
    assert dash["secrets"] == ["metrics_token"] and "HMS_TOKEN=$$(cat /run/secrets/metrics_token)" in dash["command"][-1]
    assert dash["environment"]["HMS_DEPLOYMENT_SERVICE_PORT"] in serve["ports"][0]
    assert all(v.endswith(":ro") for v in dash["volumes"][1:])


@pytest.mark.parametrize("name", ["serve", "app", "dash"])
def test_uploads_pass_through_the_disk(compose, name):
    "/tmp is memory and counts as such: a file of 2 GiB and its decoded signal do not fit there."
    service = compose["services"][name]
    mounted = [v.split(":")[1] for v in service["volumes"] if not v.endswith(":ro")]
    assert any(service["environment"]["TMPDIR"].startswith(f"{m}/") for m in mounted)
    assert not any(service["environment"]["TMPDIR"].startswith(t.split(":")[0]) for t in service["tmpfs"])


def test_jupyterlab_does_not_see_the_secrets(compose):
    "It mounts the whole folder: state and .env are covered."
    lab = compose["services"]["lab"]
    assert "..:/srv/hms" in lab["volumes"] and "/dev/null:/srv/hms/deploy/.env:ro" in lab["volumes"]
    assert any(t.startswith("/srv/hms/deploy/state:") for t in lab["tmpfs"]) and not lab.get("secrets") and any(t.startswith("/tmp:") for t in lab["tmpfs"])


def test_pages_of_others_get_nothing_from_the_monitors(compose):
    "Grafana answers to one name; Prometheus has no list of names, but lets no other page read it."
    grafana, prometheus = compose["services"]["grafana"]["environment"], compose["services"]["prometheus"]["command"]
    assert grafana["GF_SERVER_ENFORCE_DOMAIN"] == "true" and f"http://{grafana['GF_SERVER_DOMAIN']}:" in grafana["GF_SERVER_ROOT_URL"]
    (origin,) = [w.partition("=")[2] for w in prometheus if w.startswith("--web.cors.origin=")]
    assert re.fullmatch(filled(origin, {}), "http://127.0.0.1:9090") and not re.fullmatch(filled(origin, {}), "http://evil.example")


def test_no_password_stands_anywhere(compose):
    for name, s in compose["services"].items():
        for key, value in s.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN", key): assert key.endswith(("__FILE", "_FILE")) or re.fullmatch(r"\$\{\w+:-\}", value), f"{name}: {key}"
    assert all(v["file"].startswith("./state/secrets/") for v in compose["secrets"].values())
    assert {"GF_SECURITY_ADMIN_PASSWORD__FILE", "GF_AUTH_ANONYMOUS_ENABLED"} <= set(compose["services"]["grafana"]["environment"])
    assert all(re.fullmatch(r"[A-Z_]+=", line) for line in (DEPLOY / ".env.example").read_text().splitlines() if not line.startswith("#"))
    tracked = subprocess.run(["git", "ls-files", "deploy"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "state/" not in tracked and ".env\n" not in tracked


def test_ports_are_those_of_the_settings(compose):
    for section in ("deployment", "monitoring"):
        for key, value in DEFAULTS[section].items():
            for found in re.findall(rf"HMS_{section.upper()}_{key.upper()}:-(\d+)", (DEPLOY / "compose.yml").read_text()): assert int(found) == value
    found = {k: re.search(rf"HMS_\w+_{k}_PORT:-(\d+)", (DEPLOY / "compose.yml").read_text()) for k in stack_ports()}
    assert {k: int(m[1]) for k, m in found.items()} == stack_ports(), "deploy/stack.py asks elsewhere"
    names = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yml").read_text()))
    assert names == {line[:-1] for line in (DEPLOY / ".env.example").read_text().splitlines() if not line.startswith("#")}
    for name in names:
        if m := re.fullmatch(r"HMS_(DEPLOYMENT|MONITORING)_(\w+)", name): assert m[2].lower() in DEFAULTS[m[1].lower()], name


def stack_ports():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("stack", DEPLOY / "stack.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    return module.PORTS


def test_no_port_stands_alone(compose):
    "What listens in the machine's network is asked, and published, at the port of the settings."
    for name, s in compose["services"].items():
        check = str(s["healthcheck"]) if "healthcheck" in s else word_of(s["build"]["target"], "HEALTHCHECK")
        if s.get("network_mode") == "host": assert "_port}" in check and not re.search(r"127\.0\.0\.1:\d", check), name
        assert not [w for w in s.get("command", []) if re.fullmatch(r"\d+", w)], name


@pytest.mark.parametrize("target", ["serve", "app", "dash", "train"])
def test_targets(target):
    steps = chain(target)
    users = [rest for word, rest in steps if word == "USER"]
    assert users and users[-1].split(":")[0] not in ("0", "root")
    own = stages()[target][1]
    assert not any(word in ("RUN", "ADD") for word, _ in own), "nothing is built in the last stage"
    command = json.loads(next(rest for word, rest in own if word == "CMD"))
    done = subprocess.run([sys.executable, "-c", "from hms_brain.cli import main; main()", *command[1:], "--help"], capture_output=True, text=True)
    assert command[0] == "hms" and done.returncode == 0


def test_the_build_sees_only_what_it_copies():
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {w for target in stages().values() for word, rest in target[1] if word == "COPY" and not rest.startswith("--from") for w in rest.split()[:-1]}
    assert kept == copied and all((ROOT / name).exists() for name in copied)


def test_the_workflow_tries_what_needs_an_engine(compose):
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    told = lambda job: "\n".join(step.get("run", "") for step in jobs[job]["steps"])
    assert set(jobs["containers"]["env"]["PROFILES"].split()) == {p for s in compose["services"].values() for p in s["profiles"]}
    targets = re.search(r"for t in ([\w ]+);", told("containers"))[1].split()
    assert set(targets) == {t for t in stages() if t not in ("build", "base") and not t.startswith("build-")}
    for words in ("hadolint", "config --quiet", 'docker build --file deploy/Dockerfile --target "$t"', "make up", "make health", "make down"): assert words in told("containers"), words
    assert "install --yes --no-install-recommends prometheus" in told("test")


def test_secrets_are_drawn_once_and_private(tmp_path):
    (tmp_path := tmp_path / "deploy").mkdir()
    shutil.copy(DEPLOY / "stack.py", tmp_path)
    (tmp_path / ".env").write_text("HMS_UID=0\nHMS_DEPLOYMENT_SERVICE_PORT=9000\n")
    run = lambda: subprocess.run([sys.executable, "stack.py", "secrets"], cwd=tmp_path, check=True, capture_output=True)
    run()
    read = lambda: {p.name: p.read_text() for p in (tmp_path / "state/secrets").iterdir()}
    first = read()
    assert set(first) == {"hms_secret", "grafana_password", "metrics_token"} and first["hms_secret"] != first["grafana_password"]
    assert min(len(first["hms_secret"]), len(first["grafana_password"])) >= 43
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state/secrets").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "state/secrets").stat().st_mode) == 0o700
    env = dict(line.split("=") for line in (tmp_path / ".env").read_text().splitlines())
    assert env["HMS_UID"] != "0" and env["HMS_GID"] != "0" and env["HMS_DEPLOYMENT_SERVICE_PORT"] == "9000"
    run()
    assert read() == first


def test_a_fresh_clone_has_every_folder_that_is_mounted(compose, tmp_path):
    "What is missing the engine would make, for root: MLflow could not write its file beside the runs."
    (tmp_path / "deploy").mkdir()
    shutil.copy(DEPLOY / "stack.py", tmp_path / "deploy")
    subprocess.run([sys.executable, "stack.py", "secrets"], cwd=tmp_path / "deploy", check=True, capture_output=True)
    sources = [v.rsplit(":ro", 1)[0].split(":")[0] for s in compose["services"].values() for v in s.get("volumes", [])]
    made = [tmp_path / "deploy" / s for s in sources if s.startswith(("./state", "../"))] + [tmp_path / "deploy/state/outputs/tmp"]
    assert tmp_path / "outputs/runs" in [p.resolve() for p in made] and all(p.is_dir() for p in made), made
    store = next(w for w in compose["services"]["mlflow"]["command"] if w.startswith("sqlite:"))
    assert store.startswith("sqlite:////srv/hms/outputs/runs/") and "../outputs:/srv/hms/outputs" in compose["services"]["mlflow"]["volumes"]
    owner = int(re.search(r"HMS_UID=(\d+)", (tmp_path / "deploy/.env").read_text())[1])
    assert owner and {p.stat().st_uid for p in (tmp_path / "outputs/runs", tmp_path / "deploy/state/outputs/tmp")} == {owner}


DOCKER = """#!/bin/sh
echo "$@" >> "$LOG"
echo "told $HMS_DEPLOYMENT_APP_PORT $HMS_DEPLOYMENT_DASH_PORT" >> "$LOG"
case "$*" in *"token create"*) echo a.signed.token;; esac
case "$*" in *" --wait "*) exit $UP;; esac
"""


@pytest.fixture
def stack(tmp_path):
    "stack.py beside a docker that only writes down what it is told."
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("state", ".env"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER)
    (tmp_path / "bin/docker").chmod(0o755)
    def run(*words, engine=True, up=0):
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin" if engine else str(tmp_path)
        done = subprocess.run([sys.executable, str(tmp_path / "deploy/stack.py"), *words], env={"PATH": path, "LOG": str(tmp_path / "log"), "UP": str(up)}, capture_output=True, text=True)
        return done, (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    return run


def test_up_waits_and_signs_a_token(stack, tmp_path):
    done, told = stack("up", "core", "monitor")
    assert done.returncode == 0 and "--profile core --profile monitor up --detach --build --wait" in told, done.stderr
    assert (tmp_path / "deploy/state/secrets/metrics_token").read_text() == "a.signed.token"
    assert "http://127.0.0.1:8000" in done.stdout and "grafana_password" in done.stdout
    assert (tmp_path / "deploy/state/secrets/grafana_password").read_text() not in done.stdout + told
    done, _ = stack("up", up=1)
    assert done.returncode == 1 and "see make logs" in done.stderr
    (tmp_path / "deploy/state/outputs" / "tmp" / "hms_x").mkdir()
    (tmp_path / "deploy/state/outputs" / "tmp" / "hms_x" / "upload").write_text("of a service that was killed")
    done, told = stack("down")
    assert list((tmp_path / "deploy/state/outputs/tmp").iterdir()) == []
    assert done.returncode == 0 and told.splitlines()[-2].endswith("down --remove-orphans --timeout 40")


def test_up_signs_a_token_for_the_dashboards(stack, tmp_path):
    done, _ = stack("up", "dash")
    assert done.returncode == 0 and (tmp_path / "deploy/state/secrets/metrics_token").read_text() == "a.signed.token", done.stderr
    assert "http://127.0.0.1:8050" in done.stdout and "http://127.0.0.1:7860" in done.stdout


def test_ports_come_from_settings_then_env_file_then_environment(stack, tmp_path):
    (tmp_path / "settings.ini").write_text("[deployment]\napp_port = 1111  # ours\ndash_port = 2222\nlab_port = 3333\n")
    (tmp_path / "deploy/.env").write_text("HMS_DEPLOYMENT_DASH_PORT=4444\nHMS_DEPLOYMENT_LAB_PORT=\n")
    done, _ = stack("up", "dash", "dev", "track")
    assert re.findall(r"(\w+) +http://127.0.0.1:(\d+)", done.stdout) == [("app", "1111"), ("dash", "4444"), ("lab", "3333"), ("mlflow", "5000")]
    assert "told 1111 4444" in (tmp_path / "log").read_text()


def test_without_an_engine_one_clear_line(stack):
    for verb in ("up", "down", "logs"):
        done, told = stack(verb, engine=False)
        assert done.returncode == 1 and done.stderr.strip() == "docker is not installed; without containers: hms serve, then make health" and not told


def test_health_asks(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health/ready" else 404)
            self.end_headers()
        def log_message(self, *_): pass

    server = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = lambda *words: subprocess.run([sys.executable, str(DEPLOY / "stack.py"), "health", *words], capture_output=True, text=True,
                                        env=os.environ | {"HMS_DEPLOYMENT_SERVICE_PORT": str(server.server_port), "HMS_MONITORING_PROMETHEUS_PORT": str(server.server_port), "HMS_MONITORING_GRAFANA_PORT": str(free_port())})
    done = run()
    assert done.returncode == 0 and re.match(r"service +ok", done.stdout)
    done = run("monitor")
    assert done.returncode == 1 and re.search(r"prometheus +status 404", done.stdout) and re.search(r"grafana +does not answer", done.stdout)
    server.shutdown()


# the steps of the targets, without an engine

USER = 65534 if os.getuid() == 0 else os.getuid()
AS_USER = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}


def usable(python):
    "Whether a user without rights may run it and make environments with it."
    try: return subprocess.run([python, "-c", "import ensurepip"], capture_output=True, **AS_USER).returncode == 0
    except OSError: return False


def image_python(folder):
    "bin/python, as in the image: the one that runs here, or a copy of it where it lies in somebody's home; the variables that it needs."
    here, prefix, version = Path(os.path.realpath(sys.executable)), Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "bin").mkdir()
    if usable(here):
        (folder / "bin/python").symlink_to(here)
        return {}
    def left_out(place, names): return [n for n in names if n in ("test", "idlelib", "__pycache__") or (Path(place).name == "site-packages" and not n.startswith("pip"))]
    shutil.copytree(prefix / "lib" / version, folder / "lib" / version, ignore=left_out)
    shutil.copy(here, folder / "bin/python")
    for library in (prefix / "lib").glob("libpython*.so*"): shutil.copy(library, folder / "lib")
    return {"LD_LIBRARY_PATH": str(folder / "lib")}


def own(folder):
    if os.getuid() == 0: subprocess.run(["chown", "-R", str(USER), str(folder)], check=True)


def take_steps(target, folder):
    "What the Dockerfile says of a target, word for word, below a folder instead of /: the folder it ends in, and its variables."
    inside = lambda path: folder / path.lstrip("/")
    env = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "REQUESTS_"))} | {"PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "tmp")} | image_python(folder)
    for name in ("tmp", "opt"): (folder / name).mkdir()
    where = folder
    for word, rest in chain(target):
        if word == "WORKDIR": (where := inside(rest)).mkdir(parents=True, exist_ok=True)
        elif word == "ENV":
            for k, v in (pair.split("=", 1) for pair in shlex.split(rest)):
                v = v.replace("${PATH}", env["PATH"]).replace("/opt/hms", str(folder / "opt/hms"))
                env[k] = str(inside(v)) if k in ("HMS_ROOT", "HOME") else v
        elif word == "COPY" and not rest.startswith("--from"):
            *sources, to = rest.split()
            for s in sources:
                if (ROOT / s).is_dir(): shutil.copytree(ROOT / s, where / to, ignore=shutil.ignore_patterns("__pycache__"))
                else: shutil.copy(ROOT / s, where / to)
        elif word == "RUN":
            own(folder)
            done = subprocess.run(["/bin/sh", "-c", rest], cwd=where, env=env, capture_output=True, text=True, **AS_USER)
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return where, env


def filled(text, told):
    "A text of compose.yml with its variables."
    return re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda m: told.get(m[1]) or m[2], text).replace("$$", "$")


def word_of(target, name):
    return next(rest for word, rest in chain(target)[::-1] if word == name)


def runs_as_in_compose(service, folder, where, base):
    "Start a service with the command and the variables of compose.yml, ask its health check until it is well, end it; what it said."
    import psutil

    port, target = str(free_port()), service["build"]["target"]
    told = {f"HMS_DEPLOYMENT_{k.upper()}": port for k in DEFAULTS["deployment"] if k.endswith("_port")}
    here = lambda text: re.sub(r"(?<![\w.])/(srv/hms|run/secrets)", rf"{folder}/\1", text)
    env = base | {k: here(filled(v, told)) for k, v in service.get("environment", {}).items()}
    if "HMS_DEPLOYMENT_SERVICE_PORT" in env and service.get("ports"): env["HMS_DEPLOYMENT_SERVICE_PORT"] = port
    if "TMPDIR" in env: Path(env["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    own(where / "outputs")
    command = [here(filled(w, told)) for w in service.get("command") or json.loads(word_of(target, "CMD"))]
    check = service["healthcheck"]["test"][1:] if "healthcheck" in service else json.loads(word_of(target, "HEALTHCHECK").partition("CMD ")[2])
    with open(folder / "tmp/said", "w+") as said:
        process = subprocess.Popen(command, cwd=where, env=env, stdout=said, stderr=said, start_new_session=True, **AS_USER)
        try:
            deadline = time.monotonic() + 240
            while subprocess.run(check, cwd=where, env=env, capture_output=True, **AS_USER).returncode:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "tmp/said").read_text()[-3000:]
                time.sleep(1)
            ports = {c.laddr.port for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] for c in p.net_connections("inet") if c.status == "LISTEN" and c.laddr.ip != "127.0.0.1"}
            assert ports == ({int(port)} if service.get("ports") else set()), "listens where others are"
            return (folder / "tmp/said").read_text()
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("target, services, absent", [("serve", ["serve"], "torch gradio voila"), ("app", ["app"], "torch fastapi-offline voila"), ("dash", ["dash", "lab"], "torch mlflow"), ("train", ["mlflow"], "gradio voila")])
def test_the_steps_of_each_target(target, services, absent, compose):
    "The RUN lines of the Dockerfile in an empty folder, by a user without rights; then every service that compose.yml makes of them, on a root that is not theirs to write."
    folder = Path(tempfile.mkdtemp(prefix=f"hms_{target}_"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    try:
        where, env = take_steps(target, folder)
        for place in (where / "outputs/runs", where / "runs", where / "data", folder / "run/secrets"): place.mkdir(parents=True)
        for name in ("hms_secret", "metrics_token"): (folder / "run/secrets" / name).write_text("a secret of more than thirty-two bytes")
        for path in (folder / "run/secrets").iterdir(): path.chmod(0o600)
        own(folder)
        subprocess.run(["chmod", "-R", "a-w", str(folder / "opt"), str(where)], check=True)
        subprocess.run(["chmod", "-R", "u+w", str(where / "outputs")], check=True)
        installed = subprocess.run([str(folder / "opt/hms/bin/pip"), "list"], env=env, capture_output=True, text=True, **AS_USER).stdout
        assert re.search(rf"^pyarrow +{25 if target == 'train' else 26}", installed, re.M) and not [p for p in absent.split() if re.search(rf"^{p} ", installed, re.M)]
        assert subprocess.run(["hms", "--version"], cwd=where, env=env, capture_output=True, **AS_USER).returncode == 0
        for name in services:
            said = runs_as_in_compose(compose["services"][name], folder, where, env)
            assert "Traceback" not in said, said
            if name == "dash": assert re.search(r"http://127\.0\.0\.1:\d+/\?token=\S{16}", said)
        if target == "serve": assert sorted(p.name for p in (where / "outputs").iterdir()) == ["audit", "jobs", "runs", "tmp"] and not list((where / "outputs/tmp").glob("[!.]*"))
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)])
        shutil.rmtree(folder, ignore_errors=True)
