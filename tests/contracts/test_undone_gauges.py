"""Pivoted layers that rounding would hurt go back to their plain gauge: the same product, by measured error."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.data import Data
from lrcompress.export.plain import WORSE, Rounding, undo_gauges
from lrcompress.factorize import form
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import replace_layer
from lrcompress.runtime import Session

SPEC = (InputSpec("x", "float32", ("batch", 16, 12, 12)),)


def pictures(n: int = 32) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((n, 16, 12, 12)).astype(np.float32)
    return np.maximum(x + 0.5 * np.roll(x, 1, 2) + 0.5 * np.roll(x, 1, 3), 0)


def network(*forms: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in forms for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())))
    for i, name in enumerate(forms):
        if name != "dense":
            weight = net[2 * i].weight.detach()
            weight = weight * 0.6 ** torch.arange(16.0).reshape(-1, 1, 1, 1)
            replace_layer(net, str(2 * i), form(name).decompose(weight, form(name).clip(tuple(weight.shape), 14)))
    return net.eval()


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": x} for x in np.split(pictures(), 4)]


@pytest.mark.parametrize("given", [True, False], ids=["calibrated", "not"])
def test_a_gauge_that_is_to_be_rounded_is_undone_and_the_product_stays(given):
    net = network("pivoted_spatial", "svd", "dense")
    before, x = copy.deepcopy(net), torch.from_numpy(pictures())
    found = undo_gauges(net, open_model(net, inputs=SPEC), feeds() if given else [], {"0": 8, "2": 8, "4": 8})
    assert set(found) == {"0"} and found["0"].form == net[0].form == "spatial_svd" and not found["0"].halved
    with torch.no_grad():
        torch.testing.assert_close(net(x), before(x), rtol=1e-4, atol=1e-4)
        exact = before(x)
        errors = []
        for one in (before, net):
            with Rounding(8):
                errors.append(float((one(x) - exact).norm() / exact.norm()))
    assert errors[1] < errors[0]


def test_what_is_not_to_be_rounded_is_left_alone():
    net = network("pivoted_spatial")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for bits, given, cored in (
        ({}, feeds(), ()),
        ({"0": 16}, feeds(), ()),
        ({"0": 32}, feeds(), ()),
        ({"0": 8}, [], ("0",)),
    ):
        assert undo_gauges(net, open_model(net, inputs=SPEC), given, bits, cored) == {}
    assert net[0].form == "pivoted_spatial"
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_layer_with_an_adapter_between_its_factors_keeps_its_gauge():
    net = network("pivoted_spatial")
    found = undo_gauges(net, open_model(net, inputs=SPEC), feeds(), {"0": 8}, cored=("0",))
    assert found["0"].halved and net[0].form == found["0"].form == "pivoted_spatial"
    assert found["0"].error > WORSE * found["0"].plain_error > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_what_it_says(bits):
    layer, x = nn.Linear(32, 8), torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Rounding(bits):
        y = layer(x)
    with torch.no_grad():
        error = float((y - layer(x)).norm() / layer(x).norm())
    assert {8: 0.001, 4: 0.02}[bits] < error < {8: 0.02, 4: 0.2}[bits]


def test_an_export_says_which_layers_changed_and_serves_the_same_payloads(tmp_path):
    net = network("pivoted_spatial", "dense")
    calib = Data.of_arrays({"x": pictures()})
    opened = open_model(net, inputs=SPEC)
    report = {}
    for name, options in (
        ("fp32", {}),
        ("int8", {"quantize": "int8"}),
        ("cored", {"quantize": "int8", "slots": ("core",)}),
    ):
        options = {"slots": ("lora",), **options}
        report[name] = lrcompress.export(opened, calib=calib, output=tmp_path / name, **options).data
    notes = {n: [w["gauge"] for w in r["weights"] if w["kind"] == "layer"] for n, r in report.items()}
    assert notes["fp32"] == [] and "became spatial_svd" in notes["int8"][0]
    assert "an adapter lies between its factors" in notes["cored"][0]
    assert report["int8"]["slots_id"] == report["fp32"]["slots_id"]
    assert set(Manifest.load(tmp_path / "int8").raw["factors"]) == {"0.first", "0.second"}
    x = pictures()
    exact = Session(tmp_path / "fp32").run({"x": x})["output"]
    for name in ("int8", "cored"):
        got = Session(tmp_path / name).run({"x": x})["output"]
        assert np.linalg.norm(got - exact) < 0.04 * np.linalg.norm(exact), name
    assert net[0].form == "pivoted_spatial", "the model that was given is not changed"
