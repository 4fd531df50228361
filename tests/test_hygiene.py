"""The house rules: generated files are current, notebooks stay small, layers point downwards, the base has no torch."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT

NBS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
LIGHT = ["core", "records", "simulate", "simset", "twin", "catalog", "runs", "signal", "quality", "spectrogram", "attributes", "preprocess", "metrics", "evaluate", "experts", "plots", "score_plots", "embedding", "report",
         "scaling", "uncertainty", "bundle", "predict", "scan", "events", "annotate", "exports", "scan_files", "archive", "occlusion", "explain_plots", "reasons", "wheels", "kaggle_kernel",
         "pages", "session", "results", "viewer", "app", "audit", "drift", "monitor", "watch", "panels", "explorer", "views", "dash", "service.web", "doctor", "bench", "bench_scan", "console", "operate", "cli"]
FLOORS = {"gradio": "6.20.0", "starlette": "1.3.0", "python-multipart": "0.0.30", "pyjwt": "2.15.0", "torch": "2.10.0", "onnx": "1.23.2",
          "pyarrow": "26.0.0", "voila": "0.5.6", "jupyter-server": "2.20.0", "nbconvert": "7.17.1", "distributed": "2026.1.0"}
FLOOR_EXCEPTIONS = {("all.lock", "pyarrow"): "MLflow 3.17 asks for pyarrow < 26; environments without it lock 26"}


def cells(path, kind=None):
    found = json.loads(path.read_text())["cells"]
    return [c for c in found if kind is None or c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def exported(path):
    return [c for c in cells(path, "code") if re.search(r"^#\|\s*exports?\b", source(c), re.M)]


def module_of(path):
    return next(m[1] for c in cells(path, "code") if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)))


def n_lines(cell):
    return len([line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")])


def tree(folder):
    "Bytes of every generated or cleaned file."
    kept = [p for p in folder.rglob("*") if p.suffix in (".py", ".ipynb") and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.is_file()}


def test_clean_and_export_change_nothing(tmp_path):
    for name in ("nbs", "hms_brain"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = tree(tmp_path)
    for command in ("nbdev-clean", "nbdev-export"):
        subprocess.run([str(Path(sys.executable).parent / command)], cwd=tmp_path, check=True, capture_output=True)
    after = tree(tmp_path)
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_budgets(path):
    code, exports = cells(path, "code"), exported(path)
    lengths = [n_lines(c) for c in exports]
    assert max(lengths) <= 60 and sum(lengths) / len(lengths) <= 20, lengths
    assert sum(lengths) <= 350, sum(lengths)
    assert len(cells(path)) <= 80 and path.stat().st_size <= 100_000
    assert len(cells(path, "markdown")) / len(cells(path)) >= 0.25
    assert sum(source(c).startswith("#| hide") for c in code) <= 0.15 * len(code)
    assert source(cells(path)[0]).startswith("# ") and re.search(r"^> \S", source(cells(path)[0]), re.M)


@pytest.mark.parametrize("path", [*NBS, ROOT / "nbs/index.ipynb", *sorted((ROOT / "nbs/pipelines").glob("*.ipynb")), *sorted((ROOT / "nbs/dashboards").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_notebook_is_clean_text(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    kinds = {kind for c in notebook["cells"] for o in c.get("outputs", []) for kind in o.get("data", {})}
    assert kinds <= {"text/plain", "text/markdown", "text/latex"}
    for c in cells(path, "code"):
        assert "import *" not in source(c)
        assert "expect_fail(lambda" not in source(c), "expect_fail is a context manager: this checks nothing"
        assert not any(o["output_type"] == "error" for o in c["outputs"])


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "A cell with top-level imports holds nothing else: the docs build executes it."
    for c in exported(path):
        body = ast.parse(source(c)).body
        is_import = [isinstance(n, ast.Import | ast.ImportFrom) or (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)) for n in body]
        assert all(is_import) or not any(is_import), source(c)[:200]


def imported(path):
    "Modules of the house that a notebook's exported cells import at their top level."
    for node in (n for c in exported(path) for n in ast.parse(source(c)).body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hms_brain."): yield node.module.removeprefix("hms_brain.")
        if isinstance(node, ast.Import): yield from (a.name.removeprefix("hms_brain.") for a in node.names if a.name.startswith("hms_brain."))


WORDS = {"rng", "seed", "path", "directory", "where", "n_times", "kind", "app", "url", "host", "port", "token", "body", "threads", "epochs", "batch_size", "patients", "labels",
         "dist"}  # parameters that are called so mean the same everywhere: a source of chance, a file, where something came from for messages, samples, ...


def undocumented(text, nouns):
    "What lacks words in a module: docstrings of public functions and classes, comments beside parameters that neither a noun of the house nor a word of it explains."
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        if not ast.get_docstring(node): yield node.name
        elif len(ast.get_docstring(node).splitlines()) > 1 and not isinstance(node, ast.ClassDef): yield f"{node.name}: more than a line"
        if isinstance(node, ast.ClassDef) or any("command" in ast.unparse(d) for d in node.decorator_list): continue  # a command's help stands in its types
        if lines[node.lineno - 1].rstrip()[-1] != "(": continue  # a signature of one line is explained by its docstring
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            words = set(re.findall(r"\w+", ast.unparse(arg.annotation))) if arg.annotation else set()
            if "#" not in lines[arg.end_lineno - 1] and arg.arg not in WORDS and not words & nouns: yield f"{node.name}({arg.arg})"


def test_docstrings():
    "Rule: one line for every public function and class, and beside each parameter what it is."
    modules = [p for p in sorted((ROOT / "hms_brain").rglob("*.py")) if p.name not in ("_modidx.py", "__init__.py")]
    texts = {p: p.read_text() for p in modules}
    nouns = {n.name for text in texts.values() for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)}
    assert {p.name: lacking for p, text in texts.items() if (lacking := list(undocumented(text, nouns)))} == {}
    bad = 'def f(\n    x: float,\n    fs: float,  # Hz\n    seed: int,\n    run: Run,\n):\n    "Does."\n\ndef g(): pass\n'
    assert list(undocumented(bad, {"Run"})) == ["f(x)", "g"]


def test_layers_point_downwards():
    "Notebooks import notebooks that stand before them: lower numbers, or the same number and an earlier name."
    place = {module_of(p): p.name for p in NBS}
    wrong = [f"{path.stem} imports {module}" for path in NBS for module in imported(path) if not (ROOT / "hms_brain" / module).is_dir() and place.get(module, "99") >= path.name]
    assert wrong == []


def test_pipelines_are_short():
    for path in sorted((ROOT / "nbs/pipelines").glob("*.ipynb")):
        code = cells(path, "code")
        assert sum(c["metadata"].get("tags") == ["parameters"] for c in code) == 1, path.name
        assert not any(re.search(r"^\s*(def|class) ", source(c), re.M) for c in code), path.name
        assert len(code) <= 13, path.name


def test_readme_in_sync():
    from hms_brain.docs import render_readme

    assert (ROOT / "README.md").read_text() == render_readme(ROOT / "nbs/index.ipynb"), "run `make format`"


def shown(path, code):
    "What the cell with that line printed when it last ran."
    cell = next(c for c in cells(path, "code") if code in source(c))
    return "".join("".join(o.get("text") or o["data"]["text/plain"]) for o in cell["outputs"])


def test_outputs_are_of_the_present_version():
    "The same call shows the same in README and first tutorial, and the page on the house lists the notebooks as they call themselves."
    from hms_brain.docs import library

    assert shown(ROOT / "nbs/index.ipynb", "prediction.to_frame()") == shown(ROOT / "nbs/tutorials/00_first_recording.ipynb", "prediction.to_frame()")
    listed = "".join(f"{notebook:24} {sentence}\n" for notebook, sentence in library(ROOT / "nbs").items())
    assert shown(ROOT / "nbs/architecture.ipynb", "library()") == listed, "run nbs/architecture.ipynb again"


@pytest.mark.parametrize("command", ["evaluate", "report", "export"])
def test_make_leaves_the_newest_run_to_the_command(command, tmp_path):
    "A folder that looks like a training is not one that ended well."
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "outputs/runs/20990101-000000-train").mkdir(parents=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | {"RUN": ""}  # these tests may be run by a make
    told = lambda *words: subprocess.run(["make", "-n", command, *words], cwd=tmp_path, capture_output=True, text=True, check=True, env=clean).stdout.split()
    for name in ("base.lock", "all.lock", "pyproject.toml"): (tmp_path / name).touch()
    assert told()[-2:] == [".venv/bin/hms", command] and told("RUN=mine")[-2:] == [command, "mine"]


def test_light_modules_need_no_torch():
    script = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import hms_brain.{m}" for m in LIGHT)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_help_imports_little():
    script = "import sys, hms_brain.cli; print([m for m in ('numpy', 'pandas', 'scipy', 'rich', 'pydantic', 'torch', 'papermill') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return {r.name.lower().replace("_", "-"): Version(next(iter(r.specifier)).version) for r in found}


def test_locks_satisfy_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [Requirement(t) for k, v in project["optional-dependencies"].items() if k != "all" for t in v]
    for lock, wanted in (("base.lock", []), ("all.lock", extras)):
        locked = pins(lock)
        for r in [Requirement(t) for t in project["dependencies"]] + wanted:
            version = locked.get(r.name.lower().replace("_", "-"))
            assert version and version in r.specifier, f"{lock}: {r} has {version}"
    assert "torch" not in pins("base.lock")


def test_floors():
    for lock in ("base.lock", "all.lock"):
        for name, version in pins(lock).items():
            if name in FLOORS and (lock, name) not in FLOOR_EXCEPTIONS: assert version >= Version(FLOORS[name]), f"{lock}: {name} {version}"
        assert "python-jose" not in pins(lock)


def test_ranges_begin_at_the_floors():
    "Whoever installs without a lock file gets nothing below a floor; pyarrow begins at 25 because the extra track would have no solution otherwise."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(t) for t in [*project["dependencies"], *(t for k, v in project["optional-dependencies"].items() if k != "all" for t in v)]]
    low = {r.name.lower(): Version(next(s.version for s in r.specifier if s.operator == ">=")) for r in asked if r.name.lower() in FLOORS}
    assert [n for n, v in low.items() if v < Version(FLOORS[n])] == [n for _, n in FLOOR_EXCEPTIONS] and set(low) == set(FLOORS)


def test_ruff():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "hms_brain", "tests"], check=True, cwd=ROOT)


def test_nothing_of_the_workplace():
    "The project speaks of itself alone: no machine paths, no registry hosts."
    words = ["/" + "work/", "/" + "root/", "pypi" + ".org", "files.python" + "hosted"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    hits = [f"{name}: {w}" for name in tracked if name and (ROOT / name).is_file() and (ROOT / name).suffix in (".py", ".ipynb", ".md", ".toml", ".yml", ".ini", ".lock", "")
            for w in words if w in (ROOT / name).read_text(errors="ignore")]
    assert hits == []


def test_tests_that_are_named_exist():
    "The page on safety names tests; each of the twenty rows has one, or says that it has none."
    text = "\n".join(source(c) for c in cells(ROOT / "nbs/safety.ipynb"))
    named = set(re.findall(r"(tests/test_\w+\.py)::(test_\w+)", text))
    lost = [f"{file}::{name}" for file, name in sorted(named) if not re.search(rf"^def {name}\(", (ROOT / file).read_text() if (ROOT / file).is_file() else "", re.M)]
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert lost == [] and len(named) > 60 and len(rows) == 20
    assert all("tests/test_" in row or "not shown yet" in row for row in rows)


WRITES = r"""\.write_text\(|\.write_bytes\(|\.to_csv\(|\.to_parquet\(|\bopen\([^)]*["'][wax]b?\+?["']|np\.save\(|\bsave_file\(|\bcopyfile\(|shutil\.copy|json\.dump\("""
UNKEPT = {"bench.py", "bench_scan.py", "docs.py"}  # measurements and the site: made anew by one command
BESIDE = {  # file -> what may stand half-written: nobody is told of it before it is whole
    "mne.py": "signal.lay", "sandbox.py": "job[", "search.py": "study.lock", "uploads.py": '"xb"', "web.py": "stderr", "variants.py": "plain.write_bytes(model)|file.write_bytes(model)", "app.py": "sample_file()",
    "kaggle_kernel.py": "sitecustomize|to_csv(asked"}


def test_files_are_written_whole():
    "Whatever a user keeps goes through `atomic_path` or `atomic_folder`, whose yielded names are tmp and new (or lie in it)."
    found = [(p.name, line.strip()) for p in sorted((ROOT / "hms_brain").rglob("*.py")) if p.name not in UNKEPT for line in p.read_text().splitlines() if re.search(WRITES, line)]
    bare = [(name, line) for name, line in found if not re.search(r"\b(tmp|new|place) ?[,./)]|\btmp\b", line) and not any(word and word in line for word in BESIDE.get(name, "").split("|"))]
    assert bare == [] and len(found) > 30


def test_seeded_faults_are_current():
    "Every fault of `make mutation` has its place and its test; every row of the page on safety has one."
    from mutation import FAULTS

    outdated = [f.name for f in FAULTS if (ROOT / f.file).read_text().count(f.old) != 1]
    lost = [f.test for f in FAULTS if not re.search(rf"^def {re.escape(f.test.partition('::')[2].partition('[')[0])}\(", (ROOT / f.test.partition("::")[0]).read_text(), re.M)]
    assert outdated == [] and lost == [] and {f.row for f in FAULTS} == set(range(1, 21)) and len({f.name for f in FAULTS}) == len(FAULTS)
