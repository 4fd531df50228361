"""A newcomer's walk: every command of the README and of the tutorials, in a fresh clone with an environment of its own.

The fast test holds every command that is named anywhere in the prose against the commands and options that exist. The slow one runs what stands
in blocks, in order, and then the tutorials' cells, there."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from conftest import ROOT, free_port

TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "deploy/README.md", ROOT / "nbs/safety.ipynb", *TUTORIALS]

LEFT_OUT = {  # command -> why it is not run
    "make test": "the suite that this test is part of; `make status` sets up the same",
    "hms download": "needs Kaggle's token and 26 GB; tests/test_catalog.py runs it on a stand-in",
    "hms kaggle push": "needs Kaggle's token; tests/test_kaggle.py runs it on a stand-in",
    "hms kaggle submit": "needs Kaggle's token; tests/test_kaggle.py runs it on a stand-in"}
SERVERS = {"hms app": "app", "hms serve": "service", "hms dash": "dash"}  # command -> port in [deployment]
NIGHT = """from hms_brain.exports import write_edf, write_sample
from hms_brain.simulate import simulate_recording
write_edf("night.edf", simulate_recording(seed=1, patient=1, pattern="lpd", duration=3660))
import os; os.mkdir("archive"); write_sample("archive/a.edf"); write_sample("archive/b.edf")"""
BEFORE = {  # command -> what the page takes for granted
    "make test": "make status",
    "hms predict night.edf": f"python -c {shlex.quote(NIGHT)}",
    "hms kaggle pack": "mkdir -p outputs/bundles && cp -r outputs/runs/first/bundle outputs/bundles/mine"}


def prose(path):
    "The Markdown of a page."
    if path.suffix == ".md": return path.read_text()
    return "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")


def blocks(path):
    "The page's blocks of commands, in order."
    found = re.findall(r"^```(\w*)\n(.*?)^```", prose(path), re.M | re.S)
    return [[line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")] for language, block in found if language in ("", "sh")]


def named(path):
    "Commands in the text of the page."
    spans = re.findall(r"(?<!`)`((?:hms|make) [^`\n]+)`", prose(path))
    return [part.strip() for span in spans for part in span.split("; ")]


def begins(command, table):
    "The entry of a table that a command begins with: the longest."
    return max((k for k in table if (command + " ").startswith(k + " ")), key=len, default=None)


# what is named exists

def complaint(words, targets, root, parameters):
    "What is wrong with a command; None when nothing is."
    if words[0] == "make": return next((f"no target {w}" for w in words[1:] if re.fullmatch(r"[a-z-]+", w) and w not in targets), None)
    here, rest = root, words[1:]
    while rest and hasattr(here, "commands"):
        if rest[0] == "--help": return None
        if rest[0] not in here.commands: return f"no command {rest[0]}"
        here, rest = here.commands[rest[0]], rest[1:]
    options = {o for p in here.params for o in p.opts} | {"--help"}
    wrong = [w for w in rest if re.match(r"--?[a-z]", w) and w.split("=")[0] not in options]
    given = [after.split("=")[0] for w, after in zip(rest, rest[1:]) if w == "-p"]
    return f"{wrong} {given}" if wrong or (given and not set(given) <= parameters.get(here.name, set())) else None


def surroundings():
    import typer

    from hms_brain.cli import PIPELINES, app
    from hms_brain.runs import pipeline_parameters

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    return targets, typer.main.get_command(app), {name: set(pipeline_parameters(name)) for name in PIPELINES}


@pytest.fixture(scope="module")
def known():
    return surroundings()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_that_are_named_exist(path, known):
    lines = [c for block in [named(path), *blocks(path)] for c in block if re.match(r"(hms|make) [a-z]", c) and " | " not in c]
    wrong = {c: why for c in lines if (why := complaint(shlex.split(c, comments=True), *known))}
    assert wrong == {}


def test_the_check_can_fail(known):
    for line in ("hms predikt a.edf", "hms predict a.edf --everywhere", "hms train -p epoch=3", "make tests", "hms token make"): assert complaint(shlex.split(line), *known), line


# what stands in blocks runs

class Shell:
    "A terminal in the clone: what a command exports, the next one sees."

    def __init__(self, clone):
        self.clone, self.ports, self.servers = clone, {name: free_port() for name in ("service", "app", "dash")}, []
        kept = {k: v for k, v in os.environ.items() if not re.match(r"HMS_|PYTHON|VIRTUAL_ENV|COVERAGE|COV_|KAGGLE|PYTEST", k)}
        kept["PATH"] = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != os.path.dirname(sys.executable))
        self.env = kept | {f"HMS_DEPLOYMENT_{name.upper()}_PORT": str(port) for name, port in self.ports.items()} | {"PYTHON": os.path.realpath(sys.executable)}

    def run(self, command, seconds=3600):
        "Run a command; the test fails with its output when it fails."
        script = f"set -e\n{command.replace(':8000', ':' + str(self.ports['service']))}\nenv -0 > ../env"
        done = subprocess.run(["bash", "-c", script], cwd=self.clone, env=self.env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        self.env = dict(x.split("=", 1) for x in (self.clone.parent / "env").read_text().split("\0") if "=" in x)
        return done.stdout

    def serve(self, command, port, seconds=300):
        "Start a server and wait until it answers, whatever it answers."
        with open(self.clone.parent / "server.log", "ab") as log:
            process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.clone, env=self.env, stdout=log, stderr=log, start_new_session=True)
        self.servers.append(process)
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            try: return urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
            except HTTPError: return
            except (URLError, OSError): time.sleep(1)
        raise AssertionError(f"{command} does not answer:\n{(self.clone.parent / 'server.log').read_text()[-3000:]}")

    def stop(self):
        "End the servers."
        for process in self.servers:
            if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
            try: process.wait(60)
            except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        self.servers = []


def walk(shell, page):
    "Run a page's commands in order; servers stay until the end of their block."
    before = dict(BEFORE)
    try:
        for block in blocks(page):
            for command in block:
                bare = " ".join(shlex.split(command, comments=True))
                print(f"{time.strftime('%X')} {bare}", flush=True)
                if (first := begins(bare, before)): shell.run(before.pop(first))
                if begins(bare, LEFT_OUT): continue
                if (server := begins(bare, SERVERS)): shell.serve(bare, shell.ports[SERVERS[server]])
                else: shell.run(command)
            shell.stop()
    finally: shell.stop()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "The last commit, cloned."
    folder = tmp_path_factory.mktemp("walk") / "hms_brain"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.alone
@pytest.mark.slow
def test_a_newcomers_walk(clone):
    "README, then each tutorial, in one clone; fourteen to twenty-three minutes and ten gigabytes where the packages are near."
    shell = Shell(clone)
    walk(shell, clone / "README.md")
    for path in TUTORIALS:
        again = Shell(clone)
        again.run(". .venv/bin/activate")
        walk(again, clone / path.relative_to(ROOT))
    shell.run(f"python -m pytest -q tests/test_notebooks.py -k '{' or '.join(p.stem for p in TUTORIALS)}'")
