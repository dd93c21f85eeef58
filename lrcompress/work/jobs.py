"""What can be computed of one weight alone: its factors at a rank, or the curve of a form."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..errors import PlanError
from ..factorize import Factorization, Point, Rank, Refused, Statistics, form
from ..files import canonical_json
from ..model.stored import Reference
from ..model.tensors import update_digest

R = TypeVar("R")
_MOMENTS = ("gram", "mean", "output_gram", "row_weights")


class Packed(NamedTuple):
    """A result as named tensors and plain JSON values."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


class Curve(NamedTuple):
    """What an allocator needs of one form for one weight: its points, and the loss of having nothing."""

    points: list[Point]
    total: float


class Task(Protocol[R]):
    """What `run` asks of a job."""

    def key(self, threads: int) -> str: ...

    def compute(self, threads: int) -> Packed: ...

    def unpack(self, packed: Packed) -> R: ...

    def by_value(self) -> Task[R]: ...


@dataclass(frozen=True)
class _WeightJob(Generic[R]):
    """A job on one weight: a tensor, or a reference to one in a file."""

    weight: Tensor | Reference = field(repr=False)
    form: str
    statistics: Statistics | None = field(default=None, repr=False)

    @property
    def settings(self) -> list[Any]:
        """What else decides the result."""
        raise NotImplementedError

    def key(self, threads: int) -> str:
        """Return the hash of everything that the result depends on."""
        total = hashlib.sha256()
        kind = type(self).__name__
        total.update(canonical_json([kind, self.form, self.settings, threads, __version__, torch.__version__]))
        update_digest(total, "weight", self._weight())
        if self.statistics is not None:
            s = self.statistics
            total.update(canonical_json([s.count, s.positions.hex(), s.groups]))
            for name in _MOMENTS:
                value = getattr(s, name)
                if value is not None:
                    update_digest(total, name, value)
        return total.hexdigest()

    def by_value(self) -> Any:
        """Return a copy that needs no file, and no more memory in a message than its numbers."""
        moments = None
        if self.statistics is not None:
            # Without the roots that the statistics keep once they were asked for.
            own: dict[str, Any] = {n: _own(getattr(self.statistics, n)) for n in _MOMENTS}
            moments = replace(self.statistics, **own)
        weight: Any = self._weight() if isinstance(self.weight, Reference) else _own(self.weight)
        return replace(self, weight=weight, statistics=moments)

    def for_process(self) -> Any:
        """Return what a process of this machine takes: a reference stays one."""
        return replace(self.by_value(), weight=self.weight) if isinstance(self.weight, Reference) else self.by_value()

    def _weight(self) -> Tensor:
        if isinstance(self.weight, Reference):
            _give_back()
            return self.weight.read()
        # In one order of memory: products of other orders round otherwise.
        return self.weight.detach().contiguous()


@functools.cache
def _trim() -> Callable[[int], int]:
    """Return the C library's way of giving freed memory back; nothing where it has none."""
    found: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    return found


def _give_back() -> None:
    """Give freed memory back before a large layer comes: pieces of many sizes otherwise leave a heap that grows."""
    _trim()(0)


@dataclass(frozen=True)
class Job(_WeightJob[Factorization]):
    """Decompose a weight: `options` are arguments that the form takes beside rank and statistics; errors say `name`."""

    rank: Rank = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "a layer"

    @property
    def settings(self) -> list[Any]:
        return [list(self.rank) if isinstance(self.rank, tuple) else self.rank, dict(self.options)]

    def compute(self, threads: int) -> Packed:
        torch.set_num_threads(threads)
        try:
            found: Factorization = form(self.form).decompose(self._weight(), self.rank, self.statistics, **self.options)
        except Refused as e:
            raise PlanError(f"{self.name}: {self.form}", e.expected, e.got, e.remedy) from e
        if found.extra:
            raise RuntimeError(
                f"{found.form} returned something beside factors, which is not kept: {list(found.extra)}"
            )
        tensors = {f"factor.{k}": v for k, v in found.factors.items()}
        if found.bias_shift is not None:
            tensors["bias_shift"] = found.bias_shift
        about = {
            "form": found.form,
            "factors": list(found.factors),
            "shape": list(found.shape),
            "rank": list(found.rank) if isinstance(found.rank, tuple) else found.rank,
            "norm": found.norm,
            **{n: float(getattr(found, n)).hex() for n in ("loss", "rel_error", "rel_error_frobenius")},
        }
        return Packed(tensors, about)

    def unpack(self, packed: Packed) -> Factorization:
        tensors, about = packed
        rank = tuple(about["rank"]) if isinstance(about["rank"], list) else about["rank"]
        measured: dict[str, Any] = {n: float.fromhex(about[n]) for n in ("loss", "rel_error", "rel_error_frobenius")}
        return Factorization(
            form=about["form"],
            factors={k: tensors[f"factor.{k}"] for k in about["factors"]},
            shape=tuple(about["shape"]),
            rank=rank,
            norm=about["norm"],
            bias_shift=tensors.get("bias_shift"),
            **measured,
        )


@dataclass(frozen=True)
class CurveJob(_WeightJob[Curve]):
    """Price every rank of a form for a weight."""

    @property
    def settings(self) -> list[Any]:
        return []

    def compute(self, threads: int) -> Packed:
        torch.set_num_threads(threads)
        weight = self._weight()
        points = form(self.form).curve(weight, self.statistics)
        total = (self.statistics or Statistics()).loss(weight)
        listed = [
            [list(p.rank) if isinstance(p.rank, tuple) else p.rank, p.n_params, float(p.loss).hex()] for p in points
        ]
        return Packed({}, {"points": listed, "total": total.hex()})

    def unpack(self, packed: Packed) -> Curve:
        points = [
            Point(tuple(r) if isinstance(r, list) else r, n, float.fromhex(loss))
            for r, n, loss in packed.about["points"]
        ]
        return Curve(points, float.fromhex(packed.about["total"]))


def _own(value: Tensor | None) -> Tensor | None:
    """Return a tensor that holds its numbers and no others: a view travels with all it is a view of."""
    if value is None:
        return None
    value = value.detach().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def encode(packed: Packed) -> bytes:
    """Return the JSON of what is not tensors, in its one form."""
    return canonical_json(packed.about)


def decode(data: bytes | str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(data)
    return value
