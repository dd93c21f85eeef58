"""How a payload stores the numbers of a tensor: f32, f16, and codes of 8 or 4 bits with scales that broadcast.

    f32, f16    the tensor itself, under its name
    int8        `<name>.q`: codes of -127…127, and `<name>.scale`
    int4        `<name>.<shape>` with a shape as 8x64x3x3: codes of -7…7, a row for each scale, two in a byte, the earlier one
                in the low bits; where they are odd in number, the last high bits are zero. `<name>.scale`: one for each
                row. Vectors, which would take a scale for each number, stay as they are.

Scales of int8 hold the largest number exactly. Four bits cannot afford that: of a few scales the one of the least squared
error is taken. What was rounded once stays as it is: a scale s = x / 7 comes back from 7 s, which rounds to x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .errors import PayloadError

ENCODINGS = ("f32", "f16", "int8", "int4")
#: An earlier payload's scale is kept if it is at most so many times the one that would be chosen now.
EARLIER_SCALE = 1.5
#: The largest code of four bits.
_MOST = 7
#: Parts of the largest number that four bits may end at.
_ENDS = np.linspace(1.0, 0.35, 27, dtype=np.float32)
_SHAPE = re.compile(r"(0|[1-9][0-9]{0,8})(x(0|[1-9][0-9]{0,8})){1,7}")

Stored = dict[str, np.ndarray]


def stored_bytes(shape: Sequence[int], encoding: str) -> int:
    """Return what the numbers of a tensor take in a payload: codes and their scales; names and golden outputs come on top."""
    size = math.prod(shape)
    if encoding == "int4" and len(shape) >= 2:
        rows, row = _rows(shape)
        return rows * (-(-row // 2) + 4)
    if encoding == "int8":
        return size + 4 * (shape[_scaled_axis(shape)] if shape else 1)
    return size * (2 if encoding == "f16" else 4)


def as_stored(value: np.ndarray, encoding: str) -> np.ndarray:
    """Return what a device decodes of a tensor that is stored so, which is itself when it is stored so again."""
    return decode(encode("value", np.asarray(value, np.float32), encoding), encoding)["value"]


def encode(name: str, value: np.ndarray, encoding: str, earlier: np.ndarray | None = None) -> Stored:
    """Return what is stored of a tensor. `earlier`: scales of int8 that are used where they suit.

    Raises `PayloadError` for numbers that the encoding does not hold.
    """
    if not np.isfinite(value).all():
        raise PayloadError(f"payload: {name}", "finite numbers", "NaN or infinity")
    if encoding == "f32" or (encoding == "int4" and value.ndim < 2):
        return {name: value.astype("<f4")}
    if encoding == "f16":
        if value.size and float(np.abs(value).max()) > 65504:
            got = f"{np.abs(value).max():.3g}"
            raise PayloadError(f"payload: {name}", "numbers that float16 holds", got, "use f32")
        return {name: value.astype("<f2")}
    if encoding == "int4":
        return _encode_halves(name, value)
    largest = _largest(value)
    # A scale that underflows to zero would divide by it.
    scale = np.maximum(np.where(largest > 0, largest, 1.0) / 127, np.finfo(np.float32).tiny).astype("<f4")
    if earlier is not None and earlier.shape == scale.shape:
        suits = (earlier >= scale) & (earlier <= EARLIER_SCALE * scale) | ((largest == 0) & (earlier > 0))
        scale = np.where(suits, earlier, scale).astype("<f4")
    return {f"{name}.q": np.clip(np.rint(value / scale), -127, 127).astype("i1"), f"{name}.scale": scale}


def decode(stored: Mapping[str, np.ndarray], encoding: str) -> Stored:
    """Return tensors as float32. Raises `PayloadError` for what is not stored as `encoding` says."""
    if encoding == "int8":
        out = _decode_bytes(stored)
    elif encoding == "int4":
        out = _decode_halves(stored)
    else:
        out = {name: _plain(name, value, "<f4" if encoding == "f32" else "<f2") for name, value in stored.items()}
    for name, value in out.items():
        if not np.isfinite(value).all():
            raise PayloadError(f"payload: {name}", "finite numbers", "NaN or infinity")
    return out


def holdable(shape: Sequence[int]) -> bool:
    """Tell whether an array may have this shape: even one without numbers may not be any number of times empty."""
    return math.prod(max(d, 1) for d in shape) < 1 << 40


def _scaled_axis(shape: Sequence[int]) -> int:
    """Return the axis that has a scale for each index: the first, or the second where the first is longer than all others
    together. Of two that is the rank, so scales cost little.
    """
    return 0 if len(shape) < 2 or shape[0] <= math.prod(shape[1:]) else 1


def _largest(value: np.ndarray) -> np.ndarray:
    """Return the largest size of a number by scale."""
    axes = tuple(i for i in range(value.ndim) if i != _scaled_axis(value.shape))
    found: np.ndarray = np.max(np.abs(value), axis=axes, keepdims=True, initial=0.0)
    return found


def _plain(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    if value.dtype != np.dtype(dtype):
        raise PayloadError(f"payload: {name}", f"dtype {np.dtype(dtype)}", value.dtype)
    return value.astype(np.float32)


def _times(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        found: np.ndarray = codes.astype(np.float32) * scale
    return found


def _decode_bytes(stored: Mapping[str, np.ndarray]) -> Stored:
    out: Stored = {}
    for name, q in stored.items():
        if name.endswith(".scale"):
            if name.removesuffix(".scale") + ".q" not in stored:
                raise PayloadError(f"payload: {name}", "codes beside the scale", "none")
            continue
        scale = stored.get(name.removesuffix(".q") + ".scale") if name.endswith(".q") else None
        if scale is None or q.dtype != np.int8 or scale.dtype != np.float32 or scale.ndim != q.ndim:
            expected = "int8 codes and a float32 scale of the same number of axes"
            raise PayloadError(f"payload: {name}", expected, q.dtype)
        if any(s not in (1, d) for s, d in zip(scale.shape, q.shape, strict=True)):
            got = f"{list(scale.shape)} over {list(q.shape)}"
            raise PayloadError(f"payload: {name}", "a scale that broadcasts", got)
        out[name.removesuffix(".q")] = _times(q, scale)
    return out


# four bits ------------------------------------------------------------------------------------------------------------


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return (scales, numbers that share one) of a tensor of two axes or more."""
    rows = shape[_scaled_axis(shape)]
    return rows, math.prod(shape) // rows if rows else 0


