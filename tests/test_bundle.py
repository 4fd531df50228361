"A bundle is checked before it is read, answers like the trained network, and needs no torch."
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from hms_brain.batches import SineCache
from hms_brain.bundle import FILES, MANIFEST, OPTIONAL, Bundle, default_bundle, export_bundle, seal_files
from hms_brain.core import CLASSES, InputError, get_settings, rng_for
from hms_brain.metrics import softmax
from hms_brain.preprocess import Preprocess
from hms_brain.recipe import Recipe
from hms_brain.runtime import PARITY, check_onnx, gate_windows
from hms_brain.scaling import Scaling
from hms_brain.train import train

SMALL = {"stem": 4, "width": 16, "hidden": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    return train(SineCache(), Recipe(epochs=1, batch_size=12), folder=folder, model_settings=SMALL, threads=1, say=None, command="hms train -p epochs=1")


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    return export_bundle(run, tmp_path_factory.mktemp("bundles") / "b", name="test", drift={"n": 50})


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.folder, tmp_path / "copy")


def reseal(folder, **changed):
    "Write files and a manifest that fits them, as somebody with bad intentions would."
    for name, data in changed.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    files = {name: (folder / name).read_bytes() for name in (*FILES, *OPTIONAL)}
    (folder / MANIFEST).write_bytes(seal_files(files))


def refusal(folder):
    with pytest.raises(InputError) as e:
        Bundle.load(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_drift_is_compared_with_goes_along(run, tmp_path):
    assert export_bundle(run, tmp_path / "b", drift={"n": 7}).drift == {"n": 7} == Bundle.load(tmp_path / "b").drift


def test_what_a_bundle_says(bundle, run):
    assert bundle.classes == CLASSES and bundle.models == ("resnet1d_gru",) and bundle.inputs == ("eeg",) and bundle.scaling == Scaling()
    assert bundle.identity() == {"name": "test", "sha256": bundle.sha256, "simulated": True}
    assert bundle.preprocess == Preprocess()
    np.testing.assert_allclose(bundle.prior, run.prior)
    card = (bundle.folder / "card.md").read_text()
    assert "Trained on simulated EEG, research use only." in card and "hms train -p epochs=1" in card
    assert set(bundle.card["parity"]) == {"1", "2", "5", "64"} and max(bundle.card["parity"].values()) <= PARITY
    assert bundle.card["metrics"] == run.metrics and bundle.card["seed"] == 0
    assert {p.name for p in bundle.folder.iterdir()} == {*FILES, *OPTIONAL, MANIFEST} and bundle.uncertainty.windows == 12


def test_answers_like_the_trained_network(bundle, run):
    windows = gate_windows(("eeg",), 5)
    with torch.no_grad():
        ours = softmax(run.model()(torch.as_tensor(windows["eeg"])).logits.numpy())
    p = bundle.predict_proba(**windows, threads=1)
    assert p.dtype == np.float64 and p.shape == (5, 6)
    np.testing.assert_allclose(p, ours, atol=1e-5)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)


def test_batch_and_single_agree(bundle):
    eeg = gate_windows(("eeg",), 7)["eeg"]
    single = np.concatenate([bundle.predict_proba(w[None], threads=1) for w in eeg])
    np.testing.assert_allclose(bundle.predict_proba(eeg, threads=1), single, atol=1e-6)
    np.testing.assert_array_equal(bundle.predict_proba(eeg, threads=1), bundle.predict_proba(eeg.copy(), threads=1))


def test_more_windows_than_a_batch(bundle, monkeypatch):
    eeg = gate_windows(("eeg",), 7)["eeg"]
    whole = bundle.outputs(eeg, threads=1)
    monkeypatch.setattr("hms_brain.runtime.BATCH", 3)
    parts = bundle.outputs(eeg, threads=1)
    assert set(whole) == {"logits", "features", "attention"}
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5)


def test_temperature_flattens(bundle):
    eeg = gate_windows(("eeg",), 4)["eeg"]
    warm = dataclasses.replace(bundle, about=bundle.about | {"temperature": 4.0})
    assert (warm.predict_proba(eeg, threads=1).max(1) <= bundle.predict_proba(eeg, threads=1).max(1) + 1e-9).all()


