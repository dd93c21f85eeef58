"""`lrcompress recover` is killed at any moment: the same command continues, and gives the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.files import sha256_tree
from lrcompress.model import InputSpec
from tests.support.nets import images, small

ROOT = Path(__file__).resolve().parents[2]
#: What is trained, and how: few steps a second, so that a kill lands in the middle of them.
KINDS = {
    "factors": ("--train", "factors", "--loss", "logits=1,hidden=0.5,labels=0.1"),
    "adapters": ("--adapter", "lora", "--rank", "4", "--augment", "--accumulate", "2"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a compressed model and data, and what unbroken runs make of them."""
    folder = tmp_path_factory.mktemp("kill")
    torch.save(small().state_dict(), folder / "model.pt")
    x, y = images(300)
    np.savez(folder / "train.npz", x=x, y=y)
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(
        folder / "model.pt", ratio=0.3, calib=str(folder / "train.npz"), arch="tests.support.nets:small", inputs=spec,
        output=folder / "compressed", threads=1,
    )  # fmt: skip
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(output: str, kind: str, steps: int) -> list[str]:
    script = [sys.executable, "-m", "lrcompress", "recover", "compressed", "--data", "train.npz", "-o", output]
    options = [
        "--steps",
        str(steps),
        "--batch-size",
        "16",
        "--save-seconds",
        "0",
        "--threads",
        "1",
        "--name",
        "one",
        "--quiet",
    ]
    return [*script, *options, *KINDS[kind]]


def states(folder: Path, output: str) -> list[Path]:
    return list(folder.glob(f".{output}.work-*/*.safetensors"))


def unbroken(folder: Path, kind: str, steps: int) -> None:
    # States that are never read must not change anything: this run keeps none.
    words = [w if w != "0" else "1000" for w in command(f"whole-{kind}", kind, steps)]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kill_often(folder: Path, kind: str, steps: int, kills: int, seed: int) -> None:
    """Kill a run once a state is there, somewhere in what follows."""
    draw, output, broken = random.Random(seed), f"killed-{kind}-{seed}", 0
    unbroken(folder, kind, steps)
    for _ in range(kills):
        process = subprocess.Popen(
            command(output, kind, steps),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = {p: p.stat().st_mtime_ns for p in states(folder, output)}
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if {p: p.stat().st_mtime_ns for p in states(folder, output) if p.exists()} != before:
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.wait()
        if (folder / output).exists():
            break
        broken += 1
        assert states(folder, output), "a state is kept"
    assert broken, "no kill hit the run"
    done = subprocess.run(command(output, kind, steps), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sha256_tree(folder / output) == sha256_tree(folder / f"whole-{kind}")
    assert not list(folder.glob(f".{output}*")), "nothing stays beside a complete output"


@pytest.mark.parametrize("kind", KINDS)
def test_kills_and_the_same_bytes(place, kind):
    kill_often(place, kind, steps=60, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills_and_the_same_bytes(place, kind, seed):
    kill_often(place, kind, steps=300, kills=8, seed=seed)
