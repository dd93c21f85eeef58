"""Options that name some of what there is, refused before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return what reads names separated by commas, each one of `known`."""

    def names(text: str) -> list[str]:
        unknown = [n for n in text.split(",") if n not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
        return text.split(",")

    return names
