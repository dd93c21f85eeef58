"""Goldens are plain arrays, a difference passes or it does not, and what travels in a payload is the same everywhere."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompress.errors import ManifestError, PayloadError
from lrcompress.golden import BUDGET_BYTES, compare, compare_projected, load_golden, project

RNG = np.random.default_rng(0)


def rows(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, *shape)).astype(np.float32)


# reading --------------------------------------------------------------------------------------------------------


def stored(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **{k.replace("__", "/"): v for k, v in arrays.items()})  # type: ignore[arg-type]
    return path


def test_groups_are_told_apart_by_their_first_word(tmp_path: Path) -> None:
    x, y = rows(3, 4), rows(3, 2)
    found = load_golden(stored(tmp_path / "g.npz", input__a=x, compressed__b=y, original__b=y + 1, other__c=x))
    assert np.array_equal(found.inputs["a"], x) and found.inputs.keys() == {"a"}
    assert np.array_equal(found.compressed["b"], y) and np.array_equal(found.original["b"], y + 1)
    assert load_golden(stored(tmp_path / "h.npz", input__a=x, compressed__b=y)).original == {}


@pytest.mark.parametrize("missing", ["input__a", "compressed__b"])
def test_inputs_and_answers_must_be_there(tmp_path: Path, missing: str) -> None:
    arrays = {"input__a": rows(2, 2), "compressed__b": rows(2, 2)}
    del arrays[missing]
    with pytest.raises(ManifestError, match="input/"):
        load_golden(stored(tmp_path / "g.npz", **arrays))


def test_a_pickle_inside_is_not_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (marker,)  # type: ignore[return-value]

    stored(tmp_path / "g.npz", input__a=np.array([Planted()], dtype=object), compressed__b=rows(2, 2))
    with pytest.raises(ManifestError):
        load_golden(tmp_path / "g.npz")
    assert not marker.exists()


def test_no_damage_is_an_accident(tmp_path: Path) -> None:
    """Every cut, and every changed byte in a sample of places, is read as whole arrays or refused."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"input/a": rows(3, 4), "compressed/b": rows(3, 2)})
    good, path = buffer.getvalue(), tmp_path / "g.npz"
    refused = 0
    for i in range(0, len(good), 7):
        for bad in (good[:i], good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :]):
            path.write_bytes(bad)
            try:
                load_golden(path)
            except ManifestError as e:
                assert "\n" not in str(e)
                refused += 1
    assert refused > len(good) // 7
    path.unlink()
    with pytest.raises(ManifestError):
        load_golden(path)


def test_an_array_that_claims_to_be_enormous_is_refused(tmp_path: Path) -> None:
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(127)
        + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as z:
        z.writestr("input/a.npy", header)
    with pytest.raises(ManifestError):
        load_golden(tmp_path / "g.npz")


# comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "limit"), [(0.1, 1e-3), (1.0, 1e-3), (50.0, 5e-2)])
def test_the_limit_is_relative_to_the_largest_answer_from_one_up(largest: float, limit: float) -> None:
    want = {"y": np.array([[largest, 0.0]])}
    assert compare(want, {"y": want["y"] + np.array([[0, limit * 0.999]])}, 1e-3).passed
    report = compare(want, {"y": want["y"] + np.array([[0, limit * 1.001]])}, 1e-3)
    assert not report.passed and report.outputs[0].tolerance == pytest.approx(limit)
    assert report.max_abs_diff == pytest.approx(limit * 1.001)


@pytest.mark.parametrize("got", [{}, {"z": np.ones((2, 3))}, {"y": np.ones((3, 2))}, {"y": np.ones((2, 3, 1))}])
def test_missing_and_misshapen_answers_are_infinitely_far(got: dict[str, np.ndarray]) -> None:
    report = compare({"y": np.ones((2, 3))}, got, 1.0)
    assert not report.passed and report.max_abs_diff == math.inf


@pytest.mark.parametrize(
    ("want", "got"), [(1.0, np.nan), (np.nan, 1.0), (np.nan, np.nan), (1.0, np.inf), (np.inf, -np.inf)]
)
def test_what_is_not_finite_does_not_pass(want: float, got: float) -> None:
    assert not compare({"y": np.array([want, 0.0])}, {"y": np.array([got, 0.0])}, 1e6).passed


def test_equal_infinities_pass_and_do_not_excuse_their_neighbours() -> None:
    mask = np.array([[-np.inf, 1.0]])
    assert compare({"y": mask}, {"y": mask + np.array([[0, 1e-6]])}, 1e-3).passed
    assert not compare({"y": mask}, {"y": mask + np.array([[0, 0.5]])}, 1e-3).passed


