"""The quickstart on a small budget: from nothing to a device that takes two updates; stopped anywhere, it continues."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress import metrics, pipeline, recipe
from lrcompress.errors import CommandError, ParityError
from lrcompress.progress import Advance
from lrcompress.report import table_text

TOP = Path(__file__).parents[2]
REPRODUCIBLE = ("base", "factorize", "recover", "export", "baselines", "update-rotated")


@pytest.fixture(scope="module", autouse=True)
def _passphrase() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRCOMPRESS_KEY_PASSPHRASE", "only for tests")
        patch.setattr("lrcompress.pipeline.measure._ROUNDS", 5)
        yield


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline of equal bytes need not be met closely here."""
    monkeypatch.setattr(sys.modules["lrcompress.pipeline.baselines"], "_EQUAL_TRIES", 1)  # the name is a function, too


def small_recipe(folder: Path, **changes: str) -> Path:
    """Write the quickstart with fewer steps into `folder`; `changes` replace text."""
    text = (
        (TOP / "recipes" / "quickstart.yaml").read_text().replace("archs/digits.py", f"{TOP}/recipes/archs/digits.py")
    )
    text = (
        text.replace("steps: 400", "steps: 120")
        .replace("steps: 800", "steps: 60")
        .replace("max_drop: 0.02", "max_drop: 0.2")
    )
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(text)
    return path


class Seen:
    """A `Progress` that remembers the tasks in their order, and calls `at` whenever one begins."""

    def __init__(self, at: Any = None) -> None:
        self.tasks: list[str] = []
        self.advanced: set[str] = set()
        self._at = at

    @contextlib.contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        self.tasks.append(name)
        if self._at:
            self._at(name)
        yield lambda n=1, text="": self.advanced.add(name)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], Seen]:
    """One finished run: (recipe, run directory, report, progress)."""
    folder = tmp_path_factory.mktemp("quick")
    path, seen = small_recipe(folder), Seen()
    report = pipeline.run(path, folder / "run", seen)
    return path, folder / "run", report, seen


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()
    }


