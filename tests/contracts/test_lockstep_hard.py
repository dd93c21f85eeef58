"""Passes side by side where networks are less plain: in place, ahead, twice, changed elsewhere, deciding by the data."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrcompress.errors import ModelError
from lrcompress.factorize import form
from lrcompress.model import InputSpec, open_model
from lrcompress.model.lockstep import at_stop, flow_of, lockstep
from lrcompress.model.surgery import find_layers, replace_layer


def seeded(cls, seed=0):
    torch.manual_seed(seed)
    return cls().eval()


def rows(n=6, seed=0, width=8):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def factorized(net, name, rank=2):
    layer = next(n for n in find_layers(net) if n.name == name)
    replace_layer(net, name, form("svd").decompose(layer.weight, rank))


def checked(net, changed, batches, names, *, sums, turn=1.25):
    """Run in step, and check every stop against plain runs of the network and of the copy as it is by then.

    `sums`: layer → the module that is called with the sum its answer went into.
    """
    opened = open_model(net)
    few = {k: v[:2] for k, v in batches[0].items()}
    flow, turned, before = flow_of(opened, net, few, names), copy.deepcopy(changed), []
    for stop in lockstep(opened, net, changed, batches, flow, flow.once):
        for k, pair in enumerate(stop.pairs()):
            for module, read in ((net, pair.clean), (turned, pair.drifted)):
                torch.testing.assert_close(read, read_by(opened, module, stop.layer, batches[k]), rtol=1e-5, atol=1e-6)
            if stop.layer in sums:
                assert pair.beside is not None, stop.layer
                for module, value in ((net, pair.beside[0]), (turned, pair.beside[1])):
                    answer = answered_by(opened, module, stop.layer, batches[k])
                    total = read_by(opened, module, sums[stop.layer], batches[k])
                    torch.testing.assert_close(value + answer, total, rtol=1e-4, atol=1e-5)
            else:
                assert pair.beside is None, stop.layer
        with torch.no_grad():
            changed.get_submodule(at_stop(stop.layer)).weight.mul_(turn)
            turned.get_submodule(stop.layer).weight.mul_(turn)
        before.append(stop.layer)
    assert before == list(flow.once)
    return flow


def hooked(opened, module, name, inputs, pick):
    seen = []
    handle = module.get_submodule(name).register_forward_hook(lambda _m, a, out: seen.append(pick(a, out).clone()))
    with torch.no_grad():
        opened.outputs(module, inputs)
    handle.remove()
    return seen[-1]


def read_by(opened, module, name, inputs):
    return hooked(opened, module, name, inputs, lambda a, out: a[0])


def answered_by(opened, module, name, inputs):
    return hooked(opened, module, name, inputs, lambda a, out: out)


class Beside(nn.Module):
    """Sums that are read by `seen*`, an identity, so that a plain run can show them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.seen, self.seen2 = nn.Identity(), nn.Identity()


class InPlace(Beside):
    """x += f(x) twice, a rectifier in place between; the inner branch of the second has a branch of its own."""

    def forward(self, x):
        x = F.relu_(self.a(x))
        x = self.seen(x.add_(self.b(x)))
        y = F.relu_(self.c(x))
        return self.d(self.seen2(x + y * 0.5))


def test_work_in_place_is_seen_as_the_value_that_it_makes():
    net = seeded(InPlace)
    checked(net, copy.deepcopy(net), [{"x": rows()}, {"x": rows(3, 1)}], list("abcd"), sums={"b": "seen"})


class Nested(Beside):
    def forward(self, x):
        x = self.a(x)
        y = self.seen(torch.tanh(x) + self.b(x))
        return self.d(self.seen2(torch.tanh(x) + self.c(y)))


def test_residuals_within_each_other():
    net = seeded(Nested)
    flow = checked(net, copy.deepcopy(net), [{"x": rows()}], list("abcd"), sums={"b": "seen", "c": "seen2"})
    assert set(flow.additions) == {"b", "c"} and not flow.ahead


class Scaled(Beside):
    """What is not a plain sum of two values of one shape is none."""

    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = torch.add(torch.tanh(x), self.b(x), alpha=0.5)
        z = torch.tanh(y).mean(0) + self.c(y)
        w = self.d(z)
        return w + w


def test_sums_that_are_no_plain_ones_are_none():
    net = seeded(Scaled)
    flow = checked(net, copy.deepcopy(net), [{"x": rows()}], list("abcd"), sums={})
    assert not flow.additions and not flow.ahead


class Later(Beside):
    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = self.b(x)
        return self.d(self.seen(y + torch.tanh(self.c(x))))


def test_a_shortcut_that_is_computed_later_is_seen_ahead():
    net = seeded(Later)
    flow = checked(net, copy.deepcopy(net), [{"x": rows()}, {"x": rows(4, 2)}], list("abcd"), sums={"b": "seen"})
    assert set(flow.ahead) == {"b"} and not flow.additions


class Twice(Beside):
    """`a` is called twice: no stop, and no longer one operation unless it is counted as one."""

    def forward(self, x):
        x = torch.tanh(self.a(self.a(x)))
        return self.d(self.seen(torch.tanh(x) + self.b(x)))


def test_a_layer_that_is_called_twice_moves_no_position():
    net = seeded(Twice)
    checked(net, copy.deepcopy(net), [{"x": rows()}], ["a", "b", "d"], sums={"b": "seen"})


class Looked(Beside):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)

    def forward(self, x):
        x = torch.tanh(self.a(torch.tanh(self.embed(x))))
        return self.d(self.seen(torch.tanh(x) + self.b(x)))


