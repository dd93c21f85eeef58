"""A compressed folder on its way to the runtime, as tests of single forms see it off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.model.checkpoint import load_compressed


def loaded_and_exported(made: Any, folder: Path, x: Tensor, exported: Path) -> tuple[nn.Module, Tensor]:
    """Assert that a folder loads to what `made` answers, bit for bit, and dense alike; export it; return both."""
    back = load_compressed(folder).module
    with torch.no_grad():
        expected = made.model(x)
        assert torch.equal(back(x), expected)
        torch.testing.assert_close(lrcompress.to_dense(back)(x), expected, rtol=1e-4, atol=1e-5)
    lrcompress.export(folder, output=exported)
    return back, expected
