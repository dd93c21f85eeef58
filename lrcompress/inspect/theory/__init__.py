"""What each form can represent, checked numerically when asked: one file per form.

A file states `FORMULA` and `STATEMENTS`; its name is the name of the page. Every statement is tried at several
sizes on seeded random factors in float64: a dimension is the rank of the Jacobian of the parametrisation.

    for page in pages("hadamard"):
        for statement in page.statements:
            assert statement.check(seed=0).holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import plugins
from ._statement import Case, Checked, Statement

__all__ = ["Case", "Checked", "Page", "Statement", "names", "pages"]


@dataclass(frozen=True)
class Page:
    """The statements on one form."""

    name: str
    formula: str
    statements: Sequence[Statement]


def names() -> tuple[str, ...]:
    """Return the forms that have a page."""
    return plugins.names(__name__)


def pages(name: str) -> list[Page]:
    """Return the page of a form, or of every one for "all". Raises `KeyError` with the nearest name."""
    return [
        Page(n, m.FORMULA, m.STATEMENTS)
        for n in (names() if name == "all" else (name,))
        for m in (plugins.load(__name__, n),)
    ]
