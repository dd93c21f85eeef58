"""Tensors that stay in their files: the same numbers and digest whatever the container, and never all at once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lrcompress.errors import ModelError
from lrcompress.model import open_model, stored
from lrcompress.model.stored import StoredTensors, open_index, open_stored
from lrcompress.model.tensors import digest_tensors, examine

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("safetensors", "pt", "older pt", "shards")


def sample() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, generator=g)
    return {
        "b.weight": w, "a.weight": w.half(), "c.weight": w.bfloat16(), "d": w.double(), "n": torch.tensor(7),
        "flag": torch.tensor([True, False]), "bytes": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0, 3),
        "tiny": w.to(torch.float8_e4m3fn), "z": torch.complex(w, w),
    }  # fmt: skip


def written(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> StoredTensors:
    if kind == "safetensors":
        save_file(tensors, folder / "m.safetensors")
        return open_stored(folder / "m.safetensors")
    if kind == "shards":
        names = sorted(tensors)
        save_file({n: tensors[n] for n in names[:4]}, folder / "one.safetensors")
        torch.save({n: tensors[n] for n in names[4:]}, folder / "two.bin")
        weight_map = {n: "one.safetensors" if i < 4 else "two.bin" for i, n in enumerate(names)}
        (folder / "i.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return open_index(folder / "i.index.json")
    torch.save(tensors, folder / "m.pt", _use_new_zipfile_serialization=kind == "pt")
    return open_stored(folder / "m.pt")


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8) if t.numel() else t


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_tensors_and_digest(tmp_path, kind):
    tensors = sample()
    if kind == "older pt":
        del tensors["tiny"]  # torch.save cannot write it there
    found = written(tmp_path, kind, tensors)
    assert set(found) == set(tensors) and len(found) == len(tensors)
    for name, value in tensors.items():
        about = found.described()[name]
        assert about.is_meta and about.dtype == value.dtype and about.shape == value.shape
        for read in (found.read(name), found[name]):
            assert read.dtype == value.dtype and read.shape == value.shape
            assert torch.equal(as_bytes(read), as_bytes(value)), name
        reference = found.reference(name)
        if reference is None:
            assert kind == "older pt"
            continue
        assert torch.equal(as_bytes(pickle.loads(pickle.dumps(reference)).read()), as_bytes(value)), name
    assert examine(found, "here") == digest_tensors(found) == digest_tensors(tensors)


def test_a_mapping_is_renewed_and_what_was_read_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_RENEW_BYTES", 200)
    tensors = {f"l{i}": torch.full((10, 5), float(i)) for i in range(5)}
    found = written(tmp_path, "pt", tensors)
    opened = []
    load = stored.load_pickle
    monkeypatch.setattr(stored, "load_pickle", lambda path: opened.append(path) or load(path))
    kept = [found.read(n) for n in tensors]
    assert len(opened) == 4
    assert all(torch.equal(k, t) for k, t in zip(kept, tensors.values(), strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_that_changes_is_noticed(tmp_path, kind):
    tensors = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    found = written(tmp_path, kind, tensors)
    reference = found.reference("a")
    written(tmp_path, kind, {"a": torch.zeros(4, 4), "b": torch.ones(4, 4)})
    for read in (lambda: found.read("a"), reference.read):
        with pytest.raises(ModelError, match=r"as it was when it was opened.*got another one"):
            read()


def test_tied_names_are_one_tensor(tmp_path):
    w = torch.randn(4, 4)
    torch.save({"a.weight": w, "b.weight": w, "c.weight": w.clone(), "d.weight": w.T}, tmp_path / "m.pt")
    about = open_stored(tmp_path / "m.pt").described()
    assert about["a.weight"] is about["b.weight"]
    assert len({id(t) for t in about.values()}) == 3


def test_a_prefix_is_said_once(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(stored, "_RENEW_BYTES", 1)
    torch.save({f"module.l{i}": torch.ones(3) for i in range(4)}, tmp_path / "m.pt")
    found = open_stored(tmp_path / "m.pt")
    assert all(found.read(n).sum() == 3 and found.reference(n).read().sum() == 3 for n in found)
    assert [str(w.message).count("stripped") for w in recwarn if "stripped" in str(w.message)] == [1]


@pytest.mark.parametrize("where", [0, 3_999_999, 4_000_000, 8_999_999])
def test_one_infinity_among_millions_is_found(where):
    w = torch.zeros(3000, 3000, dtype=torch.float16)
    w.view(-1)[where] = float("inf")
    with pytest.raises(ModelError, match=r"here: w: expected finite weights, got 0 NaN and 1 infinite of 9000000"):
        examine({"w": w}, "here")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_opening_holds_one_tensor_at_a_time(tmp_path, kind):
    """16 tensors of 16 MB are opened, checked and hashed; at most half of their sum is in memory at any moment (mapped pages count too)."""
    written(tmp_path, kind, {f"l{i:02d}.weight": torch.randn(2048, 2048) for i in range(16)})
    code = """
import sys, torch
from lrcompress.model import open_model
def kib(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])
torch.isfinite(torch.zeros(5_000_000)).all()
before = kib("VmRSS")
open_model(sys.argv[1])
print((kib("VmHWM") - before) * 1024)
"""
    path = next(p for p in tmp_path.iterdir() if p.name.startswith("m."))
    run = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout)
    assert grown < 8 * 16_777_216, f"{grown / 1e6:.0f} MB"


def test_an_opened_state_dict_is_not_in_memory(tmp_path):
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    opened = open_model(tmp_path / "m.safetensors")
    assert isinstance(opened.tensors, StoredTensors) and not opened.tensors._mapped
