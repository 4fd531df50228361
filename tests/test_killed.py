"A training that is killed again and again ends where it would have ended; and what would happen without the two guards."
import json
import multiprocessing
import os
import signal
import time

import pytest
from safetensors.torch import save, save_file

from hms_brain import checkpoints, train as module
from hms_brain.batches import SineCache
from hms_brain.checkpoints import newest_checkpoint, state_tensors
from hms_brain.core import rng_for
from hms_brain.train import Run
from test_train import Stop, fit, stop_after, weights

EPOCHS, KILLS = 36, 20


def work(folder, ready=None, patches=()):
    "The training of a child process: 18 windows, three steps per epoch, dropout, mixing, a second stage."
    for name, value in patches: setattr(module, name, value)
    if ready: ready.set()
    cache = SineCache(24)
    cache.index.loc[::2, cache.index.columns[-6:]] *= 4
    return fit(folder, cache, epochs=EPOCHS // 2, stage2_epochs=EPOCHS // 2, batch_size=6, mixup=0.3, patience=0, resume=True)


def child(folder, **how):
    "A process that has torch loaded already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hms_brain.train", "accelerate", "test_train"])
    ready = context.Event()
    process = context.Process(target=work, args=(folder, ready), kwargs=how)
    process.start()
    assert ready.wait(300)
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    began = time.perf_counter()
    run = work(tmp_path_factory.mktemp("runs") / "whole")
    return run, (time.perf_counter() - began) / EPOCHS


@pytest.mark.fault
@pytest.mark.slow
def test_twenty_kills_change_nothing(whole, tmp_path):
    "SIGKILL at random moments, by turns after the start and after a new checkpoint; the weights' sha256 is that of the run that nobody killed."
    (run, epoch), rng, kills, resumed = whole, rng_for(0, "kills"), 0, 0
    listed = tmp_path / "r" / "checkpoints" / "list.json"
    state = lambda: listed.read_bytes() if listed.exists() else b""
    while True:
        before = state()
        resumed += before != b"" and newest_checkpoint(tmp_path / "r") is not None
        process = child(tmp_path / "r")
        while kills % 2 and kills < KILLS and state() == before and process.is_alive(): process.join(0.01)
        process.join(rng.uniform(0, 1.5 * epoch) if kills < KILLS else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
    killed = Run.load(tmp_path / "r")
    print(json.dumps({"kills": kills, "resumed": int(resumed), "equal": weights(killed) == weights(run)}))
    assert kills == KILLS and resumed > 10 and weights(killed) == weights(run)
    assert killed.history.drop(columns="seconds").equals(run.history.drop(columns="seconds")) and set(killed.history.stage) == {1, 2}


def torn(tensors, path, metadata):
    "The process dies in the middle of writing the third checkpoint."
    data = save(tensors, metadata)
    if json.loads(metadata["state"])["epoch"] != 3: return save_file(tensors, path, metadata)
    with open(path, "wb") as f:
        f.write(data[:len(data) // 2])
        f.flush()
        os.fsync(f.fileno())
        os.kill(os.getpid(), signal.SIGKILL)


def save_in_place(training, folder):
    "What the guard replaces: one file, written over itself."
    (folder / "checkpoints").mkdir(exist_ok=True)
    write = torn if os.environ.get("TORN") else save_file
    write(state_tensors(training), folder / "checkpoints" / "last.safetensors", metadata={"state": json.dumps({"identity": training.identity, "epoch": training.epoch, "step": training.step, "history": training.history, "scaler": None})})


def last_in_place(folder):
    path = folder / "checkpoints" / "last.safetensors"
    return path if path.exists() else None


def save_torn(training, folder):
    "The house's own way, in a process that dies in the middle of a write."
    checkpoints.save_file = torn
    checkpoints.save_checkpoint(training, folder)


@pytest.mark.fault
def test_killed_in_the_middle_of_a_write(whole, tmp_path):
    process = child(tmp_path / "r", patches=(("save_checkpoint", save_torn),))
    process.join(300)
    assert process.exitcode == -signal.SIGKILL and newest_checkpoint(tmp_path / "r").name == "epoch-0002.safetensors"
    assert weights(work(tmp_path / "r")) == weights(whole[0])


@pytest.mark.fault
def test_control_saving_in_place_loses_the_run(tmp_path, monkeypatch):
    "Without the guard the same death leaves half a file and nothing to continue from."
    monkeypatch.setenv("TORN", "1")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=(tmp_path / "r",), kwargs={"patches": (("save_checkpoint", save_in_place), ("newest_checkpoint", last_in_place))})
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL and last_in_place(tmp_path / "r")
    monkeypatch.setattr(module, "newest_checkpoint", last_in_place)
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|metadata"):
        work(tmp_path / "r")


def test_control_without_fresh_chance_a_resumed_run_differs(tmp_path, monkeypatch):
    "Without chance as a function of seed and epoch the resumed run is another one."
    for guarded in (True, False):
        if not guarded: monkeypatch.setattr(module, "reseed", lambda seed, epoch: None)
        whole = fit(tmp_path / f"whole-{guarded}")
        with pytest.raises(Stop): fit(tmp_path / f"cut-{guarded}", say=stop_after(1))
        assert (weights(fit(tmp_path / f"cut-{guarded}", resume=True)) == weights(whole)) == guarded
