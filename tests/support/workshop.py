"""A folder to work in on the command line: a small model, its compressed checkpoint, and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.model import InputSpec
from tests.support.nets import images, small

ROOT = Path(__file__).resolve().parents[2]
ARCH = ("--arch", "tests.support.nets:small")
X, Y = images(24)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict, its compressed checkpoint, an adapter's training data."""
    folder = tmp_path_factory.mktemp("ready")
    torch.save(small().state_dict(), folder / "model.pt")
    np.savez(folder / "train.npz", x=X, y=Y)
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(folder / "model.pt", rank=4, arch=ARCH[1], inputs=spec, output=folder / "compressed")
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of one's own with a good model in it."""
    for name in ("model.pt", "train.npz"):
        shutil.copy(ready / name, tmp_path)
    shutil.copytree(ready / "compressed", tmp_path / "ok" / "compressed")
    shutil.copy(ready / "model.pt", tmp_path / "ok")
    spec = json.loads((tmp_path / "ok/compressed/lrcompress.json").read_text())
    spec["source"]["path"] = "../model.pt"
    (tmp_path / "ok/compressed/lrcompress.json").write_text(json.dumps(spec))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
