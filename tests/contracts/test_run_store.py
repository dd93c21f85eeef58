"""Stages of a run: finished or absent, found again by digest, never trusted by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrcompress.pipeline.store import Store
from lrcompress.progress import Silent


class Build:
    """A stage that counts how often it was built."""

    def __init__(self, content: str = "x", fail: bool = False) -> None:
        self.times, self.content, self.fail = 0, content, fail

    def __call__(self, stage: Path) -> dict[str, Any]:
        self.times += 1
        (stage / "inner").mkdir()
        (stage / "inner" / "out.txt").write_text(self.content)
        if self.fail:
            raise RuntimeError("in the middle")
        return {"n": self.times, "not_finite": float("nan")}


def store(folder: Path) -> Store:
    return Store(folder, Silent(), total=1)


def test_a_stage_is_built_once_per_key(tmp_path: Path) -> None:
    build = Build()
    first = store(tmp_path).stage("one", {"a": 1}, build)
    again = store(tmp_path).stage("one", {"a": 1}, build)
    assert build.times == 1 and not first.reused and again.reused
    assert (first.key, first.folder, first.result, first.digest) == (
        again.key,
        again.folder,
        again.result,
        again.digest,
    )
    assert again.result == {"n": 1, "not_finite": None}
    other = store(tmp_path).stage("one", {"a": 2}, build)
    assert build.times == 2 and other.folder != first.folder
    store(tmp_path).stage("one", {"a": 1}, build)
    assert build.times == 2


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        store(tmp_path).stage("one", {}, Build(fail=True))
    assert not list(tmp_path.glob("stages/*"))


@pytest.mark.parametrize("harm", ["flip", "delete", "add", "record", "other_key"])
def test_harm_is_noticed_and_repaired(tmp_path: Path, harm: str) -> None:
    build = Build()
    first = store(tmp_path).stage("one", {}, build)
    file, record = first.folder / "inner" / "out.txt", first.folder / "stage.json"
    if harm == "flip":
        file.write_text("y")
    elif harm == "delete":
        file.unlink()
    elif harm == "add":
        (first.folder / "inner" / "more.txt").write_text("")
    elif harm == "record":
        record.write_bytes(record.read_bytes()[:50])
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "key": "0" * 64}))
    again = store(tmp_path).stage("one", {}, build)
    assert build.times == 2 and again.digest == first.digest
    assert file.read_text() == "x" and not (first.folder / "inner" / "more.txt").exists()


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    found = store(tmp_path).stage("one", {}, Build())
    left = found.folder.parent / f".{found.folder.name}.stage-abc"
    found.folder.rename(left)
    again = store(tmp_path).stage("one", {}, Build())
    assert again.digest == found.digest and not left.exists()


def test_a_stage_that_needs_something_outside_is_done_again_without_it(tmp_path: Path) -> None:
    build, outside = Build(), tmp_path / "device"
    outside.mkdir()
    store(tmp_path).stage("one", {}, build, needs=(outside,))
    store(tmp_path).stage("one", {}, build, needs=(outside,))
    assert build.times == 1
    outside.rmdir()
    store(tmp_path).stage("one", {}, build, needs=(outside,))
    assert build.times == 2
