"""Deltas: the named result from the named base, byte for byte, or one line; and never a payload that was not signed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrcompress import deltas, publish
from lrcompress.errors import LrcompressError, PayloadError
from lrcompress.files import sha256_bytes
from lrcompress.manifest import Manifest
from lrcompress.payload import build, parse, scales_of
from lrcompress.phases import delta_name
from lrcompress.publish.encoding import DELTA_ENTRY_BYTES
from lrcompress.publish.repository import Repository
from tests.support.fleet import PASSPHRASE, Fleet, answers, made
from tests.support.payloads import GOLDEN, base, lora


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return base(tmp_path_factory.mktemp("deltas") / "exported")


def nudged(tensors, share, seed=0, only=None):
    rng = np.random.default_rng(seed)
    return {
        n: v + (share * (v.std() if v.size else 0) * rng.standard_normal(v.shape)).astype(np.float32)
        if only is None or n == only
        else v
        for n, v in tensors.items()
    }


def made_of(manifest, tensors, encoding, **options):
    return build(tensors, manifest=manifest, kind="lora", encoding=encoding, golden=GOLDEN, **options)


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8", "int4"])
@pytest.mark.parametrize("other", ["f32", "int8", "int4"])
def test_the_result_is_the_payload_byte_for_byte(manifest, encoding, other):
    old = made_of(manifest, lora(manifest), other)
    for new in (nudged(lora(manifest), 0.01), lora(manifest, rank=3), lora(manifest, rank=0)):
        result = made_of(manifest, new, encoding)
        delta = deltas.build(old, result)
        assert deltas.apply(old, delta, max_bytes=len(result)) == result
        assert deltas.ends(delta) == (sha256_bytes(old), sha256_bytes(result), len(result))
    assert len(deltas.build(old, old)) < 120


def test_unchanged_tensors_are_not_sent_again(manifest):
    tensors = lora(manifest, rank=16)
    old = made_of(manifest, tensors, "f32")
    name = "fc.lora_B"
    delta = deltas.build(old, made_of(manifest, nudged(tensors, 1.0, only=name), "f32"))
    assert len(delta) < tensors[name].nbytes + 150  # noise does not compress; nothing else is in it
    assert len(delta) < 0.1 * len(old)


def test_codes_on_the_scales_of_before_make_small_deltas(manifest):
    tensors = lora(manifest, rank=16)
    old = made_of(manifest, tensors, "int8")
    new = nudged(tensors, 0.01)
    own = made_of(manifest, new, "int8")
    kept = made_of(manifest, new, "int8", scales=scales_of(old))
    assert len(deltas.build(old, kept)) < 0.95 * len(deltas.build(old, own)) and len(deltas.build(old, own)) < len(own)
    for name, value in parse(kept).tensors.items():  # and cost no more than a half code of the scale that was kept
        assert np.abs(value - new[name]).max() <= 1.5 * np.abs(new[name]).max() / 127
    far = made_of(manifest, {n: 9 * v for n, v in new.items()}, "int8", scales=scales_of(old))
    assert far == made_of(manifest, {n: 9 * v for n, v in new.items()}, "int8")  # too small to hold it
    near = made_of(manifest, {n: v / 9 for n, v in new.items()}, "int8", scales=scales_of(old))
    assert near == made_of(manifest, {n: v / 9 for n, v in new.items()}, "int8")  # too coarse for it
    assert scales_of(made_of(manifest, tensors, "f16")) == {}


def test_what_is_wrong_has_one_line(manifest):
    old, new = (made_of(manifest, lora(manifest, seed=s), "int8") for s in (1, 2))
    delta = deltas.build(old, new)
    head, stream = delta[:76], zlib.decompress(delta[76:])
    pack = zlib.compress
    cases = {
        "sha256": [(new, delta), (old[:-1], delta), (old, delta[:40] + bytes(32) + delta[72:])],
        "version": [(old, b""), (old, delta[:75]), (old, b"x" + delta[1:])],
        "at most": [(old, delta[:72] + struct.pack("<I", len(new) + 1) + delta[76:])],
        "delta": [
            (old, delta[:-1]),
            (old, delta + b"x"),
            (old, head + b"nothing that zlib reads"),
            (old, head + pack(stream[:-1])),
            (old, head + pack(stream + b"x")),
            (old, head + pack(stream[:1] + b"\x07" + stream[2:])),  # a mode that is none
            (old, head + pack(b"\x02" + struct.pack("<I", 1 << 31) + stream)),
            (old, head + pack(b"\x02" + struct.pack("<I", 4) + b"nope" + stream)),
            (old, head + pack(bytes(50_000_000))),  # 50 MB in 50 kB
            (old, head),
        ],
    }
    for word, pairs in cases.items():
        for before, bad in pairs:
            with pytest.raises(PayloadError) as caught:
                deltas.apply(before, bad, max_bytes=len(new))
            assert "\n" not in str(caught.value) and (word in str(caught.value) or "payload" in str(caught.value))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), inner=st.booleans(), cut=st.integers(0, 40))
def test_no_byte_that_changes_gives_another_payload(manifest, at, value, inner, cut):
    old, new = (made_of(manifest, lora(manifest, seed=s), "int8") for s in (1, 2))
    delta = deltas.build(old, new)
    if inner:
        stream = bytearray(zlib.decompress(delta[76:]))
        stream[at % len(stream)] = value
        changed = delta[:76] + zlib.compress(bytes(stream[: len(stream) - cut]))
    else:
        changed = delta[: at % len(delta)] + bytes([value]) + delta[at % len(delta) + 1 : len(delta) - cut]
    try:
        assert deltas.apply(old, changed, max_bytes=len(new)) == new
    except LrcompressError as e:
        assert isinstance(e, PayloadError)


# publishing them ------------------------------------------------------------------------------------------------------


def second(repo: Path, share: float, **options):
    """Publish the payload that is served, nudged."""
    exported = made() / "exported"
    repository = Repository(repo)
    now = parse(repository.payload_file("default", repository.latest("default").sha256).read_bytes())
    data = build(nudged(now.tensors, share), manifest=Manifest.load(exported), kind=now.kind, encoding="f32")
    path = repo.parent / "nudged.safetensors"
    path.write_bytes(data)
    return publish.add(repo, path, passphrase=PASSPHRASE, **options)


def test_a_device_that_has_the_base_fetches_the_delta_and_another_the_whole(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.add("first", encoding="auto")
    device = fleet.device()
    device.update()
    d = second(fleet.repo, 0.01)
    assert d["encoding"] == "delta" and d["payload_bytes"] == d["sizes"]["delta"] < 0.5 * d["sizes"]["int8"]
    assert d["whole"] == {"encoding": "int8", "bytes": d["sizes"]["int8"]}
    got = device.update()
    assert (got["state"], got["serving"]["sha256"]) == ("updated", d["sha256"])
    assert got["bytes_downloaded"] - d["payload_bytes"] < d["metadata_bytes"] + 900  # targets, and an old root's 404
    assert not list((fleet.at / "dl").iterdir()) and {p.name for p in (fleet.at / "store").iterdir()} >= {d["sha256"]}
    fresh = Fleet.__new__(Fleet)
    fresh.at, fresh.options = tmp_path / "fresh", {}
    from lrcompress.edge import Device

    whole = Device.init(fresh.at, made() / "exported", fleet.root, str(fleet.repo)).update()
    assert whole["serving"]["sha256"] == d["sha256"] and whole["bytes_downloaded"] > d["sizes"]["int8"]
    np.testing.assert_array_equal(answers(device), answers(Device(fresh.at)))


@pytest.mark.parametrize("harm", ["gone", "rotten", "cut"])
def test_a_delta_that_does_not_arrive_is_a_detour(tmp_path, harm):
    fleet = Fleet(tmp_path)
    old = fleet.add("first", encoding="auto")
    device = fleet.device()
    device.update()
    d = second(fleet.repo, 0.01)
    name = delta_name(old["sha256"], d["sha256"])
    (file,) = (fleet.repo / "targets").rglob(f"*{name}")
    data = file.read_bytes()
    {"gone": file.unlink, "rotten": lambda: file.write_bytes(data[:-1] + b"\x55"), "cut": lambda: file.write_bytes(data[:9])}[harm]()  # fmt: skip
    got = device.update()
    assert (got["state"], got["serving"]["sha256"]) == ("updated", d["sha256"])
    assert not list((fleet.at / "dl").iterdir())


def test_a_delta_that_saves_less_than_its_entry_costs_is_not_published(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path)
    fleet.add("first", encoding="auto")
    monkeypatch.setattr("lrcompress.publish.encoding.DELTA_ENTRY_BYTES", 1 << 14)
    d = second(fleet.repo, 0.01)
    assert "delta" not in d["sizes"] and not list((fleet.repo / "targets").rglob("*.delta"))


def test_deltas_are_targets_like_any_other_and_go_with_their_release(tmp_path):
    fleet = Fleet(tmp_path)
    with pytest.raises(PayloadError, match="earlier payload"):
        fleet.add("first", encoding="delta")
    first = fleet.add("first", encoding="auto")
    d = second(fleet.repo, 0.01)
    targets = Repository(fleet.repo).read("default").signed.targets
    name = f"small/default/{delta_name(first['sha256'], d['sha256'])}"
    assert targets[name].custom == {"from": first["sha256"], "to": d["sha256"]}
    publish.verify(fleet.repo)
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    assert not [n for n in Repository(fleet.repo).read("default").signed.targets if n.endswith(".delta")]
    # A delta that saves less than its own entry costs is not worth a signature, unless it is asked for.
    far = fleet.add("second", encoding="auto")
    assert (far["encoding"] == "delta") == ("delta" in far["sizes"]) and far["payload_bytes"] == min(
        far["sizes"].values()
    )
    if far["encoding"] == "delta":
        assert far["payload_bytes"] + DELTA_ENTRY_BYTES < far["whole"]["bytes"]
    assert second(fleet.repo, 2.0, encoding="delta")["encoding"] == "delta"
