"""A payload is exactly what its base takes, byte for byte and tensor for tensor, or it is refused with one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.errors import PayloadError
from lrcompress.files import sha256_bytes
from lrcompress.manifest import Manifest
from lrcompress.payload import MAX_HEADER_BYTES, Payload, build, expand_loha, parse
from tests.support.graphs import cnn, run, write_exported

X = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
GOLDEN = {"output": np.arange(8, dtype=np.float16).reshape(4, 2)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A base with three convolutional slots and a linear one."""
    model, slots = cnn()
    return Manifest.load(write_exported(tmp_path_factory.mktemp("payload") / "exported", model, slots, X))


def other_base(manifest: Manifest, folder: Path, **changes: Any) -> Manifest:
    """Return a manifest like `manifest` whose slots say something else."""
    model, slots = cnn()

    def edit(value: dict[str, Any]) -> None:
        from lrcompress.manifest import base_id, slots_id

        for slot in value["slots"]:
            slot.update(changes)
        hashes = {n: value["files"][n]["sha256"] for n in ("model.onnx", "base.data")}
        value["base_id"] = base_id(graph=hashes["model.onnx"], data=hashes["base.data"], slots=value["slots"])
        value["slots_id"] = slots_id(slots=value["slots"], factors=value["factors_digest"])

    return Manifest.load(write_exported(folder, model, slots, X, edit=edit))


