"""An exported model answers on emulated 64-bit ARM as it does here: float and int8, convolutions, slots, payloads."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lrcompress import payload as payloads
from lrcompress.cli.main import run as command
from lrcompress.errors import CommandError, HostError
from lrcompress.export.quantize import quantize_int8
from lrcompress.golden import project
from lrcompress.manifest import Manifest
from lrcompress.validate import validate
from lrcompress.validate.arm_root import CHECKED_CPUS, arm_root, cpus
from tests.support.graphs import adapter, batches, cnn, run, write_exported

pytestmark = pytest.mark.arm


@pytest.fixture(scope="module")
def root() -> Path:
    try:
        return arm_root()
    except HostError as e:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(e))


def images(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN with conv and linear slots and a payload; its goldens are what x86 answers, at 1e-4."""
    model, slots = cnn()
    if request.param == "int8":
        model = quantize_int8(model, slots=slots, calibration=batches(images(16, seed=2)))
    folder = write_exported(
        tmp_path_factory.mktemp("arm") / "exported", model, slots, images(8), precision=request.param
    )
    tensors = adapter(model, slots, rank=4)
    golden = project({"output": run(model, x=images(8), **tensors)})
    (folder / "payloads").mkdir()
    data = payloads.build(tensors, manifest=Manifest.load(folder), kind="lora", encoding="f32", golden=golden)
    (folder / "payloads" / "first.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("cpu", CHECKED_CPUS)
def test_arm_answers_what_x86_answers(root: Path, exported: Path, cpu: str) -> None:
    report = validate(exported, on=(f"arm64:{cpu}",))
    assert report.passed, report.misses
    rows = {t["against"]: t for t in report.data["targets"]}
    assert set(rows) == {"compressed", "payload first.safetensors"}
    assert all(t["p50_ms"] is None and t["p95_ms"] is None for t in rows.values()), "emulated time means nothing"
    assert rows["compressed"]["max_abs_diff"] < 1e-5


def test_the_command_checks_here_and_there(root: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["validate", str(exported), "--on", "cpu", "--on", "arm64:cortex-a53", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and {t["target"] for t in found["targets"]} == {"cpu", "arm64:cortex-a53"}


def test_a_model_that_answers_otherwise_is_a_miss_there_too(root: Path, tmp_path: Path) -> None:
    model, slots = cnn()
    folder = write_exported(tmp_path / "e", model, slots, images(8), expected=run(model, x=images(8)) + 1e-3)
    report = validate(folder, on=("arm64:cortex-a53",))
    assert report.misses and report.misses[0].startswith("arm64:cortex-a53: output is 0.001 from compressed")


def test_a_processor_there_is_not_is_named_with_those_there_are(root: Path, exported: Path) -> None:
    with pytest.raises(CommandError, match="cortex-a53"):
        validate(exported, on=("arm64:cortex-m4",))


def test_the_tree_is_a_python_for_arm_and_its_children_are_too(root: Path) -> None:
    code = """if True:
        import json, platform, subprocess, sys, numpy, onnxruntime
        asked = [sys.executable, "-c", "import platform; print(platform.machine())"]
        child = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        shown = open("/proc/cpuinfo").read()
        versions = [numpy.__version__, onnxruntime.__version__]
        print(json.dumps([platform.machine(), child, *versions, shown.count("processor"), "asimddp" in shown]))
    """
    for cpu, dot_product in zip(CHECKED_CPUS, (False, True), strict=True):
        done = subprocess.run(
            [str(root / "bin/arm-python"), "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "QEMU_CPU": cpu},
        )
        expected = [
            "aarch64",
            "aarch64",
            np.__version__,
            onnxruntime.__version__,
            os.sysconf("SC_NPROCESSORS_CONF"),
            dot_product,
        ]
        assert json.loads(done.stdout) == expected


def test_a_second_call_only_looks(root: Path) -> None:
    before = (root / "made").stat().st_ino
    assert arm_root() == root and (root / "made").stat().st_ino == before
    assert set(CHECKED_CPUS) <= set(cpus(root))