def test_nothing_to_compare_is_no_pass_and_a_scalar_can_be_compared() -> None:
    assert not compare({}, {"y": np.ones(1)}, 1.0).passed
    assert compare({"y": np.float32(2.0)}, {"y": np.array(2.0)}, 1e-6).passed  # type: ignore[dict-item]
    assert not compare({"y": np.array(2.0)}, {"y": np.array(2.1)}, 1e-6).passed


def test_the_worst_output_is_the_one_furthest_beyond_its_own_limit() -> None:
    want = {"a": np.array([1000.0]), "b": np.array([1.0]), "c": np.array([1.0])}
    report = compare(want, {"a": np.array([1001.0]), "b": np.array([1.1]), "c": np.array([1.0])}, 1e-2)
    assert report.worst.name == "b" and not report.passed
    assert compare(want, {**want, "c": np.array([np.nan])}, 1e-2).worst.name == "c"
    assert report.as_dict()["outputs"][0] == {"name": "a", "max_abs_diff": 1.0, "tolerance": 10.0}


# travelling -----------------------------------------------------------------------------------------------------


def test_small_outputs_travel_whole_and_large_ones_within_the_budget() -> None:
    small = rows(8, 5)
    assert np.array_equal(project({"y": small})["y"], small.astype(np.float16))
    for outputs in ({"y": rows(8, 4096)}, {"y": rows(8, 32, 32), "z": rows(8, 7)}, {"a": rows(1, 100_000)}):
        found = project(outputs)
        assert found.keys() == outputs.keys()
        assert sum(v.nbytes for v in found.values()) <= BUDGET_BYTES
        assert all(v.ndim == 2 and len(v) == len(outputs[k]) and v.shape[1] >= 1 for k, v in found.items())


def test_the_directions_are_pinned() -> None:
    """A device with another numpy must project as the publisher did: SHAKE-256 of name, width and index."""
    found = project({"logits": np.eye(400, dtype=np.float32)[:8]})["logits"]
    assert found.shape == (8, 64)
    assert np.allclose(np.abs(found), 1 / 20, atol=1e-4)
    first = ["".join("+" if v > 0 else "-" for v in row) for row in found[:, :4]]
    assert first == ["--+-", "++++", "-++-", "--++", "---+", "++-+", "---+", "-+--"]


def test_a_change_of_any_sample_is_seen_and_rounding_is_not() -> None:
    outputs = {"y": rows(8, 4096) * 3}
    kept = project(outputs)
    assert compare_projected(kept, outputs, 1e-6).passed
    assert compare_projected(kept, {"y": outputs["y"] + np.float32(1e-6)}, 1e-4).passed
    for sample in range(8):
        moved = {"y": outputs["y"].copy()}
        moved["y"][sample] = rows(1, 4096)
        assert not compare_projected(kept, moved, 1e-2).passed


@pytest.mark.parametrize("got", [{}, {"y": rows(7, 4096)}, {"y": rows(8, 3)}, {"z": rows(8, 4096)}])
def test_answers_of_another_shape_do_not_pass(got: dict[str, np.ndarray]) -> None:
    assert not compare_projected(project({"y": rows(8, 4096)}), got, 1e6).passed


@pytest.mark.parametrize("value", [6.0e4, 65504.0, 1e6, 1e30])
@pytest.mark.parametrize("width", [4, 5000])
def test_numbers_that_float16_cannot_hold_travel_as_float32(value: float, width: int) -> None:
    outputs = {"y": np.full((4, width), value, np.float32)}
    kept = project(outputs)["y"]
    assert np.isfinite(kept).all() and kept.nbytes <= BUDGET_BYTES
    assert compare_projected({"y": kept}, outputs, 1e-6).passed


def test_whole_numbers_stay_exact() -> None:
    ids = np.arange(24, dtype=np.int64).reshape(8, 3) * 5001
    kept = project({"ids": ids})
    assert kept["ids"].dtype == np.float32 and compare_projected(kept, {"ids": ids}, 1e-9).passed
    assert not compare_projected(kept, {"ids": ids + 1}, 1e-9).passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite_cannot_travel(value: float) -> None:
    with pytest.raises(PayloadError, match="finite"):
        project({"y": np.array([[1.0, value]])})


@given(st.integers(1, 12), st.integers(1, 3000), st.floats(1e-3, 1e4))
def test_a_projection_keeps_the_size_of_what_it_projects(n: int, width: int, scale: float) -> None:
    outputs = {"y": rows(n, width) * np.float32(scale)}
    kept = project(outputs)
    assert compare_projected(kept, outputs, 1e-6).passed
    assert np.abs(kept["y"]).max() <= 2 * math.sqrt(width) * np.abs(outputs["y"]).max()
