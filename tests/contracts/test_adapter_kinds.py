"""Every adapter kind on every layer type: what is added is what is merged, and the base is never touched."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lrcompress.adapt import Target, adapter, adapter_class, kinds, lokh, lokr
from lrcompress.model.adapting import (
    by_pattern,
    every_target,
    fresh,
    merge,
    plain_target,
    unmerge,
)
from lrcompress.model.surgery import attach, detach, factorized_layers, to_dense, wrap_dense
from tests.support.adapter_cases import CASES, KIND_OF, LAYERS, WITHOUT_CORE, case, generator, random_values


@pytest.mark.parametrize(("kind", "layer", "form_name", "options"), CASES)
def test_what_is_added_is_what_is_merged(kind, layer, form_name, options):
    model, x = case(layer, form_name)
    wrap_dense(model, "0")
    before, state = model(x).detach(), {k: (id(p), p.detach().clone()) for k, p in model[0].named_parameters()}
    target = model[0].target
    made = fresh(kind, target, 2, 3.0, generator=generator(), **options).double()
    attach(model, "a", lambda *_: made, ["0"])
    # Zero at init, to the bit, and one factor alone is zero.
    assert torch.equal(model(x), before)
    assert not made.delta_weight(model[0]).any()
    assert sum(not p.any() for p in made.parameters()) == 1
    # Trains from the first step; after it no factor is dead.
    for _ in range(2):
        made.zero_grad()
        (model(x) - before - 1).square().sum().backward()
        grads = [float(p.grad.abs().max()) if p.grad is not None else 0.0 for p in made.parameters()]
        assert any(grads)
        with torch.no_grad():
            for p in made.parameters():
                p -= 1e-3 * p.grad
    assert all(grads), dict(zip(made.tensors(), grads, strict=True))
    random_values(made)
    corrected = model(x)
    assert float((corrected - before).abs().max().detach()) > 1e-3
    plain = to_dense(model)
    assert not list(factorized_layers(plain))
    torch.testing.assert_close(plain(x), corrected, rtol=1e-9, atol=1e-10)
    # Merging and taking back, as often as one likes, leaves the same parameters with the same bits.
    for _ in range(3):
        assert merge(model) == ["0"] and merge(model) == []
        torch.testing.assert_close(model(x), corrected, rtol=1e-9, atol=1e-10)
        assert unmerge(model) == ["0"] and unmerge(model) == []
    assert torch.equal(model(x), corrected)
    detach(model, "a")
    assert list(dict(model[0].named_parameters())) == list(state)
    for name, p in model[0].named_parameters():
        assert id(p) == state[name][0] and torch.equal(p, state[name][1])
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("kind", "layer", "form_name", "options"), CASES)
def test_the_expansion_is_exact(kind, layer, form_name, options):
    model, _ = case(layer, form_name)
    base = wrap_dense(model, "0")
    made = fresh(kind, base.target, 2, 3.0, generator=generator(), **options).double()
    random_values(made)
    a, b = made.expand(base)
    assert a.shape[0] == b.shape[1] and a.shape[1:] == base.shape[1:] and b.shape[0] == base.shape[0]
    delta = made.delta_weight(base)
    assert float(((b @ a.flatten(1)).reshape(delta.shape) - delta).detach().norm() / delta.detach().norm()) < 1e-12


@pytest.mark.parametrize(("kind", "layer", "form_name", "options"), CASES)
def test_tensors_come_back_bit_for_bit_and_wrong_ones_are_refused(kind, layer, form_name, options):
    model, _ = case(layer, form_name)
    base = wrap_dense(model, "0")
    made = fresh(kind, base.target, 2, 3.0, generator=generator(), **options).double()
    random_values(made)
    again = fresh(kind, base.target, 2, 3.0, rslora=made.rslora).double()
    again.load(made.tensors())
    assert torch.equal(again.delta_weight(base), made.delta_weight(base))
    kept = {n: t.clone() for n, t in again.tensors().items()}
    for name, value in made.tensors().items():
        fewer = {n: t for n, t in made.tensors().items() if n != name}
        for wrong in (fewer, {**fewer, name: value.new_zeros(value.shape[0] + 1, *value.shape[1:])}):
            with pytest.raises(ValueError, match=r"lo|hada|core|missing|expected"):
                again.load(wrong)
    with pytest.raises(ValueError, match=r"unexpected tensor strange|three axes|product"):
        again.load({**made.tensors(), "strange": torch.zeros(2)})
    assert all(torch.equal(t, kept[n]) for n, t in again.tensors().items()), "a refused load changed the adapter"


def _forms_of(kind: str, layer: str) -> list[str]:
    """Return the forms to try: all that have a core for what lives in it, else one."""
    forms = [f for f in LAYERS[layer][2] if (f, KIND_OF[layer]) not in WITHOUT_CORE]
    return forms if adapter_class(kind).in_core else (forms or ["dense"])[:1]


@pytest.mark.parametrize(
    ("kind", "layer", "form_name"), [(k, n, f) for k in kinds() for n in LAYERS for f in _forms_of(k, n)]
)
def test_several_at_once_are_weighted_and_switched(kind, layer, form_name):
    model, x = case(layer, form_name)
    base = wrap_dense(model, "0")
    before, weight = model(x).detach(), base.weight.detach().clone()
    deltas = {}
    for i, name in enumerate(("a", "b", "c")):
        made = fresh(kind, base.target, 1 + i, 2.0, generator=generator(i)).double()
        random_values(made, 0.2 + 0.1 * i)
        base.add_adapter(name, made)
        deltas[name] = made.delta_weight(base).detach()
    for active in ({"a": 0.5, "b": -2.0, "c": 3.0}, {"b": 1.0}, {"c": -0.25, "a": 1.0}, {}, {"a": 0.0}):
        base.active = dict(active)
        expected = weight + sum((w * deltas[n] for n, w in active.items()), torch.zeros_like(weight))
        torch.testing.assert_close(base.merged_weight(), expected)
        torch.testing.assert_close(model(x), to_dense(model)(x), rtol=1e-9, atol=1e-9)
        assert active or torch.equal(model(x), before)


@pytest.mark.parametrize("kind", [k for k in kinds() if not adapter_class(k).in_core])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "reflect", "embedding", "depthwise", "conv1d"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weight_decomposition_keeps_norms_and_moves_directions(kind, layer, axis):
    model, x = case(layer, "dense")
    base = wrap_dense(model, "0")
    before = model(x)
    made = fresh(kind, base.target, 2, generator=generator()).double()
    made.decompose(base.weight, axis)
    attach(model, "a", lambda *_: made, ["0"])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        for i, p in enumerate(p for n, p in made.named_parameters() if n != "magnitude"):
            p.copy_(torch.randn(p.shape, generator=generator(i + 1), dtype=torch.float64) * 0.3)
    merged, dims = base.merged_weight(), [i for i in range(base.weight.dim()) if i != axis]
    torch.testing.assert_close(
        torch.linalg.vector_norm(merged, dim=dims), torch.linalg.vector_norm(base.weight, dim=dims)
    )
    assert not torch.allclose(merged, base.weight)
    torch.testing.assert_close(to_dense(model)(x), model(x), rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        made.magnitude *= 2
    torch.testing.assert_close(base.merged_weight(), 2 * merged)
    model(x).square().sum().backward()
    assert made.magnitude.grad is not None and bool(made.magnitude.grad.any())
    again = fresh(kind, base.target, 2).double()
    again.load(made.tensors())
    assert torch.equal(again.delta_weight(base), made.delta_weight(base))
    with pytest.raises(ValueError, match="depends on the weight"):
        made.delta_weight()


def test_a_magnitude_of_another_shape_is_refused():
    made = adapter("lora", weight_shape=(6, 4), rank=2)
    for wrong in ((6,), (6, 4), (5, 1), (1, 6)):
        with pytest.raises(ValueError, match="magnitude"):
            made.load({**made.tensors(), "magnitude": torch.ones(wrong)})


def test_lora_on_groups_has_filters_of_its_own_or_shares_them():
    own = adapter("lora", weight_shape=(12, 2, 3, 3), rank=8, groups=4, generator=generator()).double()
    shared = adapter("lora", weight_shape=(12, 2, 3, 3), rank=3, groups=4, generator=generator()).double()
    assert tuple(own.lora_B.shape) == (12, 2, 1, 1) and tuple(shared.lora_B.shape) == (12, 3, 1, 1)
    random_values(own)
    random_values(shared)
    for g in range(4):
        rows = slice(3 * g, 3 * g + 3)
        block = own.lora_B[rows].flatten(1) @ own.lora_A[2 * g : 2 * g + 2].flatten(1)
        torch.testing.assert_close(own.plain_delta()[rows].flatten(1), block)
        block = shared.lora_B[rows].flatten(1) @ shared.lora_A.flatten(1)
        torch.testing.assert_close(shared.plain_delta()[rows].flatten(1), block)


def test_lokr_is_the_kronecker_product_and_has_the_promised_rank():
    made = adapter("lokr", weight_shape=(24, 30), rank=2, alpha=3.0, generator=generator()).double()
    random_values(made)
    whole = torch.kron(made.first.contiguous(), (made.lokr_w2_a @ made.lokr_w2_b).contiguous())
    torch.testing.assert_close(made.delta_weight(), 1.5 * whole)
    (m1, n1), (a, b) = made.first.shape, made.expand()
    assert a.shape[0] == b.shape[1] == min(m1, n1) * 2 == torch.linalg.matrix_rank(whole)
    tall = adapter("lokr", weight_shape=(64, 6), rank=1, generator=generator()).double()
    assert tuple(tall.first.shape) == (8, 2) and tall.expand()[0].shape[0] == 2
    both = adapter("lokr", weight_shape=(144, 144), rank=2, decompose_both=True, generator=generator()).double()
    random_values(both)
    assert both.expand()[0].shape[0] == 4 == torch.linalg.matrix_rank(both.delta_weight())


def test_a_middle_tensor_of_lokr_lies_between_its_outputs_and_its_inputs():
    made = adapter("lokr", weight_shape=(24, 30, 3, 2), rank=2, alpha=3.0, generator=generator(), tucker=True).double()
    random_values(made)
    second = torch.einsum("ijkl,im,jn->mnkl", made.lokr_t2, made.lokr_w2_a, made.lokr_w2_b)
    for k, j in itertools.product(range(3), range(2)):
        whole = torch.kron(made.first.contiguous(), second[:, :, k, j].contiguous())
        torch.testing.assert_close(made.delta_weight()[:, :, k, j], 1.5 * whole)


@pytest.mark.parametrize(("dimension", "factor", "expected"), [
    (127, -1, (1, 127)), (128, -1, (8, 16)), (360, -1, (18, 20)), (128, 4, (4, 32)), (128, 32, (4, 32)), (250, 4, (2, 125)), (1, -1, (1, 1)),
])  # fmt: skip
def test_factorizations(dimension, factor, expected):
    assert lokr.factorization(dimension, factor) == expected


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 30, 64, 97, 768, 3072, 4095])
def test_chains_multiply_up_to_the_rows(rows):
    sizes = lokh.chain(rows)
    assert torch.tensor(sizes).prod() == rows and list(sizes) == sorted(sizes) and len(sizes) <= lokh.MAX_FACTORS
    assert len(sizes) <= 2 or sizes[0] >= 4


def test_lokh_is_columnwise_kronecker_and_generically_of_full_rank():
    made = adapter("lokh", weight_shape=(24, 9), rank=2, factors=(2, 3, 4), generator=generator()).double()
    random_values(made, 1.0)
    expected = torch.zeros(24, 9, dtype=torch.float64)
    for k, j in itertools.product(range(2), range(9)):
        a, b, c = (f[k, :, j].contiguous() for f in made.factors)
        expected[:, j] += torch.kron(torch.kron(a, b), c)
    torch.testing.assert_close(made.delta_weight(), expected)
    one = adapter("lokh", weight_shape=(24, 24), rank=1, generator=generator()).double()
    random_values(one, 1.0)
    assert torch.linalg.matrix_rank(one.delta_weight()) == 24
    assert sum(p.numel() for p in one.parameters()) == 24 * sum(lokh.chain(24))


def test_every_layer_of_a_network_is_found_and_none_is_wrapped():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight
            self.table, self.depthwise = nn.Embedding(7, 4), nn.Conv2d(6, 6, 3, groups=6)
            self.up, self.norm = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)

    model = Odd()
    classes = [type(m) for m in model.modules()]
    found = every_target(model)
    assert list(found) == ["table", "depthwise", "up"] and [type(m) for m in model.modules()] == classes
    assert (found["up"].kind, found["up"].groups, found["up"].shape) == ("conv_transpose", 2, (4, 3, 2, 2))
    assert found["depthwise"] == plain_target(model.depthwise) and found["depthwise"].groups == 6
    for target in found.values():
        back = Target.from_dict(target.as_dict())
        assert (back.shape, back.kind, back.groups, back.core) == (
            target.shape,
            target.kind,
            target.groups,
            target.core,
        )


def test_a_merge_that_is_not_finite_changes_nothing():
    model, _ = case("linear", "svd")
    made = fresh("lora", model[0].target, 2, generator=generator()).double()
    with torch.no_grad():
        made.lora_B[0, 0] = torch.inf
    attach(model, "a", lambda *_: made, ["0"])
    with pytest.raises(ValueError, match="finite"):
        merge(model)
    assert model[0].form == "svd" and model[0].active == {"a": 1.0}


def test_ranks_and_alphas_by_pattern_and_the_scaling_survives_a_cut():
    patterns = {"encoder.*.query": 4, "encoder.*": 2}
    assert [by_pattern(n, patterns, 8) for n in ("encoder.0.query", "encoder.0.key", "head")] == [4, 2, 8]
    for rslora in (False, True):
        cut = fresh("lora", Target((3, 50)), 12, 24.0, rslora=rslora)
        assert cut.rank == 3 and cut.scaling == pytest.approx(24 / (12**0.5 if rslora else 12))
