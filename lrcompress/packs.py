"""Packs: one file that brings a whole base model to a device, or what is new of it to one that has another base.

    data = build(files, cuts, start=old_id, result=new_id, known=ranges)      # publisher
    pack = Pack(blocks, most_bytes=…)                                         # device: PayloadError for a malformed one
    pack.check(start=old_id, result=new_id, sizes={"base.data": 14272, …})
    for file, content in pack.files(read_range): …

Layout: 8 bytes of magic, then one zlib stream: length (u32) and text of a header, then all new bytes in order.

    {"start": base_id | null, "result": base_id, "files": [[name, [[source, offset, length] | length, …]], …]}

A piece is a range of a file of the base that is started from, or so many of the new bytes. What comes out is believed
by nobody before its own hashes hold: a pack says how to make files, never what they must be.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PayloadError
from .files import canonical_json, sha256_bytes
from .manifest import MANIFEST, is_file_name, is_sha256, strict_json

MAGIC = b"LRBASE01"
MAX_HEADER_BYTES = 8 << 20
MAX_FILES, MAX_PIECES = 64, 200_000
#: What is read of a stream or of a range at once.
BLOCK_BYTES = 1 << 20
_REMEDY = "the publisher makes it again"

#: Returns the content of a range of a file of the base that is started from, in blocks.
Source = Callable[[str, int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Piece:
    """A range of `source`, or new bytes where that is None."""

    source: str | None
    offset: int
    length: int


@dataclass(frozen=True)
class File:
    """A file to be made."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        return sum(p.length for p in self.pieces)


@dataclass(frozen=True)
class Recipe:
    """The header of a pack."""

    start: str | None
    result: str
    files: tuple[File, ...]

    @property
    def length(self) -> int:
        """The bytes of all that is made."""
        return sum(f.length for f in self.files)

    @property
    def new_bytes(self) -> int:
        """How many of them are in the pack itself."""
        return sum(p.length for f in self.files for p in f.pieces if p.source is None)


# reading --------------------------------------------------------------------------------------------------------------


class Pack:
    """A pack that is read from `blocks`; its header is parsed at once. Whatever it makes is at most `most_bytes` long."""

    def __init__(self, blocks: Iterable[bytes], *, most_bytes: int) -> None:
        self._stream = _Stream(iter(blocks))
        (length,) = struct.unpack("<I", self._stream.take(4))
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise PayloadError("pack: header", f"at most {MAX_HEADER_BYTES} bytes", length, _REMEDY)
        self.recipe = parse(self._stream.take(length))
        if self.recipe.length > most_bytes:
            raise PayloadError("pack", f"files of at most {most_bytes} bytes", self.recipe.length, _REMEDY)

    def check(self, *, start: str | None, result: str, sizes: Mapping[str, int]) -> None:
        """Raise `PayloadError` unless this leads from `start`, whose files have these sizes, to `result`."""
        recipe = self.recipe
        if (recipe.start, recipe.result) != (start, result):
            raise PayloadError("pack", f"one from {start} to {result}", f"{recipe.start} to {recipe.result}", _REMEDY)
        for file in recipe.files:
            for p in file.pieces:
                if p.source is not None and p.offset + p.length > sizes.get(p.source, -1):
                    got = f"bytes {p.offset} to {p.offset + p.length} of {p.source}"
                    there = f"{sizes[p.source]} bytes" if p.source in sizes else "no such file"
                    raise PayloadError(f"pack: {file.name}", f"ranges within the base before ({there})", got, _REMEDY)

    def files(self, source: Source) -> Iterator[tuple[File, Iterator[bytes]]]:
        """Yield every file with its content, which must be read before the next one. Raises `PayloadError` at the end of a pack that holds more."""
        for file in self.recipe.files:
            yield file, self._content(file, source)
        self._stream.end()

    def _content(self, file: File, source: Source) -> Iterator[bytes]:
        for piece in file.pieces:
            if piece.source is not None:
                yield from source(piece.source, piece.offset, piece.length)
                continue
            left = piece.length
            while left:
                block = self._stream.some(min(left, BLOCK_BYTES))
                left -= len(block)
                yield block


def parse(text: bytes) -> Recipe:
    """Return the header of a pack. Raises `PayloadError` for every rule that it breaks."""

    def need(good: object, where: str, expected: str, got: object) -> None:
        if not good:
            raise PayloadError(f"pack: {where}", expected, got, _REMEDY)

    try:
        value = strict_json(text.decode())
    except ValueError as e:
        raise PayloadError("pack: header", "JSON", e, _REMEDY) from None
    need(
        isinstance(value, dict) and set(value) == {"start", "result", "files"}, "header", "start, result, files", value
    )
    start, result, listed = value["start"], value["result"], value["files"]
    need(start is None or is_sha256(start), "start", "a base id or null", start)
    need(is_sha256(result), "result", "a base id", result)
    need(isinstance(listed, list) and len(listed) <= MAX_FILES, "files", f"a list of at most {MAX_FILES}", listed)
    files, count = [], 0
    for entry in listed:
        need(isinstance(entry, list) and len(entry) == 2, "files", "[name, pieces]", entry)
        name, pieces = entry
        need(is_file_name(name), "files", "plain file names", name)
        need(isinstance(pieces, list), name, "a list of pieces", pieces)
        count += len(pieces)
        need(count <= MAX_PIECES, name, f"at most {MAX_PIECES} pieces", count)
        files.append(File(name, tuple(_piece(name, p, start) for p in pieces)))
    names = [f.name for f in files]
    need(len(set(names)) == len(names), "files", "different names", ", ".join(names))
    need(MANIFEST in names, "files", MANIFEST, ", ".join(names) or "none")
    return Recipe(start, result, tuple(files))


