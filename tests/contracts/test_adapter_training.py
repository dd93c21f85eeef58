"""However a step is computed, factor by factor or with one summed weight, it is the same step, and nothing is spoilt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrcompress.adapt import Target, adapter_class, kinds
from lrcompress.adapt._adding import added
from lrcompress.adapt.core import metric_of
from lrcompress.adapt.lokr import Adapter as LoKr
from lrcompress.factorize import form
from lrcompress.model.adapting import fresh
from lrcompress.model.surgery import replace_layer, wrap_dense

PLAIN = [k for k in kinds() if not adapter_class(k).in_core]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "no_bias": (lambda: nn.Linear(12, 8, bias=False), (7, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 6, 5)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), (2, 6, 3, 3)),
}
OPTIONS = {"lora": [{}, {"tucker": True}], "loha": [{}, {"tucker": True}], "lokr": [{}, {"tucker": True, "factor": 2}]}
CASES = [(k, n, o) for k in PLAIN for n in LAYERS for o in OPTIONS.get(k, [{}])]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(kind: str, layer: str, rank: int = 2, **options):
    torch.manual_seed(1)
    make, shape = LAYERS[layer]
    holder = nn.ModuleDict({"layer": make().double().requires_grad_(False)})
    base = wrap_dense(holder, "layer")
    made = fresh(kind, base.target, rank, 3.0, generator=torch.Generator().manual_seed(0), **options).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(randn(*p.shape, seed=i + 1) * 0.4)
    base.add_adapter("a", made, 0.75)
    return base, made, randn(*shape)


def step(base: nn.Module, made: nn.Module, x: torch.Tensor):
    """Return the output and all gradients, the input's too."""
    x = x.clone().requires_grad_()
    y = base(x)
    tensors = [x, *made.parameters()]
    return y.detach(), torch.autograd.grad(y, tensors, randn(*y.shape, seed=9))


