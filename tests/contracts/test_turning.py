"""Fresh adapters are turned along the gradient of the loss: the theory of it, against the gradient of a dense network."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lrcompress.adapt import kinds
from lrcompress.adapt.core import metric_of
from lrcompress.data import Data
from lrcompress.model.checkpoint import load_compressed
from lrcompress.progress import Silent
from lrcompress.recover import World
from lrcompress.recover.logs import NoLog
from lrcompress.recover.order import read_units
from lrcompress.verbs.recovering import Asked, prepare, ready, settings_of
from tests.support.nets import small
from tests.support.training import compressed, data, weight_gradients

#: 60 samples in batches of 7: the looks read all but the last, and it is not a multiple.
BATCH, LOOKED = 7, 8


class _Begun(Exception):
    """A run has begun: here a rate would be looked for."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("turning"))


@contextlib.contextmanager
def begun(place, kind: str, rank: int, samples: Data | None = None, *, before=lambda job: None, **options):
    """Yield a run that was prepared and has taken no step: (job, its adapters as they were before it began, training)."""
    base, samples = load_compressed(place / "small"), samples or data()
    settings = settings_of({"batch_size": BATCH, "loss": "labels", **options}, 0)
    job = prepare(
        base, None, Asked(kind=kind, rank=rank), settings, (samples, samples), metric=None, world=World(), shard_teacher=False
    )  # fmt: skip
    before(job)

    def stop(_):
        raise _Begun

    with ready(job, None, NoLog(), Silent()) as training:
        fresh = {n: {k: t.clone() for k, t in a.tensors().items()} for n, a in job.adapters.items()}
        with pytest.raises(_Begun):
            training.run(stop)
        yield job, fresh, training


def gradients(job, training, batches: int = LOOKED) -> dict[str, torch.Tensor]:
    looked = training.order.epoch(0)[:batches]
    return weight_gradients(job.module, small(), [read_units(job.train_data, units) for units in looked])


def leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[2][..., :rank, :]


def assert_spans(found: torch.Tensor, wanted: torch.Tensor, loss: float = 1e-3):
    """Rows are orthogonal, equally long, and span what the wanted ones do."""
    found = found.double()
    length = found.norm(dim=-1).mean()
    eye = torch.eye(len(found), dtype=torch.float64)
    assert torch.allclose(found @ found.T / length**2, eye, atol=1e-4)
    assert float((found / length @ wanted.T).square().sum()) >= len(found) - loss


# what each kind becomes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_sees_the_strongest_directions_of_the_gradient(place, rank):
    with begun(place, "lora", rank) as (job, fresh, training):
        wanted = gradients(job, training)
        assert set(wanted) == set(job.adapters) == {"conv1", "conv2", "mix", "fc1", "fc2"}
        for name, adapter in job.adapters.items():
            a = adapter.lora_A.detach().flatten(1)
            # Of 288 and 256 columns and 32 rows at most, all directions are seen: exact but for rounding.
            assert_spans(a, leading(wanted[name], rank))
            was = fresh[name]["lora_A"].flatten(1).norm(dim=1).mean()
            assert float(a.norm(dim=1).mean()) == pytest.approx(float(was), rel=1e-4)
            assert not adapter.lora_B.any()


def test_the_first_gradient_is_as_large_as_one_of_this_rank_can_be(place):
    """‖G aᵀ‖ = σ₁‖a‖, where a random a sees a part of it."""
    with begun(place, "lora", 1) as (job, fresh, training):
        wanted = gradients(job, training)
        training.gradients(training.order.epoch(0)[:LOOKED], training.parameters, name="the test")
        for name, adapter in job.adapters.items():
            a, g = adapter.lora_A.detach().flatten(1), adapter.lora_B.grad
            largest = float(torch.linalg.svdvals(wanted[name])[0] * a.norm())
            assert float(g.norm()) == pytest.approx(largest, rel=1e-3)
            random = float((wanted[name] @ fresh[name]["lora_A"].flatten(1).double().T).norm())
            assert random < 0.9 * largest


