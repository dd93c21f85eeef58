"""A statement in words and as a formula, and how it is tried: a function of a size and a seeded generator.

dimension("The set of rank-r matrices", "r(m + n − r)", sizes, shapes, build, count)
Statement("…", "rank(B⊗C) = rank B · rank C", sizes, lambda size, g: equal(size_text, expected, found))
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Singular values below this share of the largest count as zero, in ranks and dimensions.
THRESHOLD = 1e-7
#: Two matrices are the same if they differ by no more than this share of their size.
EXACT = 1e-10

Size = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One trial: at which size, what the statement says there, what was found."""

    size: str
    expected: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Checked:
    """A statement after its trials."""

    statement: Statement
    cases: tuple[Case, ...]

    @property
    def holds(self) -> bool:
        return all(c.holds for c in self.cases)

    def facts(self) -> dict[str, Any]:
        cases = [{"size": c.size, "expected": c.expected, "found": c.found, "holds": c.holds} for c in self.cases]
        return {"words": self.statement.words, "formula": self.statement.formula, "cases": cases, "holds": self.holds}


@dataclass(frozen=True)
class Statement:
    """`words`: one sentence; `formula`; `trial(size, generator)` makes one case of each of `sizes`."""

    words: str
    formula: str
    sizes: Sequence[Size]
    trial: Callable[[Size, torch.Generator], Case]

    def check(self, seed: int = 0) -> Checked:
        """Try every size; the same seed draws the same factors, whichever statements are checked beside this one."""
        cases = []
        for i, size in enumerate(self.sizes):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{i}/{self.words}".encode()))
            cases.append(self.trial(size, generator))
        return Checked(self, tuple(cases))


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw a Gaussian tensor, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def low(generator: torch.Generator, rows: int, columns: int, rank: int) -> Tensor:
    """Draw a matrix of the given rank."""
    return random(generator, rows, rank) @ random(generator, rank, columns)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def rank_of(matrix: Tensor) -> int:
    """Return the numerical rank: singular values above THRESHOLD·σ₁."""
    values = torch.linalg.svdvals(matrix)
    return int((values > THRESHOLD * values[0]).sum()) if values.numel() and float(values[0]) > 0 else 0


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def jacobian_rank(build: Callable[..., Tensor], factors: Sequence[Tensor]) -> int:
    """Return the dimension of the set that `build` reaches around `factors`: the rank of its Jacobian there."""
    parts = torch.func.jacfwd(lambda *f: build(*f).reshape(-1), argnums=tuple(range(len(factors))))(*factors)
    return rank_of(torch.cat([p.reshape(p.shape[0], -1) for p in parts], 1))


def equal(size: str, expected: int, found: int, what: str = "") -> Case:
    """The case that two counts agree."""
    suffix = f" {what}" if what else ""
    return Case(size, f"{expected}{suffix}", f"{found}{suffix}", expected == found)


def same(size: str, error: float) -> Case:
    """The case that two matrices are the same but for rounding."""
    return Case(size, "no difference", f"relative difference {error:.0e}", error <= EXACT)


def dimension(
    words: str,
    formula: str,
    sizes: Sequence[Size],
    *,
    shapes: Callable[[Size], Sequence[Size]],
    build: Callable[..., Tensor],
    count: Callable[[Size], int],
    text: Callable[[Size], str],
) -> Statement:
    """State that the set built from factors of `shapes(size)` has dimension `count(size)`."""

    def trial(size: Size, generator: torch.Generator) -> Case:
        factors = [random(generator, *shape) for shape in shapes(size)]
        numbers = sum(math.prod(shape) for shape in shapes(size))
        found = jacobian_rank(build, factors)
        return Case(text(size), str(count(size)), f"{found} from {numbers} numbers", found == count(size))

    return Statement(words, formula, sizes, trial)
