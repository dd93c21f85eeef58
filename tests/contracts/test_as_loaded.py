"""Pivoted layers in a graph: few numbers in the file, and a runtime that makes their bases whole when it loads it."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.data import Data
from lrcompress.factorize import ConvGeometry, Refused, form
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import factorized_layers, find_layers, replace_layer
from lrcompress.plan.form_time import Place, steps_of
from lrcompress.runtime import Session

FORMS = ("pivoted", "pivoted_spatial", "pivoted_tucker")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "shape",
    [(12, 8, 3, 3), (8, 12, 3, 3), (6, 5, 5, 3), (6, 5, 2, 4), (9, 7, 1, 1)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_the_same_with_whole_bases(name: str, shape: tuple[int, ...], stride: int) -> None:
    module, x = form(name), gaussian(2, shape[1], 9, 10, seed=1)
    if not getattr(module, "serves", lambda s: True)(shape):
        pytest.skip("not for this kernel")
    geometry = ConvGeometry((stride, 1), (1, 2), (1, 1))
    full = module.full_rank(shape)
    ranks = [full, 2, 4, 7, 11, *([(3, 4), (2, shape[1])] if name == "pivoted_tucker" else [])]
    tried = 0
    for rank in dict.fromkeys(module.clip(shape, r) if isinstance(r, int) else r for r in ranks):
        try:
            factors = module.decompose(gaussian(*shape), rank).factors
        except Refused:
            continue
        torch.testing.assert_close(
            module.conv_as_loaded(factors, x, geometry), module.conv(factors, x, geometry), rtol=1e-9, atol=1e-9
        )
        tried += 1
    assert tried > 1


def test_products_are_the_same_with_whole_bases() -> None:
    for shape in ((12, 8), (8, 12), (5, 5)):
        for rank in range(1, min(shape) + 1):
            factors = form("pivoted").decompose(gaussian(*shape), rank).factors
            x = gaussian(3, shape[1], seed=1)
            torch.testing.assert_close(
                form("pivoted").linear_as_loaded(factors, x), form("pivoted").linear(factors, x), rtol=1e-10, atol=1e-10
            )


def network(*forms: str) -> nn.Module:
    """Return convolutions and a linear layer in these forms."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 40)
    )  # fmt: skip
    for at, name in zip((0, 2, 5), forms, strict=True):
        weight = net[at].weight.detach()
        rank = form(name).clip(tuple(weight.shape), 5)
        replace_layer(net, str(at), form(name).decompose(weight.double(), rank))
    return net.float().eval()


def optimized(path: Path) -> collections.Counter[str]:
    """Return the operators of the graph that ONNX Runtime would run."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.parent / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return collections.Counter(n.op_type for n in model.graph.node)


def test_a_graph_has_the_numbers_of_the_pivots_and_the_operators_of_the_plain_gauge(tmp_path: Path) -> None:
    inputs, x = (InputSpec("x", "float32", ("batch", 3, 8, 8)),), gaussian(4, 3, 8, 8).float().numpy()
    nets = {"pivots": network(*FORMS[1:], FORMS[0]), "plain": network("spatial_svd", "tucker", "svd")}
    found, sizes = {}, {}
    for name, net in nets.items():
        lrcompress.export(open_model(net, inputs=inputs), slots=("none",), output=tmp_path / name)
        found[name] = optimized(tmp_path / name / "model.onnx")
        sizes[name] = (tmp_path / name / "base.data").stat().st_size
        with torch.no_grad():
            expected = net(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(Session(tmp_path / name).run({"x": x})["output"], expected, atol=2e-5)
    assert found["pivots"] == found["plain"]
    own, plain = (
        sum(
            sum(p.numel() for p in layer.factors.values() if p.is_floating_point()) for _, layer in factorized_layers(n)
        )
        for n in nets.values()
    )
    assert plain - own == 100  # r² each, twice for Tucker
    assert sizes["plain"] - sizes["pivots"] > 0.7 * 4 * (plain - own)  # positions take some


@pytest.mark.parametrize("rank", [15, 19, 20])
def test_what_is_dearer_than_dense_is_dense_when_it_is_loaded(tmp_path: Path, rank: int) -> None:
    """Few numbers in the file, one product in the runtime; the manifest says that it takes the memory."""
    net = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.Flatten(), nn.Linear(24 * 16, 40))
    for at, name, r in ((0, "pivoted", rank), (2, "pivoted", 2 * rank)):
        weight = net[at].weight.detach()
        replace_layer(net, str(at), form(name).decompose(weight.double(), r))
    net = net.float().eval()
    x = gaussian(4, 24, 4, 4).float().numpy()
    opened = open_model(net, inputs=(InputSpec("x", "float32", ("batch", 24, 4, 4)),))
    lrcompress.export(opened, slots=("lora",), output=tmp_path / "e")
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected, atol=2e-5)
    raw, stored = Manifest.load(tmp_path / "e").raw, (tmp_path / "e" / "base.data").stat().st_size
    # Dense from 24·24·9 / (24 + 216) = 21.6 and 384·40 / 424 = 36.2 on.
    assert raw["dense_at_run_time"] == ([] if rank == 15 else ["2"])  # at 20 of full rank: nothing is mixed
    numbers = sum(p.numel() for _, layer in factorized_layers(net) for p in layer.factors.values())
    assert stored < 4 * numbers * 1.06


@pytest.mark.parametrize("quantize", ["fp16", "int8"])
def test_rounded_exports_of_pivots_move_nothing_either(tmp_path: Path, quantize: str) -> None:
    inputs = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    x = gaussian(32, 3, 8, 8).float().numpy()
    net = network(*FORMS[1:], FORMS[0])
    lrcompress.export(
        open_model(net, inputs=inputs), slots=("none",), quantize=quantize, calib=Data.of_arrays({"x": x}), output=tmp_path / "e"
    )  # fmt: skip
    operators = optimized(tmp_path / "e" / "model.onnx")
    assert not {"Gather", "Slice", "Split"} & set(operators) and operators["Concat"] == 1, operators  # Flatten's
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    got = Session(tmp_path / "e").run({"x": x})["output"]
    assert np.linalg.norm(got - expected) < {"fp16": 2e-3, "int8": 0.05}[quantize] * np.linalg.norm(expected)


def test_a_core_between_the_factors_keeps_them_as_they_are(tmp_path: Path) -> None:
    inputs, x = (InputSpec("x", "float32", ("batch", 3, 8, 8)),), gaussian(4, 3, 8, 8).float().numpy()
    net = network(*FORMS[1:], FORMS[0])
    lrcompress.export(open_model(net, inputs=inputs), slots=("core",), output=tmp_path / "e")
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected, atol=2e-5)


def test_a_plan_pays_for_what_the_runtime_runs() -> None:
    net = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Linear(384, 1536))
    conv, linear = find_layers(net)
    place = Place(image=(8, 8), geometry=ConvGeometry((1, 1), (1, 1), (1, 1)))
    assert steps_of("pivoted", linear, 96, Place(rows=9)) == steps_of("svd", linear, 96, Place(rows=9))
    assert steps_of("pivoted_spatial", conv, 12, place) == steps_of("spatial_svd", conv, 12, place)
    assert steps_of("pivoted_tucker", conv, (8, 6), place) == steps_of("tucker", conv, (8, 6), place)
