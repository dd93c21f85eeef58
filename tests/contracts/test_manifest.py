"""An exported folder is what its manifest says, down to the byte, or it is refused with one line."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.errors import ManifestError
from lrcompress.files import canonical_json
from lrcompress.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    base_id,
    is_safe_name,
    load_limits,
    slots_id,
    strict_json,
    version_key,
)
from tests.support.graphs import cnn, mlp, write_exported

FILES = ("model.onnx", "base.data", "golden.npz", "device.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of a CNN: slots of both ops."""
    model, slots = cnn()
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    folder = write_exported(tmp_path_factory.mktemp("manifest") / "exported", model, slots, x)
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert {s["op"] for s in value["slots"]} == {"linear", "conv"}
    return value


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model, slots = mlp("matmul")
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    return write_exported(tmp_path / "exported", model, slots, x)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Give `value` the identities that belong to it, so that the rule under test decides and not these."""
    hashes = {n: value["files"][n]["sha256"] for n in ("model.onnx", "base.data")}
    value["base_id"] = base_id(graph=hashes["model.onnx"], data=hashes["base.data"], slots=value["slots"])
    value["slots_id"] = slots_id(slots=value["slots"], factors=value["factors_digest"])
    return value


def changed(value: dict[str, Any], path: tuple[str | int, ...], new: Any) -> dict[str, Any]:
    """Return a copy of `value` with what stands at `path` replaced, or removed if `new` is ..."""
    value = copy.deepcopy(value)
    *way, last = path
    at: Any = value
    for key in way:
        at = at[key]
    if new is ...:
        del at[last]
    else:
        at[last] = new
    return value


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(data)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 6
    for word in words:
        assert word in text, text


# parsing --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(raw: dict[str, Any]) -> None:
    manifest = Manifest.parse(json.dumps(raw).encode())
    assert manifest.raw == raw and manifest.model == "small" and manifest.precision == "fp32"
    assert Manifest.parse(manifest.to_bytes()).to_bytes() == manifest.to_bytes() == canonical_json(raw)
    assert set(manifest.slot_tensors) == {t["name"] for s in raw["slots"] for t in s["tensors"]}
    tensor, slot = manifest.slot_tensors["c0.lora_A"]
    assert tensor["shape"][1:] == [3, 3, 3] and slot["layer"] == "c0"
    assert manifest.tolerance == pytest.approx(1e-4)


def test_a_later_key_is_no_error(raw: dict[str, Any]) -> None:
    assert Manifest.parse(json.dumps({**raw, "since": "later"}).encode()).base_id == raw["base_id"]


HOSTILE: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("schema",), 2, "schema"), (("schema",), True, "schema"), (("schema",), "1", "schema"), (("schema",), ..., "schema"),
    (("model",), "../x", "model"), (("model",), "a..b", "model"), (("model",), "Upper", "model"), (("model",), "", "model"), (("model",), 3, "model"),
    (("base_id",), "AB" * 32, "base_id"), (("base_id",), "ab" * 31, "base_id"), (("base_id",), None, "base_id"),
    (("slots_id",), ..., "slots_id"), (("factors_digest",), 7, "factors_digest"), (("precision",), ..., "precision"),
    (("files", "model.onnx"), ..., "files"), (("files", "golden.npz"), ..., "files"), (("files",), [], "files"),
    (("files", "../x"), {"sha256": "ab" * 32, "bytes": 1}, "plain file names"), (("files", "a/b"), {"sha256": "ab" * 32, "bytes": 1}, "plain file names"),
    (("files", ".hidden"), {"sha256": "ab" * 32, "bytes": 1}, "plain file names"), (("files", "manifest.json"), {"sha256": "ab" * 32, "bytes": 1}, "plain file names"),
    (("files", "base.data", "sha256"), "ab", "base.data"), (("files", "base.data", "bytes"), -1, "base.data"),
    (("files", "base.data", "bytes"), 1.5, "base.data"), (("files", "base.data", "bytes"), True, "base.data"), (("files", "base.data"), 3, "base.data"),
    (("ort",), {}, "ort"), (("ort", "min"), ..., "ort"), (("ort", "min"), 1, "ort"), (("ort", "max"), 2, "ort"),
    (("tolerances",), [], "tolerances"), (("tolerances", "cpu"), 0, "tolerances.cpu"), (("tolerances", "arm64"), -1e-3, "tolerances.arm64"),
    (("tolerances", "cpu"), True, "tolerances.cpu"), (("tolerances", "cpu"), 1e7, "tolerances.cpu"), (("tolerances", "arm64"), ..., "tolerances.arm64"),
    (("inputs",), [], "inputs"), (("inputs", 0, "name"), 3, "inputs"), (("inputs", 0, "shape"), "batch", "inputs"),
    (("inputs", 0, "shape", 1), -3, "inputs"), (("inputs", 0, "shape", 1), 1.0, "inputs"), (("outputs",), {}, "outputs"),
    (("outputs", 0, "dtype"), ..., "outputs"), (("slots",), {}, "slots"), (("slots", 0), "c0", "slots[0]"),
    (("slots", 1, "layer"), "c0", "different layers"), (("slots", 1, "tensors", 0, "name"), "c0.lora_A", "different tensor names"),
    (("slots", 0, "kind"), "loha", "kind lora"), (("slots", 0, "op"), "einsum", "linear or conv"), (("slots", 0, "op"), ["conv"], "linear or conv"),
    (("slots", 0, "r_min"), 65, "r_min"), (("slots", 0, "r_max"), -1, "r_max"), (("slots", 0, "r_max"), 4.0, "r_max"), (("slots", 0, "r_max"), ..., "r_max"),
    (("slots", 0, "default_rank"), 2, "default_rank"), (("slots", 0, "default_rank"), 1.0, "default_rank"), (("slots", 0, "default_rank"), "1", "default_rank"),
    (("slots", 0, "tensors"), [], "two tensors"), (("slots", 0, "tensors", 1), ..., "two tensors"), (("slots", 0, "tensors", 0, "rank_axis"), ..., "rank_axis"),
    (("slots", 0, "tensors", 0, "dtype"), "float16", "dtype"), (("slots", 0, "tensors", 0, "rank_axis"), 4, "rank axis"),
    (("slots", 0, "tensors", 0, "rank_axis"), 1, "symbolic"), (("slots", 0, "tensors", 0, "rank_symbol"), "q", "rank_symbol"),
    (("slots", 0, "tensors", 0, "shape", 0), 4, "rank_symbol"), (("slots", 0, "tensors", 0, "shape", 1), "n", "symbolic"),
    (("slots", 0, "tensors", 0, "shape", 1), 0, "symbolic"), (("slots", 0, "tensors", 1, "shape"), [16, "r_c0", 3, 3], "1x1"),
    (("slots", 0, "tensors", 1, "shape"), [16, "r_c0"], "A (r, in, *k)"), (("slots", 3, "op"), "conv", "A (r, in, *k)"), (("slots", 0, "op"), "linear", "A (in, r)"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "new", "word"), HOSTILE, ids=lambda v: "…")
def test_one_wrong_field_is_refused_by_its_own_rule(
    raw: dict[str, Any], path: tuple[str | int, ...], new: Any, word: str
) -> None:
    value = changed(raw, path, new)
    # Some are too broken to have identities.
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        value = value if path[0] in ("base_id", "slots_id") else sealed(value)
    refused(json.dumps(value).encode(), word)


def test_a_rank_axis_without_a_symbol_is_refused(raw: dict[str, Any]) -> None:
    """A number that equals its own 'symbol' would leave a payload without a rank to check."""
    value = changed(raw, ("slots", 0, "tensors", 0, "shape", 0), 4)
    value["slots"][0]["tensors"][0]["rank_symbol"] = value["slots"][0]["tensors"][1]["rank_symbol"] = 4
    value["slots"][0]["tensors"][1]["shape"][1] = 4
    refused(json.dumps(sealed(value)).encode(), "rank_symbol")


def test_two_ranks_for_one_slot_are_refused(raw: dict[str, Any]) -> None:
    value = changed(raw, ("slots", 0, "tensors", 0, "shape", 0), "other")
    value["slots"][0]["tensors"][0]["rank_symbol"] = "other"
    refused(json.dumps(sealed(value)).encode(), "one rank symbol")


@pytest.mark.parametrize("key", ["base_id", "slots_id"])
def test_identities_are_recomputed_and_not_believed(raw: dict[str, Any], key: str) -> None:
    refused(json.dumps(changed(raw, (key,), "ab" * 32)).encode(), key, "ab" * 32)


@pytest.mark.parametrize(
    ("path", "new", "which"),
    [
        (("files", "model.onnx", "sha256"), "cd" * 32, "base_id"), (("files", "base.data", "sha256"), "cd" * 32, "base_id"),
        (("slots", 0, "r_max"), 63, "base_id"), (("factors_digest",), "cd" * 32, "slots_id"),
    ],
)  # fmt: skip
def test_what_an_identity_covers_cannot_change_under_it(
    raw: dict[str, Any], path: tuple[str | int, ...], new: Any, which: str
) -> None:
    refused(json.dumps(changed(raw, path, new)).encode(), which)


def test_the_default_rank_is_no_part_of_what_payloads_must_fit(raw: dict[str, Any]) -> None:
    other = sealed(changed(raw, ("slots", 0, "default_rank"), 0))
    assert other["slots_id"] == raw["slots_id"] and other["base_id"] != raw["base_id"]
    assert sealed(changed(raw, ("slots", 0, "r_max"), 63))["slots_id"] != raw["slots_id"]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": NaN}', b'{"schema": 1, "schema": 1}', b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b"}", "{}".encode("utf-16"), b"1" * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(11),
)  # fmt: skip
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("text", [b'"x": 1e999', b'"x": "\\ud800"'])
def test_what_has_no_canonical_form_has_no_identity(raw: dict[str, Any], text: bytes) -> None:
    data = json.dumps(raw).encode().replace(b'"op": "conv"', b'"op": "conv", ' + text, 1)
    refused(data, "canonical")


def test_strict_json_names_what_is_wrong() -> None:
    assert strict_json(b'{"a": [1, null]}') == {"a": [1, None]}
    for bad in (
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 2}}',
        "[NaN]",
        "[-Infinity]",
        "[" * 50_000,
        "[-1e999]",
        '["\\ud800"]',
        '{"\\ud800": 1}',
        '["\ud800"]',
        b'["\xed\xa0\x80"]',
        b'["\xff"]',
    ):
        with pytest.raises(ValueError):
            strict_json(bad)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(["ab" * 32, "..", "r_c0"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items: list[tuple[str | int, Any]] = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [p for k, v in items for p in [(*at, k), *paths(v, (*at, k))]]


def survive(data: bytes) -> None:
    """Parse `data`; whatever is accepted must also be usable."""
    try:
        manifest = Manifest.parse(data)
        manifest.check_runtime("1.22.0")
    except ManifestError as e:
        assert "\n" not in str(e)
        str(e).encode()
        return
    assert manifest.tolerance > 0 and len(manifest.slot_tensors) == 2 * len(manifest.slots)
    assert manifest.inputs and manifest.outputs and Manifest.parse(manifest.to_bytes()).raw == manifest.raw


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_edit_of_a_good_manifest_surprises(raw: dict[str, Any], data: st.DataObject) -> None:
    value = raw
    for _ in range(data.draw(st.integers(1, 3))):
        known = paths(value)
        if not known:
            break
        value = changed(value, data.draw(st.sampled_from(known)), data.draw(st.just(...) | JSON))
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, IndexError):
        value = sealed(value)
    survive(json.dumps(value).encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_no_bytes_surprise(data: bytes) -> None:
    survive(data)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_changed_byte_surprises(raw: dict[str, Any], data: st.DataObject) -> None:
    good = bytearray(json.dumps(raw).encode())
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] = data.draw(st.integers(0, 255))
    survive(bytes(good[: data.draw(st.sampled_from([len(good), at]))]))


# files ----------------------------------------------------------------------------------------------------------


def test_a_whole_folder_loads(exported: Path) -> None:
    assert Manifest.load(exported).files.keys() == set(FILES)


#: base.data is empty here and has no bit to flip.
DAMAGES = [
    (n, h)
    for n in FILES
    for h in ("flip", "cut", "longer", "gone", "folder", "dangling")
    if (n, h) != ("base.data", "flip")
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_each_file_is_held_to_its_size_and_hash(exported: Path, name: str, how: str) -> None:
    path = exported / name
    data = path.read_bytes()
    edits: dict[str, Callable[[], object]] = {
        "flip": lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "cut": lambda: path.write_bytes(data[:-1]) if data else path.unlink(),
        "longer": lambda: path.write_bytes(data + b"\0"),
        "gone": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "dangling": lambda: (path.unlink(), path.symlink_to("nowhere")),
    }
    edits[how]()
    with pytest.raises(ManifestError, match=name) as caught:
        Manifest.load(exported)
    assert "copy the folder again" in str(caught.value)
    assert Manifest.load(exported, verify=False).base_id


def test_no_manifest_is_one_line(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ManifestError, match="lrcompress export"):
            Manifest.load(place)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "version", "fits"),
    [
        ("1.22.0", None, "1.22", True), ("1.22.0", None, "1.21.9", False), ("1.22", None, "1.22.1rc1", True), ("1.9", None, "1.10", True),
        ("1.22", "1.30", "1.30.0", True), ("1.22", "1.30", "1.30.1", False), ("1.22", "1.30", "2.0", False),
    ],
)  # fmt: skip
def test_the_range_of_runtimes(raw: dict[str, Any], low: str, high: str | None, version: str, fits: bool) -> None:
    manifest = Manifest.parse(json.dumps(changed(raw, ("ort",), {"min": low, "max": high})).encode())
    if fits:
        manifest.check_runtime(version)
    else:
        with pytest.raises(ManifestError, match=f"{low} or newer.*got {version}"):
            manifest.check_runtime(version)


def test_versions_compare_by_number() -> None:
    assert version_key("1.22.0rc1") == version_key("1.22") == (1, 22) and version_key("1.100") > version_key("1.99.9")
    assert version_key("dev") == ()


@pytest.mark.parametrize("name", ["../x", "a/b", ".a", "", "A", "a..b", "a\0", "ä", "x" * 101, None])
def test_names_that_are_no_part_of_a_path(name: object) -> None:
    assert not is_safe_name(name) and is_safe_name("resnet20-cifar10_v1.2")


def test_limits_and_their_defaults(exported: Path) -> None:
    assert load_limits(exported) == {"max_payload_bytes": float(1 << 20), "latency_factor": 20.0, "threads": 1.0}
    (exported / "device.json").write_text('{"schema": 1, "max_distance": 0.5}')
    assert load_limits(exported) == {
        "max_payload_bytes": float(64 << 20),
        "latency_factor": 20.0,
        "threads": 1.0,
        "max_distance": 0.5,
    }


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "threads": 0}', '{"schema": 1, "threads": true}', '{"schema": 1, "max_payload_bytes": "9"}',
     '{"schema": 1, "latency_factor": 1e999}', '{"schema": 1, "max_payload_bytes": 1' + "0" * 400 + "}", '{"schema": 1, "max_distance": -1}'],
)  # fmt: skip
def test_limits_that_are_none(exported: Path, text: str) -> None:
    (exported / "device.json").write_text(text)
    with pytest.raises(ManifestError, match=r"device\.json"):
        load_limits(exported)
