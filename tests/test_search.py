"A search loses nothing, repeats what was lost, prunes, and prints a command that trains its best."
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hms_brain import search as module
from hms_brain.batches import SineCache
from hms_brain.core import InputError, read_json
from hms_brain.recipe import Recipe, parse_recipe
from hms_brain.runs import parse_parameters
from hms_brain.search import SPACE, check_space, open_study, search, train_command
from hms_brain.train import Run, train

SMALL = {"stem": 4, "width": 16, "hidden": 8}
RECIPE = Recipe(epochs=2, batch_size=12, patience=0)
SPACE_OF_ONE = {"learning_rate": {"from": 1e-4, "to": 1e-2, "log": True}}


def look(folder, trials, space=SPACE_OF_ONE, recipe=RECIPE, **how):
    return search(SineCache(24), recipe, space, folder=folder, trials=trials, model_settings=SMALL, threads=1, say=None, **how)


def test_an_interrupted_search_tries_the_same(tmp_path):
    whole = look(tmp_path / "whole", 3)
    for n in (1, 2, 3): cut = look(tmp_path / "cut", n)
    pd.testing.assert_frame_equal(whole, cut)
    assert (whole.state == "complete").all() and whole.val_kl.is_monotonic_increasing
    best = read_json(tmp_path / "cut/best.json")
    assert best["trial"] == whole.number[0] and best["recipe"]["learning_rate"] == whole.learning_rate[0]
    run = Run.load(tmp_path / "cut" / whole.folder[0])
    assert run.metrics["val_kl"] == pytest.approx(best["val_kl"]) and set(run.validation.fold) == {RECIPE.fold}
    with pytest.raises(InputError, match="recipe differs"):
        look(tmp_path / "cut", 4, recipe=replace(RECIPE, seed=1))
    with pytest.raises(InputError, match="space differs"):
        look(tmp_path / "cut", 4, {"ema": [0.9]})


def test_the_command_trains_the_best(tmp_path):
    recipe = Recipe(model="specnet", mixup=0.4, stage2_epochs=2, learning_rate=0.0123, per_period=True)
    words = shlex.split(train_command(recipe, {"width": 16}, "data/my cache"))
    assert words[:2] == ["hms", "train"] and set(words[2::2]) == {"-p"}
    values = parse_parameters("train", words[3::2])
    own = {k: values[k] for k in ("model", "epochs", "batch_size", "learning_rate", "fold", "seed", "limit")}
    assert parse_recipe(values["recipe"], **own) == recipe and json.loads(values["settings"]) == {"width": 16} and values["cache"] == "data/my cache"


def test_hopeless_trials_are_cut(tmp_path, monkeypatch):
    rates = iter([3e-3] * 3 + [1e-9])
    monkeypatch.setattr(module, "suggest", lambda trial, space: ({"learning_rate": next(rates), "ema": 0.0}, {}))
    import optuna
    plain = optuna.pruners.MedianPruner
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda n_startup_trials: plain(n_startup_trials=3))
    recipe = replace(RECIPE, epochs=4, batch_size=6, learning_rate=3e-3)
    table = look(tmp_path, 4, recipe=recipe).set_index("number")
    assert table.state[3] == "pruned" and table.epochs[3] < 4 and (table.epochs[:3] == 4).all()
    assert Run.load(tmp_path / table.folder[3]).status == "ok"


def test_a_loss_that_is_not_finite_fails_the_trial_alone(tmp_path, monkeypatch):
    calls = []
    def sometimes(*args, **how):
        calls.append(1)
        if len(calls) == 1: raise RuntimeError("the loss is nan in step 3")
        return train(*args, **how)
    monkeypatch.setattr(module, "train", sometimes)
    table = look(tmp_path, 2, recipe=replace(RECIPE, epochs=1)).set_index("number")
    assert table.state.to_dict() == {0: "fail", 1: "complete"} and "loss is nan" in table.error[0]


def test_spaces_are_checked():
    check_space(SPACE)
    for space, words in (({}, "empty"), ({"moddel": [1]}, "moddel"), ({"fold": [0, 1]}, "no 'fold'"), ({"ema": []}, "ema may be"), ({"ema": {"from": 0, "to": 1, "log": True}}, "ema may be"), ({"ema": {"from": "a", "to": "b"}}, "ema may be")):
        with pytest.raises(InputError, match=words): check_space(space)
    with pytest.raises(InputError, match="mean median"): open_study(Path("."), {}, "medium")


@pytest.mark.fault
def test_a_killed_search_goes_on(tmp_path):
    "SIGKILL in the middle of a trial: the next call repeats it with the same values in the same folder, and ends where an undisturbed search ends."
    folder = tmp_path / "killed"
    recipe = replace(RECIPE, epochs=6)
    script = f"""
from test_search import *
look(Path({str(folder)!r}), 2, recipe={recipe!r})"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
    end = time.time() + 300
    while not (folder / "trial-0000/history.csv").exists():
        assert process.poll() is None and time.time() < end
        time.sleep(0.05)
    with pytest.raises(InputError, match="another process"):
        look(folder, 2, recipe=recipe)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    table = look(folder, 2, recipe=recipe)
    lost = table[table.state == "fail"]
    again = table[(table.number > lost.number.iloc[0]) & (table.folder == lost.folder.iloc[0])]
    assert len(lost) == len(again) == 1 and again.learning_rate.iloc[0] == lost.learning_rate.iloc[0] and again.epochs.iloc[0] == 6
    alone = train(SineCache(24), replace(recipe, learning_rate=float(again.learning_rate.iloc[0])), folder=tmp_path / "alone", model_settings=SMALL, threads=1, say=None)
    assert alone.metrics["weights_sha256"] == Run.load(folder / "trial-0000").metrics["weights_sha256"]
