"""Parity is the gate, accuracy is gated by its paired error, a miss is a readable report, and nothing is guessed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress import payload as payloads
from lrcompress.cli.main import run as command
from lrcompress.data import Data
from lrcompress.errors import CommandError, HostError, LrcompressWarning, ManifestError, PayloadError
from lrcompress.golden import project
from lrcompress.manifest import Manifest
from lrcompress.validate import arm_root as emulation
from lrcompress.validate import golden_runner, validate
from lrcompress.validate.tolerances import tolerances
from tests.support.graphs import adapter, mlp, run, write_exported


def inputs(n: int = 8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 64)).astype(np.float32)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model, slots = mlp("matmul")
    return write_exported(tmp_path / "exported", model, slots, inputs(), original=run(model, x=inputs()) + 0.5)


def row(data: dict[str, Any], against: str) -> dict[str, Any]:
    (found,) = [t for t in data["targets"] if t["against"] == against]
    return dict(found)


def test_a_good_export_passes_and_says_how_fast_it_is(exported: Path) -> None:
    report = validate(exported)
    assert report.passed and report.data["passed"] and report.misses == ()
    first = row(report.data, "compressed")
    assert report.data["targets"][0] == first
    assert (
        first["target"] == "cpu" and first["max_abs_diff"] < 1e-6 and first["threads"] == 1 and first["metric"] is None
    )
    (output,) = first["outputs"]
    assert output["name"] == "output" and output["tolerance"] >= 1e-4
    assert 0 < first["p50_ms"] <= first["p95_ms"] < 1000
    assert first["bytes"] == sum((exported / n).stat().st_size for n in ("model.onnx", "base.data"))


def test_the_distance_to_the_original_is_reported_and_gates_nothing(exported: Path) -> None:
    report = validate(exported, on=("cpu", "cpu"))
    (row,) = report.data["targets"]  # one for each target, as the contract says
    assert report.passed and row["original"]["max_abs_diff"] == pytest.approx(0.5, abs=1e-5)
    assert [o["name"] for o in row["original"]["outputs"]] == ["output"]


@pytest.mark.parametrize(("share", "passes"), [(0.5, True), (0.99, True), (1.01, False), (100.0, False)])
def test_the_gate_is_the_tolerance_times_the_size_of_the_answer(tmp_path: Path, share: float, passes: bool) -> None:
    model, slots = mlp("matmul")
    answer = run(model, x=inputs()).astype(np.float64)
    shifted = answer.copy()
    at = np.unravel_index(np.argmin(np.abs(answer)), answer.shape)
    limit = 1e-2 * max(1.0, float(np.abs(answer).max()))
    shifted[at] += share * limit
    folder = write_exported(tmp_path / "e", model, slots, inputs(), tolerance=1e-2, expected=shifted)
    report = validate(folder)
    assert report.passed is passes
    first = row(report.data, "compressed")
    assert first["outputs"][0]["tolerance"] == pytest.approx(limit)
    assert first["max_abs_diff"] == pytest.approx(share * limit, rel=1e-3)
    if not passes:
        (line,) = report.misses
        assert line == f"cpu: output is {first['max_abs_diff']:.3g} from compressed, allowed {limit:.3g}"


def test_an_answer_that_is_not_finite_is_a_miss(tmp_path: Path) -> None:
    model, slots = mlp("matmul")
    x = inputs()
    good = run(model, x=x)
    x[3, 5] = np.nan
    report = validate(write_exported(tmp_path / "e", model, slots, x, expected=good))
    assert not report.passed and len(report.misses) == 1


def shipped(exported: Path, *, wrong: float = 0.0, **changes: Any) -> None:
    model, slots = mlp("matmul")
    tensors = adapter(model, slots, rank=3)
    answers = {"output": run(model, x=inputs(), **tensors) + np.float32(wrong)}
    manifest = Manifest.load(exported)
    (exported / "payloads").mkdir(exist_ok=True)
    data = payloads.build(tensors, manifest=manifest, kind="lora", encoding="f32", golden=project(answers))
    (exported / "payloads" / "first.safetensors").write_bytes(data)


def test_a_payload_is_swapped_in_and_held_to_its_own_goldens(exported: Path) -> None:
    shipped(exported)
    report = validate(exported)
    assert report.passed
    found = row(report.data, "payload first.safetensors")
    assert found["outputs"][0]["max_abs_diff"] < found["outputs"][0]["tolerance"] < 1e-2
    assert found["bytes"] > row(report.data, "compressed")["bytes"] and found["p50_ms"] is None


def test_a_payload_that_does_not_do_what_it_promises_is_a_miss(exported: Path) -> None:
    shipped(exported, wrong=0.2)
    report = validate(exported)
    assert not report.passed
    assert [t["against"] for t in report.data["targets"] if not t["passed"]] == ["payload first.safetensors"]


def test_a_payload_of_another_base_is_refused(exported: Path, tmp_path: Path) -> None:
    model, slots = mlp("matmul", slot=True)
    other = write_exported(
        tmp_path / "other", model, slots[:2], inputs(), edit=lambda m: m["slots"] or pytest.fail("no slots")
    )
    tensors = {n: v for n, v in adapter(model, slots, rank=3).items() if n in slots[:2]}
    (exported / "payloads").mkdir()
    data = payloads.build(tensors, manifest=Manifest.load(other), kind="lora", encoding="f32")
    (exported / "payloads" / "x.safetensors").write_bytes(data)
    with pytest.raises(PayloadError):
        validate(exported)


# --- accuracy ----------------------------------------------------------------------------------------------------


def labelled(n: int = 400) -> tuple[Data, np.ndarray]:
    model, _ = mlp("matmul")
    x = inputs(n, seed=5)
    labels = run(model, x=x).argmax(-1)
    return Data.of_arrays({"x": x}, labels), labels


def original_better_by(labels: np.ndarray, hits: int) -> Any:
    """Return data labels on which the exported model is wrong `hits` times, and an original that is always right."""
    changed = labels.copy()
    changed[:hits] = (changed[:hits] + 1) % 10
    at = 0

    def predict(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal at
        n = len(batch["x"])
        chosen = changed[at : at + n]
        at = (at + n) % len(changed)
        return {"output": np.eye(10, dtype=np.float32)[chosen]}

    return changed, predict


@pytest.mark.parametrize(("hits", "passes"), [(0, True), (4, True), (6, True), (20, False), (100, False)])
def test_a_drop_beyond_the_limit_and_two_paired_errors_is_a_miss(exported: Path, hits: int, passes: bool) -> None:
    data, labels = labelled()
    changed, predict = original_better_by(labels, hits)
    data = Data.of_arrays({"x": inputs(400, seed=5)}, changed)
    report = validate(exported, data=data, metric="accuracy", predict_original=predict, max_drop=0.01)
    metric = row(report.data, "compressed")["metric"]
    assert metric["n"] == 400 and metric["original"] == 1.0
    assert metric["value"] == pytest.approx(1 - hits / 400)
    # The paired difference is Bernoulli(hits / n).
    p = hits / 400
    error = np.sqrt(p * (1 - p) / 399)
    assert metric["drop"] == pytest.approx(p) and metric["drop_stderr"] == pytest.approx(error, abs=1e-9)
    assert metric["passed"] is passes is bool(p <= 0.01 + 2 * error)
    assert report.passed is passes
    if not passes:
        assert report.misses == (
            f"cpu: accuracy {1 - p:.4f} against 1.0000, a drop of {p:.4f}, allowed {0.01 + 2 * error:.4f}",
        )


def test_the_default_limit_is_one_percent(exported: Path) -> None:
    data, labels = labelled()
    _, predict = original_better_by(labels, 0)
    report = validate(exported, data=data, metric="accuracy", predict_original=predict)
    assert row(report.data, "compressed")["metric"]["max_drop"] == 0.01
    mse = Data.of_arrays({"x": inputs(400, seed=5)}, np.zeros((400, 10), np.float32))
    found = row(validate(exported, data=mse, metric="mse", predict_original=predict).data, "compressed")["metric"]
    assert found["max_drop"] == pytest.approx(0.01 * found["original"])


def test_without_an_original_the_metric_is_told_and_this_is_said(exported: Path) -> None:
    data, _ = labelled()
    with pytest.warns(LrcompressWarning, match="original"):
        report = validate(exported, data=data, metric="accuracy")
    metric = row(report.data, "compressed")["metric"]
    assert report.passed and metric["value"] == 1.0 and metric["original"] is None


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["ssh://pi@bo ard", "arm46", "cpu:0", "arm64:max", "arm64:max,sve=on", "arm64:../x", "arm64:a b", ""]
)
def test_a_target_there_is_not_is_refused_before_anything_runs(exported: Path, target: str) -> None:
    (exported / "model.onnx").unlink()
    with pytest.raises(CommandError):
        validate(exported, on=("cpu", target))


def test_what_belongs_together_is_asked_for_together(exported: Path) -> None:
    data, _ = labelled(16)
    for wrong in ({"data": data}, {"metric": "accuracy"}, {"max_drop": 0.1}, {"on": ()}):
        with pytest.raises(CommandError):
            validate(exported, **wrong)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match="--original"):
        validate(exported, data=data, metric="accuracy", max_drop=0.1)
    with pytest.raises(CommandError, match="--original"):
        validate(exported, data=data, metric="cosine_to_original")


@pytest.mark.parametrize("name", ["model.onnx", "base.data", "golden.npz", "device.json"])
def test_a_changed_file_is_refused(exported: Path, name: str) -> None:
    data = (exported / name).read_bytes()
    (exported / name).write_bytes(data + b"\0")
    with pytest.raises(ManifestError, match=name):
        validate(exported)


def test_goldens_must_cover_the_graph(tmp_path: Path) -> None:
    model, slots = mlp("matmul")

    def another_output(manifest: dict[str, Any]) -> None:
        manifest["outputs"].append({"name": "embedding", "dtype": "float32", "shape": ["batch", 4]})

    with pytest.raises(ManifestError, match="embedding"):
        validate(write_exported(tmp_path / "e", model, slots, inputs(), edit=another_output))


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_one_object(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["validate", str(exported)]) == 0
    out = capsys.readouterr().out
    assert "compressed" in out and "reported" in out and out.rstrip().endswith("passed")
    assert command(["validate", str(exported), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["passed"] and {"seconds", "schema", "warnings", "targets"} <= found.keys()


def test_a_miss_is_exit_5_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, slots = mlp("matmul")
    folder = write_exported(tmp_path / "e", model, slots, inputs(), expected=run(model, x=inputs()) + 1)
    assert command(["validate", str(folder)]) == 5
    out = capsys.readouterr().out
    assert "MISS" in out and "missed:\n  cpu: output is 1 from compressed, allowed" in out
    assert command(["validate", str(folder), "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["passed"] is False and found["targets"]
    assert (
        found["error"]["code"] == 5
        and found["error"]["kind"] == "parity"
        and "1 from compressed" in found["error"]["got"]
    )


def test_a_folder_that_is_no_export_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["validate", str(tmp_path)]) == 6
    streams = capsys.readouterr()
    assert streams.out == "" and len(streams.err.strip().splitlines()) == 1 and "lrcompress export" in streams.err


# --- the runner and the emulation --------------------------------------------------------------------------------


def test_the_runner_needs_nothing_of_ours_and_answers_the_same(exported: Path, tmp_path: Path) -> None:
    model, slots = mlp("matmul")
    tensors = adapter(model, slots, rank=2)
    np.savez(tmp_path / "in.npz", **{"tensor/x": inputs()})
    np.savez(tmp_path / "a.npz", **{f"tensor/{k}": v for k, v in tensors.items()})
    job = {
        "model": str(exported / "model.onnx"), "inputs": str(tmp_path / "in.npz"), "threads": 1,
        "result": str(tmp_path / "out.npz"), "cases": {"0": None, "1": str(tmp_path / "a.npz")},
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = f"import runpy, sys; sys.argv[1:] = [{str(tmp_path / 'job.json')!r}]; "
    script += f"runpy.run_path({golden_runner.__file__!r}, run_name='__main__')"
    script += "; print(any(m.startswith(('lrcompress', 'torch', 'onnx.')) for m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
    assert set(json.loads(done.stdout)["ms"]) == {"0", "1"}
    with np.load(tmp_path / "out.npz") as answers:
        assert np.array_equal(answers["0/output"], run(model, x=inputs()))
        assert np.array_equal(answers["1/output"], run(model, x=inputs(), **tensors))


def test_a_host_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get") as caught:
        emulation.arm_root()
    assert caught.value.exit_code == 10 and not (tmp_path / "cache").exists()


def test_a_build_that_fails_says_the_last_line_and_leaves_no_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "apt-cache"):
        (tools / name).write_text("#!/bin/sh\necho reading >&2\necho 'E: no network here' >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HostError, match=r"got E: no network here; see .*failed\.log"):
        emulation.arm_root()
    left = {p.name for p in (tmp_path / "cache" / "arm-root").iterdir()}
    assert left == {"apt-arm64", "failed.log", "lock"}


def test_a_cache_that_apt_cannot_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "with blank"))
    with pytest.raises(HostError, match="LRCOMPRESS_CACHE"):
        emulation.arm_root()


def test_int8_tolerances_follow_the_model_and_fp32_ones_do_not() -> None:
    assert tolerances("fp32", 0.3) == {"cpu": 1e-4, "arm64": 1e-4}
    assert tolerances("int8", 0.02) == {"cpu": pytest.approx(0.041), "arm64": pytest.approx(0.041)}
