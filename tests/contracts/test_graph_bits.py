"""ONNX graphs of others in fewer bits: what branches and loops read, opsets that have no 4 bits, ranges that are cut off."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrcompress
from lrcompress.export.products import inner_reads, products
from lrcompress.export.quantize import quantize
from lrcompress.graphs import open_graph
from lrcompress.verbs.factorize_graph import factorize_graph
from tests.e2e.test_real_recipes import assets
from tests.support.graphs import run as exactly
from tests.support.onnx_files import conv_net, correlated, mlp, model, node, save, w


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def images(n: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 12, 12)).astype(np.float32)


def choosing() -> onnx.ModelProto:
    """x (n, 32): a product, then one of two products, by its sum, read by branches, one of them inside another; one elsewhere, too."""

    def graph(name: str, made: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(
            [made], name, [], [helper.make_tensor_value_info(made.output[0], TensorProto.FLOAT, None)]
        )

    inside = node("If", ["positive"], ["inside"], then_branch=graph("a", node("MatMul", ["h", "fourth"], ["a_y"])),
                  else_branch=graph("b", node("MatMul", ["h", "third_t"], ["b_y"])))  # fmt: skip
    nodes = [
        node("MatMul", ["x", "first"], ["a"]), node("Relu", ["a"], ["h"]), node("ReduceSum", ["a"], ["sum"], keepdims=0),
        node("Transpose", ["third"], ["third_t"], perm=[1, 0]), node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["chosen"], then_branch=graph("then", node("MatMul", ["h", "second"], ["then_y"])),
             else_branch=graph("else", inside)),
        node("MatMul", ["h", "second"], ["again"]), node("Add", ["chosen", "again"], ["both"]),
        node("MatMul", ["both", "last"], ["y"]),
    ]  # fmt: skip
    constants = {
        "first": w(32, 48), "second": w(48, 64, seed=1), "third": w(64, 48, seed=2), "last": w(64, 8, seed=3),
        "fourth": w(48, 64, seed=4),
        "zero": np.float32(0),
    }  # fmt: skip
    made = model(nodes, constants, ("n", 32))
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8]))
    onnx.checker.check_model(made)  # so that what is made of it is checked, too
    return made


def test_what_a_branch_reads_is_no_product_of_the_graph_around_it() -> None:
    made = choosing()
    assert {"second", "third_t", "fourth", "h"} <= inner_reads(made.graph)
    assert [p.weight for p in products(made.graph)] == ["first", "last"]


@pytest.mark.parametrize(("bits", "within"), [(16, 2e-3), (8, 0.05), (4, 0.25)])
def test_branches_answer_as_before(bits: int, within: float) -> None:
    made, x = choosing(), correlated(64, 32)
    small = quantize(made, bits, slots=[], calibration=[{"x": x[:32]}]).model
    for rows in (x[32:48], -x[32:48]):  # one branch, then the other
        assert relative(exactly(made, x=rows), exactly(small, x=rows)) < within
    stored = {t.name: t.data_type for t in small.graph.initializer}
    for name in ("second", "third", "fourth"):
        assert stored[f"{name}_quantized"] == TensorProto.FLOAT16, "what only a branch reads is stored halved"
    assert small.ByteSize() < made.ByteSize()


@pytest.mark.parametrize("source", ["mlp", "conv"])
def test_all_bits_of_a_graph_come_smaller_and_smaller(source: str, tmp_path: Path) -> None:
    made, x = (mlp(), correlated(96, 32)) if source == "mlp" else (conv_net(), images(96))
    save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=x[:64])
    factorize_graph(tmp_path / "m.onnx", rank=8, calib=tmp_path / "x.npz", output=tmp_path / "c")
    exact = exactly(onnx.load(tmp_path / "c/model.onnx"), x=x[64:])
    sizes, errors = [], []
    for bits in ("none", "fp16", "int8", "int4"):
        report, out = _exported(tmp_path, bits)
        sizes.append(report["bytes"]["total"])
        errors.append(relative(exact, exactly(onnx.load(out / "model.onnx"), x=x[64:])))
    assert errors[0] == 0 and errors[1] < 2e-3 and errors[2] < 0.05 and errors[3] < 0.25, errors
    assert sizes[1] < sizes[0] and sizes[3] < sizes[0], sizes


def _exported(folder: Path, bits: str) -> tuple[dict, Path]:
    out = folder / bits
    made = lrcompress.export(folder / "c", quantize=bits, calib=folder / "x.npz", output=out)
    assert lrcompress.validate(out).passed
    return made.data, out


def old(opset: int) -> onnx.ModelProto:
    """A convolutional net whose mean names its axes as an attribute: that word is gone from opset 18 on."""
    made = conv_net()
    nodes = [n for n in made.graph.node if n.op_type not in ("GlobalAveragePool", "Flatten")]
    at = next(i for i, n in enumerate(nodes) if n.op_type == "Gemm")
    nodes.insert(at, node("ReduceMean", ["h1"], ["f"], axes=[2, 3], keepdims=0))
    constants = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    return model(nodes, constants, ("n", 3, 12, 12), opset=opset, ir=8)


def test_a_graph_that_opset_21_would_not_read_keeps_its_convolutions_at_8_bits(tmp_path: Path) -> None:
    save(old(13), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=images(64))
    factorize_graph(tmp_path / "m.onnx", rank=30, output=tmp_path / "c")
    report, out = _exported(tmp_path, "int4")
    made = onnx.load(out / "model.onnx")
    assert report["opset"] == open_graph(out / "model.onnx").opset == 13
    kinds = {t.data_type for t in made.graph.initializer}
    assert TensorProto.INT4 not in kinds and TensorProto.INT8 in kinds
    assert any(n.op_type == "MatMulNBits" for n in made.graph.node), "the classifier has 4 bits all the same"


def test_a_graph_that_answers_otherwise_under_opset_21_stays_what_it_is(tmp_path: Path) -> None:
    """Before opset 13 a Softmax was one over all axes from its own on: the same words, another sum."""
    made = conv_net()
    last = [n for n in made.graph.node if n.op_type == "Relu"][-1]
    last.op_type = "Softmax"
    last.attribute.append(helper.make_attribute("axis", 1))
    made.opset_import[0].version, made.ir_version = 12, 7
    save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=images(64))
    factorize_graph(tmp_path / "m.onnx", rank=30, output=tmp_path / "c")
    report, out = _exported(tmp_path, "int4")
    assert report["opset"] < 21 and TensorProto.INT4 not in {
        t.data_type for t in onnx.load(out / "model.onnx").graph.initializer
    }


def test_a_graph_that_opset_21_reads_alike_becomes_one(tmp_path: Path) -> None:
    made = conv_net()
    made.opset_import[0].version, made.ir_version = 13, 8
    save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=images(64))
    factorize_graph(tmp_path / "m.onnx", rank=30, output=tmp_path / "c")
    report, out = _exported(tmp_path, "int4")
    made = onnx.load(out / "model.onnx")
    assert report["opset"] == 21 and made.ir_version >= 10
    assert TensorProto.INT4 in {t.data_type for t in made.graph.initializer}


def cut(operator: str, *ends: float, twice: bool = False) -> onnx.ModelProto:
    """A convolution whose answers go far beyond what is left of them."""
    names = [f"end{i}" for i in range(len(ends))]
    nodes = [
        node("Conv", ["x", "c.weight", "c.bias"], ["a"], pads=[1, 1, 1, 1], name="c"),
        node(operator, ["a", *names], ["h"], name="cut"),
    ]
    nodes += [node("Conv", ["h", "d.weight"], ["b"], name="d")]
    nodes += (
        [node("ReduceMax", ["a"], ["most"]), node("Add", ["b", "most"], ["y"])]
        if twice
        else [node("Identity", ["b"], ["y"])]
    )
    constants = {
        "c.weight": w(16, 3, 3, 3, scale=0.5),
        "c.bias": 80 * (np.arange(16) == 3).astype(np.float32),
        "d.weight": w(8, 16, 1, 1),
    }
    return model(nodes, constants | {n: np.float32(v) for n, v in zip(names, ends, strict=True)}, ("n", 3, 12, 12))


@pytest.mark.parametrize(
    ("operator", "ends", "twice", "gone", "within"),
    [
        ("Relu", (), False, True, 6e-3),
        ("Clip", (0.0, 6.0), False, True, 0.018),  # 0.034 where the convolution's own answer is coded
        ("Clip", (-1.0, 1.0), False, True, 0.03),  # 0.074
        ("Clip", (1.0, 6.0), False, False, 0.04),
        ("Clip", (-6.0, -1.0), False, False, 0.06),
        ("Clip", (0.0, 6.0), True, False, 0.04),
    ],
)
def test_codes_are_of_what_a_cut_leaves(
    operator: str, ends: tuple[float, ...], twice: bool, gone: bool, within: float
) -> None:
    made, x = cut(operator, *ends, twice=twice), images(96)
    small = quantize(made, 8, slots=[], calibration=[{"x": x[:64]}]).model
    assert any(n.op_type == operator for n in small.graph.node) != gone
    error = relative(exactly(made, x=x[64:]), exactly(small, x=x[64:]))
    assert error < within, error


def with_slot(operator: str, *ends: float) -> tuple[onnx.ModelProto, list[str]]:
    """The same with a slot: what is cut is the sum of the convolution's answer and an adapter's."""
    made = cut(operator, *ends)
    for n in made.graph.node:
        if n.name == "cut":
            n.input[0] = "sum"
    branch = [
        node("Conv", ["x", "c.lora_A"], ["c.h"], pads=[1, 1, 1, 1]), node("Conv", ["c.h", "c.lora_B"], ["c.d"]),
        node("Add", ["a", "c.d"], ["sum"]),
    ]  # fmt: skip
    nodes = [made.graph.node[0], *branch, *made.graph.node[1:]]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    for name, shape, empty in (
        ("c.lora_A", ["r", 3, 3, 3], (1, 3, 3, 3)),
        ("c.lora_B", [16, "r", 1, 1], (16, 1, 1, 1)),
    ):
        made.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        made.graph.initializer.append(numpy_helper.from_array(np.zeros(empty, np.float32), name))
    return made, ["c.lora_A", "c.lora_B"]


@pytest.mark.parametrize("ends", [(0.0, 6.0), (-1.0, 1.0)])
def test_codes_leave_an_adapter_room_to_move_what_is_cut(ends: tuple[float, float]) -> None:
    (made, slots), x = with_slot("Clip", *ends), images(96)
    small = quantize(made, 8, slots=slots, calibration=[{"x": x[:64]}]).model
    error = relative(exactly(made, x=x[64:]), exactly(small, x=x[64:]))
    assert error < 0.03, error  # 0.034 and 0.074 where all that the convolution answers is coded
    rng = np.random.default_rng(5)
    moves = {"c.lora_A": rng.standard_normal((2, 3, 3, 3)) * 0.1, "c.lora_B": rng.standard_normal((16, 2, 1, 1))}
    feeds = {"x": x[64:], **{k: v.astype(np.float32) for k, v in moves.items()}}
    moved = exactly(made, **feeds)
    assert relative(exactly(made, x=x[64:]), moved) > 0.1, "the adapter must matter for this test"
    assert relative(moved, exactly(small, **feeds)) < 0.04


@pytest.mark.assets
@pytest.mark.parametrize("name", ["silero_vad.onnx", "silero_vad_16k_op15.onnx"])
def test_a_voice_detector_of_others_says_what_it_said(name: str, tmp_path: Path) -> None:
    """Silero's two files, factorized without torch and stored halved, chunk by chunk against its own published answers."""
    source = assets() / "models/silero_vad" / name
    known = np.load(assets() / "data/silero_test_probs.npy")
    with wave.open(str(assets() / "data/silero_test_16k.wav")) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    chunks = sound[: len(sound) // 512 * 512].reshape(-1, 512)[:400]
    inputs = np.concatenate([np.concatenate([np.zeros((1, 64), np.float32), chunks[:-1, -64:]]), chunks], 1)

    def answers(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
        session, state = ort.InferenceSession(str(path)), np.zeros((2, 1, 128), np.float32)
        found, states = [], []
        for x in inputs:
            states.append(state[:, 0])
            p, state = session.run(None, {"input": x[None], "state": state, "sr": np.array(16000)})
            found.append(float(p[0, 0]))
        return np.array(found), states

    before, states = answers(source)
    np.testing.assert_allclose(before, known[:400], atol=1e-3)
    np.savez(tmp_path / "x.npz", input=inputs[:128], state=np.stack(states[:128]), sr=np.full(128, 16000))
    told = lrcompress.factorize(source, rank=64, calib=tmp_path / "x.npz", output=tmp_path / "c").data
    assert told["params_after"] < told["params_before"] and any(n["form"] != "dense" for n in told["layers"])
    assert all(n["reason"] for n in told["layers"] if n["form"] == "dense"), "a layer that is left says why"
    low = answers(tmp_path / "c/model.onnx")[0]
    report, out = _exported(tmp_path, "fp16")
    halved = answers(out / "model.onnx")[0]
    np.testing.assert_allclose(halved, low, atol=2e-3)
    agree = float(((halved[128:] > 0.5) == (known[128:400] > 0.5)).mean())
    assert agree > 0.95, agree
    assert report["bytes"]["base"] < 0.6 * _exported(tmp_path, "none")[0]["bytes"]["base"]