def _piece(name: str, value: Any, start: str | None) -> Piece:
    if _count(value):
        return Piece(None, 0, value)
    good = isinstance(value, list) and len(value) == 3 and is_file_name(value[0]) and all(map(_count, value[1:]))
    if not good or start is None:
        expected = "a number of new bytes" + ("" if start is None else " or a range [file, offset, length]")
        raise PayloadError(f"pack: {name}", expected, value, _REMEDY)
    return Piece(*value)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


class _Stream:
    """What the zlib stream behind the magic holds, in order and no more at once than is asked for."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        head = b""
        while len(head) < len(MAGIC) and (block := next(blocks, None)) is not None:
            head += block
        if not head.startswith(MAGIC):
            raise PayloadError("pack", "a pack of this version", f"{len(head)} bytes of something else", _REMEDY)
        self._blocks, self._inflate, self._fresh = blocks, zlib.decompressobj(), head[len(MAGIC) :]

    def _more(self, most: int) -> bytes:
        """Return up to `most` bytes; none at the end of the stream."""
        while not self._inflate.eof:
            fed, self._fresh = self._inflate.unconsumed_tail or self._fresh, b""
            try:
                # Without input, too: output may be left that the call before had no room for.
                found = self._inflate.decompress(fed, most)
            except zlib.error as e:
                raise PayloadError("pack", "a stream that zlib reads", e, _REMEDY) from None
            if found:
                return found
            if not self._inflate.unconsumed_tail and not self._inflate.eof:
                block = next(self._blocks, None)
                if block is None:
                    raise PayloadError("pack", "a whole stream", "one that is cut", _REMEDY)
                self._fresh = block
        return b""

    def some(self, most: int) -> bytes:
        """Return 1…`most` bytes."""
        found = self._more(most)
        if not found:
            raise PayloadError("pack", "more new bytes", "the end of the stream", _REMEDY)
        return found

    def take(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            found += self.some(count - len(found))
        return bytes(found)

    def end(self) -> None:
        """Raise `PayloadError` unless this is the end."""
        if self._more(1) or self._inflate.unused_data or any(self._blocks):
            raise PayloadError("pack", "nothing after the last file", "more bytes", _REMEDY)


# writing --------------------------------------------------------------------------------------------------------------


def key(data: bytes | memoryview) -> str:
    """Return what ranges are compared by: enough of their hash to find them; whether they are equal is checked by the result."""
    return sha256_bytes(bytes(data))[:32]


#: Ranges by key and length: (file, offset) of each.
Known = Mapping[tuple[str, int], Sequence[tuple[str, int]]]
#: A shorter range costs more to name than to send, unless it goes on where the one before it ends.
SHORTEST_BYTES = 24


def build(
    files: Mapping[str, bytes],
    cuts: Mapping[str, Sequence[int]],
    *,
    result: str,
    start: str | None = None,
    known: Known | None = None,
) -> bytes:
    """Return the pack that makes `files`, cut at these offsets into ranges that are new or not.

    `known`: the ranges of the base `start`.
    """
    listed, chunks = [], []
    for name in sorted(files):
        data, pieces = memoryview(files[name]), list[Piece]()
        edges = sorted({0, len(data), *(c for c in cuts.get(name, ()) if 0 < c < len(data))})
        for begin, end in itertools.pairwise(edges):
            part = data[begin:end]
            piece = _found(pieces[-1] if pieces else None, (name, begin), part, known or {})
            if piece.source is None:
                chunks.append(part)
            pieces[-1:] = _joined(pieces[-1], piece) if pieces else [piece]
        listed.append([name, [p.length if p.source is None else [p.source, p.offset, p.length] for p in pieces]])
    text = canonical_json({"start": start, "result": result, "files": listed})
    deflate = zlib.compressobj(9)
    out = [MAGIC, deflate.compress(struct.pack("<I", len(text)) + text)]
    out += [deflate.compress(c) for c in chunks]
    return b"".join([*out, deflate.flush()])


def _found(before: Piece | None, here: tuple[str, int], part: memoryview, known: Known) -> Piece:
    """Return where a range is in the base before: after the piece before it, at its own place, or anywhere; else as new."""
    places = known.get((key(part), len(part)), ())
    following = None if before is None or before.source is None else (before.source, before.offset + before.length)
    for place in (following, here, *places):
        if place in places and (len(part) >= SHORTEST_BYTES or place == following):
            assert place is not None
            return Piece(*place, len(part))
    return Piece(None, 0, len(part))


def _joined(a: Piece, b: Piece) -> list[Piece]:
    """Return two pieces as one where the second goes on where the first ends."""
    if a.source == b.source and (a.source is None or a.offset + a.length == b.offset):
        return [Piece(a.source, a.offset, a.length + b.length)]
    return [a, b]
