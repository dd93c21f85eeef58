"""A process that has imported what a device needs and forks one device per line of its input: a real kill in 0.1 s.

{"folder": F, "kill_at": 7}        SIGKILL by the device itself before its eighth call to the disk
{"folder": F, "after_s": 0.013}    SIGKILL from outside, so long after the device said that it is up
{"folder": F}                      left to finish

Each device has a live ONNX Runtime session, with two threads that ask it all the time while it updates. The answer is
one line: how it ended, how often it answered, what it said, and the hash of each different answer that it gave.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress.edge import Device
from lrcompress.edge.disk import Disk
from lrcompress.edge.settings import load_settings
from lrcompress.edge.trial import Trial, judge
from lrcompress.golden import load_golden
from lrcompress.manifest import Manifest
from lrcompress.runtime import Session


class Deadly(Disk):
    """Kills its own process before a call that changes the disk."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self._left = -1 if at is None else at

    def _count(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        self._count()
        super().write(path, data, mode)

    def append(self, path: Path, data: bytes) -> None:
        self._count()
        super().append(path, data)

    def sync(self, path: Path) -> None:
        self._count()
        super().sync(path)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)

    def rename(self, source: Path, dest: Path) -> None:
        self._count()
        super().rename(source, dest)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)


def trial(folder: Path) -> Trial:
    def judged(data: bytes) -> None:
        factory = folder / "factory"
        session = Session(factory, manifest=Manifest.load(factory), verify=False)
        judge(data, session, load_golden(factory / "golden.npz"), load_settings(folder, Disk()).limits)

    return judged


def live(task: dict[str, Any], out: int) -> None:
    """Be a device that serves and updates; write a letter when up, then every new answer's hash, then what it said."""
    folder = Path(task["folder"])
    disk = Deadly(task.get("kill_at"))
    options = {} if task.get("child") else {"trial": trial(folder)}
    device = Device(folder, disk=disk, sleep=lambda s: None, **options)
    x = np.load(task["input"])
    seen, lock, stop = set[str](), threading.Lock(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found = hashlib.sha256(device.infer({"x": x})["output"].tobytes()).hexdigest()
            with lock:
                if found not in seen:
                    seen.add(found)
                    os.write(out, f"{found}\n".encode())

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not seen:
        time.sleep(0.0005)
    os.write(out, b"up\n")
    said = device.update()
    time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    os.write(out, f"said {said['state']} {disk._left}\n".encode())


def one(task: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            live(task, write)
            os._exit(0)
        except BaseException as e:
            os.write(write, f"error {type(e).__name__}: {e}\n".encode())
            os._exit(1)
    os.close(write)
    lines: list[str] = []
    with os.fdopen(read) as pipe:
        for line in iter(pipe.readline, ""):
            lines.append(line.strip())
            if line == "up\n" and "after_s" in task:
                time.sleep(task["after_s"])
                os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    said = next((s.split() for s in lines if s.startswith("said ")), None)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "ended": status,
        "answers": [s for s in lines if len(s) == 64],
        "said": None if said is None else said[1],
        "calls": None if said is None else -1 - int(said[2]),
        "error": next((s for s in lines if s.startswith("error ")), None),
    }


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(one(json.loads(line))), flush=True)