def lora(manifest: Manifest, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {n: [rank if isinstance(d, str) else d for d in t["shape"]] for n, (t, _) in manifest.slot_tensors.items()}
    return {n: (rng.standard_normal(s) * 0.1).astype(np.float32) for n, s in shapes.items()}


def loha(manifest: Manifest, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for slot in manifest.slots:
        a, b = (t["shape"] for t in slot["tensors"])
        outer, inner = (b[0], int(np.prod(a[1:]))) if slot["op"] == "conv" else (b[1], a[0])
        for part in ("hada_w1", "hada_w2"):
            out[f"{slot['layer']}.{part}_a"] = rng.standard_normal((outer, rank)).astype(np.float32)
            out[f"{slot['layer']}.{part}_b"] = rng.standard_normal((rank, inner)).astype(np.float32)
    return out


def made(manifest: Manifest, kind: str = "lora", encoding: str = "f32", rank: int = 2) -> bytes:
    tensors = lora(manifest, rank) if kind == "lora" else loha(manifest, rank)
    return build(tensors, manifest=manifest, kind=kind, encoding=encoding, golden=GOLDEN)


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def stored(tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, Any]) -> bytes:
    """Write safetensors by hand, in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    body = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return put_together(header, body)


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(PayloadError) as caught:
        parse(data)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 6
    for word in words:
        assert word in text, text


# exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("encoding", ["f32", "f16"])
def test_a_round_trip_is_byte_identical(manifest: Manifest, kind: str, encoding: str) -> None:
    data = made(manifest, kind, encoding)
    found = parse(data)
    again = build(found.tensors, manifest=manifest, kind=kind, encoding=encoding, golden=found.golden)
    assert again == data == found.raw and found.sha256 == sha256_bytes(data) and found.size == len(data)
    assert (found.kind, found.encoding, found.base_ids, found.slots_id) == (kind, encoding, (manifest.base_id,), manifest.slots_id)
    assert np.array_equal(found.golden["output"], GOLDEN["output"])


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8"])
def test_equal_input_gives_equal_bytes_in_any_order(manifest: Manifest, encoding: str) -> None:
    tensors = lora(manifest)
    backwards = dict(reversed(list(tensors.items())))
    one, two = (build(t, manifest=manifest, kind="lora", encoding=encoding) for t in (tensors, backwards))
    assert one == two
    header, _ = taken_apart(one)
    assert list(header)[1:] == sorted(list(header)[1:])
    several = build(tensors, manifest=manifest, kind="lora", encoding=encoding, base_ids=["cd" * 32, manifest.base_id])
    assert parse(several).base_ids == tuple(sorted(["cd" * 32, manifest.base_id]))


def test_any_safetensors_reader_can_read_it(manifest: Manifest) -> None:
    from safetensors.numpy import load

    tensors = lora(manifest)
    found = load(made(manifest))
    assert all(np.array_equal(found[n], v) for n, v in tensors.items()) and found.keys() == {*tensors, "golden/output"}


def test_encodings_keep_what_they_promise(manifest: Manifest) -> None:
    tensors = lora(manifest)
    sizes = {}
    for encoding in ("f32", "f16", "int8"):
        data = build(tensors, manifest=manifest, kind="lora", encoding=encoding)
        found, sizes[encoding] = parse(data), len(data)
        for name, value in tensors.items():
            got = found.tensors[name]
            assert got.dtype == np.float32 and got.shape == value.shape
            if encoding == "int8":
                rank_axis = manifest.slot_tensors[name][0]["rank_axis"]
                axes = tuple(i for i in range(value.ndim) if i != rank_axis)
                limit = np.abs(value).max(axis=axes, keepdims=True) / 127 * 0.501
                assert (np.abs(got - value) <= limit).all()
            else:
                assert np.array_equal(got, value if encoding == "f32" else value.astype(np.float16).astype(np.float32))
    assert sizes["int8"] < sizes["f16"] < sizes["f32"]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_int8_survives_extreme_numbers(manifest: Manifest, value: float) -> None:
    tensors = {n: np.full_like(v, value) for n, v in lora(manifest).items()}
    found = parse(build(tensors, manifest=manifest, kind="lora", encoding="int8")).tensors
    assert all(np.abs(found[n].astype(np.float64) - v).max() <= max(value / 127, 1e-37) for n, v in tensors.items())


def test_float16_is_refused_where_it_cannot_hold_the_number(manifest: Manifest) -> None:
    tensors = lora(manifest)
    tensors["fc.lora_A"] = tensors["fc.lora_A"] + 7e4
    with pytest.raises(PayloadError, match="use f32"):
        build(tensors, manifest=manifest, kind="lora", encoding="f16")


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_loha_is_expanded_exactly(manifest: Manifest, rank: int) -> None:
    """B A of the expansion = (B1 A1)∘(B2 A2), to the rounding of float64; as a kernel for convolutions."""
    tensors = loha(manifest, rank)
    for slot in manifest.slots:
        w1a, w1b, w2a, w2b = (tensors[f"{slot['layer']}.hada_{p}"].astype(np.float64) for p in ("w1_a", "w1_b", "w2_a", "w2_b"))
        expected = (w1a @ w1b) * (w2a @ w2b)
        a, b = expand_loha(slot, tensors)
        shapes = [[rank**2 if isinstance(d, str) else d for d in t["shape"]] for t in slot["tensors"]]
        assert [list(a.shape), list(b.shape)] == shapes
        if slot["op"] == "conv":
            got = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        else:
            got = (a @ b).T
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14 * rank**2 * np.abs(expected).max())


def test_the_graph_with_a_loha_is_the_graph_with_its_lora(manifest: Manifest) -> None:
    model, _ = cnn()
    payload = parse(made(manifest, "loha"))
    feeds = payload.feeds(manifest)
    assert {n: v.shape for n, v in feeds.items()}.keys() == manifest.slot_tensors.keys()
    assert all(v.dtype == np.float32 and v.flags.c_contiguous for v in feeds.values())
    pairs = {s["layer"]: expand_loha(s, payload.tensors) for s in manifest.slots}
    expected = {f"{layer}.lora_{'AB'[i]}": v.astype(np.float32) for layer, pair in pairs.items() for i, v in enumerate(pair)}
    assert all(np.array_equal(feeds[n], expected[n]) for n in expected)
    assert np.abs(run(model, x=X, **feeds) - run(model, x=X)).max() > 1e-3


def test_a_rank_of_zero_is_fed_as_the_default_that_changes_nothing(manifest: Manifest) -> None:
    model, _ = cnn()
    payload = parse(build(lora(manifest, rank=0), manifest=manifest, kind="lora", encoding="f32"))
    feeds = payload.feeds(manifest)
    assert feeds["c0.lora_A"].shape == (1, 3, 3, 3) and feeds["fc.lora_A"].shape == (64, 0)
    assert np.array_equal(run(model, x=X, **feeds), run(model, x=X))


# bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["f32", "int8"])
def test_every_flipped_bit_of_the_frame_is_seen(manifest: Manifest, encoding: str) -> None:
    """In length and header a flipped bit is refused, or changes what is said; no bit passes unseen."""
    data = made(manifest, encoding=encoding)
    (length,) = struct.unpack_from("<Q", data)
    good = parse(data)
    for at in range(0, 8 + length):
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


META = {"schema": "1", "slots_id": "ab" * 32, "base_ids": json.dumps(["cd" * 32]), "kind": "lora", "encoding": "f32"}
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
    return put_together({"__metadata__": META, "a": {**entry, "data_offsets": a}, "b": {**entry, "data_offsets": b}}, b"\0" * size)


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_breaks_one_rule_is_refused_by_it(name: str) -> None:
    make, word = FRAMES[name]
    refused(make(), word)


# metadata and decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("schema", ..., "metadata"), ("kind", ..., "metadata"), ("extra", "1", "metadata"), ("schema", 1, "metadata"), ("base_ids", ["cd" * 32], "metadata"),
        ("schema", "2", "update lrcompress"), ("kind", "lokr", "kind"), ("kind", "", "kind"), ("encoding", "int4", "encoding"),
        ("base_ids", "[", "base_ids"), ("base_ids", "[]", "base_ids"), ("base_ids", '{"a": 1}', "base_ids"), ("base_ids", '["CD"]', "base_ids"),
        ("base_ids", "[[]]", "base_ids"), ("base_ids", "[" * 5000, "base_ids"), ("slots_id", "ab", "slots_id"),
    ],
)  # fmt: skip
def test_metadata_is_exactly_what_is_known(key: str, value: Any, word: str) -> None:
    metadata = {k: v for k, v in {**META, key: value}.items() if v is not ...}
    refused(stored(ONE, metadata), word)


CODES, SCALE, HALF = b"\1\2\3\4", np.ones(1, np.float32).tobytes(), np.ones(2, np.float16).tobytes()
INT8 = {**META, "encoding": "int8"}


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
        ({"golden/": ("F16", [1, 2], HALF)}, META, "golden/"), ({"golden/y": ("F16", [2], HALF)}, META, "rows"), ({"golden/y": ("I8", [2, 2], CODES)}, META, "rows"),
        ({"golden/y": ("F32", [1, 2], np.array([0, np.nan], "<f4").tobytes())}, META, "finite"),
    ],
)  # fmt: skip
def test_tensors_are_in_the_encoding_they_declare(tensors: Any, metadata: dict[str, Any], word: str) -> None:
    refused(stored(tensors, metadata), word)


# fitting a base -------------------------------------------------------------------------------------------------


Edit = Callable[[dict[str, np.ndarray]], object]
MISFITS: dict[str, tuple[str, Edit, str]] = {
    "a tensor is missing": ("lora", lambda t: t.pop("c1.lora_B"), "c1.lora_B missing"),
    "a tensor too many": ("lora", lambda t: t.update({"c9.lora_A": np.zeros((1, 2), np.float32)}), "c9.lora_A too many"),
    "a layer is missing": ("lora", lambda t: (t.pop("fc.lora_A"), t.pop("fc.lora_B")), "fc.lora_A missing"),
    "an axis too many": ("lora", lambda t: t.update({"fc.lora_A": t["fc.lora_A"][None]}), "fc.lora_A"),
    "another width": ("lora", lambda t: t.update({"c1.lora_A": t["c1.lora_A"][:, :-1]}), "c1.lora_A"),
    "a transposed factor": ("lora", lambda t: t.update({"fc.lora_A": t["fc.lora_A"].T}), "fc.lora_A"),
    "two ranks": ("lora", lambda t: t.update({"c1.lora_A": t["c1.lora_A"][:1]}), "one rank"),
    "a rank beyond the slot": ("lora", lambda t: t.update({"fc.lora_A": np.zeros((64, 65), np.float32), "fc.lora_B": np.zeros((65, 10), np.float32)}), "0…64"),
    "a wide kernel for B": ("lora", lambda t: t.update({"c1.lora_B": np.zeros((32, 2, 3, 3), np.float32)}), "c1.lora_B"),
    "LoRA's names in a LoHa": ("loha", lambda t: t.update({"fc.lora_A": np.zeros((64, 2), np.float32)}), "too many"),
    "a LoHa factor is missing": ("loha", lambda t: t.pop("c0.hada_w2_b"), "hada_w2_b missing"),
    "two ranks in a LoHa": ("loha", lambda t: t.update({"c0.hada_w2_a": t["c0.hada_w2_a"][:, :1], "c0.hada_w2_b": t["c0.hada_w2_b"][:1]}), "one rank"),
    "a LoHa whose square is beyond the slot": ("loha", lambda t: t.update(loha_of_rank(t, "fc", 9)), "0…64"),
}  # fmt: skip


def loha_of_rank(tensors: dict[str, np.ndarray], layer: str, rank: int) -> dict[str, np.ndarray]:
    outer, inner = len(tensors[f"{layer}.hada_w1_a"]), tensors[f"{layer}.hada_w1_b"].shape[1]
    shapes = {"w1_a": (outer, rank), "w1_b": (rank, inner), "w2_a": (outer, rank), "w2_b": (rank, inner)}
    return {f"{layer}.hada_{k}": np.zeros(s, np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_exactly_is_neither_built_nor_accepted(manifest: Manifest, name: str) -> None:
    kind, edit, word = MISFITS[name]
    tensors = lora(manifest) if kind == "lora" else loha(manifest)
    edit(tensors)
    with pytest.raises(PayloadError) as caught:
        build(tensors, manifest=manifest, kind=kind, encoding="f32")
    assert word in str(caught.value)
    raws = {n: ("F32", list(v.shape), v.tobytes()) for n, v in sorted(tensors.items())}
    metadata = {**META, "kind": kind, "slots_id": manifest.slots_id, "base_ids": json.dumps([manifest.base_id])}
    with pytest.raises(PayloadError) as caught:
        parse(stored(raws, metadata)).verify(manifest)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_at_the_edge_of_the_slot_fit(manifest: Manifest) -> None:
    tensors = loha(manifest)
    tensors.update(loha_of_rank(tensors, "fc", 8))
    for kind, good in (("lora", lora(manifest, 64)), ("loha", tensors)):
        parse(build(good, manifest=manifest, kind=kind, encoding="f32")).verify(manifest)


def test_another_base_and_other_slots_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    payload = parse(made(manifest))
    payload.verify(manifest)
    with pytest.raises(PayloadError, match="slots_id"):
        payload.verify(other_base(manifest, tmp_path / "slots", r_max=63))
    # The default's rank changes the base and not what payloads must fit.
    sister = other_base(manifest, tmp_path / "sister", default_rank=1)
    assert sister.slots_id == manifest.slots_id and sister.base_id != manifest.base_id
    with pytest.raises(PayloadError, match="base_ids"):
        payload.verify(sister)
    both = build(lora(manifest), manifest=manifest, kind="lora", encoding="f32", base_ids=[sister.base_id])
    parse(both).verify(sister)
    parse(both).verify(manifest)


def test_a_least_rank_is_held_too(manifest: Manifest, tmp_path: Path) -> None:
    strict = other_base(manifest, tmp_path / "e", r_min=2)
    build(lora(strict, 2), manifest=strict, kind="lora", encoding="f32")
    with pytest.raises(PayloadError, match=r"2…64, got 1"):
        build(lora(strict, 1), manifest=strict, kind="lora", encoding="f32")


@pytest.mark.parametrize(("kind", "encoding"), [("lokr", "f32"), ("lora", "bf16"), ("", "")])
def test_unknown_kinds_and_encodings_are_not_built(manifest: Manifest, kind: str, encoding: str) -> None:
    with pytest.raises(PayloadError, match="kind"):
        build(lora(manifest), manifest=manifest, kind=kind, encoding=encoding)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_not_built(manifest: Manifest, value: float) -> None:
    tensors: dict[str, np.ndarray] = dict(lora(manifest))
    tensors["fc.lora_B"] = np.full(tensors["fc.lora_B"].shape, value)
    for encoding in ("f32", "f16", "int8"):
        with pytest.raises(PayloadError, match=r"fc\.lora_B"):
            build(tensors, manifest=manifest, kind="lora", encoding=encoding)


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
    good = bytearray(made(manifest, *data.draw(st.sampled_from([("lora", "f32"), ("lora", "int8"), ("loha", "f16")])), rank=1))
    (length,) = struct.unpack_from("<Q", good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length + 40))
        good[at] = data.draw(st.integers(0, 255))
    survive(bytes(good[: data.draw(st.sampled_from([len(good), 8 + length, at]))]), manifest)


LEAF = st.none() | st.booleans() | st.integers(-2, 1 << 41) | st.floats() | st.sampled_from(["F32", "F16", "I8", "", "\ud800", "\x1b[2J", "1", "lora"])
VALUE = LEAF | st.lists(LEAF, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), LEAF | st.lists(LEAF, max_size=3))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_edit_of_a_good_header_surprises(manifest: Manifest, data: st.DataObject) -> None:
    header, body = taken_apart(made(manifest, *data.draw(st.sampled_from([("lora", "f32"), ("lora", "int8"), ("loha", "f32")])), rank=1))
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
