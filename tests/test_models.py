"Every registered model: shapes, an exact parameter count, gradients, symmetry, independence within the batch, ONNX parity."
import subprocess
import sys

import numpy as np
import pytest
import torch

from hms_brain.bundle import measure_parity, open_session, to_onnx
from hms_brain.core import CHANNELS, InputError, mirror_index, rng_for
from hms_brain.models.core import MODELS, create_model, list_models, n_params, register_model

# name -> trainable parameters, width of the embedding, whether mirrored heads give the same answer
TABLE = {"resnet1d_gru": dict(n_params=283_738, features=128, symmetric=True)}
names = pytest.mark.parametrize("name", TABLE)


@pytest.fixture(scope="module")
def windows():
    rng = rng_for(0, "windows")
    eeg = torch.tensor(rng.normal(0, 30, (3, 19, 10000)), dtype=torch.float32)
    return {"eeg": eeg, "image": torch.tensor(rng.random((3, 3, 224, 224)), dtype=torch.float32)}


def made(name, seed=0):
    torch.manual_seed(seed)
    model = create_model(name).eval()
    for module in model.modules():  # statistics as after some training, else normalisation is the identity
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def answer(model, windows):
    with torch.no_grad():
        return model(**windows)


def test_every_model_is_in_the_table():
    for name in list_models():
        create_model(name)
    assert set(list_models()) == set(TABLE) == set(MODELS)


@names
def test_size_is_locked(name):
    assert n_params(create_model(name)) == TABLE[name]["n_params"]


@names
def test_shapes(name, windows):
    model = made(name)
    out = answer(model, windows)
    assert out.logits.shape == (3, 6) and out.features.shape == (3, TABLE[name]["features"])
    assert all(x.isfinite().all() for x in out if x is not None)
    assert set(model.inputs) <= {"eeg", "image"} and model.settings == {}
    if out.attention is not None:
        np.testing.assert_allclose(out.attention.sum(-1), 1, atol=1e-5)
        assert (out.attention >= 0).all()


@names
def test_every_parameter_learns(name, windows):
    model = create_model(name)
    model(**windows).logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []


@names
def test_windows_do_not_see_each_other(name, windows):
    model = made(name)
    alone = torch.cat([answer(model, {k: v[i:i + 1] for k, v in windows.items()}).logits for i in range(3)])
    torch.testing.assert_close(alone, answer(model, windows).logits, atol=1e-5, rtol=0)


@names
@pytest.mark.parametrize("seed", range(3))
def test_mirrored_heads_get_the_same_answer(name, seed, windows):
    if not TABLE[name]["symmetric"]:
        pytest.skip("not symmetric by design")
    model = made(name, seed)
    flipped = answer(model, windows | {"eeg": windows["eeg"][:, mirror_index()]}).logits
    assert (flipped - answer(model, windows).logits).abs().max() <= 1e-5
    asymmetric = windows["eeg"].clone()
    asymmetric[:, CHANNELS.index("T3")] *= 3
    assert (answer(model, windows | {"eeg": asymmetric}).logits - answer(model, windows).logits).abs().max() > 1e-3


@names
def test_empty_and_huge_windows_have_finite_answers(name):
    model = made(name)
    for value in (0.0, 1e6, -1e30):
        windows = {"eeg": torch.full((2, 19, 10000), value), "image": torch.zeros(2, 3, 224, 224)}
        windows["eeg"][:, ::2] *= -1
        assert answer(model, windows).logits.isfinite().all()


@names
def test_onnx_answers_like_torch(name):
    model = made(name)
    onnx = to_onnx(model)
    assert max(measure_parity(model, onnx, (1, 2, 5)).values()) <= 1e-5
    assert b"location" not in onnx
    assert [i.name for i in open_session(onnx, 1, name).get_inputs()] == list(model.inputs)


def test_resnet_ignores_the_reference_and_the_absent(windows):
    model, eeg = made("resnet1d_gru"), windows["eeg"]
    shifted = eeg + 100 * torch.sin(torch.arange(10000) / 20)
    torch.testing.assert_close(answer(model, {"eeg": shifted}).logits, answer(model, {"eeg": eeg}).logits, atol=1e-3, rtol=0)
    short = eeg.clone()
    short[:, :, :4000] = 0
    attention = answer(model, {"eeg": short}).attention
    assert attention[:, :50].abs().max() == 0 and attention[:, 50:].min() > 0


def test_resnet_looks_at_the_centre():
    attention = answer(create_model("resnet1d_gru").eval(), {"eeg": torch.randn(1, 19, 10000)}).attention[0]
    assert attention[50:75].sum() > 0.35  # a fifth of the window


def test_unknown_names_and_settings():
    with pytest.raises(InputError, match=r"known: .*resnet1d_gru"):
        create_model("resnet")
    with pytest.raises(InputError, match="colour"):
        create_model("resnet1d_gru", colour=1)
    with pytest.raises(ValueError, match="twice"):
        register_model("resnet1d_gru")(torch.nn.Identity)
    assert create_model("resnet1d_gru", width=32).settings == {"width": 32}


def test_listing_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; from hms_brain.models.core import list_models; print(list_models())"
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "resnet1d_gru" in said