@pytest.mark.parametrize(("kind", "layer", "options"), CASES)
def test_one_product_and_several_are_the_same_step(kind, layer, options, monkeypatch):
    base, made, x = adapted(kind, layer, **options)
    weight = base.weight.clone()
    found = []
    for whole in (True, False):
        monkeypatch.setattr(made, "is_whole", lambda *_, whole=whole: whole)
        found.append(step(base, made, x))
        assert torch.equal(base.weight, weight)
    # What autograd makes of the definition: the plain layer with W + share·ΔW.
    x_plain = x.clone().requires_grad_()
    padded = x_plain if getattr(base, "_pad", None) is None else nn.functional.pad(x_plain, base._pad, mode="reflect")
    y = base.target.apply(padded, base.weight + 0.75 * made.plain_delta(), bias=base.bias)
    expected = torch.autograd.grad(y, [x_plain, *made.parameters()], randn(*y.shape, seed=9))
    for output, gradients in found:
        torch.testing.assert_close(output, y.detach(), rtol=1e-10, atol=1e-11)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "layer", "options"), [c for c in CASES if c[1] not in ("no_bias", "reflect")])
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_are_those_of_finite_differences(kind, layer, options, whole, monkeypatch):
    base, made, x = adapted(kind, layer, **options)
    monkeypatch.setattr(made, "is_whole", lambda *_: whole)
    names = [n for n, p in made.named_parameters() if p.requires_grad]
    values = [made.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def run(x, *tensors):
        return torch.func.functional_call(
            base, {f"adapters.a.{n}": t for n, t in zip(names, tensors, strict=True)}, (x,)
        )

    inputs = (x.requires_grad_(), *values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_adding_a_product_overwrites_only_what_it_was_given(channels_first, view):
    y, h = (randn(2, 6, 5), randn(2, 3, 5)) if channels_first else (randn(2, 5, 6), randn(2, 5, 3))
    b, given = randn(6, 3, seed=3), y.clone()
    product = torch.einsum("mr,nrp->nmp" if channels_first else "mr,npr->npm", b, h)
    kept = h.clone(), b.clone()
    got = added(y[:] if view else y, h, b, -0.5, channels_first=channels_first)
    torch.testing.assert_close(got, given - 0.5 * product)
    assert torch.equal(h, kept[0]) and torch.equal(b, kept[1])
    # A view belongs to someone else.
    assert torch.equal(y, given) if view else got.data_ptr() == y.data_ptr()
    half = given.bfloat16()
    mixed = added(half, h.float(), b.float(), 1.0, channels_first=channels_first)
    assert mixed.dtype == torch.float32 and torch.equal(half, given.bfloat16())


def test_a_layer_never_writes_over_its_input_or_over_a_result_it_gave_before():
    for layer in LAYERS:
        for kind in PLAIN:
            base, _, x = adapted(kind, layer)
            given, first = x.clone(), base(x)
            kept = first.detach().clone()
            second = base(x + 1)
            assert torch.equal(x, given) and torch.equal(first, kept) and not torch.equal(first, second)
            with torch.no_grad():
                assert torch.equal(base(x), kept), "with and without a graph the bits are the same"


@pytest.mark.parametrize("kind", PLAIN)
def test_a_base_that_trains_gets_its_gradient_too(kind, monkeypatch):
    base, made, x = adapted(kind, "linear")
    base.requires_grad_(True)
    found = []
    for whole in (True, False):
        monkeypatch.setattr(made, "is_whole", lambda *_, whole=whole: whole)
        base.zero_grad()
        base(x).square().sum().backward()
        found.append((base._parameters["weight"].grad.clone(), base.bias.grad.clone()))
    for one, two in zip(*found, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", PLAIN)
def test_other_precisions_and_autocast_still_run(kind):
    for layer in ("linear", "conv"):
        base, made, x = adapted(kind, layer)
        base.float(), made.float()
        x, exact = x.float(), base(x.float()).detach()
        with torch.autocast("cpu", torch.bfloat16):
            y = base(x)
        y.float().square().sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in made.parameters())
        torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.15 * float(exact.abs().max()))


def test_what_is_whole_follows_from_the_multiply_adds():
    linear = Target((1536, 384))
    loha = {r: fresh("loha", linear, r) for r in (2, 8, 16, 32)}
    assert [a.is_whole(linear, 512) for a in loha.values()] == [False, False, True, True]
    # Building ΔW costs the same for one position as for many.
    assert not loha[16].is_whole(linear, 1)
    assert loha[8].n_macs(linear) == 64 * (1536 + 384)
    lora = fresh("lora", linear, 8)
    assert lora.n_macs(linear) == 8 * (1536 + 384) and not lora.is_whole(linear, 10**6)
    square = Target((64, 64))
    assert fresh("lora", square, 32).is_whole(square, 512)
    table = Target((1000, 16), "embedding")
    assert not any(fresh(k, table, 4).is_whole(table, 512) for k in PLAIN)
    decomposed = fresh("loha", linear, 16)
    decomposed.decompose(torch.ones(1536, 384))
    assert not decomposed.is_whole(linear, 512)
    assert isinstance(lokr := fresh("lokr", linear, 8), LoKr) and not lokr.is_whole(linear, 512)


@pytest.mark.parametrize("rank", [3, 99])
@pytest.mark.parametrize(
    "name",
    [
        "svd",
        "pivoted",
        "als",
        "tucker",
        "spatial_svd",
        "pivoted_spatial",
        "pivoted_tucker",
        "grouped_svd",
        "cp",
        "kronecker",
    ],
)
def test_a_core_is_trained_in_units_of_the_output_and_is_the_same_core(name, rank):
    generator = torch.Generator().manual_seed(0)
    shape = (12, 10) if name in ("svd", "pivoted") else (12, 10, 3, 3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    groups = 2 if name == "grouped_svd" else 1
    layer = nn.Linear(10, 12).double() if len(shape) == 2 else nn.Conv2d(10 * groups, 12, 3, groups=groups).double()
    net = nn.ModuleDict({"a": layer})
    with torch.no_grad():
        layer.weight.copy_(weight)
    apart = weight if groups == 1 else weight.reshape(groups, -1, *shape[1:])
    found = replace_layer(net, "a", form(name).decompose(apart, (5, 6) if "tucker" in name else 5))
    adapter = fresh("core", found.target, rank, generator=generator).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    before = adapter.delta_weight(found).detach()
    left, right = metric_of(found)
    adapter.enter(left, right)
    torch.testing.assert_close(adapter.delta_weight(found).detach(), before, rtol=1e-8, atol=1e-10)
    if rank == 99:  # whole: the size of the change is that of what is trained
        size = float(found.weight.detach().norm()) / (groups * found.target.core) ** 0.5
        torch.testing.assert_close(before.norm(), size * adapter.core_R.detach().norm(), rtol=1e-6, atol=0)
    adapter.leave()
    assert adapter.metric is None
    torch.testing.assert_close(adapter.delta_weight(found).detach(), before, rtol=1e-8, atol=1e-10)
