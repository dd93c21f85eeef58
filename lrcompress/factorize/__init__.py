"""Decompositions: one file per form, pure functions over tensors, one frozen result type.

A form is a module of this package (or of the entry-point group `lrcompress.factorize`) with

    LAYERS: frozenset[str]                                  kinds it serves: "linear", "conv", "grouped", "embedding"
    serves(shape) -> bool                                   optional: whether it makes sense for a weight of this shape
    full_rank(shape) -> Rank                                the rank at which it is exact
    clip(shape, n) -> Rank                                  the rank that `--rank n` means for this shape
    n_params(shape, rank) -> int                            stored numbers, without bias
    decompose(weight, rank, statistics=None) -> Factorization    `Refused` where it would lose accuracy
    curve(weight, statistics=None) -> list[Point]           (rank, numbers, loss) that an allocator may choose from
    to_tensor(factors, shape) -> Tensor
    linear(factors, x) | conv(factors, x, geometry) | embedding(factors, ids)     the forward pass, factor by factor
    n_macs(shape, rank, positions) -> int
    factor_shapes(shape, rank) -> dict[str, tuple]          optional: shapes of the factors, what bits and times are told from
    AUTO = False                                            optional: "auto" does not choose it, a user may
    INTEGER: frozenset[str]                                 optional: factors that are positions, stored as int32
    PLAIN: str                                              optional: the same product at the same rank, in a plain gauge
    DENSE_AT_RUN_TIME = True                                optional: small on disk, rebuilt when it is loaded

Its key is its file name. The contract tests take every form from the directory listing.

    svd = form("svd")
    f = svd.decompose(W, 16, Statistics(gram=S, mean=mu))
    assert f.rel_error < 0.1
"""

from __future__ import annotations

from types import ModuleType

from .. import plugins
from ._anchor import Drift, anchored
from ._types import ConvGeometry, Factorization, Point, Rank, Refused, Statistics, shrunk

__all__ = [
    "ConvGeometry",
    "Drift",
    "Factorization",
    "Point",
    "Rank",
    "Refused",
    "Statistics",
    "anchored",
    "form",
    "forms",
    "shrunk",
]


def forms() -> tuple[str, ...]:
    """Return the keys of all forms."""
    return plugins.names(__name__)


def form(name: str) -> ModuleType:
    """Return the module of a form; "dense" is the weight as it is. Raises `KeyError` with the nearest name."""
    if name == "dense":
        from . import _dense

        return _dense
    return plugins.load(__name__, name)