@pytest.mark.parametrize(("eeg", "says"), [
    (None, "is needed"), (np.zeros((19, 10000)), "has shape"), (np.zeros((2, 20, 10000)), "has shape"), (np.zeros((0, 19, 10000)), "has shape"),
    (np.full((1, 19, 10000), np.nan), "NaN"), (np.full((1, 19, 10000), np.inf), "infinity")])
def test_unusable_inputs(bundle, eeg, says):
    with pytest.raises(InputError, match=says):
        bundle.predict_proba(eeg)


def test_a_bundle_may_lack_uncertainty_and_drift(copy):
    for name in OPTIONAL: (copy / name).unlink()
    (copy / MANIFEST).write_bytes(seal_files({name: (copy / name).read_bytes() for name in FILES}))
    bare = Bundle.load(copy)
    assert bare.uncertainty is None and bare.drift is None
    (copy / OPTIONAL[0]).write_bytes(b"x")
    assert OPTIONAL[0] in refusal(copy) and "does not belong" in refusal(copy)


def test_a_bias_moves_the_answer(bundle):
    eeg = gate_windows(("eeg",), 3)["eeg"]
    biased = dataclasses.replace(bundle, about=bundle.about | {"bias": [5.0, -1, -1, -1, -1, -1]})
    assert (biased.predict_proba(eeg, threads=1)[:, 0] > bundle.predict_proba(eeg, threads=1)[:, 0]).all()


def test_sessions_are_shared(bundle):
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(bundle.session(1))) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({id(s) for s in seen}) == 1 and bundle.session(2) is not seen[0]


def test_bit_flips_are_found(copy):
    rng = rng_for(0, "flips")
    for name in (*FILES, *OPTIONAL, MANIFEST):
        path, good = copy / name, (copy / name).read_bytes()
        for _ in range(30):
            at = int(rng.integers(len(good)))
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1:])
            assert name in refusal(copy) or name == MANIFEST  # which may blame the file whose checksum it lost
        for cut in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            assert name in refusal(copy)
        path.write_bytes(good)
    Bundle.load(copy)


@pytest.mark.parametrize("name", [*FILES, *OPTIONAL, MANIFEST])
def test_missing_files_are_named(copy, name):
    (copy / name).unlink()
    assert name in refusal(copy) and "is missing" in refusal(copy)


def test_strangers_links_and_folders_are_refused(copy, tmp_path):
    (copy / "extra.txt").write_text("x")
    assert "extra.txt" in refusal(copy)
    (copy / "extra.txt").unlink()
    shutil.move(copy / "model.onnx", tmp_path / "elsewhere.onnx")
    (copy / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert "not a plain file" in refusal(copy)
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    assert "not a plain file" in refusal(copy)
    assert "not a bundle's folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [
    {"format": 99}, {"format": None}, {"classes": list(CLASSES[::-1])}, {"inputs": []}, {"inputs": ["eeg", "../../x"]}, {"prior": [1, 0]},
    {"prior": [-1, 2, 0, 0, 0, 0]}, {"temperature": 0}, {"bias": [0, 1]}, {"bias": [float("inf")] * 6}, {"bias": 3}, {"temperature": "hot"}, {"inputs": None}, {"prior": ["a"]}])
def test_unknown_formats_are_refused_even_when_sealed(copy, change):
    about = json.loads((copy / "bundle.json").read_text()) | change
    reseal(copy, bundle__json=json.dumps(about).encode())
    assert "bundle.json" in refusal(copy)


def test_a_bundle_of_the_future_says_so(copy):
    (copy / MANIFEST).write_text((copy / MANIFEST).read_text().replace('"format": 1', '"format": 2'))
    assert "format 2" in refusal(copy) and "release" in refusal(copy)


def test_external_data_are_refused(copy):
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data
    model = onnx.load_from_string((copy / "model.onnx").read_bytes())
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, copy / "model.onnx")
    data = (copy / "model.onnx").read_bytes()
    for path in copy.glob("weights.bin"):
        path.unlink()
    reseal(copy, model__onnx=data)
    assert "outside of the file" in refusal(copy)
    with pytest.raises(InputError, match="single file"):
        check_onnx(data, "model.onnx")


