"TensorBoard and MLflow show what a run's folder holds: curves, parameters, artefacts, folds within their cross-validation."
import pytest

from hms_brain.batches import SineCache
from hms_brain.core import InputError, read_json
from hms_brain.crossval import crossval
from hms_brain.tracking import follow, parameters_of, parse_mirrors, track
from hms_brain.recipe import Recipe
from hms_brain.train import train

SMALL = {"stem": 4, "width": 16, "hidden": 8}
RECIPE = Recipe(epochs=2, batch_size=12, patience=0)


@pytest.fixture
def store(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    (tmp_path / "settings.ini").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from hms_brain.tracking import open_mlflow

    return open_mlflow()


def test_mlflow_shows_a_training(tmp_path, store):
    run = train(SineCache(), RECIPE, folder=tmp_path / "r", model_settings=SMALL, threads=1, say=None, mirrors=["mlflow", "tensorboard"])
    client, experiment = store
    (shown,) = client.search_runs([experiment])
    assert shown.info.status == "FINISHED" and shown.data.params["recipe.epochs"] == "2" and shown.data.tags["simulated"] == "True"
    curve = client.get_metric_history(shown.info.run_id, "val_kl")
    assert [p.step for p in curve] == [1, 2] and [p.value for p in curve] == pytest.approx(run.history.val_kl.tolist())
    assert {"run.json", "metrics.json", "history.csv"} <= {f.path for f in client.list_artifacts(shown.info.run_id)}
    assert list((tmp_path / "r/tensorboard").glob("events.*")) and (tmp_path / "outputs/runs/mlflow.db").is_file()
    before = shown.data.metrics
    track(run.folder)  # nothing is new
    assert client.get_run(shown.info.run_id).data.metrics == before and len(client.search_runs([experiment])) == 1


def test_folds_are_nested(tmp_path, store):
    crossval(SineCache(), RECIPE, folder=tmp_path / "cv", model_settings=SMALL, threads=1, check=False, say=None, mirrors=["mlflow"])
    client, experiment = store
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert set(runs) == {"cv", "fold-0", "fold-1", "fold-2", "fold-3"}
    assert {r.data.tags["mlflow.parentRunId"] for name, r in runs.items() if name != "cv"} == {runs["cv"].info.run_id}
    assert runs["cv"].info.status == "FINISHED" and "table.csv" in {f.path for f in client.list_artifacts(runs["cv"].info.run_id)}


def test_a_broken_mirror_costs_no_training(tmp_path, monkeypatch):
    import hms_brain.tracking as module

    calls = []
    def broken(folder, record, epochs, noted):
        calls.append(len(epochs))
        if calls[1:]: raise OSError("no space left")
        return {"started": True}
    monkeypatch.setitem(module.MIRRORS, "tensorboard", broken)
    with pytest.warns(UserWarning, match="no space left"):
        run = train(SineCache(), RECIPE, folder=tmp_path / "r", model_settings=SMALL, threads=1, say=None, mirrors=["tensorboard"])
    assert run.status == "ok" and len(run.history) == 2 and calls == [0, 1, 2, 2]  # what was missed is shown the next time
    assert read_json(tmp_path / "r/tracking.json")["tensorboard"]["epochs"] == 0


def test_words(tmp_path):
    assert parse_mirrors("mlflow, tensorboard") == ("mlflow", "tensorboard") and parse_mirrors("") == ()
    with pytest.raises(InputError, match="known: tensorboard, mlflow"): parse_mirrors("wandb")
    assert "model.weights" not in parameters_of({"model_settings": {"weights": "/somewhere", "stem": 8}})
    with pytest.warns(UserWarning, match="not tracked"): follow(tmp_path, ["tensorboard"])
