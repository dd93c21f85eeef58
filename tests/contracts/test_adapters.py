"""The theory every adapter must satisfy, for every kind the directory lists, on every layer that takes one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lrcompress.adapt import adapter, adapter_class, kinds, lokh, lokr
from lrcompress.adapt._files import read_adapter, write_adapter
from lrcompress.errors import ModelError
from lrcompress.factorize import form
from lrcompress.model.surgery import (
    adaptable_layers,
    attach,
    count_parameters,
    detach,
    factorized_layers,
    find_layers,
    replace_layer,
    to_dense,
)

SHAPES = [(10, 14), (8, 6, 3, 3), (6, 4, 5)]
#: Kinds that need nothing but the weight; those that live in a layer's core are tested on layers that have one.
PLAIN = [k for k in kinds() if not adapter_class(k).in_core]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_adapter(kind: str, shape: tuple[int, ...], rank: int = 3, alpha: float = 1.5):
    a = adapter(kind, weight_shape=shape, rank=rank, alpha=alpha, generator=generator()).double()
    with torch.no_grad():
        for i, p in enumerate(a.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(i + 1), dtype=torch.float64))
    return a


class Net(nn.Module):
    """Linear, dilated, reflect-padded, strided, 'same'-padded, grouped and one-axis convolutions, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4 * 64)
        self.c1 = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect")
        self.c2 = nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.c3 = nn.Conv2d(8, 8, 4, padding="same", groups=2)
        self.d1 = nn.Conv1d(8, 6, 4, padding="same")
        self.fc = nn.Linear(6 * 32, 5)

    def forward(self, ids):
        x = self.embed(ids).reshape(-1, 4, 8, 8)
        x = self.c3(torch.relu(self.c2(torch.relu(self.c1(x)))))
        return self.fc(torch.relu(self.d1(x.flatten(2))).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


IDS = torch.tensor([1, 5, 10])


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryKind:
    def test_zero_at_init_with_a_live_gradient(self, kind, shape):
        a = adapter(kind, weight_shape=shape, rank=2, generator=generator()).double()
        delta = a.delta_weight()
        assert delta.shape == shape and not delta.any()
        target = torch.randn(shape, generator=generator(9), dtype=torch.float64)
        (delta - target).square().sum().backward()
        assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in a.parameters())

    def test_expansion_is_exact_at_the_stated_rank(self, kind, shape):
        a = random_adapter(kind, shape)
        left, right = a.expand()
        rebuilt = (right @ left.flatten(1)).reshape(shape)
        assert float((rebuilt - a.delta_weight()).norm() / a.delta_weight().norm()) < 1e-12
        m1, n1 = lokr.factorization(shape[0])[0], lokr.factorization(shape[1])[0]
        split = max(shape[0] // m1, shape[1] // n1) / 2 > 3
        small = min(m1, n1) * min(shape[0] // m1, 3 if split else math.prod(shape[1:]) // n1)
        expected = {"lora": 3, "loha": 9, "lokr": small, "lokh": min(a.sides)}[kind]
        assert left.shape[0] == right.shape[1] == expected
        assert torch.linalg.matrix_rank(a.delta_weight().flatten(1)) == min(expected, *a.sides)

    def test_scaling_is_alpha_over_rank(self, kind, shape):
        one, two = random_adapter(kind, shape, alpha=3.0), random_adapter(kind, shape, alpha=6.0)
        torch.testing.assert_close(2 * one.delta_weight(), two.delta_weight())
        assert one.scaling == 1.0

    def test_counts(self, kind, shape):
        out, inner, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
        (m1, m2), (n1, n2) = lokr.factorization(out), lokr.factorization(shape[1])
        second = 3 * (m2 + n2 * kernel) if max(m2, n2) / 2 > 3 else m2 * n2 * kernel
        chained = 3 * sum(lokh.chain(out)) * inner
        expected = {"lora": 3 * (out + inner), "loha": 6 * (out + inner), "lokr": m1 * n1 + second, "lokh": chained}
        assert sum(p.numel() for p in random_adapter(kind, shape).parameters()) == expected[kind]

    def test_same_seed_same_bytes(self, kind, shape):
        one, two = (adapter(kind, weight_shape=shape, rank=2, generator=generator(4)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        other = adapter(kind, weight_shape=shape, rank=2, generator=generator(5))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("factorized", [False, True])
def test_forward_equals_merged_on_every_layer(kind, factorized):
    model = net()
    if factorized:
        for layer in find_layers(model):
            if layer.reason is None and layer.name != "d1":
                chosen = form("grouped_svd" if layer.kind == "grouped" else "svd")
                replace_layer(model, layer.name, chosen.decompose(layer.weight, 2))
    plain_answer = model(IDS)
    # Some processors add a bias within the product: a dense layer that is wrapped may round otherwise, once.
    attach(model, "wrap", lambda *_: None, adaptable_layers(model))
    before = model(IDS)
    torch.testing.assert_close(before, plain_answer, rtol=1e-12, atol=1e-14)
    attached = attach(
        model,
        "a",
        lambda _, shape: adapter(kind, weight_shape=shape, rank=2, generator=generator()).double(),
        adaptable_layers(model),
    )
    assert set(attached) == {"c1", "c2", "d1", "fc"}
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    with torch.no_grad():
        for a in attached.values():
            for i, p in enumerate(a.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator(i), dtype=torch.float64) * 0.2)
    corrected = model(IDS)
    assert float((corrected - before).abs().max()) > 1e-3
    plain = to_dense(model)
    assert not list(factorized_layers(plain))
    torch.testing.assert_close(plain(IDS), corrected, rtol=1e-9, atol=1e-10)
    detach(model, "a")
    assert torch.equal(model(IDS), before)


def test_several_adapters_add_up_by_weight():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(3, 6, generator=generator(), dtype=torch.float64)
    base = model(x)
    one, two = random_adapter("lora", (4, 6)), random_adapter("loha", (4, 6))
    attach(model, "one", lambda *_: one, ["0"])
    attach(model, "two", lambda *_: two, ["0"])
    layer = model[0]
    layer.active = {"one": 0.5, "two": 2.0}
    torch.testing.assert_close(model(x), base + x @ (0.5 * one.delta_weight() + 2 * two.delta_weight()).T)
    layer.set_active(["two"])
    torch.testing.assert_close(model(x), base + x @ two.delta_weight().T)


def test_attaching_to_a_dense_layer_moves_no_number():
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    size = count_parameters(model)
    attach(model, "a", lambda _, shape: adapter("lora", weight_shape=shape, rank=2), adaptable_layers(model))
    after = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    assert count_parameters(model) == size


def test_depthwise_tied_and_computed_weights_stay_dense_with_their_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight
            self.depthwise, self.grouped = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 3, groups=2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
            self.attention = nn.MultiheadAttention(8, 2)
            self.free = nn.Linear(5, 5)
            self.again = self.free

    reasons = {layer.name: layer.reason for layer in find_layers(Odd())}
    assert reasons.pop("free") is None and reasons.pop("grouped") is None and "again" not in reasons
    expected = {
        "embed": "tied",
        "head": "tied",
        "depthwise": "depthwise",
        "normed": "parametrization",
        "attention.out_proj": "parent",
    }
    assert reasons.keys() == expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], (name, reasons[name])


def test_a_shared_module_is_replaced_everywhere():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Sequential(self.a, nn.ReLU())

        def forward(self, x):
            return self.b(self.a(x))

    model = Twice().double()
    x = torch.randn(2, 6, generator=generator(), dtype=torch.float64)
    expected = model(x)
    [layer] = find_layers(model)
    replace_layer(model, layer.name, form("svd").decompose(layer.weight, 6))
    assert model.a is model.b[0]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", PLAIN)
def test_an_adapter_folder_comes_back_bit_for_bit(kind, tmp_path):
    made = {
        "fc": random_adapter(kind, (10, 14)).float(),
        "c.1": random_adapter(kind, (8, 6, 3, 3), rank=2, alpha=4.0).float(),
    }
    write_adapter(tmp_path, made, maker="test", base="b" * 64, info={"seed": 3})
    folder = read_adapter(tmp_path)
    assert (folder.kind, folder.base, folder.info["seed"]) == (kind, "b" * 64, 3)
    assert folder.n_params == sum(p.numel() for a in made.values() for p in a.parameters())
    for layer, a in made.items():
        back = folder.adapters[layer]
        assert (back.rank, back.alpha, back.weight_shape) == (a.rank, a.alpha, a.weight_shape)
        assert torch.equal(back.delta_weight(), a.delta_weight())


def test_a_damaged_adapter_folder_is_refused(tmp_path):
    made = {"fc": random_adapter("lora", (4, 6)).float()}
    write_adapter(tmp_path, made, maker="test", base="b" * 64, info={})
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="intact"):
        read_adapter(tmp_path)
    with pytest.raises(ModelError, match="adapter folder"):
        read_adapter(tmp_path / "nowhere")
    with torch.no_grad():
        made["fc"].lora_A[0, 0] = math.nan
    write_adapter(tmp_path, made, maker="test", base="b" * 64, info={})
    with pytest.raises(ModelError, match="finite"):
        read_adapter(tmp_path)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        adapter("lora", weight_shape=(4, 4), rank=0)


def test_merged_weights_do_not_drift():
    """Merging is a copy: the factors are untouched however often a merged network is made."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        attach(model, "a", lambda _, shape: random_adapter("lora", shape), ["fc"])
        to_dense(model)
        detach(model, "a")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
