"""What commands ask alike, checked before anything heavy is imported: sizes, and patterns on layer names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from ..errors import CommandError, ModelError

if TYPE_CHECKING:
    from ..graphs import GraphLayer
    from ..model.surgery import Layer

L = TypeVar("L", "Layer", "GraphLayer")


def check_sizes(rank: int | None, ratio: float | None, energy: float | None, plan: object) -> None:
    """Refuse anything but exactly one of the four ways to say how small, each in its range."""
    where = "lrcompress factorize"
    sizes = (("--rank", rank), ("--ratio", ratio), ("--energy", energy), ("--plan", plan))
    given = [name for name, value in sizes if value is not None]
    if len(given) != 1:
        expected = "exactly one of --rank, --ratio, --energy, --plan"
        raise CommandError(where, expected, " and ".join(given) or "none", "for example --rank 16")
    if rank is not None and rank < 1:
        raise CommandError(f"{where} --rank", "a whole number of at least 1", rank, "for example --rank 16")
    for name, share in (("--ratio", ratio), ("--energy", energy)):
        if share is not None and not 0 < share <= 1:
            raise CommandError(f"{where} {name}", "a number above 0 and at most 1", share)


def marked(layers: Sequence[L], include: Sequence[str], exclude: Sequence[str], *, verb: str, where: object) -> list[L]:
    """Return `layers`; those that the patterns leave out carry that as their reason."""
    if not layers:
        raise ModelError(where, "at least one linear, convolution or embedding layer", "none")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                near = ", ".join(layer.name for layer in layers[:4])
                got = f"layers are {near}, …"
                raise CommandError(f"lrcompress {verb} {option}", "a pattern that matches a layer", pattern, got)
    return [replace(layer, reason=left_out(layer.name, include, exclude) or layer.reason) for layer in layers]


def left_out(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Return which option leaves a layer of this name out, or None."""
    if include and not any(fnmatchcase(name, p) for p in include):
        return "not in --include"
    return "in --exclude" if any(fnmatchcase(name, p) for p in exclude) else None
