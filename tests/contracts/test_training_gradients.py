"""The gradient that a step follows: that of the whole batch, however it is computed, and never a long one."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrcompress.adapt._files import read_adapter
from lrcompress.data import Data
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.layers import FactorizedLayer
from lrcompress.progress import Silent
from lrcompress.recover import World, losses
from lrcompress.recover.logs import NoLog
from lrcompress.recover.training import Training
from lrcompress.verbs.recover import recover
from lrcompress.verbs.recovering import Asked, prepare, ready, settings_of
from tests.support.nets import small
from tests.support.training import RATE, compressed, data, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("training"))


def job_of(folder, samples: Data, *, train: str = "adapters", **options):
    """Return what a run of these options would train, with a fresh adapter of rank 2 that is no longer zero."""
    base = load_compressed(folder)
    settings = settings_of({"batch_size": len(samples), **options}, 0)
    job = prepare(
        base, base.open_original(), Asked(train=train, rank=2), settings, (samples, samples), metric=None, world=World(),
        shard_teacher=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in job.trained.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return job


@contextlib.contextmanager
def training_of(*args, **options):
    job = job_of(*args, **options)
    with ready(job, None, NoLog(), Silent()) as training:
        yield job, training


def gradients(training: Training, batches: int = 1) -> dict[str, torch.Tensor]:
    training.gradient(batches)
    return {n: p.grad.clone() for n, p in training.trained.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [1, 3, 7, 80])
@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_the_gradient_in_pieces_is_that_of_the_whole_batch(place, train, accumulate):
    """Sixty samples in pieces that are not equally large: the mean over all of them, not a mean of means."""
    options = {"train": train, "accumulate": accumulate, "loss": "logits=1,labels=0.5", "temperature": 2.0}
    with training_of(place / "small", data(), **options) as (job, training):
        found = gradients(training)
        batch = next(iter(job.train_data.batches(60)))
        x, y = torch.as_tensor(batch.inputs["x"]), torch.as_tensor(batch.labels)
        scores, teacher = job.module(x), small()(x)
        p = F.softmax(teacher / 2, -1)
        distance = 4 * (p * (p.log() - F.log_softmax(scores / 2, -1))).sum(-1)
        (distance + 0.5 * F.cross_entropy(scores, y, reduction="none")).mean().backward()
    # `gradient` left its own in the parameters; `backward` added the other one to it.
    for name, p in job.trained.parameters.items():
        torch.testing.assert_close(p.grad, 2 * found[name], rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2


def test_the_gradient_of_several_batches_is_their_mean(place):
    with training_of(place / "stack", rows(40), batch_size=10) as (_, training):
        four = gradients(training, 4)
    with training_of(place / "stack", rows(40), batch_size=40) as (_, training):
        one = gradients(training, 1)
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_checkpointing_changes_no_bit_of_the_gradient_and_holds_less(place, train):
    found = {}
    for checkpointing in (False, True):
        options = {"train": train, "checkpointing": checkpointing, "loss": "logits=1,hidden=1"}
        with training_of(place / "stack", rows(), **options) as (job, training):
            held = held_bytes(job.module, training)
            found[checkpointing] = held, gradients(training)
        assert "forward" not in vars(job.module.blocks[0]), "afterwards the blocks are what they were"
    (plain, one), (less, other) = found[False], found[True]
    assert set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)
    assert any(float(g.abs().max()) > 1e-3 for g in one.values())
    # A block of 4 · 12 numbers inside keeps 12 of them: what is left is the inputs of three blocks, and the head.
    assert less < 0.4 * plain, (less, plain)


@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_gradients_reach_what_is_trained_alone(place, train):
    """What is frozen asks for no gradient while it lasts, in the original neither; then all is as it was."""
    job = job_of(place / "small", data(), train=train)
    networks = {"student": job.module, "teacher": job.teacher.module}
    before = {(k, n): p.requires_grad for k, m in networks.items() for n, p in m.named_parameters()}
    assert all(before.values())
    with ready(job, None, NoLog(), Silent()) as training:
        training.gradient(1)
        trained = {id(p) for p in job.trained.parameters.values()}
        for m in networks.values():
            for p in m.parameters():
                assert p.requires_grad == (id(p) in trained)
                assert p.grad is None or id(p) in trained
    assert before == {(k, n): p.requires_grad for k, m in networks.items() for n, p in m.named_parameters()}


def held_bytes(network: nn.Module, training: Training) -> int:
    """Return the bytes that a forward pass keeps for its gradient, parameters left out.

    A checkpoint keeps the inputs of its block beside autograd: they are counted where they come in.
    """
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    handles = [b.register_forward_pre_hook(lambda _, args: (keep(args[0]), None)[1]) for b in network.blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            answers = training.networks.student(training._read(np.arange(40)))
    finally:
        for handle in handles:
            handle.remove()
    assert answers["answer"].requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_no_gradient_is_followed_that_is_longer_than_one(place):
    """A loss a thousand times as large has a gradient as long; the step sees one of length 1 in the same direction."""
    seen = []

    def look(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        seen.append(float(torch.stack([g.norm() for g in grads]).norm()))

    handle = register_optimizer_step_pre_hook(look)
    try:
        recover(place / "small", data=data(), loss="labels=1000", steps=3, **RATE)
    finally:
        handle.remove()
    assert seen == pytest.approx([1.0] * 3, abs=1e-4)


def test_bf16_trains_in_bf16_and_decides_in_fp32(place, tmp_path):
    select, seen = data(50, 7), Counter()

    def look(layer, _, out):
        seen[torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")] += isinstance(layer, FactorizedLayer)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        found = recover(
            place / "small", data=data(), select=select, precision="bf16", steps=6, output=tmp_path / "a", **RATE
        )
    finally:
        handle.remove()
    assert {k for k, n in seen.items() if n} == {(True, True), (False, False)}, seen
    loss = found.data["loss"]
    assert loss["after"] < loss["before"]
    x = torch.as_tensor(next(iter(select.batches(50))).inputs["x"])
    with torch.no_grad():
        exact = float(losses.logits(found.model(x), small()(x), temperature=math.inf).mean())
        with torch.autocast("cpu", torch.bfloat16):
            rough = float(losses.logits(found.model(x).float(), small()(x).float(), temperature=math.inf).mean())
    assert loss["after"] == pytest.approx(exact, rel=1e-5) and rough != pytest.approx(exact, rel=1e-5)
    kept = read_adapter(tmp_path / "a").adapters.values()
    assert {p.dtype for a in kept for p in a.parameters()} == {torch.float32}
