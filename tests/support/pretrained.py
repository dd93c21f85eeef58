"""Where pretrained models and their data are, for tests that are worth nothing without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


def assets() -> Path:
    """Return the folder of pretrained models, or skip with the reason; under CI a folder that is there must be used."""
    place = Path(os.environ.get("LRCOMPRESS_ASSETS") or TOP.parent / "shared" / "assets")
    missing = [n for n in ("models", "data") if not (place / n).is_dir()]
    if missing:
        if place.is_dir() and os.environ.get("CI") == "true":
            pytest.fail(f"{place} is there, but without {', '.join(missing)}")
        pytest.skip(f"no pretrained models at {place} (set LRCOMPRESS_ASSETS)")
    return place
