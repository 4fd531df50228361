"""What a variant is worth: built from the training it belongs to, measured, chosen by rule, kept in a bundle that still opens."""
import numpy as np
import onnx
import pytest

from hms_brain.batches import SineCache
from hms_brain.bundle import Bundle, export_bundle
from hms_brain.core import InputError
from hms_brain.metrics import softmax
from hms_brain.recipe import Recipe
from hms_brain.runtime import gate_windows, open_session
from hms_brain.train import train
from hms_brain.variants import choose, keep_variants, tensorrt_options, to_tensorrt, trtexec_command, variants_of_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(SineCache(), Recipe(epochs=1, batch_size=12), folder=tmp_path_factory.mktemp("runs") / "r", model_settings={"stem": 4, "width": 16, "hidden": 8}, threads=1, say=None)


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    return export_bundle(run, tmp_path_factory.mktemp("bundles") / "b", name="test")


def test_variants_of_a_training(run, bundle, tmp_path):
    found, files = variants_of_run(run, bundle, SineCache(), windows=12, calibrate=8)
    rows = {(r["variant"], r["runtime"]): r for r in found["rows"]}
    assert found["windows"] == 12 and 0 < found["windows_with_votes"] <= 12
    assert rows["fp32", "onnxruntime"]["mean_change"] == 0
    assert ("fp16" in found["left_out"]) != (("fp16", "onnxruntime") in rows and rows["fp16", "onnxruntime"]["mean_change"] < 0.01)
    assert all(r["latency_ms"] > 0 and r["per_second"] > 0 and r["megabytes"] > 0 and np.isfinite(r["kl"]) for r in rows.values())
    assert {n.op_type for n in onnx.load_from_string(files["model.int8.onnx"]).graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    kept = keep_variants(bundle, found, files, tmp_path / "v")
    assert kept.card["variants"] == found and "Variant in use" in (kept.folder / "card.md").read_text()
    assert (kept.onnx == bundle.onnx) == (found["default"] == "fp32")
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == [*sorted(files), "variants.json"]
    with pytest.raises(InputError, match="not the cache of this training"): variants_of_run(run, bundle, SineCache(24))
    Bundle.load(kept.folder)


@pytest.mark.parametrize("spoiled", [{"mean_change": 0.011}, {"same_class": 0.98}, {"kl_worse": 0.011}, {"runtime": "openvino"}])
def test_the_fastest_within_the_limits(spoiled):
    base = {"variant": "fp32", "runtime": "onnxruntime", "per_second": 10, "mean_change": 0, "same_class": 1, "kl_worse": 0}
    fast = base | {"variant": "int8", "per_second": 20}
    assert choose([base, fast]) == "int8" and choose([base, fast | spoiled]) == "fp32"


def test_the_graph_for_tensorrt_answers_alike(bundle):
    folded, feed = to_tensorrt(bundle.onnx), gate_windows(bundle.inputs, 5)
    p, q = (softmax(open_session(m, 1, "x").run(["logits"], feed)[0]) for m in (bundle.onnx, folded))
    assert np.abs(p - q).max() < 1e-5 and b"location" not in folded
    graph = onnx.load_from_string(folded)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param and len(graph.graph.node) < len(onnx.load_from_string(bundle.onnx).graph.node)
    options = tensorrt_options(bundle.inputs, "cache")[0]
    assert options[0] == "TensorrtExecutionProvider" and options[1]["trt_profile_max_shapes"] == "eeg:64x19x10000" and "--minShapes=eeg:1x19x10000" in trtexec_command(bundle.inputs)