def test_a_core_sees_them_in_the_units_it_is_trained_in(place):
    with begun(place, "core", 2) as (job, _fresh, training):
        wanted = gradients(job, training)
        turned = [n for n, a in job.adapters.items() if "core_Q" in a._parameters]
        assert turned
        for name in turned:
            layer, adapter = job.module.get_submodule(name), job.adapters[name]
            u, v = (layer.factors[k].detach().flatten(1).double() for k in ("U", "V"))
            left, right = metric_of(layer)
            wanted_core = left.T @ (u.T @ wanted[name] @ v.T) @ right.T
            assert_spans(adapter.core_Q.detach(), leading(wanted_core, 2))
            assert not adapter.core_P.any()


# what it leaves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
def test_the_network_answers_as_before_and_holds_its_own_adapters(place, kind):
    x = torch.as_tensor(next(iter(data(8, 2).batches(8))).inputs["x"])
    with begun(place, kind, 2) as (job, fresh, _training):
        base = load_compressed(place / "small").need_module("the test").eval()
        with torch.no_grad():
            torch.testing.assert_close(job.module.eval()(x), base(x))
        for name, adapter in job.adapters.items():
            assert job.module.get_submodule(name).adapters["recover"] is adapter
            assert {k: t.shape for k, t in adapter.tensors().items()} == {k: t.shape for k, t in fresh[name].items()}
        moved = {
            n for n, a in job.adapters.items() if any(bool((t != fresh[n][k]).any()) for k, t in a.tensors().items())
        }
        assert bool(moved) == (kind in ("lora", "core"))


def test_an_adapter_that_is_not_zero_stays_as_it_is(place):
    def set_one(job):
        with torch.no_grad():
            job.adapters["fc1"].lora_B.fill_(1e-3)

    with begun(place, "lora", 2, before=set_one) as (job, fresh, _training):
        same = {n: all(torch.equal(t, fresh[n][k]) for k, t in a.tensors().items()) for n, a in job.adapters.items()}
        assert same == {n: n == "fc1" for n in job.adapters}


def test_without_a_gradient_nothing_turns(place):
    """All answers are right for sure: the gradient is zero."""

    def sure(job):
        with torch.no_grad():
            head = job.module.get_submodule("fc2")
            head.bias.copy_(torch.tensor([1e4, 0, 0, 0, 0]))

    x = next(iter(data().batches(60))).inputs["x"]
    with begun(place, "lora", 2, Data.of_arrays({"x": x}, np.zeros(60, np.int64)), before=sure) as (job, fresh, _):
        for name, adapter in job.adapters.items():
            assert all(torch.equal(t, fresh[name][k]) for k, t in adapter.tensors().items())


@pytest.mark.parametrize(
    ("options", "looked"),
    [({"steps": 400}, 8), ({"steps": 60}, 3), ({"steps": 5}, 1), ({"max_seconds": 1e-3}, 1), ({"max_seconds": 1e4}, 8)],
)
def test_looking_is_a_small_part_of_a_run(place, options, looked):
    with begun(place, "lora", 2, **options) as (job, _fresh, training):
        wanted = gradients(job, training, looked)["fc1"]
        assert_spans(job.adapters["fc1"].lora_A.detach(), leading(wanted, 2))


def test_looking_takes_a_small_part_of_the_seconds_that_are_given(place, monkeypatch):
    """Two seconds a batch, two looks, a tenth of 120 seconds: three batches."""
    from lrcompress.recover import turning

    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(turning, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with begun(place, "lora", 2, max_seconds=120.0) as (job, _fresh, training):
        wanted = gradients(job, training, 3)["fc1"]
        assert_spans(job.adapters["fc1"].lora_A.detach(), leading(wanted, 2))
