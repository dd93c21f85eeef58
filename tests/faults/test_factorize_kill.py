"""`lrcompress factorize` is killed at any moment: the same command continues, and gives the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lrcompress.files import sha256_tree

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and what an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("kill")
    torch.manual_seed(0)
    weights = {f"l{i}.weight": torch.randn(1024, 1024) for i in range(LAYERS)}
    torch.save({**weights, "l0.bias": torch.randn(1024)}, folder / "m.pt")
    subprocess.run(command("whole"), cwd=folder, env=environment(), check=True, capture_output=True)
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(output: str, *more: str) -> list[str]:
    script = [sys.executable, "-m", "lrcompress", "factorize", "m.pt", "--rank", "48", "-o", output, "--threads", "1"]
    return [*script, "--quiet", *more]


def started(folder: Path, *words: str) -> subprocess.Popen:
    null = subprocess.DEVNULL
    return subprocess.Popen(command(*words), cwd=folder, env=environment(), stdout=null, stderr=null)


def kept(folder: Path, output: str) -> set[str]:
    return {p.name for p in folder.glob(f".{output}.work-*/*.safetensors")}


def wait_for(what, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.005)
    assert what()


def kill_often(folder: Path, output: str, kills: int, seed: int) -> None:
    """Kill a run after some results, or while it opens, writes or ends; what was kept is there the next time."""
    draw, before = random.Random(seed), set()
    for i in range(kills):
        process = started(folder, output)
        goal = min(LAYERS, len(before) + draw.choice([0, 1, 1, 2]))
        while process.poll() is None and len(kept(folder, output)) < goal:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.wait()
        if (folder / output).exists():  # it was done before the kill
            break
        now = kept(folder, output)
        assert before <= now, f"kill {i} lost {before - now}"
        before = now
    done = subprocess.run(command(output), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sha256_tree(folder / output) == sha256_tree(folder / "whole")
    assert not list(folder.glob(f".{output}*")), "nothing stays beside a complete output"


def test_three_kills_and_the_same_bytes(place):
    kill_often(place, "short", kills=3, seed=0)


@pytest.mark.slow
def test_twenty_kills_and_the_same_bytes(place):
    kill_often(place, "long", kills=20, seed=1)


def test_a_kill_loses_at_most_one_layer(place):
    process = started(place, "one")
    wait_for(lambda: len(kept(place, "one")) >= 3)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in place.glob(".one.work-*/*.safetensors")}
    assert len(before) >= 3
    again = started(place, "one")
    wait_for(lambda: len(kept(place, "one")) > len(before))
    again.kill()
    again.wait()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "what was kept is not written again"


@pytest.mark.slow
def test_another_command_has_its_own_store(place):
    process = started(place, "two")
    wait_for(lambda: len(kept(place, "two")) >= 2)
    process.kill()
    process.wait()
    before = {p: p.read_bytes() for p in place.glob(".two.work-*/*")}
    other = [w if w != "48" else "47" for w in command("two")]
    subprocess.run(other, cwd=place, env=environment(), check=True, capture_output=True)
    assert {p: p.read_bytes() for p in place.glob(".two.work-*/*")} == before


def children(pid: int) -> set[int]:
    """Return the processes whose ancestor is `pid`."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, more = set(), {pid}
    while more:
        more = {p for p, parent in parents.items() if parent in more} - found
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    out = set()
    for pid in pids:
        try:
            if (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
                out.add(pid)
        except OSError:
            continue
    return out


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_workers_go_with_their_parent(place, how):
    """Ctrl-C is 130 and no worker is left; a killed parent's workers notice, and the same command continues."""
    name = f"w{int(how)}"
    process = subprocess.Popen(
        command(name, "--workers", "2"), cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_for(lambda: len(kept(place, name)) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    if how == signal.SIGINT:
        assert err.strip().splitlines()[-1].startswith("error: interrupted") and "Traceback" not in err
        time.sleep(0.5)
        assert not alive(workers)
    wait_for(lambda: not alive(workers), seconds=20)
    before = kept(place, name)
    assert len(before) >= 2
    done = subprocess.run(command(name), cwd=place, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sha256_tree(place / name) == sha256_tree(place / "whole")
