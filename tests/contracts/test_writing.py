"""Checkpoints are written tensor by tensor: the bytes of the library, or shards that read as one."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lrcompress
from lrcompress.model import writing
from lrcompress.model.checkpoint import load_compressed, open_weights, tensors_digest
from lrcompress.model.stored import held
from lrcompress.model.writing import write_tensors
from tests.support.nets import small

DTYPES = [d for d in writing._ORDER if d not in (torch.complex64,)]
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def filled(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2, (size,), generator=g, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8))
def test_one_file_has_the_bytes_of_the_library(tmp_path, wanted):
    tensors = {n: filled(shape, dtype, i) for i, (n, (shape, dtype)) in enumerate(wanted.items())}
    hashes = write_tensors(tmp_path, held(tensors))
    save_file({n: tensors[n] for n in sorted(tensors)}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert set(hashes) == set(tensors)


@pytest.mark.parametrize("most", [1, 400, 900, 10_000])
def test_shards_read_as_one(tmp_path, most):
    tensors = {f"l{i}.weight": torch.randn(i + 1, 20) for i in range(9)} | {"n": torch.tensor(3)}
    write_tensors(tmp_path, tensors, shard_bytes=most)
    files = sorted(p.name for p in tmp_path.iterdir())
    if most == 10_000:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert files == sorted({*index["weight_map"].values(), "model.safetensors.index.json"})
        for shard in set(index["weight_map"].values()):
            part = load_file(tmp_path / shard)
            assert {n for n, s in index["weight_map"].items() if s == shard} == set(part)
            assert sum(t.nbytes for t in part.values()) <= most or len(part) == 1
    found = open_weights(writing.weights_of(tmp_path))
    assert all(torch.equal(found.read(n), t) for n, t in tensors.items()) and set(found) == set(tensors)
    assert tensors_digest(found, {}) == tensors_digest(tensors, {})


@pytest.mark.parametrize("arch", [None, "tests.support.nets:small"])
def test_a_sharded_checkpoint_is_the_same_model(tmp_path, monkeypatch, arch):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    lrcompress.factorize(tmp_path / "m.pt", rank=4, arch=arch, output=tmp_path / "one")
    monkeypatch.setattr("lrcompress.model.checkpoint.write_compressed.__kwdefaults__", {"shard_bytes": 5000})
    lrcompress.factorize(tmp_path / "m.pt", rank=4, arch=arch, output=tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = load_compressed(tmp_path / "one"), load_compressed(tmp_path / "many")
    assert one.digest == many.digest
    if arch is None:
        assert set(one.tensors) == set(many.tensors)
        assert all(torch.equal(one.tensors[n], many.tensors[n]) for n in one.tensors)
    else:
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(one.module(x), many.module(x))
    shard = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(lrcompress.errors.ModelError, match="digest"):
        load_compressed(tmp_path / "many")


def test_a_tensor_of_another_size_than_described_is_a_bug(tmp_path):
    tensors = held({"w": torch.ones(4, 4)})
    tensors.described()["w"].resize_(5, 4)
    with pytest.raises(RuntimeError, match="size"):
        write_tensors(tmp_path, tensors)


def test_a_type_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"w: safetensors has no torch\.complex128"):
        write_tensors(tmp_path, {"w": torch.zeros(2, dtype=torch.complex128)})
