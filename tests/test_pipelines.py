"""Pipelines through papermill: the whole way once, and every way to fail."""
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from hms_brain.runs import read_run
from test_cli import HMS, hms, one_line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A workbench of its own: settings.ini and nothing else."
    folder = tmp_path_factory.mktemp("workbench")
    (folder / "settings.ini").write_text("[system]\nworkers = 1\nthreads = 1\n")
    return folder


@pytest.fixture(scope="module")
def cache(home):
    assert hms("simulate", "data/simulated/tiny", "--patients", 6, "--workers", 1, cwd=home).returncode == 0
    result = hms("prepare", "-p", "data=data/simulated/tiny", "-p", "cache=data/prepared/tiny", "-p", "folds=2", "-p", "limit=48", cwd=home)
    assert result.returncode == 0, result.stderr
    return home / "data/prepared/tiny"


def test_folds_are_those_of_the_settings(home, cache, monkeypatch):
    "Unless the command says otherwise."
    monkeypatch.setenv("HMS_DATASET_FOLD_SEED", "3")
    few = ("prepare", "-p", "data=data/simulated/tiny", "-p", "folds=2", "-p", "limit=4")
    assert hms(*few, "-p", "cache=data/prepared/three", cwd=home).returncode == 0
    assert hms(*few, "-p", "cache=data/prepared/none", "-p", "fold_seed=0", cwd=home).returncode == 0
    assert [json.loads((home / f"data/prepared/{name}/manifest.json").read_text())["fold_seed"] for name in ("three", "none")] == [3, 0]


@pytest.fixture(scope="module")
def run(home, cache):
    result = hms("train", "-p", f"cache={cache}", "-p", "epochs=1", "-p", "batch_size=8", "-p", "track=tensorboard,mlflow", "-p", "out=outputs/runs/tiny", cwd=home, timeout=300)
    assert result.returncode == 0, result.stderr
    return home / "outputs/runs/tiny"


def test_train_leaves_everything(run, home):
    record = read_run(run)
    assert record["status"] == "ok" and record["pipeline"] == "train" and record["parameters"]["epochs"] == 1
    assert {"03_train.ipynb", "run.json", "history.csv", "metrics.json", "model.safetensors", "bundle"} <= {p.name for p in run.iterdir()}
    assert len(pd.read_csv(run / "history.csv")) == 1
    sample = next((home / "data/simulated/tiny/train_eegs").iterdir())
    answer = json.loads(hms("predict", sample, "--bundle", run / "bundle", "--json").stdout)
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-9 and answer["bundle"]["simulated"] is True


@pytest.mark.parametrize("model, settings", [("specnet", ""), ("fusion", ""), ("effnet", '{"variant": "mnasnet_small", "weights": "none"}')])
def test_every_model_ends_with_a_bundle(model, settings, home, cache):
    "Where no hub is reachable a model says whose weights it began with; its bundle answers all the same."
    out = home / "outputs/runs" / model
    result = hms("train", "-p", f"cache={cache}", "-p", f"model={model}", "-p", f"settings={settings}", "-p", "epochs=1", "-p", "batch_size=8", "-p", f"out={out}", cwd=home, timeout=300)
    assert result.returncode == 0, result.stderr
    sample = next((home / "data/simulated/tiny/train_eegs").iterdir())
    answer = json.loads(hms("predict", sample, "--bundle", out / "bundle", "--json").stdout)
    assert model in answer["bundle"]["name"] and abs(sum(answer["probabilities"].values()) - 1) < 1e-9


def test_a_tracked_training_ends_in_its_mirrors(run, home):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'outputs/runs/mlflow.db'}")
    (shown,) = client.search_runs([client.get_experiment_by_name("hms_brain").experiment_id])
    assert shown.info.status == "FINISHED" and shown.info.run_name == "tiny" and shown.data.params["recipe.batch_size"] == "8"
    assert {"03_train.ipynb", "metrics.json", "bundle"} <= {f.path for f in client.list_artifacts(shown.info.run_id)} and list(run.glob("tensorboard/events.*"))


def test_evaluate_and_export(run, home):
    assert hms("evaluate", run, "-p", "bootstraps=20", "-p", "robustness=3", "-p", f"against={run / 'validation.parquet'}", cwd=home).returncode == 0
    metrics = json.loads((run / "evaluate/metrics.json").read_text())
    assert 0 < metrics["kl"] < 10 and metrics["simulated_training"] is True and metrics["experts"] is None
    assert {r["difference"] for r in metrics["comparison"]} - {None} == {0} and len(metrics["robustness"]) == 11
    opens_alone(run / "evaluate/report.html")
    assert hms("export", run, "-p", f"bundle={home / 'exported'}", cwd=home).returncode == 0
    assert (home / "exported/manifest.json").exists()


