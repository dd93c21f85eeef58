"""Deltas: what turns one payload's bytes into another's, refused unless both ends are exactly those that were named.

    delta = build(base, result)                  # publisher
    result = apply(base, delta, max_bytes=…)     # device: PayloadError unless base and result have the named hashes

Layout: 8 bytes of magic, sha256 of the base, sha256 and length (u32) of the result, then one zlib stream of
header mode, modes of the tensors in the result's order, the header's text if it is another one, and the tensors' bytes.
A tensor is the base's (nothing is sent), a difference of codes to the base's of the same name, dtype and shape (words
modulo their size, byte by byte of all words, so that equal high bytes stand together), or as it is.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from .errors import PayloadError
from .files import sha256_bytes
from .payload import MAX_HEADER_BYTES, layout, parse

MAGIC = b"LRDELTA1"
_HEAD = struct.Struct("<8s32s32sI")
SAME, DIFFERENCE, RAW = 0, 1, 2
_WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


def build(base: bytes, result: bytes) -> bytes:
    """Return the delta from payload `base` to payload `result`. Raises `PayloadError` if either is none."""
    old, new = layout(base), layout(result)
    own_header = old.text != new.text
    modes, chunks = bytearray(), []
    for name, part in new.parts.items():
        before = old.parts.get(name)
        if before is None or (before.dtype, before.shape) != (part.dtype, part.shape):
            mode, chunk = RAW, part.data
        elif before.data == part.data:
            mode, chunk = SAME, b""
        else:
            mode, chunk = _smaller(before.data, part.data, part.dtype.itemsize)
        modes.append(mode)
        chunks.append(chunk)
    text = struct.pack("<I", len(new.text)) + new.text if own_header else b""
    stream = bytes([RAW if own_header else SAME]) + text + bytes(modes) + b"".join(chunks)
    hashes = bytes.fromhex(sha256_bytes(base)), bytes.fromhex(sha256_bytes(result))
    delta = _HEAD.pack(MAGIC, *hashes, len(result)) + zlib.compress(stream, 9)
    if apply(base, delta, max_bytes=len(result)) != result:
        raise AssertionError("a delta that does not lead to its result")
    return delta


def ends(delta: bytes) -> tuple[str, str, int]:
    """Return (sha256 of the base, sha256 of the result, length of the result) as the delta names them."""
    if len(delta) < _HEAD.size or not delta.startswith(MAGIC):
        raise PayloadError("delta", "a delta of this version", f"{len(delta)} bytes of something else")
    _, base, result, length = _HEAD.unpack_from(delta)
    return base.hex(), result.hex(), length


def apply(base: bytes, delta: bytes, *, max_bytes: int) -> bytes:
    """Return the result. Raises `PayloadError` for another base, a result that is not the named one, or no delta at all."""
    wanted, promised, length = ends(delta)
    if sha256_bytes(base) != wanted:
        raise PayloadError("delta: base", f"sha256 {wanted}", sha256_bytes(base), "fetch the whole payload")
    if length > max_bytes:
        raise PayloadError("delta: result", f"at most {max_bytes} bytes", length)
    old = layout(base)
    stream = _Stream(delta[_HEAD.size :], length + MAX_HEADER_BYTES)
    text = old.text if stream.take(1)[0] == SAME else stream.take(struct.unpack("<I", stream.take(4))[0])
    if len(text) + 8 > length:
        raise PayloadError("delta: header", f"at most {length} bytes", len(text))
    head = struct.pack("<Q", len(text)) + text
    new = layout(head + bytes(length - len(head)))  # the shapes; its numbers are not known yet
    modes = stream.take(len(new.parts))
    found = [head]
    for mode, (name, part) in zip(modes, new.parts.items(), strict=True):
        before = old.parts.get(name)
        fits = before is not None and (before.dtype, before.shape) == (part.dtype, part.shape)
        if mode not in (SAME, DIFFERENCE, RAW) or (mode != RAW and not fits):
            raise PayloadError(f"delta: {name}", "a tensor that the base has", f"mode {mode}")
        if mode == RAW or before is None:
            found.append(stream.take(len(part.data)))
        elif mode == SAME:
            found.append(before.data)
        else:
            found.append(_forward(before.data, stream.take(len(part.data)), part.dtype.itemsize))
    stream.end()
    result = b"".join(found)
    if sha256_bytes(result) != promised:
        raise PayloadError("delta: result", f"sha256 {promised}", sha256_bytes(result), "fetch the whole payload")
    parse(result)
    return result


def _smaller(before: bytes, after: bytes, size: int) -> tuple[int, bytes]:
    """Return the mode and bytes that compress better."""
    difference = _backward(before, after, size)
    if len(zlib.compress(difference, 6)) <= len(zlib.compress(after, 6)):
        return DIFFERENCE, difference
    return RAW, after


def _backward(before: bytes, after: bytes, size: int) -> bytes:
    words: np.ndarray = np.frombuffer(after, _WORDS[size]) - np.frombuffer(before, _WORDS[size])
    return np.ascontiguousarray(words.view("u1").reshape(-1, size).T).tobytes()


def _forward(before: bytes, planes: bytes, size: int) -> bytes:
    words = np.ascontiguousarray(np.frombuffer(planes, "u1").reshape(size, -1).T).view(_WORDS[size]).reshape(-1)
    found: np.ndarray = np.frombuffer(before, _WORDS[size]) + words
    return found.tobytes()


class _Stream:
    """What a zlib stream holds, which may be so long and no longer."""

    def __init__(self, data: bytes, limit: int) -> None:
        inflate = zlib.decompressobj()
        try:
            self._data = inflate.decompress(data, limit + 1)
        except zlib.error as e:
            raise PayloadError("delta: stream", "one that zlib reads", e) from None
        if len(self._data) > limit or not inflate.eof or inflate.unused_data:
            raise PayloadError("delta: stream", f"at most {limit} bytes and nothing after", "another length")
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise PayloadError("delta: stream", f"{count} bytes more", len(self._data) - self._at)
        self._at += count
        return self._data[self._at - count : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise PayloadError("delta: stream", "nothing after the tensors", f"{len(self._data) - self._at} bytes")
