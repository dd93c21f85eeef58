"""Weights that cannot be factorized as they stand: each is refused or handled, and a line says which and why."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import LrcompressWarning, ModelError, PlanError
from lrcompress.factorize import Statistics, form
from lrcompress.files import write_json
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import count_parameters, find_layers

X = (InputSpec("x", "float32", ("batch", 12)),)
IDS = (InputSpec("ids", "int64", ("batch", 7)), InputSpec("attention_mask", "int64", ("batch", 7)))
ROWS, WIDTH = 50, 12


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16)).eval()


def reasons(net, **options) -> dict[str, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrcompressWarning)
        return {n["name"]: n["reason"] for n in lrcompress.factorize(net, rank=3, inputs=X, **options).data["layers"]}


class Tied(nn.Module):
    """A language model in little: the output layer reads the embedding's table."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids, attention_mask):
        x = self.embed(ids) * attention_mask[..., None]
        return self.head(torch.tanh(self.mid(x)) + x)


def tied(bias=True) -> Tied:
    torch.manual_seed(1)
    net = Tied(bias).eval()
    with torch.no_grad():
        net.embed.weight.mul_(torch.linspace(2, 0.1, WIDTH))
    return net


def sentences(n=64, seed=0):
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, ROWS + 1) ** 1.2
    ids = rng.choice(ROWS, (n, 7), p=p / p.sum())
    return {"ids": ids, "attention_mask": (np.arange(7) < rng.integers(3, 8, (n, 1))).astype(np.int64)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    net = mlp()
    with torch.no_grad():
        net[2].weight[3, 1] = value
    torch.save(net.state_dict(), tmp_path / "m.pt")
    for source in (net, tmp_path / "m.pt"):
        with pytest.raises(ModelError, match=r"2\.weight.*finite.*1 (NaN|infinite)|2\.weight.*NaN and 1 infinite"):
            lrcompress.factorize(source, rank=3, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_weights_without_elements(tmp_path):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.nothing, self.none = nn.Linear(12, 20), nn.Linear(12, 0), nn.Embedding(0, 4)

        def forward(self, x):
            return torch.cat([self.fc(x), self.nothing(x)], 1)

    found = reasons(Empty().eval(), calib=Data.of_arrays({"x": np.ones((4, 12), np.float32)}))
    assert found["fc"] is None and found["nothing"] == found["none"] == "its weight has no elements"
    torch.save({"a.weight": torch.zeros(0, 5), "b.weight": torch.randn(20, 12)}, tmp_path / "m.pt")
    assert reasons(tmp_path / "m.pt") == {"a": "its weight has no elements", "b": None}


def test_integer_and_complex_weights(tmp_path):
    torch.save({"q.weight": torch.ones(20, 12, dtype=torch.int8), "b.weight": torch.randn(20, 12)}, tmp_path / "m.pt")
    assert reasons(tmp_path / "m.pt")["q"] == "its weight is int8"
    torch.save({"q.weight": torch.ones(20, 12, dtype=torch.int8)}, tmp_path / "all.pt")
    with pytest.raises(ModelError, match=r"floating-point.*before its quantization"):
        lrcompress.factorize(tmp_path / "all.pt", rank=3)
    net = mlp()
    net[2].weight = nn.Parameter(torch.ones(16, 20, dtype=torch.int32), requires_grad=False)
    assert "int32" in reasons(net)["2"]
    net[2].weight = nn.Parameter(torch.randn(16, 20, dtype=torch.complex64))
    assert "complex64" in reasons(net)["2"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_tied_pair_is_factorized_once_and_stays_tied(tmp_path, bias, calibrated):
    calib = Data.of_arrays(sentences()) if calibrated else None
    found = lrcompress.factorize(tied(bias), rank=4, inputs=IDS, calib=calib, arch="tests.contracts.test_degenerate_sources:tied",
                                 arch_args={"bias": bias}, output=tmp_path / "c")  # fmt: skip
    net = found.model
    assert net.embed.U is net.head.U and net.embed.V is net.head.V
    rows = {n["name"]: n for n in found.data["layers"]}
    assert rows["embed"]["reason"] is None and rows["head"]["reason"] == "shares the factors of embed"
    assert rows["head"]["form"] == "svd" and rows["head"]["params_after"] == rows["head"]["params_before"] == 0
    mid = rows["mid"]["params_after"] + WIDTH
    assert found.data["params_before"] == ROWS * WIDTH + WIDTH * WIDTH + WIDTH + ROWS * bias
    assert found.data["params_after"] == count_parameters(net) == 4 * (ROWS + WIDTH) + mid + ROWS * bias
    back = load_compressed(tmp_path / "c")
    assert back.module.embed.U is back.module.head.U and back.spec["layers"]["head"]["tied"] == "embed"
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert "embed.U" in stored and "head.U" not in stored
    inputs = {k: torch.as_tensor(v) for k, v in sentences(9, 1).items()}
    assert torch.equal(back.module(**inputs), net(**inputs))
    torch.testing.assert_close(net.head.weight, net.embed.weight)


def test_both_ends_of_a_tie_count(tmp_path):
    """On new sentences the shared factors beat those that know nothing of the data."""
    calib, new = Data.of_arrays(sentences(256)), {k: torch.as_tensor(v) for k, v in sentences(200, 5).items()}
    exact = tied()(**new)
    error = lambda m: float((m(**new) - exact).detach()[new["attention_mask"].bool()].norm())  # noqa: E731
    only = {"include": ["embed", "head"], "inputs": IDS, "rank": 4}
    aware, plain = lrcompress.factorize(tied(), calib=calib, **only).model, lrcompress.factorize(tied(), **only).model
    assert error(aware) < error(plain)


def test_a_budget_pays_for_a_tie_once():
    for ratio in (0.5, 0.7, 0.9):
        found = lrcompress.factorize(tied(), ratio=ratio, inputs=IDS, calib=Data.of_arrays(sentences()))
        assert count_parameters(found.model) <= ratio * count_parameters(tied())


def test_a_tied_pair_of_a_program_and_of_a_graph(tmp_path):
    args = tuple(torch.as_tensor(v) for v in sentences(3).values())
    program = torch.export.export(tied(), args, dynamic_shapes=({0: torch.export.Dim("n")},) * 2)
    torch.export.save(program, tmp_path / "m.pt2")
    lrcompress.factorize(tmp_path / "m.pt2", rank=4, output=tmp_path / "c")
    back = load_compressed(tmp_path / "c").module
    assert back.embed.U is back.head.U
    for slots in (("none",), ("lora",)):
        lrcompress.export(tmp_path / "c", output=tmp_path / "e", slots=slots)
        graph = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False).graph
        names = [t.name for t in graph.initializer]
        assert names.count("embed.U") == names.count("embed.V") == 1 and "head.U" not in names


def test_a_tied_pair_of_a_bare_state_dict(tmp_path):
    torch.save(tied().state_dict(), tmp_path / "m.pt")
    found = lrcompress.factorize(tmp_path / "m.pt", rank=4, output=tmp_path / "c", exclude=["mid"])
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert set(stored) == {"embed.U", "embed.V", "head.bias", "mid.weight", "mid.bias"}
    assert found.data["params_after"] == sum(t.numel() for t in stored.values()) < found.data["params_before"]
    assert load_compressed(tmp_path / "c").spec["layers"]["head"]["tied"] == "embed"
    kept = lrcompress.factorize(tmp_path / "m.pt", rank=400, output=tmp_path / "d").data
    assert all(n["reason"] for n in kept["layers"])


@pytest.mark.parametrize("options", [{"exclude": ["head"]}, {"include": ["embed", "mid"]}])
def test_half_a_tie_stays_dense(options):
    found = lrcompress.factorize(tied(), rank=4, inputs=IDS, **options)
    rows = {n["name"]: n for n in found.data["layers"]}
    assert rows["embed"]["form"] == "dense" and "tied: one tensor serves" in rows["embed"]["reason"]
    assert found.model.embed.weight is found.model.head.weight


def test_a_tie_that_no_factors_can_serve(tmp_path):
    class Read(nn.Module):
        """The table is also summed as it is: factors could not stand in."""

        def __init__(self):
            super().__init__()
            self.embed, self.other = nn.Embedding(ROWS, WIDTH), nn.Module()
            self.other.table = self.embed.weight

        def forward(self, ids):
            return self.embed(ids) + self.other.table.sum()

    net = Read().eval()
    spec = (InputSpec("ids", "int64", ("n", 7)),)
    with pytest.warns(LrcompressWarning, match="no layer"):
        (row,) = lrcompress.factorize(net, rank=4, inputs=spec).data["layers"]
    assert row["reason"] == "tied: one tensor serves embed.weight, other.table"
    torch.export.save(torch.export.export(net, (torch.ones(2, 7, dtype=torch.long),)), tmp_path / "m.pt2")
    with pytest.warns(LrcompressWarning, match="no layer"):
        (row,) = lrcompress.factorize(tmp_path / "m.pt2", rank=4).data["layers"]
    assert row["form"] == "dense" and ("read directly, by" in row["reason"] or "tied" in row["reason"])


def test_a_plan_names_a_tied_weight_by_either_layer_but_not_by_both_differently(tmp_path):
    entry = lambda name, rank: {"name": name, "form": "svd", "rank": rank}  # noqa: E731
    write_json(tmp_path / "p.json", {"schema": 1, "layers": [entry("head", 3)]})
    model = lrcompress.factorize(tied(), plan=tmp_path / "p.json", inputs=IDS).model
    assert model.embed.U is model.head.U and model.embed.rank == 3
    write_json(tmp_path / "q.json", {"schema": 1, "layers": [entry("head", 3), entry("embed", 4)]})
    with pytest.raises(PlanError, match="tied layers"):
        lrcompress.factorize(tied(), plan=tmp_path / "q.json", inputs=IDS)


def test_a_shared_module_is_factorized_once_from_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(12, 12)

        def forward(self, x):
            return self.b(3 + self.a(x))

    torch.manual_seed(0)
    net, x = Twice().eval(), np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    found = lrcompress.factorize(net, rank=3, inputs=X, calib=Data.of_arrays({"x": x}))
    assert found.model.a is found.model.b and found.model.a.form == "svd"
    assert [n["name"] for n in found.data["layers"]] == ["a"] and count_parameters(found.model) == 3 * 24 + 12


def test_a_weight_that_is_a_view(tmp_path):
    """Of a tensor nobody holds: factorized. Of another parameter: it cannot leave that memory, and stays."""
    big = torch.randn(40, 12)
    net = mlp()
    net[0].weight = nn.Parameter(big[5:25])
    assert reasons(net)["0"] is None
    net.register_parameter("flat", nn.Parameter(big))
    assert reasons(net)["0"] == "its weight lies in the memory of flat"
    net = mlp()
    net[0].weight = nn.Parameter(torch.randn(1, 12).expand(20, 12))
    found = lrcompress.factorize(net, rank=1, inputs=X).model
    torch.testing.assert_close(found(torch.ones(2, 12)), net(torch.ones(2, 12)), rtol=0.5, atol=5)
    torch.save({"a.weight": big[:20], "b.weight": big[10:], "c.weight": big.T}, tmp_path / "m.pt")
    found = lrcompress.factorize(tmp_path / "m.pt", rank=2, exclude=["c"], output=tmp_path / "c").data
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert torch.equal(stored["c.weight"], big.T) and found["params_after"] == sum(t.numel() for t in stored.values())


def test_parametrized_weights_say_how_to_make_them_plain():
    new, old, pruned = mlp(), mlp(), mlp()
    parametrizations.weight_norm(new[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(old[0])
    prune.l1_unstructured(pruned[0], "weight", 0.2)
    found = reasons(new, calib=Data.of_arrays({"x": np.ones((4, 12), np.float32)}))
    assert "torch.nn.utils.parametrize.remove_parametrizations" in found["0"] and found["2"] is None
    assert "torch.nn.utils.remove_weight_norm" in reasons(old)["0"]
    assert "torch.nn.utils.prune.remove" in reasons(pruned)["0"]
    nn.utils.parametrize.remove_parametrizations(new[0], "weight")
    assert reasons(new)["0"] is None
    table = nn.Embedding(20, 12, max_norm=1.0)
    assert "max_norm" in find_layers(nn.Sequential(table))[0].reason


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        empty = mlp()
    with pytest.raises(ModelError, match=r"0\.weight: expected weights with numbers.*load the weights"):
        lrcompress.factorize(empty, rank=3)
    assert "meta" in find_layers(empty)[0].reason


def test_statistics_of_another_shape_or_model():
    stats = Statistics(gram=torch.eye(9, dtype=torch.float64), mean=torch.zeros(9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gram: expected shape \(12, 12\) for a weight \(20, 12\), got \(9, 9\)"):
        form("svd").decompose(mlp()[0].weight, 3, stats)
    broken = Statistics(gram=torch.full((12, 12), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="not finite"):
        form("svd").decompose(mlp()[0].weight, 3, broken)


def test_a_layer_that_calibration_never_reaches_is_treated_plainly():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(12, 20), nn.Linear(12, 20)

        def forward(self, x):
            return F.relu(self.used(x))

    data = Data.of_arrays({"x": np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)})
    rows = lrcompress.factorize(Idle().eval(), rank=3, inputs=X, calib=data).data["layers"]
    assert {n["name"]: n["norm"] for n in rows} == {"used": "two_sided", "idle": "frobenius"}


class Same(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 4 * super().forward(ids)


class Named(nn.Linear):
    """Computes what a linear layer does."""


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Same(3, 8, 3, 2), torch.randn(2, 3, 8, 8)), (Standardized(3, 8, 3), torch.randn(2, 3, 8, 8)),
        (Scaled(20, 12), torch.arange(20)), (Named(12, 9), torch.randn(4, 12)),
    ],
)  # fmt: skip
def test_what_computes_more_than_its_layer_stays_dense(layer: nn.Module, x: torch.Tensor) -> None:
    """A factor cannot pad, scale or standardize: such a layer is left as it is, whatever rank is asked for."""
    net = nn.Sequential(layer)
    reason = find_layers(net)[0].reason
    assert (reason is None) == isinstance(layer, Named)
    assert reason is None or (type(layer).__name__ in reason and "computes more" in reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrcompressWarning)
        small = lrcompress.factorize(net, rank=1, method="svd").model
    assert torch.equal(small(x), net(x)) == (reason is not None)