def opens_alone(page):
    "Nothing of a page comes from elsewhere, plotly is inside once, and simulation is named."
    text = page.read_text()
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert text.count("plotly.js v") == 1 and "simulated EEG" in body and "Research use only" in body
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=|@import|url\(", body + "".join(re.findall(r"<script[^>]*>", text)))


def test_report_of_a_run(run, home):
    result = hms("report", run, "-p", "bootstraps=20", "-p", "robustness=0", "-p", "embedding=pca", cwd=home)
    assert result.returncode == 0, result.stderr
    opens_alone(run / "report/report.html")
    card, data = (run / "report/model_card.md").read_text(), json.loads((run / "report/report.json").read_text())
    assert all(words in card for words in ("Intended use", "Known failures", "Research use only", "simulated EEG", "held out"))
    assert data["simulated_training"] is True and data["known_failures"] and data["robustness"] is None
    assert "Map of windows" in (run / "report/report.html").read_text()


def test_any_table_is_evaluated(home):
    "Raters with names, a model with another name, no patients and no run."
    import numpy as np

    rng = np.random.default_rng(0)
    true = rng.integers(6, size=80)
    columns = {f"expert_{j}": np.where(rng.random(80) < .7, true, rng.integers(6, size=80)) for j in range(4)}
    p = .5 * np.eye(6)[true] + .5 / 6
    pd.DataFrame(columns).assign(**{f"{c}_net": p[:, k] for k, c in enumerate(("seizure", "lpd", "gpd", "lrda", "grda", "other"))}).to_csv(home / "raters.csv", index=False)
    pd.DataFrame(columns).to_csv(home / "votes.csv", index=False)
    result = hms("evaluate", "-p", "table=raters.csv", "-p", "bootstraps=10", "-p", "out=outputs/runs/raters", cwd=home)
    assert result.returncode == 0, result.stderr
    found = json.loads((home / "outputs/runs/raters/metrics.json").read_text())
    assert found["experts"]["roc"]["lpd"]["estimate"] == 100 and found["patients_known"] is False and found["robustness"] is None
    assert "Experts under the curve" in (home / "outputs/runs/raters/report.html").read_text()
    assert "holds no probabilities" in one_line_after_log(hms("evaluate", "-p", "table=votes.csv", "-p", "out=outputs/runs/none", cwd=home))


def test_crossval_leaves_its_tables(home, cache):
    result = hms("crossval", "-p", f"cache={cache}", "-p", "epochs=1", "-p", "out=outputs/runs/cv", "-p", "bootstraps=20", cwd=home, timeout=300)
    assert result.returncode == 0, result.stderr
    folder = home / "outputs/runs/cv"
    oof, table = pd.read_parquet(folder / "oof.parquet"), pd.read_csv(folder / "table.csv")
    assert set(oof.fold) == {0, 1} and oof.groupby("patient_id").fold.nunique().max() == 1
    assert {"all", "fold", "stratum", "class"} == set(table["by"]) and table.kl.between(0, 5).all()
    assert json.loads((folder / "audit.json").read_text())["passed"] and read_run(folder)["pipeline"] == "crossval"
    assert hms("evaluate", folder, "-p", "bootstraps=10", cwd=home).returncode == 0
    found = json.loads((folder / "evaluate/metrics.json").read_text())
    assert found["n"] == len(oof) and abs(found["kl"] - oof.kl.mean()) < 1e-9 and "fold" in {r["by"] for r in found["subgroups"]} and found["simulated_training"] is True


def test_two_at_once(run, home):
    "Two pipelines in one workbench do not hear each other's kernel."
    command = [HMS, "evaluate", run, "-p", "bootstraps=20", "-p", "robustness=0"]
    both = [subprocess.Popen([str(c) for c in [*command, "-p", f"out={home / name}"]], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for name in ("one", "two")]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert [read_run(home / name)["status"] for name in ("one", "two")] == ["ok", "ok"]
    assert not list(home.glob("kernel-ipc*"))


def test_a_typo_runs_nothing(home, cache):
    before = sorted((home / "outputs").rglob("run.json"))
    assert "did you mean epochs?" in one_line(hms("train", "-p", f"cache={cache}", "-p", "epoch=1", cwd=home))
    assert "not of type int" in one_line(hms("train", "-p", "epochs=many", cwd=home))
    one_line(hms("train", "-p", "x=1\nimport os", cwd=home))
    assert sorted((home / "outputs").rglob("run.json")) == before


def test_settings_are_json(home, cache):
    assert "not a JSON object" in one_line_after_log(hms("train", "-p", f"cache={cache}", "-p", "settings=width=3", "-p", "out=outputs/runs/settings", cwd=home))


def test_unusable_data_is_exit_2(home):
    assert "nowhere" in one_line_after_log(hms("train", "-p", "cache=nowhere", "-p", "out=outputs/runs/nowhere", cwd=home))
    assert read_run(home / "outputs/runs/nowhere")["status"] == "failed"


def one_line_after_log(result):
    assert result.returncode == 2, result.stderr
    return result.stderr.strip().splitlines()[-1]


def start_long_training(home, cache, out):
    return subprocess.Popen([HMS, "train", "-p", f"cache={cache}", "-p", "epochs=500", "-p", "batch_size=8", "-p", f"out={out}"], cwd=home,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.2)


def kernels_of(pid):
    "Process numbers of the kernels below a process."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: parent, words = int(stat.read_text().rpartition(")")[2].split()[1]), (stat.parent / "cmdline").read_text()
        except OSError: continue
        if parent == pid and "ipykernel" in words: found.append(int(stat.parent.name))
    return found


def test_killed_kernel(home, cache):
    out = home / "outputs/runs/killed-kernel"
    process = start_long_training(home, cache, out)
    try:
        wait_for(lambda: (out / "history.csv").exists() and kernels_of(process.pid))
        os.kill(kernels_of(process.pid)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 1 and "kernel died" in err.strip().splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


@pytest.mark.fault
def test_killed_command(home, cache):
    out = home / "outputs/runs/killed-command"
    process = start_long_training(home, cache, out)
    wait_for(lambda: (out / "history.csv").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert read_run(out)["status"] == "failed"