def test_it_tells_the_story(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    _, folder, report, seen = done
    assert [r["name"] for r in report["rows"]] == [
        "original fp32", "dense int8", "factorized", "factorized, equal bytes", "factorized + adapter", "factorized + int8",
        "factorized + int8 + adapter",
    ]  # fmt: skip
    rows = {r["name"]: r for r in report["rows"]}
    assert all(r["n"] == 600 and r["p95_ms"] >= r["p50_ms"] > 0 for r in rows.values())
    assert rows["original fp32"]["value"] > 0.9
    assert rows["factorized"]["bytes"] < 0.35 * rows["original fp32"]["bytes"]
    assert rows["dense int8"]["bytes"] < 0.5 * rows["original fp32"]["bytes"]
    equal, wanted = rows["factorized, equal bytes"]["bytes"], rows["factorized + adapter"]["bytes"]
    assert 0.9 * wanted < equal <= wanted
    device = {(r["name"], r["split"]): r["value"] for r in report["device_rows"]}
    gained = device["after update 2 (rotated)", "rotated.test"] - device["before update 2 (rotated)", "rotated.test"]
    assert gained > 0.05
    (shift,) = report["shifts"]
    assert shift["original"] < rows["original fp32"]["value"] - 0.05, (
        "the change must hurt, or the update has no reason"
    )
    assert shift["after"] - shift["before"] == pytest.approx(gained)
    for update in report["updates"]:
        assert 0 < update["payload_bytes"] < 0.6 * report["model_bytes"]
    text = table_text(report)
    for part in ("original fp32", "dense int8", "fleet of 1,000", "why updates exist", "verdict:", "training: base"):
        assert part in text
    for name in ("train the base network", "factorize", "recover", "export", "report"):
        assert any(name in task for task in seen.tasks), name
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 4 and "http" not in html.replace("http://www.w3.org", "")


def test_the_bytes_are_those_on_disk(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    _, folder, report, _ = done
    run = json.loads((folder / "run.json").read_text())
    where = {s["name"]: folder / s["folder"] for s in run["stages"]}
    size = lambda p: sum((p / n).stat().st_size for n in ("model.onnx", "base.data"))  # noqa: E731
    rows = {r["name"]: r["bytes"] for r in report["rows"]}
    main = where["export"] / "exported"
    payload = (main / "payloads" / "recover.safetensors").stat().st_size
    assert rows["factorized"] == size(main)
    assert rows["factorized + adapter"] == size(main) + payload
    assert rows["original fp32"] == size(where["baselines"] / "dense-fp32")
    assert rows["dense int8"] == size(where["baselines"] / "dense-int8")
    assert rows["factorized, equal bytes"] == size(where["baselines"] / "equal-bytes")
    targets = [p for p in (folder / "repository" / "targets").rglob("*") if p.is_file()]
    for update in report["updates"]:  # a whole payload, or what makes it from the one before
        kind = "*.delta" if update["encoding"] == "delta" else f"{update['sha256']}.payload.safetensors"
        assert update["payload_bytes"] in {p.stat().st_size for p in targets if p.match(kind)}


def test_device_rows_are_the_devices_own_answers(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    path, folder, report, _ = done
    run = json.loads((folder / "run.json").read_text())
    stage = folder / next(s["folder"] for s in run["stages"] if s["name"] == "publish")
    for row in report["device_rows"]:
        labels = recipe.open_split(path, row["split"]).labels
        with np.load(stage / row["answers"]) as answers:
            (scores,) = answers.values()
        assert row["value"] == pytest.approx((scores.argmax(-1) == labels).mean())
        assert row["n"] == len(labels) == 600
    served = [r["serving"]["kind"] for r in report["device_rows"]]
    assert served[0] == "factory" and set(served[1:]) == {"payload"}


def test_the_device_still_answers_and_is_up_to_date(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    from lrcompress.edge import Device

    path, folder, report, _ = done
    device = Device(folder / "device")
    assert device.update()["state"] == "up_to_date"
    data = recipe.open_split(path, "rotated.test")
    accuracy = metrics.get("accuracy").evaluate(device.infer, data).value
    assert accuracy == pytest.approx(next(r["value"] for r in report["device_rows"] if "after update 2" in r["name"]))


def test_a_second_run_does_nothing_and_says_so(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    path, folder, report, _ = done
    before = snapshot(folder)
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-m", "lrcompress", "run", str(path), "--run-dir", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "nothing to do" in found.stdout and "verdict:" in found.stdout
    assert snapshot(folder) == before
    again = pipeline.run(path, folder)
    assert again["nothing_to_do"] and not report["nothing_to_do"]
    assert again["hashes"] == report["hashes"] and set(again["hashes"]) == set(REPRODUCIBLE)


def test_a_damaged_stage_is_built_again_to_the_same_bytes(done: tuple[Path, Path, dict[str, Any], Seen]) -> None:
    path, folder, report, _ = done
    run = json.loads((folder / "run.json").read_text())
    stage = folder / next(s["folder"] for s in run["stages"] if s["name"] == "export")
    victim = stage / "exported" / "base.data"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    seen = Seen()
    again = pipeline.run(path, folder, seen)
    assert again["hashes"] == report["hashes"] and not again["nothing_to_do"]
    rebuilt = [t for t in seen.tasks if "/" in t]
    assert len(rebuilt) == 1 and rebuilt[0].endswith(" export")


@pytest.mark.parametrize("harm", ["device", "mark"])
def test_a_device_that_is_gone_or_another_ones_is_made_anew(
    done: tuple[Path, Path, dict[str, Any], Seen], harm: str
) -> None:
    path, folder, report, _ = done
    if harm == "device":
        shutil.rmtree(folder / "device")
    else:
        (folder / ".fleet.json").write_text("{}")
    seen = Seen()
    again = pipeline.run(path, folder, seen)
    assert [t for t in seen.tasks if "/" in t] == ["8/8 publish"]
    assert again["hashes"] == report["hashes"] and (folder / "device").is_dir()
    assert pipeline.run(path, folder)["nothing_to_do"]


KILLER = """
import json, os, signal, sys
import lrcompress.pipeline as pipeline, lrcompress.edge, lrcompress.publish, lrcompress.verbs.export
import lrcompress.pipeline.measure as measure
measure._ROUNDS = 5
recipe, folder, seconds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for after in seconds:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)   # its default action ends the process at once, like kill -9
        signal.setitimer(signal.ITIMER_REAL, after)
        pipeline.run(recipe, folder)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("finished" if os.WIFEXITED(status) else "killed", flush=True)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
print(json.dumps(pipeline.run(recipe, folder)["hashes"]))
"""


def killed_runs(path: Path, folder: Path, moments: list[float]) -> tuple[list[str], dict[str, str]]:
    """Stop a run after each of `moments` seconds, then let one finish; return what became of them and the hashes."""
    command = [sys.executable, "-c", KILLER, str(path), str(folder), json.dumps(moments)]
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TOP)}, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    *fates, last = found.stdout.strip().splitlines()
    return fates, json.loads(last)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_hashes(
    done: tuple[Path, Path, dict[str, Any], Seen], tmp_path: Path
) -> None:
    path, _, report, _ = done
    chance = random.Random(0)
    moments = [chance.uniform(0.2, 0.3 * report["seconds"]) for _ in range(2)]
    # Another depth, too: where the run directory lies must not show in any file that counts.
    fates, hashes = killed_runs(path, tmp_path / "deeper" / "run", moments)
    assert "killed" in fates
    assert hashes == report["hashes"]
    left = [p for p in (tmp_path / "deeper" / "run" / "stages").iterdir() if not (p / "stage.json").is_file()]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_forty_moments(done: tuple[Path, Path, dict[str, Any], Seen], tmp_path: Path) -> None:
    path, _, report, _ = done
    chance = random.Random(1)
    for round_ in range(4):
        moments = [chance.uniform(0.0, 0.25 * report["seconds"]) for _ in range(10)]
        fates, hashes = killed_runs(path, tmp_path / f"run{round_}", moments)
        assert "killed" in fates and hashes == report["hashes"]


_WATCHED: dict[str, Any] = {"path": None, "stage": "", "opened": []}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _WATCHED["path"] and str(args[0]) == _WATCHED["path"]:
        _WATCHED["opened"].append(_WATCHED["stage"])


@pytest.mark.slow
def test_test_data_are_not_opened_before_validate(tmp_path: Path, one_try: None) -> None:
    path = small_recipe(
        tmp_path, **{"steps: 120": "steps: 20", "steps: 60": "steps: 2", "max_drop: 0.2": "max_drop: 1.0"}
    )
    arrays = pipeline.steps.load_callable(f"{TOP}/recipes/archs/digits.py:digits")("test")
    np.savez(tmp_path / "held-out.npz", **arrays)
    held = str(tmp_path.resolve() / "held-out.npz")
    text = path.read_text().replace(
        f'test: {{source: "{TOP}/recipes/archs/digits.py:digits", args: {{split: test}}}}',
        "test: {source: held-out.npz}",
    )
    assert "held-out.npz" in text
    path.write_text(text)

    def at(name: str) -> None:
        if name[0].isdigit():
            _WATCHED["stage"] = name.partition(" ")[2]

    sys.addaudithook(_audit)
    _WATCHED.update(path=held, stage="before any stage", opened=[])
    try:
        pipeline.run(path, tmp_path / "run", Seen(at))
    finally:
        _WATCHED["path"] = None
    # Its digest is asked for when validate is next: the last stage that was built is the one before it.
    assert _WATCHED["opened"], "the audit saw nothing"
    assert set(_WATCHED["opened"]) <= {"baselines", "validate", "update-rotated", "publish"}
    first = _WATCHED["opened"].index("validate")
    assert set(_WATCHED["opened"][:first]) == {"baselines"} and first <= 2


@pytest.mark.slow
def test_a_miss_stops_before_anything_is_published(tmp_path: Path, one_try: None) -> None:
    changes = {
        "max_drop: 0.2": "max_drop: 0.0",
        "ratio: 0.05": "ratio: 0.03",
        "steps: 60": "steps: 1",
        "updates:": "updates: []\nx-later:",
    }
    path = small_recipe(tmp_path, **{k: v for k, v in changes.items() if k != "updates:"})
    text = path.read_text()
    path.write_text(text[: text.index("updates:")])
    with pytest.raises(ParityError) as caught:
        pipeline.run(path, tmp_path / "run")
    assert caught.value.exit_code == 5 and caught.value.report["passed"] is False
    assert not (tmp_path / "run" / "repository").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CommandError, match="made by something else"):
        pipeline.run(path, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    path = small_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CommandError, match="one run at a time"):
            pipeline.run(path, tmp_path / "run")
