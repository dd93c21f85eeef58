"""Cores: where each form has one, what it merges into, and what it may be combined with."""

from __future__ import annotations

import pytest
import torch

from lrcompress.adapt import Target, adapter
from lrcompress.adapt.core import POSITIONS, why_none
from lrcompress.factorize import form, forms
from lrcompress.model.adapting import (
    fresh,
    merge_core,
    takes,
)
from lrcompress.model.surgery import attach, detach, wrap_dense
from tests.support.adapter_cases import KIND_OF, LAYERS, WITHOUT_CORE, case, generator, random_values


def test_every_form_says_where_its_core_is_or_why_it_has_none():
    served = {"linear": {"linear"}, "conv": {"conv"}, "grouped": {"conv"}, "embedding": {"embedding"}}
    told = {("dense", k): why_none("dense", k) for k in KIND_OF.values()}
    told |= {(n, k): why_none(n, k) for n in forms() for s in form(n).LAYERS for k in served[s]}
    assert {place for place, why in told.items() if why} == set(WITHOUT_CORE)
    assert all(words in told[place] for place, words in WITHOUT_CORE.items())
    assert set(POSITIONS) | {n for n, _ in WITHOUT_CORE} == {*forms(), "dense"}


@pytest.mark.parametrize(("layer", "form_name"), [
    ("linear", "hadamard"), ("conv2d", "khatri_rao"), ("linear", "khatri_rao"), ("conv2d", "hadamard"), ("embedding", "hadamard"), ("embedding", "kronecker"), ("embedding", "tensor_train"),
    *((layer, "dense") for layer in LAYERS),
])  # fmt: skip
def test_where_there_is_no_core_it_is_refused_by_name(layer, form_name):
    model, x = case(layer, form_name)
    base = wrap_dense(model, "0")
    before = model(x)
    assert base.target.core == 0 and not takes("core", base.target)
    with pytest.raises(ValueError, match="expected a layer whose factors have a core"):
        fresh("core", base.target, 2)
    made = adapter("core", weight_shape=base.shape, rank=1, groups=base.target.groups, core=2)
    with pytest.raises(ValueError, match=f"none \\({form_name}: .*{WITHOUT_CORE[form_name, KIND_OF[layer]]}"):
        base.add_adapter("a", made)
    assert torch.equal(model(x), before) and not base.adapters


@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding", "conv3d", "reflect", "conv1d", "grouped"])
@pytest.mark.parametrize("rank", [1, 2, 99])
def test_a_core_merges_into_the_factors_with_no_number_more(layer, rank):
    for form_name in [f for f in LAYERS[layer][2] if (f, KIND_OF[layer]) not in WITHOUT_CORE]:
        model, x = case(layer, form_name)
        base = model[0]
        made = fresh("core", base.target, rank, generator=generator()).double()
        assert ("core_R" in made.tensors()) == (rank >= base.target.core)
        random_values(made)
        attach(model, "a", lambda *_, made=made: made, ["0"])
        corrected, numbers = model(x), sum(f.numel() for f in base.factors.values())
        weight = base.merged_weight()
        detach(model, "a")
        merge_core(base, made)
        torch.testing.assert_close(model(x), corrected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(base.weight, weight)
        assert sum(f.numel() for f in base.factors.values()) == numbers


def test_the_best_core_for_a_wanted_change_takes_what_the_factors_span():
    model, _ = case("linear", "svd")
    base = model[0]
    u, v = base.factors["U"].detach(), base.factors["V"].detach()
    wanted = torch.randn(10, 14, generator=generator(), dtype=torch.float64)
    made = fresh("core", base.target, 99).double()
    with torch.no_grad():
        made.core_R.copy_(torch.linalg.pinv(u) @ wanted @ torch.linalg.pinv(v))
    inside = u @ torch.linalg.pinv(u) @ wanted @ torch.linalg.pinv(v) @ v
    torch.testing.assert_close(made.delta_weight(base).detach(), inside)


@pytest.mark.parametrize("rank", [1, 99])
def test_a_grouped_convolution_has_a_core_per_group(rank):
    model, x = case("grouped", "grouped_svd")
    base = model[0]
    assert (base.target.core, base.target.groups) == (3, 4) and takes("core", base.target)
    made = fresh("core", base.target, rank, generator=generator()).double()
    assert {n: tuple(t.shape) for n, t in made.tensors().items()} == (
        {"core_R": (4, 3, 3)} if rank == 99 else {"core_P": (4, 3, 1), "core_Q": (4, 1, 3)}
    )
    random_values(made)
    u, v, r = base.factors["U"], base.factors["V"], made.matrix()
    whole = torch.stack([u[g] @ r[g] @ v[g].flatten(1) for g in range(4)]).reshape(base.shape)
    torch.testing.assert_close(made.delta_weight(base), whole)
    a, b = made.expand(base)
    torch.testing.assert_close((b @ a.flatten(1)).reshape(base.shape), whole)
    before = model(x)
    for groups, core in ((1, 3), (2, 3), (4, 2)):
        with pytest.raises(ValueError, match="got 3 in each of 4 groups"):
            base.add_adapter("a", adapter("core", weight_shape=base.shape, rank=1, groups=groups, core=core))
    assert torch.equal(model(x), before) and not base.adapters
    for wrong in ((3, 3), (2, 3, 3), (4, 3, 2)):
        with pytest.raises(ValueError, match="core_R: expected shape"):
            made.load({"core_R": torch.zeros(wrong)})


def test_a_core_needs_its_factors():
    with pytest.raises(ValueError, match="core"):
        adapter("core", weight_shape=(6, 4), rank=2)
    model, _ = case("linear", "svd")
    with pytest.raises(ValueError, match="core of 3"):
        model[0].add_adapter("a", adapter("core", weight_shape=(10, 14), rank=2, core=3))
    assert takes("core", model[0].target) and not takes("core", Target((10, 14))) and takes("lora", Target((10, 14)))


def test_cores_and_other_kinds_add_up_by_weight():
    model, x = case("linear", "svd")
    base = model[0]
    before = model(x)
    made = {
        n: fresh(k, base.target, 2, generator=generator()).double()
        for n, k in (("a", "core"), ("b", "core"), ("c", "lokr"))
    }
    for name, a in made.items():
        random_values(a)
        base.add_adapter(name, a, 0.5)
    base.active = {"a": 0.5, "b": -2.0, "c": 3.0}
    delta = 0.5 * made["a"].delta_weight(base) - 2 * made["b"].delta_weight(base) + 3 * made["c"].delta_weight(base)
    torch.testing.assert_close(model(x), before + x @ delta.T)
    torch.testing.assert_close(base.merged_weight(), base.weight + delta)
    base.set_active(["b"])
    torch.testing.assert_close(model(x), before + x @ made["b"].delta_weight(base).T)
    base.set_active([])
    assert torch.equal(model(x), before)
