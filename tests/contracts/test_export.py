"""ONNX with factors apart: same answers as the live network, slots that change nothing until they are used, gates that bite."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import CommandError, LrcompressWarning, ModelError, ParityError, PayloadError
from lrcompress.export import gates
from lrcompress.export.cleaning import drop_zero_biases
from lrcompress.files import sha256_tree
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.model.checkpoint import load_compressed
from lrcompress.payload import parse
from lrcompress.runtime import Session
from lrcompress.validate.tolerances import tolerances
from tests.support.nets import images, small, words

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
X, Y = images(160)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.save(small().state_dict(), folder / "model.pt")
    calib = Data.of_arrays({"x": X})
    lrcompress.factorize(
        folder / "model.pt",
        ratio=0.4,
        calib=calib,
        arch="tests.support.nets:small",
        inputs=SPEC,
        output=folder / "compressed",
    )
    for kind in ("lora", "loha"):
        lrcompress.recover(
            folder / "compressed",
            data=Data.of_arrays({"x": X}, Y),
            adapter_kind=kind,
            rank=2,
            steps=40,
            name=kind,
            output=folder / "adapters" / kind,
        )
    lrcompress.export(folder / "compressed", calib=calib, output=folder / "exported")
    return folder


def answers(module, x):
    with torch.no_grad():
        return module(torch.as_tensor(x)).numpy()


def test_the_runtime_answers_what_the_network_answers_at_any_batch(base):
    session = Session(base / "exported")
    module = load_compressed(base / "compressed").module
    for n in (1, 3, 17):
        np.testing.assert_allclose(session.run({"x": X[:n]})["output"], answers(module, X[:n]), rtol=1e-4, atol=1e-5)


def test_any_client_can_run_it_with_no_slot_fed(base):
    session = ort.InferenceSession(str(base / "exported" / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert session.run(None, {"x": X[:2]})[0].shape == (2, 5)


def test_factors_are_constants_of_their_own(base):
    model = onnx.load(str(base / "exported" / "model.onnx"))
    have = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = {i.name for i in model.graph.input}
    compressed = load_compressed(base / "compressed")
    for layer, spec in compressed.spec["layers"].items():
        for factor in spec["factors"]:
            name = f"{layer}.{factor}"
            value = compressed.module.state_dict()[name].numpy()
            # Stored as it is read: turned, or with the axes of a 1×1 kernel, and each number once.
            assert name not in inputs and have[name].dtype == value.dtype
            assert any(np.array_equal(have[name].reshape(v.shape), v) for v in (value, value.T))
    assert not any(n.metadata_props for n in model.graph.node), "source paths would travel along"
    text = (base / "exported" / "model.onnx").read_bytes()
    assert b"/tests/" not in text and b".py" not in text


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_payload_is_the_adapter(base, kind):
    """Torch with the adapter = merged torch = ONNX Runtime with the payload; without it the base is bit for bit back."""
    session = Session(base / "exported")
    before = session.run({"x": X[:9]})["output"]
    compressed = load_compressed(base / "compressed")
    from lrcompress.adapt._files import read_adapter
    from lrcompress.model.surgery import attach

    folder = read_adapter(base / "adapters" / kind)
    attach(compressed.module, "a", lambda name, _: folder.adapters[name], list(folder.adapters))
    expected = answers(compressed.module, X[:9])
    assert np.abs(expected - before).max() > 1e-3
    session.swap(parse((base / "exported" / "payloads" / f"{kind}.safetensors").read_bytes()))
    np.testing.assert_allclose(session.run({"x": X[:9]})["output"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answers(lrcompress.to_dense(compressed.module), X[:9]), expected, rtol=1e-3, atol=1e-4)
    session.swap(None)
    assert np.array_equal(session.run({"x": X[:9]})["output"], before)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_merging_bakes_the_same_answers_in(base, tmp_path, kind):
    lrcompress.export(base / "compressed", merge=kind, slots=("none",), output=tmp_path / "merged")
    session = Session(base / "exported")
    session.swap(parse((base / "exported" / "payloads" / f"{kind}.safetensors").read_bytes()))
    expected = session.run({"x": X[:9]})["output"]
    merged = Session(tmp_path / "merged")
    np.testing.assert_allclose(merged.run({"x": X[:9]})["output"], expected, rtol=1e-3, atol=1e-4)
    assert merged.manifest.slots == []


def test_exporting_again_gives_the_same_bytes(base, tmp_path):
    calib = Data.of_arrays({"x": X})
    lrcompress.export(base / "compressed", calib=calib, output=base / "again")
    one, two = (Manifest.load(base / n) for n in ("exported", "again"))
    assert one.base_id == two.base_id
    assert sha256_tree(base / "exported") == sha256_tree(base / "again")


def test_int8_keeps_its_slots_and_its_answers(base):
    calib = Data.of_arrays({"x": X})
    lrcompress.export(base / "compressed", quantize="int8", calib=calib, output=base / "int8")
    fp32, int8 = Session(base / "exported"), Session(base / "int8")
    assert int8.manifest.slots_id == fp32.manifest.slots_id and int8.manifest.base_id != fp32.manifest.base_id
    a, b = fp32.run({"x": X})["output"], int8.run({"x": X})["output"]
    assert np.abs(a - b).max() < 0.15 * np.abs(a).max()
    payload = parse((base / "int8" / "payloads" / "lora.safetensors").read_bytes())
    int8.swap(payload)
    assert np.abs(int8.run({"x": X})["output"] - b).max() > 1e-3
    assert (base / "int8" / "base.data").stat().st_size < 0.5 * (base / "exported" / "base.data").stat().st_size
    assert lrcompress.validate(base / "int8").passed
    # One table: the floor of the precision, and for int8 what quantization itself moved.
    assert fp32.manifest.tolerances == tolerances("fp32")
    assert all(v > tolerances("int8")[k] for k, v in int8.manifest.tolerances.items())


def test_a_plain_network_is_a_baseline(tmp_path):
    lrcompress.export(open_model(small(), inputs=SPEC), slots=("none",), output=tmp_path / "dense")
    np.testing.assert_allclose(
        Session(tmp_path / "dense").run({"x": X[:4]})["output"], answers(small(), X[:4]), rtol=1e-4, atol=1e-5
    )


def test_ids_and_masks_with_two_dynamic_axes(tmp_path):
    spec = (
        InputSpec("ids", "int64", ("batch", "sequence")),
        InputSpec("attention_mask", "int64", ("batch", "sequence")),
    )
    lrcompress.factorize(words(), rank=5, inputs=spec, output=tmp_path / "c")
    with pytest.raises(ModelError):  # an object has no source to come back from
        load_compressed(tmp_path / "c").need_module("export")
    lrcompress.export(open_model(words(), inputs=spec), output=tmp_path / "e")
    session = Session(tmp_path / "e")
    rng = np.random.default_rng(0)
    for shape in ((1, 3), (4, 9)):
        feed = {"ids": rng.integers(0, 40, shape), "attention_mask": np.ones(shape, np.int64)}
        with torch.no_grad():
            expected = words()(**{k: torch.as_tensor(v) for k, v in feed.items()}).numpy()
        np.testing.assert_allclose(session.run(feed)["output"], expected, rtol=1e-4, atol=1e-5)


def test_a_state_dict_has_no_graph(tmp_path):
    torch.save(small().state_dict(), tmp_path / "model.pt")
    lrcompress.factorize(tmp_path / "model.pt", rank=4, output=tmp_path / "c")
    with pytest.raises(ModelError, match="a state dict has no graph; give --arch and --input") as e:
        lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    assert e.value.exit_code == 4 and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": "tflite"}, CommandError), ({"quantize": "int3"}, CommandError), ({"slots": ("lokr",)}, CommandError),
        ({"slots": ("lora", "none")}, CommandError), ({"slot_include": ["zz*"]}, CommandError), ({"merge": "nope"}, CommandError),
        ({"adapters": ["nope"]}, CommandError), ({"original": "/nowhere"}, ModelError),
    ],
)  # fmt: skip
def test_wrong_options_write_nothing(base, tmp_path, options, error):
    with pytest.raises(error):
        lrcompress.export(base / "compressed", output=tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_not_shipped(base, tmp_path):
    import shutil

    shutil.copytree(base / "adapters" / "lora", tmp_path / "adapters" / "stranger")
    marker = tmp_path / "adapters" / "stranger" / "lrcompress.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "base": "0" * 64}))
    with pytest.raises(PayloadError, match="one for 000000000000"):  # it was asked for
        lrcompress.export(base / "compressed", adapters=[tmp_path / "adapters" / "stranger"], output=tmp_path / "e")
    assert not (tmp_path / "e").exists()
    shutil.copytree(base / "compressed", tmp_path / "compressed")
    shutil.copy(base / "model.pt", tmp_path)
    with pytest.warns(LrcompressWarning, match="another base"):  # it only lies there
        found = lrcompress.export(tmp_path / "compressed", output=tmp_path / "e").data
    assert found["payloads"] == []


# the gates, each against the fault it is there for ------------------------------------------------------------------


def graph(nodes, tensors, inputs=(("x", ["n", 96]),), outputs=(("y", ["n", 96]),)):
    value = lambda name, shape: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)  # noqa: E731
    g = helper.make_graph(
        nodes,
        "g",
        [value(*i) for i in inputs],
        [value(*o) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


U, V = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((96, 8), (8, 96)))


def test_gate_factors_multiplied_out(tmp_path):
    folded = graph(
        [helper.make_node("MatMul", ["U", "V"], ["W"]), helper.make_node("MatMul", ["x", "W"], ["y"])], {"U": U, "V": V}
    )
    apart = graph(
        [helper.make_node("MatMul", ["x", "U"], ["t"]), helper.make_node("MatMul", ["t", "V"], ["y"])], {"U": U, "V": V}
    )
    for model, name in ((folded, "folded.onnx"), (apart, "apart.onnx")):
        onnx.save(model, tmp_path / name)
    gates.factors_stay_apart(tmp_path / "apart.onnx", ["U", "V"], [])
    with pytest.raises(ModelError, match="multiplied out"):
        gates.factors_stay_apart(tmp_path / "folded.onnx", ["U", "V"], [])
    with pytest.raises(ModelError, match="none of that name"):
        gates.factors_stay_apart(tmp_path / "apart.onnx", ["U", "Z"], [])


def test_gate_slots_that_are_no_inputs(tmp_path):
    onnx.save(graph([helper.make_node("MatMul", ["x", "W"], ["y"])], {"W": U @ V}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="slot W"):
        gates.factors_stay_apart(tmp_path / "m.onnx", [], ["W"])


@pytest.mark.parametrize("fault", ["name", "bytes", "dead slot"])
def test_gate_names_and_bytes(fault):
    module = lrcompress.factorize(
        torch.nn.Sequential(torch.nn.Linear(96, 96, bias=False)),
        rank=8,
        inputs=(InputSpec("input", "float32", ("n", 96)),),
    ).model
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    tensors = {"0.U": state["0.U"], "0.V": state["0.V"]}
    if fault == "name":
        tensors["renamed"] = tensors.pop("0.U")
    if fault == "bytes":
        tensors["0.U"] = tensors["0.U"] + 1e-7
    model = graph([helper.make_node("MatMul", ["x", "0.V"], ["y"])], tensors)
    with pytest.raises(
        ModelError, match={"name": "it is gone", "bytes": "other values", "dead slot": "nothing reads it"}[fault]
    ):
        gates.names_and_bytes(model, module, ["0.lora_A"] if fault == "dead slot" else [])


def test_gate_other_answers():
    a = {"y": np.ones((2, 3), np.float32)}
    assert gates.outputs_agree(a, {"y": a["y"] + 1e-6}, 1e-5, where="t")["y"] < 2e-6
    for other in ({"y": a["y"] + 1e-3}, {"y": a["y"] * np.nan}, {"y": a["y"][:1]}, {}):
        with pytest.raises(ParityError):
            gates.outputs_agree(a, other, 1e-5, where="t")


def test_only_a_bias_of_zeros_is_dropped():
    w = np.ones((4, 3, 3, 3), np.float32)
    for value, expected in ((0.0, 1), (0.5, 0)):
        nodes = [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32(value))),
            helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.array([4], np.int64))),
            helper.make_node("Expand", ["c", "s"], ["b"]),
            helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[3, 3]),
        ]
        model = graph(nodes, {"w": w}, (("x", ["n", 3, 8, 8]),), (("y", ["n", 4, 6, 6]),))
        assert drop_zero_biases(model.graph) == expected
        assert len(model.graph.node) == (1 if expected else 4)


class Bounded(torch.nn.Module):
    """Bounds of a whole and a broken number, which the exporter cannot follow by itself."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(5, 4)

    def forward(self, x):
        return torch.clip(self.fc(x).clamp(0, 6.0), min=1, max=2.5)


