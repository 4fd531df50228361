"""Kaggle, the way up: wheels, the packed notebook, its dry run, push and submit against a loopback stand-in."""
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pandas as pd
import pytest

from hms_brain import kaggle_kernel as kk
from hms_brain.core import VOTE_COLUMNS, InputError, read_json, write_json
from hms_brain.wheels import collect_wheels, make_wheel, needed, pin
from stand_ins import Quiet, kaggle_api, serving
from test_cli import HMS, one_line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A simulated test set of two rows."
    return kk.simulate_test_set(tmp_path_factory.mktemp("test"), n=2)


@pytest.fixture
def small(tmp_path):
    "A pack of little files, marked as tried."
    out = tmp_path / "pack"
    for name, text in (("kernel/hms-brain-inference.ipynb", '{"cells": []}'), ("dataset/bundle/model.onnx", "weights"), ("dataset/wheels/a.whl", "wheel")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    for part, about in zip(("kernel", "dataset"), kk.metadata("hms-brain-inference", "hms brain inference", kk.NOBODY, "toy")):
        write_json(out / part / f"{part}-metadata.json", about)
    record = {"name": "hms-brain-inference", "competition": "toy", "bundle": {"name": "b"}, "pythons": [kk.HERE], "files": kk.list_files(out), "tried": {"rows": 2}, "pushed": None}
    write_json(out / "pack.json", record)
    return out


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    pytest.importorskip("kagglesdk.kaggle_env", reason="the Kaggle client is an extra")
    with kaggle_api(monkeypatch, tmp_path / "home") as handler:
        yield handler


# wheels


def test_a_wheel_of_ourselves_is_what_runs_here(tmp_path):
    path = make_wheel(distribution("hms_brain"), tmp_path)
    with zipfile.ZipFile(path) as z:
        names = z.namelist()
        assert z.read("hms_brain/core.py") == Path(kk.__file__).with_name("core.py").read_bytes()
        assert "hms = hms_brain.cli:main" in z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        record = {line.split(",")[0] for line in z.read(next(n for n in names if n.endswith("RECORD"))).decode().splitlines()}
    assert record == set(names) and "hms_brain/assets/bundle/model.onnx" in names and any(n.startswith("hms_brain/pipelines/") for n in names)
    assert not any("__pycache__" in n or "__editable__" in n for n in names)


def test_compiled_wheels_keep_their_tags_and_install(tmp_path):
    path = make_wheel(distribution("pydantic-core"), tmp_path / "w")
    assert f"-cp3{sys.version_info.minor}-" in path.name
    (tmp_path / "r.txt").write_text(pin([path]))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--require-hashes", "--find-links", tmp_path / "w", "-r", tmp_path / "r.txt"]
    subprocess.run([*command, "--target", tmp_path / "site"], check=True)
    subprocess.run([sys.executable, "-S", "-c", "import pydantic_core"], check=True, env={"PYTHONPATH": f"{tmp_path / 'site'}:{distribution('typing-extensions').locate_file('')}"})
    path.write_bytes(path.read_bytes() + b" ")
    assert subprocess.run([*command, "--target", tmp_path / "again"], capture_output=True).returncode


def test_wheels_for_another_python_come_from_pip(tmp_path, monkeypatch):
    other = f"3.{sys.version_info.minor + 1}"
    compiled = make_wheel(distribution("pydantic-core"), tmp_path / "made")
    (tmp_path / "index").mkdir()
    foreign = compiled.name.replace(f"cp3{sys.version_info.minor}", f"cp3{sys.version_info.minor + 1}")
    (tmp_path / "index" / foreign).write_bytes(compiled.read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    got = collect_wheels(["pydantic-core", "annotated-types"], tmp_path / "got", [other])
    assert sorted(p.name for p in got) == sorted([foreign, "annotated_types-" + distribution("annotated-types").version + "-py3-none-any.whl"])
    with pytest.raises(InputError, match=r"wheels for Python 3\.99 cannot be had") as e:
        collect_wheels(["pydantic-core"], tmp_path / "none", ["3.99"])
    assert "\n" not in str(e.value)


def test_needed_leaves_out_extras_and_names_what_is_absent():
    assert "torch" not in needed(kk.ANSWERING[1:]) and {"onnxruntime", "pydantic_core"} <= set(needed(kk.ANSWERING[1:]))
    with pytest.raises(InputError, match="not installed"):
        needed(["no-such-package-here"])


# answers


def test_answers_need_nothing_but_what_is_packed(data, tmp_path):
    "The answer command, where other packages of the base are absent."
    absent = ("torch", "mne", "sklearn", "matplotlib", "plotly", "pandera", "papermill", "edfio", "timm", "requests", "jinja2", "rich", "joblib")
    script = f"""import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from hms_brain.cli import main
sys.argv = ["hms", "kaggle", "answer", {str(data)!r}, "-o", {str(tmp_path / "s.csv")!r}]
main()"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stdout and list(pd.read_csv(tmp_path / "s.csv").columns) == ["eeg_id", *VOTE_COLUMNS]


def test_answers_are_those_of_predict(data):
    from hms_brain.predict import Predictor, predict_file

    table, notes = kk.answer_test(data)
    row = kk.read_test(data).iloc[1]
    single, _ = predict_file(data / f"test_eegs/{row.eeg_id}.parquet", Predictor(), context=data / f"test_spectrograms/{row.spectrogram_id}.parquet")
    assert notes == [] and table[list(VOTE_COLUMNS)].iloc[1].to_numpy() == pytest.approx(list(single.probabilities.values()), abs=1e-6)


def test_a_test_set_without_eegs_is_no_answer(data, tmp_path):
    (tmp_path / "test.csv").write_text((data / "test.csv").read_text())
    with pytest.raises(InputError, match="not one EEG could be used"):
        kk.answer_test(tmp_path)
    assert "is not there" in one_line(subprocess.run([HMS, "kaggle", "answer", tmp_path / "nowhere", "-o", tmp_path / "s.csv"], capture_output=True, text=True))


@pytest.mark.real
def test_the_public_test_pair(real, tmp_path):
    table, notes = kk.answer_test(real / "hms")
    table.to_csv(tmp_path / "submission.csv", index=False)
    sample = pd.read_csv(real / "hms/sample_submission.csv")
    checked = kk.check_submission(real / "hms", tmp_path / "submission.csv")
    assert notes == [] and list(checked.columns) == list(sample.columns) and checked.eeg_id.tolist() == sample.eeg_id.tolist()


def test_a_held_out_set_is_a_test_set_with_votes_aside(tmp_path):
    from hms_brain.catalog import read_train
    from hms_brain.simset import simulate_dataset

    simulate_dataset(tmp_path / "data", patients=3, recordings=1, workers=1, n_test=0, progress=False)
    train = read_train(tmp_path / "data")
    patient = train.patient_id.iloc[-1]
    test = kk.hold_out(tmp_path / "data", tmp_path / "test", [patient])
    asked = kk.read_test(test)
    assert set(asked.patient_id) == {patient} and set(asked.eeg_id) == set(train[train.patient_id == patient].eeg_id)
    for row in asked.to_dict("records"):
        eeg, spectrogram = (pd.read_parquet(test / f"test_{kind}s/{row[f'{kind}_id']}.parquet") for kind in ("eeg", "spectrogram"))
        assert len(eeg) == 10_000 and len(spectrogram) == 300 and spectrogram.time.is_monotonic_increasing
    votes = pd.read_csv(test / "votes.csv")
    one = train[train.eeg_id == votes.eeg_id[0]][list(VOTE_COLUMNS)]
    assert (one == votes[list(VOTE_COLUMNS)].iloc[0]).all(axis=1).any()


# the dry run


def test_blocked_sockets_reach_nobody(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(kk.BLOCK)
    with serving(Quiet) as address:
        host, port = address.removeprefix("http://").split(":")
        for call in (f"urllib.request.urlopen('{address}')", f"socket.create_connection(('{host}', {port}))", f"socket.socket().connect(('{host}', {port}))",
                     f"subprocess.run([sys.executable, '-c', 'import urllib.request; urllib.request.urlopen(\"{address}\")'], check=True)"):
            done = subprocess.run([sys.executable, "-c", f"import socket, subprocess, sys, urllib.request\n{call}"], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
            assert done.returncode and "sockets are blocked" in done.stderr, done.stderr
    one, two = __import__("socket").socketpair()  # processes of one machine may still talk
    one.close(), two.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A real pack for the Python that runs here, tried once."
    out = tmp_path_factory.mktemp("kaggle") / "pack"
    done = subprocess.run([HMS, "kaggle", "pack", out, "--python", kk.HERE, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.slow
def test_a_pack_answers_offline_from_its_own_wheels(packed):
    out, record = packed
    assert record["tried"]["rows"] == 3 and record["tried"]["simulated"] and not (out / "trial/scratch").exists()
    kk.check_submission(out / "trial/input" / record["competition"], record["tried"]["submission"])
    about = read_json(out / "kernel/kernel-metadata.json")
    assert about["enable_internet"] is False and about["is_private"] is True and about["dataset_sources"] == [f"{kk.NOBODY}/hms-brain-inference-files"]
    executed = (out / "trial/hms-brain-inference.ipynb").read_text()
    assert "3 rows by" in executed


@pytest.mark.slow
def test_a_pack_without_a_wheel_fails_its_dry_run(packed, tmp_path):
    import shutil

    from hms_brain.runs import RunFailed

    out = tmp_path / "pack"
    shutil.copytree(packed[0], out, ignore=shutil.ignore_patterns("trial"))
    next((out / "dataset/wheels").glob("typer-*.whl")).unlink()
    record = read_json(out / "pack.json")
    write_json(out / "pack.json", record | {"files": kk.list_files(out), "tried": None})
    with pytest.raises(RunFailed, match="typer"):
        kk.try_pack(out)
    assert read_json(out / "pack.json")["tried"] is None


def test_a_pack_for_another_python_cannot_be_tried_here(small):
    write_json(small / "pack.json", read_json(small / "pack.json") | {"pythons": ["3.99"]})
    with pytest.raises(InputError, match=r"packed for Python 3\.99"):
        kk.try_pack(small)


def test_what_is_not_a_pack_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="in the way"):
        kk.claim_pack(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_a_pack_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    "No wheel can be had: the pack that was there is whole, and the next attempt is not told that something is in the way."
    def none(*_): raise InputError("wheels cannot be had", "pip download", "check the network")
    monkeypatch.setattr(kk, "collect_wheels", lambda *_: [])
    kk.pack(tmp_path / "pack", name="first")
    before = kk.read_pack(tmp_path / "pack")
    monkeypatch.setattr(kk, "collect_wheels", none)
    for out in ("pack", "other"):
        with pytest.raises(InputError, match="cannot be had"): kk.pack(tmp_path / out, name="second")
    assert kk.read_pack(tmp_path / "pack") == before and [p.name for p in tmp_path.iterdir()] == ["pack"]


# push and submit


def sent(kaggle, method):
    return [body for m, body in kaggle.calls if m == method]


def test_push_makes_the_data_set_then_the_kernel(kaggle, small, capfd):
    pushed = kk.push(small, wait=5)
    assert pushed["kernel"] == "tester/hms-brain-inference" and pushed["version"] == 3 and pushed["dataset_was"] == "created"
    assert sorted(kaggle.datasets["tester/hms-brain-inference-files"]) == ["bundle.zip", "wheels.zip"] == sorted(kaggle.uploads)
    (kernel,) = sent(kaggle, "SaveKernel")
    assert kernel["slug"] == "tester/hms-brain-inference" and kernel["enableInternet"] is False and kernel["isPrivate"] is True
    assert kernel["datasetDataSources"] == ["tester/hms-brain-inference-files"] and kernel["competitionDataSources"] == ["toy"]
    assert read_json(small / "pack.json")["pushed"]["version"] == 3 and kk.read_pack(small)
    again = kk.push(small, wait=5)
    assert again["dataset_was"] == "new version" and sent(kaggle, "CreateDatasetVersion")
    assert "CANARY" not in "".join(capfd.readouterr())


def test_submit_waits_for_the_kernel(kaggle, small):
    kk.push(small, wait=5)
    kaggle.states[:] = ["QUEUED", "RUNNING", "COMPLETE"]
    answer = kk.submit(small, "first try", wait=5)
    (body,) = sent(kaggle, "CreateCodeSubmission")
    assert answer["ref"] == 77 and body["kernelOwner"] == "tester" and body["kernelVersion"] == 3 and body["fileName"] == "submission.csv" and body["submissionDescription"] == "first try"


@pytest.mark.parametrize("states, words", [(["RUNNING"], "the kernel is running"), (["ERROR"], "ended with error: it broke")])
def test_submit_says_how_the_kernel_fares(kaggle, small, states, words):
    kk.push(small, wait=5)
    kaggle.states[:] = states
    with pytest.raises(InputError, match=words):
        kk.submit(small)
    assert not sent(kaggle, "CreateCodeSubmission")


@pytest.mark.parametrize("status, words", [(401, "refused the token"), (403, "not yours"), (404, "no such kernel"), (429, "asks for patience"), (500, "answered 500")])
def test_refusals_of_a_push_in_words(kaggle, small, capfd, status, words):
    kaggle.datasets["tester/hms-brain-inference-files"] = []
    kaggle.status = status
    if status in (403, 404):  # these words from the state of a data set mean: there is none yet
        with pytest.raises(InputError, match=words) as e:
            kk.ask_kaggle(lambda api: api.kernels_push(str(small / "kernel")), "hms-brain-inference", "kernel")
    else:
        with pytest.raises(InputError, match=words) as e:
            kk.push(small, wait=1)
    assert "\n" not in str(e.value) and "CANARY" not in str(e.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("method, reply, words", [
    ("CreateDataset", {"status": "error", "error": "title is taken"}, "title is taken"),
    ("SaveKernel", {"error": "quota is used up"}, "quota is used up"),
    ("SaveKernel", {"invalidDatasetSources": ["tester/x"], "versionNumber": 1}, "no such dataset: tester/x"),
    ("SaveKernel", {"invalidCompetitionSources": ["toy"], "versionNumber": 1}, "no such competition: toy"),
])
def test_replies_that_say_no_are_errors(kaggle, small, method, reply, words):
    kaggle.refuses[method] = reply
    with pytest.raises(InputError, match=words):
        kk.push(small, wait=5)
    assert read_json(small / "pack.json")["pushed"] is None


def test_a_file_that_could_not_be_sent_is_told(kaggle, small):
    kaggle.upload_status = 403
    with pytest.raises(InputError, match="unsuccessful") as e:
        kk.push(small, wait=5)
    assert read_json(small / "pack.json")["pushed"] is None and "CANARY" not in str(e.value)


def test_only_what_was_tried_is_pushed(kaggle, small):
    (small / "dataset/bundle/model.onnx").write_text("other weights")
    with pytest.raises(InputError, match="changed after it was packed"):
        kk.push(small)
    assert kaggle.calls == []


def test_commands_without_a_token(small, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE")} | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(kk.__file__).parents[1])}
    done = subprocess.run([HMS, "kaggle", "push", small], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "no valid token" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    done = subprocess.run([HMS, "kaggle", "submit", small], capture_output=True, text=True, env=env)
    assert "was not pushed" in one_line(done)
