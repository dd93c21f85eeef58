"""A small compressed network and a run of `recover` on it, for tests of what recovery does and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lrcompress.data import Data
from lrcompress.model import InputSpec
from lrcompress.verbs.factorize import factorize
from lrcompress.verbs.recover import RecoverResult, recover
from tests.support import training
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


def small_compressed(folder: Path) -> Path:
    """Write `small` and, calibrated, a fifth of it into `folder`."""
    torch.save(small().state_dict(), folder / "model.pt")
    x, _y = images()
    calib = Data.of_arrays({"x": x})
    factorize(
        folder / "model.pt",
        ratio=0.2,
        calib=calib,
        arch="tests.support.nets:small",
        inputs=SPEC,
        output=folder / "compressed",
    )
    return folder


def data(n: int = 160, seed: int = 1) -> Data:
    """Return labelled images."""
    return training.data(n, seed)


def run(base: Path, **options: Any) -> RecoverResult:
    """Recover it for sixty steps."""
    # A temperature at which each sample is asked once, and bounds that a loss in units of probability can keep.
    plain = {"data": data(), "steps": 60, "rank": 4, "threads": 1, "temperature": 2.0, "mix": False}
    return recover(base / "compressed", **{**plain, **options})