def test_clamps_between_a_whole_and_a_broken_number_are_exported(tmp_path):
    net = Bounded().eval()
    opened = open_model(net, inputs=(InputSpec("x", "float32", ("batch", 5)),))
    lrcompress.export(opened, output=tmp_path / "e")
    x = torch.randn(30, 5) * 6
    got = Session(tmp_path / "e").run({"x": x.numpy()})["output"]
    np.testing.assert_allclose(got, net(x).detach().numpy(), atol=1e-6)
    assert got.min() == 1 and got.max() == 2.5


def test_licence_and_model_card_travel_with_the_artifact(tmp_path):
    from lrcompress.manifest import Manifest
    from lrcompress.model.describing import copy_notices

    source, beside, stage = tmp_path / "hub", tmp_path / "files", tmp_path / "stage"
    for folder in (source, beside, stage):
        folder.mkdir()
    names = (
        "LICENSE",
        "LICENCE.txt",
        "NOTICE",
        "COPYING",
        "MODEL_CARD.md",
        "README.md",
        "LICENSE\nx",
        "licenses.py",
        "model.pt",
    )
    for folder in (source, beside):
        for name in names:
            (folder / name).write_text(f"{name} of {folder.name}\n")
    told = ["COPYING", "LICENCE.txt", "LICENSE", "MODEL_CARD.md", "NOTICE"]
    assert copy_notices(beside, stage, card=False) == told
    assert copy_notices(source, stage, card=True) == sorted([*told, "README.md"])
    assert (stage / "README.md").read_bytes() == b"README.md of hub\n" and not (stage / "model.pt").exists()
    assert copy_notices(None, stage, card=True) == copy_notices(tmp_path / "none", stage, card=True) == []

    import torch

    import lrcompress
    from lrcompress.model import InputSpec
    from tests.support.nets import small

    torch.save(small().state_dict(), beside / "weights.pt")
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(
        beside / "weights.pt", rank=6, arch="tests.support.nets:small", inputs=spec, output=tmp_path / "c"
    )
    lrcompress.export(tmp_path / "c", adapters=[], output=tmp_path / "exported")
    manifest = Manifest.load(tmp_path / "exported")
    assert set(told) <= manifest.files.keys() and "README.md" not in manifest.files
    (tmp_path / "exported" / "LICENSE").write_text("mine")
    from lrcompress.errors import ManifestError

    with pytest.raises(ManifestError, match="LICENSE"):
        Manifest.load(tmp_path / "exported")
