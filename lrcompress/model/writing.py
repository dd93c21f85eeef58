"""Write tensors as safetensors, one at a time: one file, or shards with an index where they are many.

The bytes of one file are those of the safetensors library; it takes all tensors at once, this one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..files import write_json
from .stored import described, reader

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Above this size the tensors go into several files, as Hugging Face does it.
SHARD_BYTES = 5_000_000_000

#: The types by the order that the library writes them in, which is that of its own list.
_ORDER = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64",
}  # fmt: skip
_RANK = {dtype: i for i, dtype in enumerate(_ORDER)}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write `tensors` into `folder`; return the hex SHA-256 of the bytes of each.

    Equal tensors give equal files. Raises `ValueError` for a dtype that the format does not have.
    """
    about = described(tensors)
    shards = _shards(about, shard_bytes)
    if len(shards) == 1:
        return _write(folder / TENSORS, tensors, shards[0])
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        shard = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        hashes |= _write(folder / shard, tensors, names)
        weight_map |= dict.fromkeys(names, shard)
    total = sum(t.nbytes for t in about.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes


def weights_of(folder: Path) -> Path:
    """Return the file that `write_tensors` left in a folder: the index of shards, or the one file."""
    return folder / INDEX if (folder / INDEX).is_file() else folder / TENSORS


def _shards(about: Mapping[str, Tensor], most_bytes: int) -> list[list[str]]:
    """Return names in order, cut where the next tensor would exceed the size."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(about):
        if shards[-1] and size + about[name].nbytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += about[name].nbytes
    return shards


def _write(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, str]:
    about, read = described(tensors), reader(tensors)
    unknown = next((n for n in names if about[n].dtype not in _RANK), None)
    if unknown is not None:
        raise ValueError(f"{unknown}: safetensors has no {about[unknown].dtype}")
    order = sorted(names, key=lambda n: (-_RANK[about[n].dtype], n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        end = at + about[name].nbytes
        header[name] = {
            "dtype": _ORDER[about[name].dtype], "shape": list(about[name].shape), "data_offsets": [at, end]
        }  # fmt: skip
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = read(name).detach().cpu().contiguous()
            hashes[name] = _append(f, value)
            del value  # or it would be there beside the next one
        if f.tell() != 8 + len(text) + at:
            raise RuntimeError(f"{path}: a tensor is not of the size that was described")
    return hashes


def _append(f: BinaryIO, value: Tensor) -> str:
    if not value.numel():
        return hashlib.sha256().hexdigest()
    data = value.reshape(-1).view(torch.uint8).numpy().data
    f.write(data)
    return hashlib.sha256(data).hexdigest()
