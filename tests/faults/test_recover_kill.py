"""`lrcompress recover` is killed at any moment: the same command continues, and gives the bytes of an unbroken run."""

from __future__ import annotations

import contextlib
import multiprocessing
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
from lrcompress.cli.main import run as run_command
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


def words(output: str, kind: str, steps: int, save_seconds: float = 0.0) -> list[str]:
    options = ["--steps", str(steps), "--batch-size", "16", "--save-seconds", str(save_seconds), "--threads", "1"]
    return [
        "recover",
        "compressed",
        "--data",
        "train.npz",
        "-o",
        output,
        "--name",
        "one",
        "--quiet",
        *options,
        *KINDS[kind],
    ]


def as_a_command(folder: Path, argv: list[str]) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "lrcompress", *argv], cwd=folder, env=environment(), stdout=null, stderr=null
    )


class Forked:
    """A copy of this process that runs a command: what takes seconds to import is there already."""

    def __init__(self, folder: Path, argv: list[str]) -> None:
        def go() -> None:
            os.chdir(folder)
            os._exit(run_command(argv))

        self._process = multiprocessing.get_context("fork").Process(target=go)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join(120)
        return self._process.exitcode


def states(folder: Path, output: str) -> dict[Path, int]:
    found = {}
    for path in folder.glob(f".{output}.work-*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    return found


def kill_often(folder: Path, kind: str, steps: int, kills: int, seed: int, start) -> None:
    """Kill a run once it kept a state of its own, somewhere in what follows."""
    draw, output, whole, broken = random.Random(seed), f"killed-{kind}-{seed}", f"whole-{kind}-{steps}", 0
    # States that are never read must not change anything: the unbroken run keeps none.
    assert (folder / whole).exists() or start(folder, words(whole, kind, steps, 1000)).wait() == 0
    for _ in range(kills):
        before = states(folder, output)
        process = start(folder, words(output, kind, steps))
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until and states(folder, output) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        if (folder / output).exists():
            break
        broken += 1
        assert states(folder, output), "a state is kept"
    assert broken, "no kill hit the run"
    assert start(folder, words(output, kind, steps)).wait() == 0
    assert sha256_tree(folder / output) == sha256_tree(folder / whole)
    assert not list(folder.glob(f".{output}*")), "nothing stays beside a complete output"


@pytest.mark.parametrize("kind", KINDS)
def test_kills_and_the_same_bytes(place, kind):
    kill_often(place, kind, steps=60, kills=3, seed=1, start=Forked)


def test_a_damaged_state_is_passed_over(place, capsys):
    """The later of two states is spoilt: the earlier one goes on, and the bytes are the same."""
    output, whole = "damaged", "whole-factors-60"
    assert (place / whole).exists() or Forked(place, words(whole, "factors", 60, 1000)).wait() == 0
    process = Forked(place, words(output, "factors", 60))
    while process.poll() is None and len(states(place, output)) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    path = max(found := states(place, output), key=lambda p: found[p])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    with contextlib.chdir(place):
        assert run_command([w for w in words(output, "factors", 60) if w != "--quiet"]) == 0
    assert "damaged" in capsys.readouterr().err
    assert sha256_tree(place / output) == sha256_tree(place / whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills_and_the_same_bytes(place, kind, seed):
    kill_often(place, kind, steps=300, kills=8, seed=seed, start=as_a_command)
