"""Every example of the README, as it stands there: only the amount of work is made smaller. Its Python cells run as the notebook nbs/index.ipynb."""
import os
import re
import shlex
import shutil
import subprocess
import time

import httpx
import pytest

from conftest import ROOT, free_port
from test_cli import HMS

# the lines of its blocks, but for the one that changes the shell
BLOCKS = [[line.partition(" #")[0].strip() for line in block.splitlines() if not line.startswith(". ")] for block in re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)]
LESS = {"hms simulate": "--workers 1 --patients 6", "hms prepare": "-p folds=2 -p limit=48", "hms train": "-p batch_size=8 -p epochs=1", "hms evaluate": "-p bootstraps=20 -p robustness=3",
        "hms report": "-p bootstraps=20 -p robustness=0 -p embedding=pca", "hms explain": "-p step=10", "hms crossval": "-p epochs=1 -p bootstraps=20 -p limit=16", "hms search": "-p trials=1 -p epochs=1 -p limit=16"}


def smaller(line):
    "A command with less to do: what it names again overrides what it said."
    words, more = shlex.split(line), shlex.split(LESS.get(" ".join(line.split()[:2]), ""))
    named = {w.partition("=")[0] for w in more if "=" in w or w.startswith("--")}
    kept, skip = [], False
    for word, after in zip(words, [*words[1:], ""]):
        if skip: skip = False; continue
        if word in named or (word == "-p" and after.partition("=")[0] in named): skip = True; continue
        kept.append(word)
    return kept + more


def run(words, cwd, timeout=1800, **env):
    words = [HMS if w == "hms" else w for w in words]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
    assert done.returncode == 0, (words, done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A workbench with a recording of 70 minutes and an archive of two."
    folder = tmp_path_factory.mktemp("readme")
    (folder / "settings.ini").write_text("[system]\nworkers = 1\nthreads = 1\n")
    sample = (ROOT / "hms_brain/assets/sample.edf").read_bytes()
    size, n = 256 * (int(sample[252:256]) + 1), int(sample[236:244])
    each = (len(sample) - size) // n
    (folder / "archive").mkdir()
    for name, records in (("night", 7 * n), ("archive/a", n), ("archive/b", n // 2)):
        (folder / f"{name}.edf").write_bytes(sample[:236] + str(records).encode().ljust(8) + sample[244:size] + (sample[size:] * 7)[:records * each])
    return folder


def test_a_smaller_command_keeps_what_it_is_about():
    assert " ".join(smaller("hms train -p cache=x -p epochs=4 -p out=y")) == "hms train -p cache=x -p out=y -p batch_size=8 -p epochs=1"
    assert " ".join(smaller("hms simulate d --patients 40 --seed 0")) == "hms simulate d --seed 0 --workers 1 --patients 6"


def test_no_example_is_forgotten():
    "Blocks are told apart by what they are about; a new one needs a test here."
    assert [block[0].split("  ")[0] for block in BLOCKS] == ["make demo", "hms predict night.edf", "hms scan night.edf -o night", "hms app", "hms simulate data/simulated/first --patients 40 --seed 0", "hms report outputs/runs/first"]


def test_make_knows_its_words():
    "What `make demo` and `make test` do is tested by CI and by test_cli; here: that make knows every word of the README."
    for word in {*re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text())}: run(["make", "-n", word], ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2])
def test_recordings(home, block):
    for line in BLOCKS[block]:
        words = smaller(line)
        said = run(words, home)
        if "-o" in words: assert (home / words[words.index("-o") + 1]).exists(), line
        else: assert "seizure" in said.lower(), line
    if block == 2: assert {"report.html", "probabilities.csv"} <= {p.name for p in (home / "night").iterdir()} and list((home / "results").rglob("probabilities.csv"))


@pytest.mark.slow
def test_training_and_its_reports(home):
    for line in [*BLOCKS[4], *BLOCKS[5]]: run(smaller(line), home)
    first = home / "outputs/runs/first"
    assert all((first / name).exists() for name in ("run.json", "history.csv", "metrics.json", "bundle/bundle.json", "evaluate", "report/report.html", "explain"))
    assert {"crossval", "search"} <= {p.name.split("-")[-1] for p in (home / "outputs/runs").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in BLOCKS[3] if line.startswith("hms")])
def test_servers(home, line):
    "Each is asked for what the README says it has, on a port of its own."
    port = free_port()
    key = {"app": "APP_PORT", "serve": "SERVICE_PORT", "dash": "DASH_PORT"}[line.split()[1]]
    env = os.environ | {"PYTHONPATH": str(ROOT), f"HMS_DEPLOYMENT_{key}": str(port), "HMS_DASH_TOKEN": "t" * 20}
    process = subprocess.Popen([HMS, *shlex.split(line)[1:]], cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            assert process.poll() is None
            try: answer = httpx.get(f"http://127.0.0.1:{port}/", timeout=20, trust_env=False); break
            except httpx.TransportError: time.sleep(.3)
        assert answer.status_code < 500
        if "serve" in line:
            curl = next(x for x in BLOCKS[3] if x.startswith("curl"))
            if shutil.which("curl"): assert '"probabilities"' in run(shlex.split(curl.replace(":8000", f":{port}")), home)
            for path in ("/docs", "/metrics"): assert httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == 200
            assert run(["hms", "token", "create", "--scope", "predict", "--ttl", "1h"], home, HMS_SECRET="s" * 40).count(".") >= 2
    finally:
        process.terminate()
        process.wait(60)
