"""A payload is exactly what its base takes, tensor for tensor, or it is refused with one line.

What may be wrong with its bytes stands in `tests/attacks/test_payload_bytes.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress.encodings import ENCODINGS, as_stored, decode, encode, stored_bytes
from lrcompress.errors import PayloadError
from lrcompress.expansions import expand
from lrcompress.files import sha256_bytes
from lrcompress.manifest import Manifest, base_id, slots_id
from lrcompress.payload import build, parse
from tests.support.graphs import cnn, run, write_exported
from tests.support.payloads import GOLDEN, META, X, base, loha, lora, made, stored, taken_apart


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return base(tmp_path_factory.mktemp("payload") / "exported")


def other_base(folder: Path, **changes: Any) -> Manifest:
    """Return the base with slots that say something else."""
    model, slots = cnn()

    def edit(value: dict[str, Any]) -> None:
        for slot in value["slots"]:
            slot.update(changes)
        hashes = {n: value["files"][n]["sha256"] for n in ("model.onnx", "base.data")}
        value["base_id"] = base_id(graph=hashes["model.onnx"], data=hashes["base.data"], slots=value["slots"])
        value["slots_id"] = slots_id(slots=value["slots"], factors=value["factors_digest"])

    return Manifest.load(write_exported(folder, model, slots, X, edit=edit))


# exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("encoding", ["f32", "f16"])
def test_a_round_trip_is_byte_identical(manifest: Manifest, kind: str, encoding: str) -> None:
    data = made(manifest, kind, encoding)
    found = parse(data)
    again = build(found.tensors, manifest=manifest, kind=kind, encoding=encoding, golden=found.golden)
    assert again == data == found.raw and found.sha256 == sha256_bytes(data) and found.size == len(data)
    assert (found.kind, found.encoding, found.base_ids, found.slots_id) == (
        kind,
        encoding,
        (manifest.base_id,),
        manifest.slots_id,
    )
    assert np.array_equal(found.golden["output"], GOLDEN["output"])


@pytest.mark.parametrize("encoding", ENCODINGS)
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
    for encoding in ENCODINGS:
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
            elif encoding == "int4":
                assert np.array_equal(got, as_stored(value, "int4"))
            else:
                assert np.array_equal(got, value if encoding == "f32" else value.astype(np.float16).astype(np.float32))
    assert sizes["int4"] < sizes["int8"] < sizes["f16"] < sizes["f32"]


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8"])
@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (2, 40, 3, 3), (3, 2, 3, 3), (1, 1), (5,)])
def test_what_is_stored_is_known_before(encoding: str, shape: tuple[int, ...]) -> None:
    """Its bytes, and its numbers: those of the least error that codes have, one scale per rank, which is the shorter side."""
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    once = as_stored(value, encoding)
    np.testing.assert_allclose(as_stored(once, encoding), once, rtol=2e-6)
    step = {"f32": 0.0, "f16": 2.0**-11, "int8": 0.501 / 127}[encoding]
    assert once.dtype == np.float32 and np.abs(once - value).max() <= step * np.abs(value).max()
    rank = min(shape[0], math.prod(shape[1:]))
    scales = {"int8": 4 * (rank if len(shape) > 1 else shape[0])}.get(encoding, 0)
    assert stored_bytes(shape, encoding) == value.size * {"f32": 4, "f16": 2, "int8": 1}[encoding] + scales


@pytest.mark.parametrize(
    "shape", [(3, 40), (40, 3), (3, 41), (41, 3), (2, 5, 3, 3), (1, 1), (60, 61), (5,), (0, 5), (5, 0), ()]
)
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-30, 1e-40, 3e37])
def test_four_bits_take_what_they_say_and_round_once(shape: tuple[int, ...], size: float) -> None:
    value = (np.random.default_rng(0).standard_normal(shape) * size).astype(np.float32)
    stored = encode("w", value, "int4")
    assert sum(part.nbytes for part in stored.values()) == stored_bytes(shape, "int4")
    once = decode(stored, "int4")["w"]
    assert once.shape == value.shape and once.dtype == np.float32
    assert np.array_equal(as_stored(once, "int4"), once)  # to the last bit
    assert np.array_equal(encode("w", once, "int4").keys(), stored.keys())
    if len(shape) < 2:
        assert np.array_equal(once, value)


def test_four_bits_are_two_to_a_byte_the_earlier_one_low() -> None:
    value = np.array([[7, -1, 0, -7, 3], [14, 2, -14, -2, 0]], np.float32)
    stored = encode("w", value, "int4")
    assert stored["w.2x5"].tolist() == [[0xF7, 0x90, 0x03], [0x17, 0xF9, 0x00]]
    assert stored["w.scale"].tolist() == [1.0, 2.0]
    assert np.array_equal(decode(stored, "int4")["w"], value)
    turned = encode("w", value.T, "int4")  # the rank is second
    assert np.array_equal(turned["w.5x2"], stored["w.2x5"]) and np.array_equal(turned["w.scale"], stored["w.scale"])
    assert np.array_equal(decode(turned, "int4")["w"], value.T)
    four = np.arange(1, 2 * 2 * 3 * 1 + 1, dtype=np.float32).reshape(2, 2, 3, 1)
    as_two = encode("w", four.reshape(2, 6), "int4")["w.2x6"]
    assert np.array_equal(encode("w", four, "int4")["w.2x2x3x1"], as_two)


def test_four_bits_round_as_well_as_sixteen_levels_can() -> None:
    """Evenly spaced levels leave at least 0.01154 of the variance of normal numbers (Max, 1960, table II), fifteen with zero
    among them 0.0129 (found by trying steps); a scale that holds the largest of a thousand numbers leaves 0.02.
    """
    value = np.random.default_rng(0).standard_normal((16, 1000)).astype(np.float32)
    error = np.square(as_stored(value, "int4") - value).mean()
    assert 0.0115 < error < 0.0132


def test_numbers_of_the_same_rank_share_a_scale_and_others_do_not() -> None:
    value = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32) * 10.0 ** np.arange(-3, 1)[:, None]
    for encoding in ("int8", "int4"):
        for one, other in ((value, as_stored(value, encoding)), (value.T, as_stored(value.T, encoding))):
            axis = int(np.argmax(one.shape))
            error = np.abs(one - other).max(axis) / np.abs(one).max(axis)
            assert error.max() < 0.6 / (127 if encoding == "int8" else 4)


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
        w1a, w1b, w2a, w2b = (
            tensors[f"{slot['layer']}.hada_{p}"].astype(np.float64) for p in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        expected = (w1a @ w1b) * (w2a @ w2b)
        a, b = expand(slot, "loha", tensors)
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
    pairs = {s["layer"]: expand(s, "loha", payload.tensors) for s in manifest.slots}
    expected = {
        f"{layer}.lora_{'AB'[i]}": v.astype(np.float32) for layer, pair in pairs.items() for i, v in enumerate(pair)
    }
    assert all(np.array_equal(feeds[n], expected[n]) for n in expected)
    assert np.abs(run(model, x=X, **feeds) - run(model, x=X)).max() > 1e-3


def test_a_rank_of_zero_is_fed_as_the_default_that_changes_nothing(manifest: Manifest) -> None:
    model, _ = cnn()
    payload = parse(build(lora(manifest, rank=0), manifest=manifest, kind="lora", encoding="f32"))
    feeds = payload.feeds(manifest)
    assert feeds["c0.lora_A"].shape == (1, 3, 3, 3) and feeds["fc.lora_A"].shape == (64, 0)
    assert np.array_equal(run(model, x=X, **feeds), run(model, x=X))


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
        payload.verify(other_base(tmp_path / "slots", r_max=63))
    # The default's rank changes the base and not what payloads must fit.
    sister = other_base(tmp_path / "sister", default_rank=1)
    assert sister.slots_id == manifest.slots_id and sister.base_id != manifest.base_id
    with pytest.raises(PayloadError, match="base_ids"):
        payload.verify(sister)
    both = build(lora(manifest), manifest=manifest, kind="lora", encoding="f32", base_ids=[sister.base_id])
    parse(both).verify(sister)
    parse(both).verify(manifest)


def test_a_least_rank_is_held_too(manifest: Manifest, tmp_path: Path) -> None:
    strict = other_base(tmp_path / "e", r_min=2)
    build(lora(strict, 2), manifest=strict, kind="lora", encoding="f32")
    with pytest.raises(PayloadError, match=r"2…64, got 1"):
        build(lora(strict, 1), manifest=strict, kind="lora", encoding="f32")


@pytest.mark.parametrize(("kind", "encoding"), [("oft", "f32"), ("lora", "bf16"), ("", "")])
def test_unknown_kinds_and_encodings_are_not_built(manifest: Manifest, kind: str, encoding: str) -> None:
    with pytest.raises(PayloadError, match="kind"):
        build(lora(manifest), manifest=manifest, kind=kind, encoding=encoding)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_not_built(manifest: Manifest, value: float) -> None:
    tensors: dict[str, np.ndarray] = dict(lora(manifest))
    tensors["fc.lora_B"] = np.full(tensors["fc.lora_B"].shape, value)
    for encoding in ENCODINGS:
        with pytest.raises(PayloadError, match=r"fc\.lora_B"):
            build(tensors, manifest=manifest, kind="lora", encoding=encoding)
