"""Bytes that claim to be a payload: every rule of the format refuses what breaks it, and nothing else ever comes out."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.errors import PayloadError
from lrcompress.manifest import Manifest
from lrcompress.payload import MAX_HEADER_BYTES, Payload, parse
from tests.support.payloads import META, base, made, put_together, stored, taken_apart


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return base(tmp_path_factory.mktemp("payload") / "exported")


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(PayloadError) as caught:
        parse(data)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 6
    for word in words:
        assert word in text, text


# bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["f32", "int8", "int4"])
def test_every_flipped_bit_of_the_frame_is_seen(manifest: Manifest, encoding: str) -> None:
    """In length and header a flipped bit is refused, or changes what is said; no bit passes unseen."""
    data = made(manifest, encoding=encoding)
    (length,) = struct.unpack_from("<Q", data)
    good = parse(data)
    for at in range(8 + length):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        try:
            found = parse(bytes(bad))
            found.verify(manifest)
        except PayloadError:
            continue
        same = found.tensors.keys() == good.tensors.keys() and found.golden.keys() == good.golden.keys()
        assert not same or found.base_ids != good.base_ids or found.sha256 != good.sha256


def test_every_cut_and_every_addition_is_refused(manifest: Manifest) -> None:
    data = made(manifest)
    (length,) = struct.unpack_from("<Q", data)
    for end in [*range(0, 8 + length, 37), *range(8 + length, len(data), 211), len(data) - 1]:
        refused(data[:end])
    refused(data + b"\0", "bytes of tensors")


F4 = np.ones(2, np.float32).tobytes()
ONE: dict[str, tuple[str, list[int], bytes]] = {"a": ("F32", [2], F4)}


def test_the_hand_written_one_is_good() -> None:
    assert np.array_equal(parse(stored(ONE, META)).tensors["a"], [1, 1])


FRAMES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "0 bytes"),
    "less than a length": (lambda: b"\1\2\3", "3 bytes"),
    "a header longer than the file": (lambda: struct.pack("<Q", 100) + b"{}", "header"),
    "a huge header": (lambda: struct.pack("<Q", 1 << 63) + b"{}", "header"),
    "a header beyond the limit": (lambda: put_together(b"{" + b" " * MAX_HEADER_BYTES + b"}", b""), "header"),
    "no header": (lambda: put_together(b"", b""), "header"),
    "a header that is no text": (lambda: put_together(b"\xff\xfe{}", b""), "JSON"),
    "a header that is no JSON": (lambda: put_together(b"{nope}", b""), "JSON"),
    "a header that is a list": (lambda: put_together([], b""), "__metadata__"),
    "a deep header": (lambda: put_together(b"[" * 9000, b""), "nested"),
    "no metadata": (lambda: put_together({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, F4), "__metadata__"),
    "metadata that is a list": (lambda: put_together({"__metadata__": []}, b""), "__metadata__"),
    "a name twice": (lambda: put_together(json.dumps({"__metadata__": META})[:-1].encode() + b', "a": 1, "a": 2}', F4), "twice"),
    "unsorted names": (lambda: stored({"b": ("F32", [2], F4), "a": ("F32", [2], F4)}, META), "sorted"),
    "an unknown dtype": (lambda: stored({"a": ("F64", [1], F4)}, META), "dtype"),
    "a dtype that is a number": (lambda: stored({"a": (4, [1], F4)}, META), "dtype"),  # type: ignore[dict-item]
    "a negative dimension": (lambda: stored({"a": ("F32", [-2], F4)}, META), "shape"),
    "a dimension that is true": (lambda: stored({"a": ("F32", [True, 2], F4)}, META), "shape"),
    "a dimension that is no whole number": (lambda: stored({"a": ("F32", [2.0], F4)}, META), "shape"),
    "nine dimensions": (lambda: stored({"a": ("F32", [1] * 8 + [2], F4)}, META), "shape"),
    "a shape that overflows": (lambda: stored({"a": ("F32", [(1 << 40) - 1] * 8, F4)}, META), "data at"),
    "less data than the shape says": (lambda: stored({"a": ("F32", [3], F4)}, META), "data at"),
    "more data than the shape says": (lambda: stored({"a": ("F32", [1], F4)}, META), "data at"),
    "an unknown field": (lambda: put_together({"__metadata__": META, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1}}, F4), "data_offsets"),
    "an entry that is a list": (lambda: put_together({"__metadata__": META, "a": [1]}, F4), "data_offsets"),
    "three offsets": (lambda: put_together({"__metadata__": META, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, F4), "offsets"),
    "offsets as text": (lambda: put_together({"__metadata__": META, "a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}, F4), "offsets"),
    "a gap": (lambda: spans([0, 8], [12, 20], 20), "data at"),
    "an overlap": (lambda: spans([0, 8], [4, 12], 12), "data at"),
    "the same data twice": (lambda: spans([0, 8], [0, 8], 8), "data at"),
    "data beyond the end": (lambda: spans([0, 8], [8, 16], 12), "data at"),
    "data behind the last tensor": (lambda: spans([0, 8], [8, 16], 20), "bytes of tensors"),
    "data in another order": (lambda: spans([8, 16], [0, 8], 16), "data at"),
    "too many tensors": (lambda: put_together({"__metadata__": META, **{f"{i:05d}": 0 for i in range(16_385)}}, b""), "at most"),
}  # fmt: skip


def spans(a: list[int], b: list[int], size: int) -> bytes:
    entry = {"dtype": "F32", "shape": [2]}
    return put_together(
        {"__metadata__": META, "a": {**entry, "data_offsets": a}, "b": {**entry, "data_offsets": b}}, b"\0" * size
    )


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_breaks_one_rule_is_refused_by_it(name: str) -> None:
    make, word = FRAMES[name]
    refused(make(), word)


# metadata and decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("schema", ..., "metadata"), ("kind", ..., "metadata"), ("extra", "1", "metadata"), ("schema", 1, "metadata"), ("base_ids", ["cd" * 32], "metadata"),
        ("schema", "2", "update lrcompress"), ("kind", "oft", "kind"), ("kind", "", "kind"), ("encoding", "int2", "encoding"),
        ("base_ids", "[", "base_ids"), ("base_ids", "[]", "base_ids"), ("base_ids", '{"a": 1}', "base_ids"), ("base_ids", '["CD"]', "base_ids"),
        ("base_ids", "[[]]", "base_ids"), ("base_ids", "[" * 5000, "base_ids"), ("slots_id", "ab", "slots_id"),
    ],
)  # fmt: skip
def test_metadata_is_exactly_what_is_known(key: str, value: Any, word: str) -> None:
    metadata = {k: v for k, v in {**META, key: value}.items() if v is not ...}
    refused(stored(ONE, metadata), word)


CODES, SCALE, HALF = b"\1\2\3\4", np.ones(1, np.float32).tobytes(), np.ones(2, np.float16).tobytes()
INT8, INT4 = ({**META, "encoding": e} for e in ("int8", "int4"))


@pytest.mark.parametrize(
    ("tensors", "metadata", "word"),
    [
        ({"a": ("F16", [2], HALF)}, META, "float32"), ({"a": ("I8", [4], CODES)}, META, "float32"), ({"a": ("F32", [2], F4)}, {**META, "encoding": "f16"}, "float16"),
        ({"a": ("F32", [2], np.array([1, np.nan], "<f4").tobytes())}, META, "finite"), ({"a": ("F32", [2], np.array([1, -np.inf], "<f4").tobytes())}, META, "finite"),
        ({"a": ("F16", [2], np.array([1, np.inf], "<f2").tobytes())}, {**META, "encoding": "f16"}, "finite"),
        ({"a.q": ("I8", [2, 2], CODES)}, INT8, "scale"), ({"a.scale": ("F32", [1, 1], SCALE)}, INT8, "codes"), ({"a": ("F32", [2], F4)}, INT8, "codes"),
        ({"a.q": ("F32", [1, 2], F4), "a.scale": ("F32", [1, 1], SCALE)}, INT8, "int8 codes"), ({"a.q": ("I8", [2, 2], CODES), "a.scale": ("F16", [1, 2], HALF)}, INT8, "float32 scale"),
        ({"a.q": ("I8", [2, 2], CODES), "a.scale": ("F32", [1], SCALE)}, INT8, "same number of axes"),
        ({"a.q": ("I8", [1, 4], CODES), "a.scale": ("F32", [2, 1], F4)}, INT8, "broadcasts"), ({"a.q": ("I8", [4, 1], CODES), "a.scale": ("F32", [2, 1], F4)}, INT8, "broadcasts"),
        ({"a.q": ("I8", [2, 2], CODES), "a.scale": ("F32", [1, 1], np.array([np.nan], "<f4").tobytes())}, INT8, "finite"),
        ({"a.q": ("I8", [2, 2], CODES), "a.scale": ("F32", [1, 1], np.array([3e38], "<f4").tobytes())}, INT8, "finite"),
        ({"a": ("U8", [4], CODES)}, META, "float32"), ({"a.q": ("U8", [2, 2], CODES), "a.scale": ("F32", [1, 1], SCALE)}, INT8, "int8 codes"),
        ({"a.2x4": ("U8", [2, 2], CODES)}, INT4, "scale"), ({"a.scale": ("F32", [1, 1], SCALE)}, INT4, "codes"), ({"a": ("F32", [1, 2], F4)}, INT4, "codes"),
        ({"a.2x4": ("I8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "int4 codes"), ({"a.q": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "shape"),
        ({"a.4": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "shape"), ({"a.2x04": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "shape"),
        ({"a.2x-4": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "shape"), ({"a.2x" + "9" * 5000: ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "shape"),
        ({"a.2x4": ("U8", [2, 2], CODES), "a.scale": ("F16", [2], HALF)}, INT4, "float32 scale"), ({"a.2x4": ("U8", [2, 2], CODES), "a.scale": ("F32", [1], SCALE)}, INT4, "2 scales"),
        ({"a.2x4": ("U8", [2, 2], CODES), "a.scale": ("F32", [2, 1], F4)}, INT4, "2 scales"), ({"a.2x4": ("U8", [4, 1], CODES), "a.scale": ("F32", [2], F4)}, INT4, "[2, 2] bytes"),
        ({"a.2x5": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "[2, 3] bytes"), ({"a.2x3": ("U8", [2, 2], CODES), "a.2x4": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "once"),
        ({"a": ("F32", [2], F4), "a.2x4": ("U8", [2, 2], CODES), "a.scale": ("F32", [2], F4)}, INT4, "codes"), ({"a": ("F16", [2], HALF)}, INT4, "float32"),
        ({"a.2x4": ("U8", [2, 2], b"\x18\x11\x11\x11"), "a.scale": ("F32", [2], F4)}, INT4, "-7 to 7"), ({"a.2x4": ("U8", [2, 2], b"\x11\x81\x11\x11"), "a.scale": ("F32", [2], F4)}, INT4, "-7 to 7"),
        ({"a.2x3": ("U8", [2, 2], b"\x11\x01\x11\x11"), "a.scale": ("F32", [2], F4)}, INT4, "zero after the last"), ({"a.2x3": ("U8", [2, 2], b"\x11\x81\x11\x01"), "a.scale": ("F32", [2], F4)}, INT4, "-7 to 7"),
        ({"a.0x999999999x999999999x9": ("U8", [0, 0], b""), "a.scale": ("F32", [0], b"")}, INT4, "a shape"), ({"a": ("F32", [0, 1 << 39, 1 << 39], b"")}, META, "a shape"),
        ({"a": ("F32", [0, 1 << 40], b"")}, META, "a shape"),
        ({"a.1x4": ("U8", [1, 2], CODES[:2]), "a.scale": ("F32", [1], np.array([3e38], "<f4").tobytes())}, INT4, "finite"), ({"golden/y": ("U8", [2, 2], CODES)}, META, "rows"),
        ({"golden/": ("F16", [1, 2], HALF)}, META, "golden/"), ({"golden/y": ("F16", [2], HALF)}, META, "rows"), ({"golden/y": ("I8", [2, 2], CODES)}, META, "rows"),
        ({"golden/y": ("F32", [1, 2], np.array([0, np.nan], "<f4").tobytes())}, META, "finite"),
    ],
)  # fmt: skip
def test_tensors_are_in_the_encoding_they_declare(tensors: Any, metadata: dict[str, Any], word: str) -> None:
    refused(stored(tensors, metadata), word)


# fuzzing --------------------------------------------------------------------------------------------------------


def survive(data: bytes, manifest: Manifest) -> None:
    """Parse, verify and expand `data`: nothing but a `PayloadError` of one line may come out."""
    try:
        found: Payload = parse(data)
        assert found.size == len(data) and all(np.isfinite(v).all() for v in found.tensors.values())
        found.verify(manifest)
    except PayloadError as e:
        assert "\n" not in str(e)
        str(e).encode()
        return
    feeds = found.feeds(manifest)
    assert feeds.keys() == manifest.slot_tensors.keys()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_no_bytes_surprise(manifest: Manifest, data: bytes) -> None:
    survive(data, manifest)
    survive(struct.pack("<Q", len(data)) + data, manifest)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_of_a_good_payload_surprises(manifest: Manifest, data: st.DataObject) -> None:
    good = bytearray(
        made(
            manifest,
            *data.draw(st.sampled_from([("lora", "f32"), ("lora", "int8"), ("lora", "int4"), ("loha", "f16")])),
            rank=1,
        )
    )
    (length,) = struct.unpack_from("<Q", good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length + 40))
        good[at] = data.draw(st.integers(0, 255))
    survive(bytes(good[: data.draw(st.sampled_from([len(good), 8 + length, at]))]), manifest)


LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 41)
    | st.floats()
    | st.sampled_from(["F32", "F16", "I8", "", "\ud800", "\x1b[2J", "1", "lora"])
)
VALUE = (
    LEAF
    | st.lists(LEAF, max_size=4)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), LEAF | st.lists(LEAF, max_size=3))
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_edit_of_a_good_header_surprises(manifest: Manifest, data: st.DataObject) -> None:
    header, body = taken_apart(
        made(
            manifest,
            *data.draw(st.sampled_from([("lora", "f32"), ("lora", "int8"), ("lora", "int4"), ("loha", "f32")])),
            rank=1,
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*header, "zz", "c0.lora_A.q", "golden/x", "\ud800"]))
        entry = header.get(name)
        if isinstance(entry, dict) and data.draw(st.booleans()):
            entry[data.draw(st.sampled_from([*entry, "x"]))] = data.draw(VALUE)
        elif name in header and data.draw(st.booleans()):
            del header[name]
        else:
            header[name] = data.draw(VALUE)
    survive(put_together(json.dumps(dict(sorted(header.items()))).encode(), body), manifest)