@pytest.mark.parametrize("changed_already", ["embed", "a"])
def test_layers_that_were_changed_before_move_no_position(changed_already):
    """Factors are more operations than a weight: the copy counts them as the one that they stand for."""
    net = seeded(Looked)
    changed = copy.deepcopy(net)
    factorized(changed, changed_already)
    ids = torch.arange(12).reshape(4, 3)
    checked(net, changed, [{"x": ids}], ["b", "d"], sums={"b": "seen"})


class Masked(Beside):
    """As transformers do: where nothing is padded there is no mask to make."""

    def forward(self, x, attention_mask):
        x = torch.tanh(self.a(x))
        if not bool((attention_mask == 1).all()):
            bias = (1 - attention_mask.to(x.dtype)) * -3.0
            y = self.b(x) + 0.0
            x = torch.tanh(x + bias[..., None])
            return self.d(self.seen(torch.tanh(x) + self.c(y)))
        y = self.b(x) + 0.0
        return self.d(self.seen(torch.tanh(x) + self.c(y)))


def test_operations_that_depend_on_the_data_give_the_right_value_or_none():
    net = seeded(Masked)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    full, some = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64)
    some[:, 2] = 0
    batches = [{"x": x, "attention_mask": full}, {"x": x, "attention_mask": some}]
    opened, changed = open_model(net), copy.deepcopy(net)
    flow = flow_of(opened, net, batches[0], list("abcd"))
    for stop in lockstep(opened, net, changed, batches, flow, flow.once):
        for pair, inputs in zip(stop.pairs(), batches, strict=True):
            if stop.layer == "c" and pair.beside is not None:
                total = read_by(opened, net, "seen", inputs)
                torch.testing.assert_close(pair.beside[0] + pair.answer, total)


class Once(nn.Module):
    """Calls its last layer again for some data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.b(self.a(x))
        return self.b(y) if x.sum() < 0 else y


def test_one_call_too_many_at_the_end_is_refused():
    net, ones = seeded(Once), torch.ones(2, 4)
    flow, before = flow_of(open_model(net), net, {"x": ones}, ["a", "b"]), threading.active_count()
    with pytest.raises(ModelError, match="depend on the data"):
        list(lockstep(open_model(net), net, copy.deepcopy(net), [{"x": ones}, {"x": -ones}], flow, flow.once))
    assert threading.active_count() == before


class Telling(Beside):
    """What a rectifier cuts off is an answer all the same."""

    def forward(self, x):
        y = self.a(x)
        return {"early": y, "output": self.b(torch.relu(y))}


def test_what_is_answered_is_not_forgiven():
    net = seeded(Telling)
    flow = flow_of(open_model(net), net, {"x": rows(2)}, ["a", "b"])
    assert not flow.rectified


def bert(attention="sdpa"):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("padded", ["first", "second"])
def test_blocks_of_a_transformer_whatever_is_padded(padded):
    net = bert()
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    full, some = torch.ones_like(ids), torch.ones_like(ids)
    some[1:, 4:] = 0
    masks = (some, full) if padded == "first" else (full, some)
    batches = [{"input_ids": ids, "attention_mask": m} for m in masks]
    changed = copy.deepcopy(net)
    factorized(changed, "embeddings.word_embeddings", 4)
    turned = copy.deepcopy(changed)
    opened = open_model(
        net, inputs=(InputSpec("input_ids", "int64", ("b", "s")), InputSpec("attention_mask", "int64", ("b", "s")))
    )
    names = [n.name for n in find_layers(net) if n.kind == "linear"]
    flow, found = flow_of(opened, net, {k: v[:2] for k, v in batches[0].items()}, names), {}
    normed = {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"}
    for stop in lockstep(opened, net, changed, batches, flow, flow.once):
        block, _, part = stop.layer.partition(".layer.")[2].partition(".")
        for k, pair in enumerate(stop.pairs()):
            assert (pair.beside is None) == (part not in normed)
            if pair.beside is not None:
                total = read_by(opened, net, f"encoder.layer.{block}.{normed[part]}", batches[k])
                torch.testing.assert_close(pair.beside[0] + pair.answer, total)
                answer = answered_by(opened, turned, stop.layer, batches[k])
                total = read_by(opened, turned, f"encoder.layer.{block}.{normed[part]}", batches[k])
                torch.testing.assert_close(pair.beside[1] + answer, total)
                found[stop.layer] = float((pair.beside[0] - pair.beside[1]).abs().max())
        if part == "intermediate.dense":
            with torch.no_grad():
                changed.get_submodule(at_stop(stop.layer)).weight.mul_(0.5)
                turned.get_submodule(stop.layer).weight.mul_(0.5)
    assert len(found) == 4 and all(v > 0 for v in found.values())


def test_gates_pass_on_what_is_asked_of_their_layer():
    net = seeded(Nested)
    changed = copy.deepcopy(net)
    opened, flow = open_model(net), flow_of(open_model(net), net, {"x": rows(2)}, list("abcd"))
    run = lockstep(opened, net, changed, [{"x": rows()}], flow, flow.once)
    next(run)
    assert changed.b.weight is changed.b.layer.weight and changed.b.in_features == 8
    with torch.no_grad(), pytest.raises(AttributeError):
        _ = changed.b.nothing_of_the_kind
    torch.testing.assert_close(changed(rows()), net(rows()))  # whoever is in no pass goes straight through
    run.close()
    assert isinstance(changed.b, nn.Linear)
