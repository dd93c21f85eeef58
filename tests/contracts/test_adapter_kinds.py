"""Every adapter kind on every layer type: what is added is what is merged, and the base is never touched."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lrcompress.adapt import Target, adapter, adapter_class, kinds, lokh, lokr
from lrcompress.adapt.core import POSITIONS, why_none
from lrcompress.factorize import form, forms
from lrcompress.model.adapting import (
    by_pattern,
    every_target,
    fresh,
    merge,
    merge_core,
    plain_target,
    takes,
    unmerge,
)
from lrcompress.model.surgery import attach, detach, factorized_layers, replace_layer, to_dense, wrap_dense

#: Layer, input, and the forms it is factorized with besides staying dense.
LAYERS = {
    "linear": (lambda: nn.Linear(14, 10), (3, 5, 14), ("svd", "pivoted", "als", "kronecker", "tensor_train")),
    "linear_no_bias": (lambda: nn.Linear(6, 9, bias=False), (2, 6), ()),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=3), (2, 6, 11), ("svd", "spatial_svd", "cp", "kronecker")),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7), ("svd", "tucker", "spatial_svd", "pivoted", "pivoted_tucker", "pivoted_spatial", "cp", "kronecker")),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5), ("svd",)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1)), (2, 4, 3, 4, 4), ("svd", "tucker", "cp", "kronecker")),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, stride=(1, 2)), (2, 4, 8, 8), ("spatial_svd", "cp", "kronecker")),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6), ("tucker", "cp")),
    "circular": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9), ()),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 6), ("grouped_svd",)),
    "two_groups": (lambda: nn.Conv1d(6, 4, 3, groups=2, padding_mode="replicate", padding=1), (2, 6, 9), ()),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 6, 6), ()),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 4, 4), ()),
    "transposed_grouped": (lambda: nn.ConvTranspose1d(6, 8, 4, groups=2, stride=2, dilation=2), (2, 6, 5), ()),
    "transposed_3d": (lambda: nn.ConvTranspose3d(4, 4, 2, bias=False), (1, 4, 3, 3, 3), ()),
    "embedding": (lambda: nn.Embedding(24, 10, padding_idx=0), (4, 3), ("svd",)),
}  # fmt: skip
#: Options of the kinds that change their tensors.
OPTIONS = {
    "lora": [{}, {"rslora": True}, {"tucker": True}],
    "loha": [{}, {"tucker": True}],
    "lokr": [{}, {"decompose_both": True, "factor": 2}, {"tucker": True, "factor": 2}],
    "lokh": [{}],
    "core": [{}],
}
#: Every kind goes on every layer in every form, but a core only where the chain of factors passes one activation:
#: why not, by form and kind of layer.
WITHOUT_CORE = {
    ("dense", "linear"): "not factorized", ("dense", "conv"): "not factorized", ("dense", "embedding"): "not factorized",
    ("dense", "conv_transpose"): "not factorized",
    ("hadamard", "linear"): "rebuilt", ("hadamard", "conv"): "rebuilt", ("hadamard", "embedding"): "rebuilt",
    ("khatri_rao", "linear"): "rebuilt", ("khatri_rao", "conv"): "rebuilt", ("khatri_rao", "embedding"): "rebuilt",
    ("kronecker", "embedding"): "all of its digits", ("tensor_train", "embedding"): "all of its digits",
}  # fmt: skip
KIND_OF = {
    layer: "embedding" if layer == "embedding" else "linear" if "linear" in layer else "conv_transpose" if "transposed" in layer else "conv"
    for layer in LAYERS
}  # fmt: skip
CASES = [
    (kind, layer, form_name, options)
    for kind in kinds()
    for layer, (_, _, forms) in LAYERS.items()
    for form_name in ("dense", *forms)
    if (form_name, KIND_OF[layer]) not in WITHOUT_CORE or not adapter_class(kind).in_core
    for options in OPTIONS.get(kind, [{}])
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(layer: str, form_name: str) -> tuple[nn.Sequential, Tensor]:
    """Return a network of that one layer, factorized, and inputs."""
    make, shape, _ = LAYERS[layer]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()
    if form_name != "dense":
        weight = model[0].weight.detach()
        if form_name == "grouped_svd":
            weight = weight.reshape(model[0].groups, -1, *weight.shape[1:])
        chosen = form(form_name)
        replace_layer(model, "0", chosen.decompose(weight, chosen.clip(tuple(weight.shape), 4)))
    if layer == "embedding":
        return model, torch.randint(0, 24, shape, generator=generator())
    return model, torch.randn(shape, generator=generator(), dtype=torch.float64)


def random_values(adapter: nn.Module, std: float = 0.3) -> None:
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(i + 1), dtype=torch.float64) * std)


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
    count = adapter_class(kind).n_params(base.target.shape, made.rank, **_structure(kind, base.target, options))
    assert count == sum(p.numel() for p in made.parameters())
    kept = {n: t.clone() for n, t in again.tensors().items()}
    for name, value in made.tensors().items():
        fewer = {n: t for n, t in made.tensors().items() if n != name}
        for wrong in (fewer, {**fewer, name: value.new_zeros(value.shape[0] + 1, *value.shape[1:])}):
            with pytest.raises(ValueError, match=r"lo|hada|core|missing|expected"):
                again.load(wrong)
    with pytest.raises(ValueError, match=r"unexpected tensor strange|three axes|product"):
        again.load({**made.tensors(), "strange": torch.zeros(2)})
    assert all(torch.equal(t, kept[n]) for n, t in again.tensors().items()), "a refused load changed the adapter"


def _structure(kind: str, target: Target, options: dict) -> dict:
    own = {k: v for k, v in options.items() if k != "rslora"}
    return (
        own
        | ({"groups": target.groups} if kind in ("lora", "core") else {})
        | ({"core": target.core} if kind == "core" else {})
    )


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
    assert sum(p.numel() for p in made.parameters()) == type(made).n_params(base.shape, rank, core=3, groups=4)
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