def _encode_halves(name: str, value: np.ndarray) -> Stored:
    rows = np.moveaxis(value, _scaled_axis(value.shape), 0).reshape(_rows(value.shape))
    largest = np.abs(rows).max(1, keepdims=True, initial=0.0)
    scale, least = np.ones_like(largest), np.full(largest.shape, np.inf)
    for end in _ENDS:
        tried = np.maximum(largest * end / np.float32(_MOST), np.finfo(np.float32).tiny)
        error = np.square(_codes(rows, tried) * tried - rows, dtype=np.float64).sum(1, keepdims=True)
        scale, least = np.where(error < least, tried, scale), np.minimum(error, least)
    codes = _codes(rows, scale).astype("i1").view("u1") & 15
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    shape = "x".join(map(str, value.shape))
    return {f"{name}.{shape}": codes[:, ::2] | codes[:, 1::2] << 4, f"{name}.scale": scale[:, 0].astype("<f4")}


def _codes(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.clip(np.rint(rows / scale), -_MOST, _MOST)
    return found


def _decode_halves(stored: Mapping[str, np.ndarray]) -> Stored:
    out: Stored = {}
    parts = {name: name.rpartition(".") for name, value in stored.items() if value.dtype == np.uint8}
    for name, (base, _, shape) in parts.items():
        scale = stored.get(f"{base}.scale")
        if base in out or not _SHAPE.fullmatch(shape) or scale is None or scale.dtype != np.float32:
            expected = "int4 codes, once, under a name that ends in their shape, and a float32 scale"
            raise PayloadError(f"payload: {name}", expected, "none" if scale is None else scale.dtype)
        out[base] = _decode_rows(name, stored[name], scale, [int(d) for d in shape.split("x")])
    known = {*parts, *(f"{base}.scale" for base in out)}
    for name, value in stored.items():
        if name in known:
            continue
        if value.ndim >= 2 or name in out:
            raise PayloadError(f"payload: {name}", "int4 codes", f"{value.dtype} {list(value.shape)}")
        out[name] = _plain(name, value, "<f4")
    return out


def _decode_rows(name: str, pairs: np.ndarray, scale: np.ndarray, shape: list[int]) -> np.ndarray:
    if not holdable(shape):
        raise PayloadError(f"payload: {name}", "a shape that an array may have", shape)
    rows, row = _rows(shape)
    if pairs.shape != (rows, -(-row // 2)) or scale.shape != (rows,):
        expected = f"{[rows, -(-row // 2)]} bytes and {rows} scales"
        raise PayloadError(f"payload: {name}", expected, f"{list(pairs.shape)} and {list(scale.shape)}")
    halves = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, 2 * pairs.shape[1])
    codes = (halves.astype("i1") ^ 8) - 8
    if (codes == -8).any() or codes[:, row:].any():
        raise PayloadError(f"payload: {name}", f"codes of {-_MOST} to {_MOST}, and zero after the last", "another one")
    value = _times(codes[:, :row], scale[:, None])
    axis = _scaled_axis(shape)
    return np.moveaxis(value.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis)
