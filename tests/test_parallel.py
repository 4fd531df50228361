"Two processes on this machine's CPU compute what one does."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from hms_brain.batches import SineCache, Windows, split_rows
from hms_brain.core import InputError, rng_for, sha256_file
from hms_brain.launch import launch
from hms_brain.models.core import create_model
from hms_brain.parallel import Part, WholeBatch, parts
from hms_brain.recipe import Recipe
from hms_brain.steps import vote_loss

SMALL = {"stem": 4, "width": 16, "hidden": 8}
SPEC = {"widths": [4, 4, 8], "width": 16}


class Noisy(SineCache):
    "Sines in noise, and an image of noise: pure tones are so badly conditioned that rounding alone shows."
    def batch(self, rows):
        eeg, image, votes = super().batch(rows)
        for x, i, row in zip(eeg, image, rows):
            rng = rng_for(0, "noise", int(row))
            x += rng.normal(0, 20, x.shape).astype(np.float32)
            i += rng.random(i.shape, dtype=np.float32)
        return eeg, image, votes


@given(st.integers(1, 70), st.integers(1, 16), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_window_once(n, size, world):
    shares = [parts(n, size, rank, world) for rank in range(world)]
    assert len({len(places) for places, _ in shares}) == 1  # all keep in step
    counted = [places[k][j] for places, each in shares for k, part in enumerate(each) for j in range(part.counted)]
    assert sorted(counted) == list(range(n))
    for k in range(len(shares[0][0])):
        assert sum(each[k].share for _, each in shares) == pytest.approx(world)
        assert {p // size for places, _ in shares for p in places[k]} == {k}


@pytest.mark.parametrize("model, keywords", [("resnet1d_gru", SMALL), ("specnet", SPEC), ("fusion", {"eeg_settings": SMALL, "image_settings": SPEC})])
def test_the_mode_is_exact(model, keywords):
    "In float64 loss and gradients are those of torch's own batch normalisation and dropout, to rounding."
    cache = Noisy()
    batch = Windows(cache, split_rows(cache)).__getitems__(list(range(7)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for whole in (False, True):
            torch.manual_seed(0)
            net = create_model(model, **keywords).double()
            torch.manual_seed(1)
            x = {k: batch[k].double() for k in ("eeg", "image")}
            if whole:
                with WholeBatch(Part(7)): logits = net(**x).logits
            else: logits = net(**x).logits
            vote_loss(logits, batch["target"], batch["weight"]).backward()
            found.append((logits.detach(), {k: p.grad for k, p in net.named_parameters()}, dict(net.named_buffers())))
    finally: dist.destroy_process_group()
    (a, grads, buffers), (b, others, also) = found
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for k, g in grads.items(): torch.testing.assert_close(g, others[k], rtol=1e-6, atol=1e-9)
    for k, v in buffers.items(): torch.testing.assert_close(v, also[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model, keywords, more", [("resnet1d_gru", SMALL, {"mixup": 0.4}), pytest.param("specnet", SPEC, {}, marks=pytest.mark.slow),
                                                   pytest.param("fusion", {"eeg_settings": SMALL, "image_settings": SPEC}, {}, marks=pytest.mark.slow)])
def test_two_processes_have_the_loss_of_one(tmp_path, model, keywords, more):
    "Global batch of 7 over 36 windows: odd parts, and a last batch of one window that the second process does not share."
    recipe = Recipe(model=model, epochs=2, batch_size=7, learning_rate=1e-4, **more)
    one, two = (launch(Noisy(), recipe, processes=n, folder=tmp_path / str(n), model_settings=keywords, threads=1, say=None) for n in (1, 2))
    for column in ("train_loss", "val_kl"): np.testing.assert_allclose(two.history[column], one.history[column], atol=1e-4, rtol=0)
    assert two.status == "ok" and two.metrics["val_kl"] == pytest.approx(one.metrics["val_kl"], abs=1e-4)
    assert {p.relative_to(two.folder) for p in two.folder.rglob("*")} == {p.relative_to(one.folder) for p in one.folder.rglob("*")}


def in_double(monkeypatch):
    "Train in float64, in this process and in those that it forks."
    from hms_brain import checkpoints, train
    def create(name, **keywords):
        net = create_model(name, **keywords).double()
        net.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
        return net
    def loss(logits, target, weight, share=1.0):
        return (weight.double() * (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)).mean() * share
    monkeypatch.setattr(checkpoints, "create_model", create)
    monkeypatch.setattr(train, "vote_loss", loss)


def test_but_for_rounding_the_training_is_the_same(tmp_path, monkeypatch):
    "In float64 nothing is left of the differences, at thirty times the rate and after two epochs of AdamW."
    in_double(monkeypatch)
    one, two = (launch(Noisy(), Recipe(epochs=2, batch_size=7, learning_rate=3e-3), processes=n, folder=tmp_path / str(n), model_settings=SMALL, threads=1, say=None) for n in (1, 2))
    for column in ("train_loss", "val_kl"): np.testing.assert_allclose(two.history[column], one.history[column], atol=1e-7, rtol=0)


def test_separate_statistics_would_not_do(tmp_path, monkeypatch):
    "The control: with batch normalisation and dropout of each process for itself the losses differ."
    from contextlib import nullcontext
    recipe = Recipe(epochs=2, batch_size=7, learning_rate=1e-4)
    one = launch(Noisy(), recipe, folder=tmp_path / "1", model_settings=SMALL, threads=1, say=None)
    monkeypatch.setattr("hms_brain.train.whole_batch", lambda part: nullcontext())
    two = launch(Noisy(), recipe, processes=2, folder=tmp_path / "2", model_settings=SMALL, threads=1, say=None)
    assert np.abs(two.history.train_loss - one.history.train_loss).max() > 1e-3


def test_two_processes_resume(tmp_path):
    recipe = Recipe(epochs=2, batch_size=12)
    run = launch(Noisy(), recipe, processes=2, folder=tmp_path / "r", model_settings=SMALL, threads=1, say=None)
    before = sha256_file(run.folder / "model.safetensors")
    (run.folder / "model.safetensors").unlink()
    launch(Noisy(), recipe, processes=2, folder=tmp_path / "r", resume=True, model_settings=SMALL, threads=1, say=None)
    assert sha256_file(run.folder / "model.safetensors") == before
    with pytest.raises(InputError, match="holds a training already"):
        launch(Noisy(), recipe, processes=2, folder=tmp_path / "r")


def test_a_failing_process_is_reported(tmp_path):
    class Broken(SineCache):
        def batch(self, rows): raise OSError("the disk is gone")
    with pytest.raises(RuntimeError, match="of 2 failed"):
        launch(Broken(), Recipe(epochs=1), processes=2, folder=tmp_path / "r", model_settings=SMALL, threads=1, say=None)


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    "From a shell, on a prepared cache."
    from test_dataset import make, make_data
    cache = make(make_data(tmp_path / "data"), tmp_path / "cache")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "hms_brain.launch", str(cache.folder), "-r", '{"epochs": 1, "batch_size": 4}', "-s", '{"stem": 4, "width": 16, "hidden": 8}', "--threads", "1"]
    for name, words in (("two", command), ("one", [sys.executable, *command[command.index("-m", 3):]])):
        done = subprocess.run([*words, "-o", str(tmp_path / name)], env=os.environ | {"ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 and str(tmp_path / name) in done.stdout, done.stderr[-2000:]
    import pandas as pd
    one, two = (pd.read_csv(tmp_path / name / "history.csv") for name in ("one", "two"))
    np.testing.assert_allclose(two[["train_loss", "val_kl"]], one[["train_loss", "val_kl"]], atol=1e-4)
