"""Several processes take the steps of one; what was promised is what is there; one that fails ends all with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lrcompress
from lrcompress.errors import HostError
from lrcompress.model import InputSpec
from lrcompress.recover.world import World
from tests.support.nets import images, small

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.save(small().state_dict(), folder / "model.pt")
    x, y = images(101)
    np.savez(folder / "train.npz", x=x, y=y)
    np.savez(folder / "select.npz", x=x[:33], y=y[:33])
    np.savez(folder / "bad.npz", x=x, y=np.where(np.arange(101) == 7, 5, y))
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(
        folder / "model.pt", rank=4, arch="tests.support.nets:small", inputs=spec, output=folder / "compressed"
    )
    return folder


def run(folder: Path, launcher: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [
        *launcher,
        "-m",
        "lrcompress",
        "recover",
        "compressed",
        "--select",
        "select.npz",
        "--name",
        "one",
        "--threads",
        "1",
        *words,
    ]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_two_processes_take_the_steps_of_one(place):
    """The same samples in every step, a last batch that is smaller and odd, gradients summed: equal up to rounding.

    The teacher is spread over both, which changes nothing either.
    """
    words = ("--data", "train.npz", "--train", "factors", "--steps", "9", "--batch-size", "24", "--lr", "1e-3", "--loss", "logits=1,hidden=1,labels=0.5")  # fmt: skip
    options = {
        "train": "factors",
        "steps": 9,
        "batch_size": 24,
        "learning_rate": 1e-3,
        "loss": "logits=1,hidden=1,labels=0.5",
    }
    lrcompress.recover(
        place / "compressed",
        data=str(place / "train.npz"),
        select=str(place / "select.npz"),
        output=place / "one",
        threads=1,
        **options,
    )
    two = run(
        place, TORCHRUN, *words, "-o", "two", "--processes", "2", "--shard-teacher", "--json", "--save-seconds", "0"
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count('"ok": true') == 1 and '"processes": 2' in two.stdout
    start, a, b = (load_file(place / n / "model.safetensors") for n in ("compressed", "one", "two"))
    moved = max(float((a[n] - start[n]).abs().max()) for n in a if a[n].is_floating_point())
    apart = max(float((a[n] - b[n]).abs().max()) for n in a if a[n].is_floating_point())
    assert moved > 1e-3 and apart < 1e-3 * moved, (moved, apart)
    assert not list(place.glob(".two*"))


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_one_line(place):
    """Sample 7 has a label outside the classes, which one of the two sees."""
    found = run(place, TORCHRUN, "--data", "bad.npz", "--loss", "labels", "--batch-size", "101", "--steps", "5", "-o", "bad", "--lr", "0.01", "--quiet")  # fmt: skip
    assert found.returncode != 0
    lines = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "classes 0…4" in lines[0] and not list(place.glob("*bad")) + list(place.glob(".bad*")), (
        found.stderr
    )


def test_a_world_smaller_than_promised_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert World.join() == World()
    with pytest.raises(HostError, match=r"2 processes, got 1: .*torchrun"):
        World.join(promised=2)
    # What accelerate's launcher sets for several processes on CPUs, of which it starts one.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert World.join() == World()
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(HostError, match=r"(more than one|\d+) process(es)?, got 1"):
        World.join()


@pytest.mark.slow
def test_the_launcher_that_starts_one_of_two_is_found_out(place):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "3", "-m")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [*launcher, "lrcompress", "recover", "compressed", "--data", "train.npz", "-o", "launched"]
    found = subprocess.run(argv, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode != 0 and not (place / "launched").exists()
    line = next(x for x in found.stderr.splitlines() if x.startswith("error:"))
    assert "3 processes, got 1" in line and "torchrun" in line
