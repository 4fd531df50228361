"""The command line as users meet it: a real process, its output and its exit code."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hms_brain.core import CLASSES, HMS_COLUMNS

HMS = str(Path(sys.executable).parent / "hms")


def hms(*words, cwd=None, timeout=120):
    return subprocess.run([HMS, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=timeout)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    "50 simulated seconds in the HMS layout."
    from hms_brain.simulate import simulate_recording

    path = tmp_path_factory.mktemp("eeg") / "1.parquet"
    signal = simulate_recording(seed=5, pattern="gpd", duration=50).signal
    pd.DataFrame(signal.T, columns=list(HMS_COLUMNS)).to_parquet(path)
    return path


def one_line(result):
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hms: ")
    return lines[0]


def test_predict_json(recording):
    result = hms("predict", recording, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert list(answer["probabilities"]) == list(CLASSES)
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-9
    assert not answer["abstained"] and answer["predicted"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert answer["bundle"]["simulated"] is True and any("simulated" in w for w in answer["warnings"])
    assert "Research use only" in answer["notice"]


def test_predict_writes_what_the_suffix_says(recording, tmp_path):
    for suffix in ("html", "csv", "json"):
        result = hms("predict", recording, "-o", tmp_path / f"p.{suffix}")
        assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "p.csv")
    assert abs(table[list(CLASSES)].sum(axis=1) - 1).max() < 1e-6
    html = (tmp_path / "p.html").read_text()
    assert "simulated EEG only" in html and "Research use only" in html and html.count("plotly-graph-div") >= 3
    assert "cannot write" in one_line(hms("predict", recording, "-o", tmp_path / "p.docx"))


@pytest.mark.parametrize("value, reason", [(0.0, "flat"), (np.nan, "missing")])
def test_predict_abstains(tmp_path, value, reason):
    path = tmp_path / "1.parquet"
    pd.DataFrame(np.full((10000, 20), value, np.float32), columns=list(HMS_COLUMNS)).to_parquet(path)
    answer = json.loads(hms("predict", path, "--json").stdout)
    assert answer["abstained"] and answer["predicted"] is None and answer["reasons"]
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-9


def test_predict_refuses(tmp_path, recording):
    short = tmp_path / "short.parquet"
    pd.read_parquet(recording).iloc[:200].to_parquet(short)
    assert "10 s" in one_line(hms("predict", short))
    assert "nowhere.edf" in one_line(hms("predict", tmp_path / "nowhere.edf"))
    assert "--at" in one_line(hms("predict", recording, "--at", "-3"))
    assert "LABEL=ELECTRODE" in one_line(hms("predict", recording, "--channel", "Fp1"))
    assert "broken" in one_line(hms("predict", recording, "--bundle", tmp_path / "broken"))


def test_spectrogram(recording, tmp_path):
    result = hms("spectrogram", recording, "-o", tmp_path / "s.parquet")
    assert result.returncode == 0, result.stderr
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert table.shape == (25, 401) and list(table.columns[:3]) == ["time", "LL_0.59", "LL_0.78"] and table.columns[-1] == "RP_19.92"
    assert list(table.time[:3]) == [1, 3, 5]


def test_score(tmp_path):
    truth = pd.DataFrame({"eeg_id": [1, 2], **{f"{c}_vote": [float(i == 0), 1 / 6] for i, c in enumerate(CLASSES)}})
    guess = truth.copy()
    guess[[f"{c}_vote" for c in CLASSES]] = 1 / 6
    truth.to_csv(tmp_path / "t.csv", index=False)
    guess.iloc[::-1].to_csv(tmp_path / "s.csv", index=False)
    scores = json.loads(hms("score", tmp_path / "t.csv", tmp_path / "s.csv", "--json").stdout)
    assert abs(scores["kl"] - np.log(6) / 2) < 1e-12
    guess.iloc[:1].to_csv(tmp_path / "few.csv", index=False)
    assert "2" in one_line(hms("score", tmp_path / "t.csv", tmp_path / "few.csv"))
    guess.assign(lpd_vote=np.nan).to_csv(tmp_path / "nan.csv", index=False)
    one_line(hms("score", tmp_path / "t.csv", tmp_path / "nan.csv"))


def test_demo(tmp_path):
    result = hms("demo", "-o", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    assert "The sample recording is simulated." in result.stdout and "Trained on simulated EEG only." in result.stdout
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["prediction.csv", "report.html"]


@pytest.mark.parametrize("absent, words", [("jwt", "token create --scope predict"), ("jwt", "audit a.jsonl --keyed"), ("prometheus_client", "watch --looks 1")])
def test_a_package_that_is_absent_is_named(absent, words):
    "The base does without what only the service needs."
    script = f"import sys; sys.modules[{absent!r}] = None\nfrom hms_brain.cli import main\nmain()"
    said = one_line(subprocess.run([sys.executable, "-c", script, *words.split()], capture_output=True, text=True, timeout=120))
    assert f"no package {absent}" in said and "hms_brain[serve]" in said


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    from hms_brain.doctor import EXTRAS, look_for_extra

    (tmp_path / "hms_only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRAS, "track", ("hms_only_a_folder",))
    assert look_for_extra("track")["verdict"] == "missing"


def test_doctor():
    findings = {f["what"]: f["verdict"] for f in json.loads(hms("doctor", "--json").stdout)}
    assert findings["base"] == findings["train"] == findings["bundle"] == "ok"


def test_version_and_help():
    assert hms("--version").stdout.startswith("hms_brain 0.")
    assert "epochs" in hms("train", "--help").stdout
    assert hms("predict").returncode == 2


def test_every_pipeline_is_a_command():
    from hms_brain.cli import PIPELINES
    from hms_brain.runs import list_pipelines

    assert sorted(PIPELINES) == sorted(list_pipelines())


def test_commands_keep_linear_algebra_to_one_thread():
    "Unless somebody says otherwise; a notebook that imports the module is left alone."
    code = "import os, sys, hms_brain.cli as c; assert 'OMP_NUM_THREADS' not in os.environ or os.environ['OMP_NUM_THREADS'] == '3', 'at import'; sys.argv = ['hms', '--version']; import contextlib\nwith contextlib.suppress(SystemExit): c.main()\nimport numpy, scipy.linalg; from threadpoolctl import threadpool_info; print({p['num_threads'] for p in threadpool_info()})"
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = lambda **env: subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert done() == "{1}" and done(OMP_NUM_THREADS="3") != "{1}"


def test_options_of_the_same_name_mean_the_same():
    "And the help of --bundle names the setting that comes before the packaged bundle."
    import typer

    from hms_brain.cli import app
    root = typer.main.get_command(app).commands
    found = {(name, p.name): p.help for name, command in (root | root["kaggle"].commands).items() for p in command.params if p.name in ("bundle", "channel", "unit") and name in ("predict", "scan", "pack", "answer")}
    assert len(found) == 8 and len(set(found.values())) == 3 and "[models] bundle" in found["predict", "bundle"]
