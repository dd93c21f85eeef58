"""Pivoted layers that rounding would hurt go back to their plain gauge: the same product, by measured error."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.data import Data
from lrcompress.export import plain
from lrcompress.export.plain import WORSE, Rounding, undo_gauges
from lrcompress.export.refit.gptq import quantize
from lrcompress.export.refit.grids import signed
from lrcompress.factorize import form
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import replace_layer
from lrcompress.runtime import Session

SPEC = (InputSpec("x", "float32", ("batch", 16, 12, 12)),)


def pictures(n: int = 32) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((n, 16, 12, 12)).astype(np.float32)
    return np.maximum(x + 0.5 * np.roll(x, 1, 2) + 0.5 * np.roll(x, 1, 3), 0)


def network(*forms: str, spread: float = 0.6) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in forms for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())))
    for i, name in enumerate(forms):
        if name != "dense":
            weight = net[2 * i].weight.detach()
            weight = weight * spread ** torch.arange(16.0).reshape(-1, 1, 1, 1)
            replace_layer(net, str(2 * i), form(name).decompose(weight, form(name).clip(tuple(weight.shape), 14)))
    return net.eval()


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": x} for x in np.split(pictures(), 4)]


@pytest.mark.parametrize("given", [True, False], ids=["calibrated", "not"])
def test_a_gauge_that_is_to_be_rounded_is_undone_and_the_product_stays(given):
    net = network("pivoted_spatial", "svd", "dense")
    before, x = copy.deepcopy(net), torch.from_numpy(pictures())
    found = undo_gauges(net, open_model(net, inputs=SPEC), feeds() if given else [], {"0": 8, "2": 8, "4": 8})
    assert set(found) == {"0"} and found["0"].form == net[0].form == "spatial_svd" and not found["0"].stored
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
    assert found["0"].stored and net[0].form == found["0"].form == "pivoted_spatial"
    assert found["0"].error > WORSE * found["0"].plain_error > 0


class Read(nn.Module):
    """A pivoted layer, and something that reads what it makes."""

    def __init__(self, reads, spread=0.6):
        super().__init__()
        self.layer, self.reads = network("pivoted_spatial", spread=spread)[0], reads

    def forward(self, x):
        return self.reads(self.layer(x))


INF = float("inf")
READERS = {
    "relu": (nn.ReLU(), (0, INF)),
    "in place": (nn.ReLU(inplace=True), (0, INF)),
    "relu6": (nn.ReLU6(), (0, 6)),
    "relu6 in place": (nn.ReLU6(inplace=True), (0, 6)),
    "hardtanh": (nn.Hardtanh(-2, 3), (-2, 3)),
    "clamp": (lambda y: y.clamp(max=4), (-INF, 4)),
    "two of them": (lambda y: torch.relu(y) + torch.clamp(y, -1, 1), (-1, INF)),
    "a shape": (lambda y: torch.relu(y) * y.shape[0], (0, INF)),
    "read again": (lambda y: torch.relu(y) + y, (-INF, INF)),
    "in a list": (lambda y: torch.cat([y, torch.relu(y)]), (-INF, INF)),
    "nothing": (lambda y: y, (-INF, INF)),
    "another": (nn.Sigmoid(), (-INF, INF)),
}


@pytest.mark.parametrize(("reads", "ends"), READERS.values(), ids=READERS)
def test_what_the_network_keeps_of_an_answer_is_what_alone_reads_it(reads, ends):
    net = Read(reads)
    found = plain._inputs(net, open_model(net, inputs=SPEC), feeds(), {"layer": net.layer})["layer"]
    assert (found.low, found.high) == ends
    assert torch.equal(found.rows, torch.from_numpy(pictures()))


def test_what_is_cut_off_counts_for_the_gauge_that_can_do_without_it():
    """Codes of the plain gauge are of what is kept: with most of the answer cut off, the pivoted one falls behind."""
    errors = {}
    for name, cut in (("all", lambda y: y), ("less", lambda y: y.clamp(0, 0.5))):
        net = Read(cut, spread=0.9)
        found = undo_gauges(net, open_model(net, inputs=SPEC), feeds(), {"layer": 8}, cored=("layer",))["layer"]
        errors[name] = found.error / found.plain_error
    assert errors["less"] > 1.3 * errors["all"]


@pytest.mark.parametrize(("spread", "stored"), [(1.0, 8), (0.6, 16)])
def test_where_codes_cost_too_much_the_weights_are_stored_in_as_few_bits_as_they_bear(spread, stored):
    net = network("pivoted_spatial", spread=spread)
    found = undo_gauges(net, open_model(net, inputs=SPEC), feeds(), {"0": 8}, cored=("0",))["0"]
    assert found.stored == stored


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_what_it_says(bits):
    layer, x = nn.Linear(32, 8), torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Rounding(bits):
        y = layer(x)
    with torch.no_grad():
        error = float((y - layer(x)).norm() / layer(x).norm())
    assert {8: 0.001, 4: 0.02}[bits] < error < {8: 0.02, 4: 0.2}[bits]


def test_what_is_only_stored_is_rounded_in_its_weights_alone():
    layer, x = nn.Conv2d(8, 16, 3), torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Rounding(8, stored=True):
        y = layer(x)
    weight = quantize(layer.weight.detach().flatten(1), signed(8, 72)).values().reshape(layer.weight.shape)
    assert torch.equal(y, nn.functional.conv2d(x, weight, layer.bias.detach()))


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
