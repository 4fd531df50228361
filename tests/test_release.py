"""What is released: wheel and sdist in empty environments, what they are made of, and under which licences."""
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT
from test_hygiene import FLOORS, pins

HERE = Path(sys.executable).parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WORKS = {  # extra without torch -> what it brings, imported
    "serve": "hms_brain.service.web", "app": "hms_brain.app", "dash": "hms_brain.dash, voila, jupyterlab, anywidget, prometheus_client", "kaggle": "hms_brain.kaggle_kernel, kagglesdk",
    "scale": "hms_brain.archive, distributed, timescoring", "openvino": "openvino", "track": "mlflow"}
WITH_TORCH = ("train", "explain", "dev", "all")  # gigabytes: resolved, not installed; `make test` installs `all`


def run(*words, **kw):
    "Run a program; the test fails with its output when it fails."
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Wheel and sdist of the last commit; the wheel is built from the sdist."
    folder = tmp_path_factory.mktemp("release")
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return {p.suffix: p for p in (folder / "dist").iterdir()}


def test_wheel_and_sdist_are_complete(built):
    "Every tracked file of the package, and the pipelines and dashboards that are links there, once each."
    tracked = run("git", "ls-files", "hms_brain", "nbs/pipelines", "nbs/dashboards", cwd=ROOT).split()
    wanted = {t.replace("nbs/", "hms_brain/") for t in tracked} - {"hms_brain/pipelines", "hms_brain/dashboards"}
    wheel = zipfile.ZipFile(built[".whl"]).namelist()
    with tarfile.open(built[".gz"]) as tar: sdist = [m.name.split("/", 1)[1] for m in tar if m.isfile()]
    for names in (wheel, sdist): assert wanted - set(names) == set() and len(set(names)) == len(names)
    assert {n.split("/")[0] for n in wheel} == {"hms_brain", f"{built['.whl'].name.split('-py3')[0]}.dist-info"}


def empty(folder):
    "A new environment; its python."
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


def install(python, package, lock, *words):
    return run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / lock, *words, package)


def demo(python, folder):
    "`hms demo` far from any checkout, and what it leaves."
    folder.mkdir()
    said = run(python.parent / "hms", "demo", "-o", folder / "out", cwd=folder, env={"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(folder)})
    assert "Trained on simulated EEG only." in said and (folder / "out/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".whl", ".gz"])
def test_demo_in_an_empty_environment(built, kind, tmp_path):
    python = empty(tmp_path / "venv")
    if kind == ".gz": install(python, "setuptools", "base.lock")
    install(python, built[kind], "base.lock", *(["--no-build-isolation"] if kind == ".gz" else []))
    demo(python, tmp_path / "elsewhere")
    run(python, "-m", "pip", "check")
    found = json.loads(run(python.parent / "hms", "doctor", "--json", cwd=tmp_path))
    assert {f["what"]: f["verdict"] for f in found}["base"] == "ok"
    says = "import importlib.util as u, hms_brain.runs as r, hms_brain as h, pathlib as p; assert u.find_spec('torch') is None; print(*r.list_pipelines(), *(x.stem for x in p.Path(h.__path__[0], 'dashboards').glob('*.ipynb')))"
    assert {"train", "evaluate", "export", "training", "performance", "recording", "system"} <= set(run(python, "-c", says, cwd=tmp_path).split())


@pytest.mark.slow
@pytest.mark.parametrize("extra", WORKS)
def test_an_extra_in_an_empty_environment(built, extra, tmp_path):
    python = empty(tmp_path / "venv")
    install(python, f"{built['.whl']}[{extra}]", "all.lock")
    demo(python, tmp_path / "elsewhere")
    run(python, "-c", f"import importlib.util as u; assert u.find_spec('torch') is None; import {WORKS[extra]}", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("extra", WITH_TORCH)
def test_an_extra_resolves(built, extra, tmp_path):
    python = empty(tmp_path / "venv")
    report = json.loads(install(python, f"{built['.whl']}[{extra}]", "all.lock", "--dry-run", "--report", "-"))
    named = {Requirement(t).name.lower() for t in EXTRAS[extra] if not t.startswith("hms_brain")}
    assert named <= {i["metadata"]["name"].lower() for i in report["install"]}


def test_no_extra_is_forgotten():
    assert {*WORKS, *WITH_TORCH} == set(EXTRAS)


# what it is made of

@pytest.fixture(scope="module")
def sbom(tmp_path_factory):
    "The bill of materials of the base's environment, as `make sbom` writes it."
    if not (ROOT / ".venv-demo/bin/python").exists(): pytest.skip("no .venv-demo: `make demo` makes it")
    path = tmp_path_factory.mktemp("sbom") / "base.json"
    run(HERE / "cyclonedx-py", "environment", ROOT / ".venv-demo", "--pyproject", ROOT / "pyproject.toml", "--output-reproducible", "--of", "JSON", "-o", path)
    return path


def plain(name):
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_bill_names_every_pin(sbom):
    "Name and version of each line of base.lock, none below its floor."
    parts = {plain(c["name"]): c["version"] for c in json.loads(sbom.read_text())["components"]}
    assert {name: str(v) for name, v in pins("base.lock").items()} == {n: v for n, v in parts.items() if n in pins("base.lock")}
    low = {n: v for n, v in parts.items() if n in FLOORS and Version(v) < Version(FLOORS[n])}
    assert low == {} and "python-jose" not in parts and "torch" not in parts


def test_every_part_has_a_licence(sbom):
    from hms_brain.docs import licence_list

    lines = licence_list(sbom).splitlines()[2:]
    silent = {line.split()[1] for line in lines if "not declared" in line}
    assert len(lines) >= len(pins("base.lock")) and silent <= {"protobuf"}, "its LICENSE file says BSD-3-Clause"
    assert not any(re.search(r"\bA?GPL", line) and "LGPL" not in line for line in lines), "the base is free of copyleft that would bind it"
