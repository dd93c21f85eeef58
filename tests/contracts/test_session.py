"""One session serves one payload or another, never half of one, and refuses what the graph does not take."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress.errors import DataError, ManifestError, PayloadError
from lrcompress.manifest import Manifest
from lrcompress.payload import Payload, build, parse
from lrcompress.runtime import Session
from tests.support.graphs import adapter, mlp, run, write_exported

X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
MODEL, SLOTS = mlp("matmul")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported(tmp_path_factory.mktemp("session") / "exported", MODEL, SLOTS, X)


def payload(exported: Path, seed: int, rank: int = 3) -> Payload:
    tensors = adapter(MODEL, SLOTS, rank, seed)
    return parse(build(tensors, manifest=Manifest.load(exported), kind="lora", encoding="f32"))


def answer(seed: int, rank: int = 3) -> np.ndarray:
    return run(MODEL, x=X, **adapter(MODEL, SLOTS, rank, seed))


def test_a_swap_serves_the_payload_and_taking_it_away_serves_the_base(exported: Path) -> None:
    session = Session(exported)
    base = session.run({"x": X})["output"]
    assert np.array_equal(base, run(MODEL, x=X)) and session.payload is None and session.output_names == ["output"]
    for seed, rank in ((1, 3), (2, 5), (1, 3)):
        session.swap(payload(exported, seed, rank))
        assert session.payload is not None
        assert np.array_equal(session.run({"x": X})["output"], answer(seed, rank))
    session.swap(None)
    assert np.array_equal(session.run({"x": X})["output"], base)


def test_a_trial_runs_beside_what_is_served(exported: Path) -> None:
    session = Session(exported)
    session.swap(payload(exported, 1))
    trial = session.prepare(payload(exported, 2))
    assert np.array_equal(session.run_with(trial, {"x": X})["output"], answer(2))
    assert np.array_equal(session.run({"x": X})["output"], answer(1))
    session.activate(trial)
    assert np.array_equal(session.run({"x": X})["output"], answer(2))


def test_swaps_under_load_never_mix_two_payloads(exported: Path) -> None:
    """Three threads ask while a fourth swaps: every answer is bit for bit that of A or of B, and both are seen."""
    session = Session(exported)
    a, b = payload(exported, 1, rank=2), payload(exported, 2, rank=7)
    wanted = {"a": answer(1, 2).tobytes(), "b": answer(2, 7).tobytes()}
    session.swap(a)
    stop, seen, wrong = threading.Event(), [0, 0], []

    def ask() -> None:
        while not stop.is_set():
            got = session.run({"x": X})["output"].tobytes()
            if got == wanted["a"]:
                seen[0] += 1
            elif got == wanted["b"]:
                seen[1] += 1
            else:
                wrong.append(got)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    until = time.monotonic() + 10
    while min(seen) < 50 and not wrong and time.monotonic() < until:
        session.swap(b)
        session.swap(a)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and min(seen) >= 50, (len(wrong), seen)


def test_a_request_keeps_the_payload_it_started_with_alive(exported: Path) -> None:
    session = Session(exported)
    active = session.prepare(payload(exported, 1))
    session.swap(payload(exported, 2))
    session.swap(None)
    gc.collect()
    assert np.array_equal(session.run_with(active, {"x": X})["output"], answer(1))


def test_a_payload_that_changes_later_changes_nothing_here(exported: Path) -> None:
    session, found = Session(exported), payload(exported, 1)
    tensors = {n: v.copy() for n, v in found.tensors.items()}
    mine = Payload(found.kind, found.encoding, found.slots_id, found.base_ids, tensors, {}, found.sha256, found.size)
    session.swap(mine)
    for value in tensors.values():
        value[...] = 7
    assert np.array_equal(session.run({"x": X})["output"], answer(1))


def test_a_payload_of_another_base_changes_nothing(exported: Path, tmp_path: Path) -> None:
    session = Session(exported)
    session.swap(payload(exported, 1))
    model, slots = mlp("gemm")
    other = write_exported(tmp_path / "other", model, slots, X)
    with pytest.raises(PayloadError):
        session.swap(payload(other, 2))
    assert np.array_equal(session.run({"x": X})["output"], answer(1))


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "none"), ({"y": X}, "y"), ({"x": X, "z": X}, "x, z"), ({"x": X.astype(np.float64)}, "float64"),
        ({"x": X.astype(np.float16)}, "float16"), ({"x": X[0]}, "shape"), ({"x": X[:, :63]}, "[8, 63]"), ({"x": X[None]}, "[1, 8, 64]"),
        ({"x": X, "fc0.lora_A": np.zeros((64, 1), np.float32)}, "fc0.lora_A"),
    ],
)  # fmt: skip
def test_inputs_that_the_graph_does_not_take_are_the_data_s_fault(
    exported: Path, inputs: dict[str, Any], word: str
) -> None:
    with pytest.raises(DataError) as caught:
        Session(exported).run(inputs)
    assert word in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 9


def test_any_batch_and_any_memory_order(exported: Path) -> None:
    session = Session(exported)
    for n in (0, 1, 5):
        assert session.run({"x": X[:n]})["output"].shape == (n, 10)
    assert np.array_equal(session.run({"x": np.asfortranarray(X)})["output"], session.run({"x": X})["output"])
    assert session.run({"x": X}, ["output"]).keys() == {"output"}
    with pytest.raises(DataError):
        session.run({"x": X}, ["no such output"])


def with_graph(folder: Path, graph: bytes) -> Path:
    """Write an export, and another graph into it."""
    write_exported(folder, MODEL, SLOTS, X)
    (folder / "model.onnx").write_bytes(graph)
    return folder


def test_a_graph_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    folder = with_graph(tmp_path / "e", b"no protobuf")
    with pytest.raises(ManifestError, match=r"model\.onnx"):
        Session(folder)
    with pytest.raises(ManifestError, match="loads") as caught:
        Session(folder, verify=False)
    assert "\n" not in str(caught.value)


def test_a_slot_that_the_graph_does_not_offer_is_noticed(tmp_path: Path) -> None:
    """A runtime that folded a slot away would silently serve the base for ever."""
    plain, _ = mlp("matmul", slot=False)
    folder = with_graph(tmp_path / "e", plain.SerializeToString())
    with pytest.raises(ManifestError, match=r"slot fc0\.lora_A as an optional input"):
        Session(folder, verify=False)


def test_another_runtime_is_refused(tmp_path: Path) -> None:
    folder = write_exported(tmp_path / "e", MODEL, SLOTS, X, edit=lambda m: m.update(ort={"min": "99.0", "max": None}))
    with pytest.raises(ManifestError, match=r"99\.0 or newer"):
        Session(folder)
