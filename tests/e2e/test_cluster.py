"""Layers over workers and a cluster on the loopback: the same bytes, one line when something is gone, and no waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lrcompress.cli.main import run as invoked
from lrcompress.files import sha256_tree

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 16

pytest.importorskip("distributed")


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(output: str, *more: str, rank: int = 300) -> list[str]:
    return [
        sys.executable, "-m", "lrcompress", "factorize", "m.pt", "--rank", str(rank), "-o", output, "--threads", "1",
        "--json", *more,
    ]  # fmt: skip


def run(folder: Path, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words, **options), cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    torch.manual_seed(0)
    weights = {f"l{i}.weight": torch.randn(900, 800) for i in range(LAYERS)}
    torch.save({**weights, "c.weight": torch.randn(32, 16, 3, 3)}, folder / "m.pt")
    return folder


@pytest.fixture(scope="module")
def serial(place):
    done = run(place, "serial")
    assert done.returncode == 0, done.stderr
    return place / "serial"


class Loopback:
    """A scheduler and two workers as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        self._until(self.file.is_file)
        self.address = json.loads(self.file.read_text())["address"]
        self.workers = [
            self._start("dask_worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(folder / f"w{i}"))
            for i in range(2)
        ]

    def _start(self, name: str, *words: str) -> subprocess.Popen:
        script = [sys.executable, "-m", f"distributed.cli.{name}", "--scheduler-file", str(self.file), "--no-dashboard"]
        null = subprocess.DEVNULL
        return subprocess.Popen([*script, *words], env=environment(), stdout=null, stderr=null)

    def _until(self, what) -> None:
        until = time.monotonic() + 60
        while not what() and time.monotonic() < until:
            time.sleep(0.1)

    def wait_for_workers(self, n: int) -> None:
        from distributed import Client

        with Client(self.address, timeout=30, set_as_default=False) as client:
            client.wait_for_workers(n, timeout=60)

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    found = Loopback(tmp_path)
    try:
        found.wait_for_workers(2)
        yield found
    finally:
        found.close()


def during(folder: Path, output: str, address: str, what) -> tuple[int, str, str]:
    """Run on the cluster, and call `what` when the first results are there."""
    process = subprocess.Popen(
        command(output, "--cluster", address), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        until = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < until:
            if len(list(folder.glob(f".{output}.work-*/*.safetensors"))) >= 2:
                what()
                break
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def one_line(err: str) -> str:
    lines = [n for n in err.splitlines() if not n.startswith("factorize: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.slow
def test_serial_workers_and_a_cluster_give_the_same_bytes(place, serial, cluster):
    """One worker is killed midway; the other does its share."""
    assert run(place, "workers", "--workers", "2").returncode == 0
    code, _, err = during(place, "cluster", cluster.address, cluster.workers[0].kill)
    assert code == 0, err
    expected = sha256_tree(serial)
    assert sha256_tree(place / "workers") == expected and sha256_tree(place / "cluster") == expected
    assert not list(place.glob(".*.work-*"))


@pytest.mark.slow
def test_a_budget_on_a_cluster_gives_the_same_bytes(place, cluster):
    """A curve for every layer, too."""
    budget = [w for w in command("budget", "--cluster", cluster.address) if w not in ("--rank", "300")]
    done = subprocess.run([*budget, "--ratio", "0.5"], cwd=place, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain = [w for w in command("plain") if w not in ("--rank", "300")]
    subprocess.run([*plain, "--ratio", "0.5"], cwd=place, env=environment(), check=True, capture_output=True)
    assert sha256_tree(place / "budget") == sha256_tree(place / "plain")


@pytest.mark.slow
def test_a_scheduler_that_dies_is_one_line_and_the_work_continues(place, serial, cluster):
    started = time.monotonic()
    code, out, err = during(place, "dies", cluster.address, cluster.scheduler.kill)
    assert code == 10 and "cluster" in one_line(err) and time.monotonic() - started < 120
    assert json.loads(out)["error"]["kind"] == "environment" and "continues" in json.loads(out)["error"]["remedy"]
    assert len(list(place.glob(".dies.work-*/*.safetensors"))) >= 2 and not (place / "dies").exists()
    assert run(place, "dies").returncode == 0
    assert sha256_tree(place / "dies") == sha256_tree(serial)


@pytest.mark.slow
def test_a_dead_address_is_one_line(place):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    started = time.monotonic()
    done = run(place, "dead", "--cluster", address)
    assert done.returncode == 10 and time.monotonic() - started < 90
    assert f"--cluster {address}: expected a Dask scheduler that answers" in one_line(done.stderr)
    assert not list(place.glob("*dead*")) and not list(place.glob(".dead*"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--cluster", "nonsense"), "--cluster: expected the address of a Dask scheduler, got nonsense"),
        (("--workers", "0"), "--workers"),
        (("--workers", "-1"), "--workers"),
        (("--workers", "2", "--cluster", "tcp://127.0.0.1:1"), "--workers"),
    ],
)
def test_wrong_words_are_usage_errors(place, monkeypatch, capsys, words, text):
    monkeypatch.chdir(place)
    assert invoked([*command("wrong", *words)[3:]]) == 2
    said = capsys.readouterr().err
    assert text in said and "Traceback" not in said
    assert not list(place.glob("*wrong*")) and not list(place.glob(".wrong*"))
