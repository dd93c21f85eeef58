"""The base install is what a device runs: built in an empty environment, light to import, and able to say what is missing."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.support.graphs import mlp, write_exported

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "tensorly",
    "pydantic",
    "yaml",
    "scipy",
    "transformers",
    "optimum",
    "rich",
    "matplotlib",
    "jinja2",
}
#: What those modules are called as packages, where the name differs.
PACKAGES = HEAVY - {"yaml", "onnx_ir"} | {"pyyaml", "onnx-ir"}
RSS_LIMIT, TIME_LIMIT, RUNS = 80 << 20, 2.0, 7
#: What the build reads; built from a copy, so that no build folder is left in the checkout.
SOURCES = ("lrcompress", "recipes", "devices", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment that holds `pip install .` and nothing else."""
    place = tmp_path_factory.mktemp("base")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    venv.create(place / "venv", with_pip=True)
    pip = [
        str(place / "venv/bin/python"),
        "-m",
        "pip",
        "install",
        "-q",
        str(source),
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "venv" / "bin"


def said(bin: Path, code: str) -> str:
    """Run `code` in the environment, away from the checkout; return what it printed."""
    done = subprocess.run([str(bin / "python"), "-I", "-c", code], capture_output=True, text=True, cwd=bin)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def command(bin: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(bin / "lrcompress"), *args], capture_output=True, text=True, cwd=cwd or bin, timeout=120)


def test_nothing_heavy_is_installed(bin: Path) -> None:
    code = "from importlib.metadata import distributions; print(*{d.name.lower() for d in distributions()})"
    installed = set(said(bin, code).split())
    assert {"lrcompress", "numpy", "onnxruntime", "tuf", "click", "safetensors"} <= installed
    assert not PACKAGES & installed
    assert len(installed) < 25, sorted(installed)


def test_recipes_and_devices_travel_inside(bin: Path) -> None:
    code = (
        "from importlib.resources import files; print(*sorted(p.name for p in files('lrcompress._recipes').iterdir()))"
    )
    shipped = set(said(bin, code).split())
    assert {p.name for p in (ROOT / "recipes").iterdir() if not p.name.startswith("__")} <= shipped


def test_the_device_s_commands_are_there(bin: Path) -> None:
    for args in (("--help",), ("device", "--help"), ("device", "update", "--help"), ("--version",)):
        done = command(bin, *args)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    listed = command(bin, "device", "--help").stdout
    assert all(name in listed for name in ("init", "update", "infer", "status", "rollback"))


@pytest.mark.parametrize(
    "args",
    [
        ("factorize", "x.pt", "--rank", "4"), ("factorize", "x.pt"), ("recover", "--data", "x.npz"), ("export",), ("run", "quickstart"),
        ("validate", "x", "--data", "x.npz", "--metric", "accuracy"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_more_says_what_to_install(bin: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    done = command(bin, *args, "--json", cwd=tmp_path)
    assert done.returncode == 10, (done.returncode, done.stderr)
    assert (
        done.stderr.count("\n") == 1
        and "pip install 'lrcompress[build]'" in done.stderr
        and "Traceback" not in done.stderr
    )
    error = json.loads(done.stdout)["error"]
    assert error["code"] == 10 and error["kind"] == "missing_extra" and error["where"] == f"lrcompress {args[0]}"
    assert not list(tmp_path.iterdir())


def test_an_exported_model_can_be_checked_here(bin: Path, tmp_path: Path) -> None:
    model, slots = mlp("matmul")
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    folder = write_exported(tmp_path / "exported", model, slots, x)
    done = command(bin, "validate", str(folder), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["passed"], done.stderr


#: The whole edge, so that nothing heavy hides behind a lazy import.
EDGE = ["lrcompress.edge", *(f"lrcompress.edge.{p.stem}" for p in sorted((ROOT / "lrcompress/edge").glob("[a-z]*.py")))]


def test_the_edge_imports_nothing_heavy(bin: Path) -> None:
    modules = [*EDGE, "lrcompress.cli.device"]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*{{m.partition('.')[0] for m in sys.modules}})"
    assert not HEAVY & set(said(bin, code).split())
    # Also where everything is installed: what is at hand must not be picked up.
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & set(here.stdout.split())


def test_the_edge_is_light(bin: Path) -> None:
    """At most 80 MiB with everything that an update loads; `import lrcompress.edge`, which is what serving waits for, in
    at most twice the time of numpy and onnxruntime, measured in turns."""
    timed = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    # VmHWM: ru_maxrss would carry the memory of the process that started this one.
    rss = said(
        bin,
        f"import {', '.join(EDGE)}; print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])",
    )
    assert int(rss) << 10 <= RSS_LIMIT, f"{int(rss) / 1024:.1f} MiB"
    edge, runtime = [], []
    for _ in range(RUNS):
        runtime.append(float(said(bin, timed.format("numpy, onnxruntime"))))
        edge.append(float(said(bin, timed.format("lrcompress.edge"))))
    ratio = statistics.median(edge) / statistics.median(runtime)
    assert ratio <= TIME_LIMIT, f"{ratio:.2f}: {edge} against {runtime}"


def test_what_runs_elsewhere_is_in_the_package(bin: Path) -> None:
    """The builder of the ARM emulation, and what ssh runs on a board, are files that are read: they must be installed."""
    code = (
        "import pathlib, lrcompress; here = pathlib.Path(lrcompress.__file__).parent / 'validate'; "
        "print(*sorted(p.name for p in here.iterdir() if p.is_file()))"
    )
    done = subprocess.run([str(bin / "python"), "-I", "-c", code], capture_output=True, text=True, check=True)
    needed = {"arm_root.py", "arm_python.sh", "arm_probe.py", "golden_runner.py", "remote_runner.py"}
    assert needed <= set(done.stdout.split())