def test_code_in_model_files_does_not_run(copy, tmp_path):
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self): return (open, (str(mark), "w"))
    for name in (*FILES, *OPTIONAL):
        bad = shutil.copytree(copy, tmp_path / f"bomb-{name}")
        reseal(bad, **{name.replace(".", "__"): pickle.dumps(Bomb())})
        try:
            Bundle.load(bad).predict_proba(np.zeros((1, 19, 10000)), threads=1)
        except InputError:
            pass
    assert not mark.exists()


def test_no_torch_is_needed(bundle):
    script = f"""
import sys
for name in ("torch", "onnx", "accelerate", "safetensors.torch"): sys.modules[name] = None
import numpy as np
from hms_brain.bundle import Bundle
p = Bundle.load({str(bundle.folder)!r}).predict_proba(np.ones((2, 19, 10000)), threads=1)
print(p.shape, abs(p.sum(1) - 1).max() < 1e-12, "hms_brain.train" in sys.modules)"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said.split("\n")[0] == "(2, 6) True False"


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    settings = {"eeg_settings": SMALL, "frozen": True, "weights": {}}
    folder = tmp_path_factory.mktemp("fused")
    run = train(SineCache(24), Recipe(model="fusion", epochs=1, batch_size=6), folder=folder / "r", model_settings=settings, threads=1, say=None)
    return export_bundle(run, folder / "b")


def test_two_inputs(fused):
    assert fused.inputs == ("eeg", "image") and fused.models == ("fusion",) and fused.about["model_settings"] == {"eeg_settings": SMALL, "frozen": True}
    windows = gate_windows(fused.inputs, 9)
    p = fused.predict_proba(**windows, threads=1)
    np.testing.assert_allclose(p[4:5], fused.predict_proba(**{k: v[4:5] for k, v in windows.items()}, threads=1), atol=1e-6)
    assert set(fused.outputs(**windows)) == {"logits", "features", "attention"}
    with pytest.raises(InputError, match="is needed"):
        fused.predict_proba(windows["eeg"])
    with pytest.raises(InputError, match="same number"):
        fused.predict_proba(windows["eeg"], windows["image"][:2])


def test_two_inputs_predict_without_torch(fused):
    script = f"""
import sys
from hms_brain.predict import Predictor
from hms_brain.simulate import simulate_recording
p = Predictor({str(fused.folder)!r}, threads=1)(simulate_recording(0))
print(round(sum(p.probabilities.values()), 6), p.abstained, "torch" in sys.modules)"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said == "1.0 False False\n"


def test_export_replaces_a_bundle_and_nothing_else(run, bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="in the way"):
        export_bundle(run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    first = export_bundle(run, tmp_path / "b", name="one")
    second = export_bundle(run.folder, tmp_path / "b", name="two")
    assert (first.name, second.name) == ("one", "two") and first.sha256 != second.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "mine"]
    assert export_bundle(run, tmp_path / "named").name.startswith("resnet1d_gru-")


def test_export_refuses_what_does_not_agree(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hms_brain.bundle.measure_parity", lambda *a, **k: {"1": 2e-5})
    with pytest.raises(InputError, match="nothing was written"):
        export_bundle(run, tmp_path / "b")
    monkeypatch.setattr("hms_brain.bundle.measure_parity", lambda *a, **k: {"1": float("nan")})
    with pytest.raises(InputError, match="nothing was written"):
        export_bundle(run, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_unfinished_runs_are_not_exported(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "r")
    (tmp_path / "r" / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"no metrics\.json"):
        export_bundle(tmp_path / "r", tmp_path / "b")


def test_default_bundle(monkeypatch, root):
    assert default_bundle() == root / "hms_brain" / "assets" / "bundle"
    monkeypatch.setenv("HMS_MODELS_BUNDLE", "outputs/bundles/mine")
    get_settings.cache_clear()
    try: assert default_bundle().parts[-3:] == ("outputs", "bundles", "mine")
    finally: get_settings.cache_clear()
