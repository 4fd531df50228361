"""run.json tells the truth; parameters are checked before anything runs."""
import json
import subprocess
import sys

import pytest

from hms_brain.core import InputError
from hms_brain.runs import as_typed, list_pipelines, newest_run, parse_parameters, pipeline_parameters, read_run, record_run, run_pipeline, update_run


def test_status_follows_the_block(tmp_path):
    with record_run(tmp_path / "a", kind="x") as folder:
        assert read_run(folder)["status"] == "running"
    assert read_run(folder)["status"] == "ok"
    with pytest.raises(KeyboardInterrupt), record_run(tmp_path / "b"): raise KeyboardInterrupt
    assert read_run(tmp_path / "b")["status"] == "failed"


def test_inner_code_cannot_finish_the_outer_run(tmp_path, monkeypatch):
    with record_run(tmp_path):
        monkeypatch.setenv("HMS_RUN", str(tmp_path.resolve()))
        with record_run(tmp_path, recipe={"epochs": 1}): pass
        assert read_run(tmp_path)["status"] == "running" and read_run(tmp_path)["recipe"] == {"epochs": 1}


def test_a_killed_process_reads_as_failed(tmp_path):
    script = f"import os, signal\nfrom hms_brain.runs import record_run\nwith record_run({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", script])
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    assert read_run(tmp_path)["status"] == "failed"
    (tmp_path / "run.json").write_text('{"status": "running"}')  # without a process
    assert read_run(tmp_path)["status"] == "failed"


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"): read_run(tmp_path)
    with pytest.raises(InputError, match="no finished"): newest_run("train", tmp_path)
    (tmp_path / "run.json").write_text("{broken")
    with pytest.raises(InputError, match="not JSON"): update_run(tmp_path, x=1)


def test_every_pipeline_documents_its_parameters():
    assert list(list_pipelines())[:3] == ["download", "prepare", "train"]
    for command in list_pipelines():
        parameters = pipeline_parameters(command)
        assert "out" in parameters and all(p.help and p.type in ("int", "float", "bool", "str") for p in parameters.values()), command


@pytest.mark.parametrize("given, message", [("epoch=1", "did you mean epochs"), ("epochs", "not name=value"), ("epochs=1.5", "not of type int"), ("resume=7", "not of type bool"),
                                            ("import os=1", "unknown parameter"), ("__class__=1", "unknown parameter")])
def test_wrong_parameters(given, message):
    with pytest.raises(InputError, match=message): parse_parameters("train", [given])


def test_right_parameters():
    values = parse_parameters("train", ["epochs=3", "learning_rate=1e-4", "resume=true", "model=resnet1d_gru", "cache=a=b"])
    assert values == {"epochs": 3, "learning_rate": 1e-4, "resume": True, "model": "resnet1d_gru", "cache": "a=b"}


def test_unknown_names_from_python(tmp_path):
    with pytest.raises(InputError, match="unknown parameter"): run_pipeline("train", {"epoch": 1, "out": str(tmp_path / "x")})
    with pytest.raises(InputError, match="unknown pipeline"): run_pipeline("trian")
    assert not (tmp_path / "x").exists()


def test_a_call_as_it_would_be_typed():
    "Folders of the project are named; of other places only the end; where the outputs went, not at all."
    said = as_typed("train", {"cache": "data/prepared/default", "data": "/home/somebody/night", "other": "../away/x", "settings": '{"a": "outputs/runs/b"}', "epochs": 2, "out": "outputs/runs/c"})
    assert said == "hms train -p cache=data/prepared/default -p data=night -p other=x -p settings='{\"a\": \"outputs/runs/b\"}' -p epochs=2"
