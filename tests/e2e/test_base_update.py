"""A new base for devices in the field, by the commands alone: exported, published, updated, cut, rolled back."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.cli import main
from lrcompress.edge import Device
from lrcompress.files import staged_folder
from lrcompress.manifest import Manifest
from lrcompress.model.checkpoint import MARKER, RETRAINER, load_compressed, module_layers, state_of, write_retrained
from lrcompress.runtime import Session
from tests.faults.powercut import Model, Recorder, laid_out, taken
from tests.support.fleet import PASSPHRASE, X, answers, made, trial_here


def command(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """Run a command; return what it prints as JSON."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None), said
    return dict(said)


@pytest.mark.slow
def test_from_one_base_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", PASSPHRASE)
    repo, at, live = tmp_path / "repo", tmp_path / "live" / "device", tmp_path / "live"
    # The factors of one layer are trained on; the rest of the model is what it was.
    found = load_compressed(made() / "compressed")
    module = found.need_module("export")
    with torch.no_grad():
        module.get_submodule("fc1").V.mul_(0.9)
    with staged_folder(tmp_path / "compressed", maker=RETRAINER, marker=MARKER) as stage:
        write_retrained(
            stage, tmp_path / "compressed", found, tensors=state_of(module), layers=module_layers(module), report={}
        )
    lrcompress.export(tmp_path / "compressed", adapters=[], output=tmp_path / "exported2", name="small")
    new_base = Manifest.load(tmp_path / "exported2").base_id

    command(capsys, "publish", "init", repo, "--exported", made() / "exported", "--keys", tmp_path / "keys")
    command(capsys, "publish", "add", repo, made() / "adapters" / "first")
    live.mkdir()
    command(
        capsys,
        "device",
        "init",
        at,
        "--exported",
        made() / "exported",
        "--root",
        repo / "metadata" / "1.root.json",
        "--url",
        repo,
    )
    assert command(capsys, "device", "update", at)["to_seq"] == 1
    before = answers(Device(at))

    said = command(capsys, "publish", "base", repo, "--exported", tmp_path / "exported2")
    assert (said["seq"], said["base"]["tensors_changed"], said["base"]["base_id"]) == (2, 1, new_base)
    # 6144 bytes of a tensor of which zlib saves little; golden outputs, hashes and offsets are the rest.
    assert 5000 < said["base"]["bytes"] < 6144 + 3000 < said["base"]["whole_bytes"]

    start = taken(live)
    disk = Recorder(live)
    Device(at, disk=disk, trial=trial_here(at), sleep=lambda s: None).update()
    shutil.rmtree(live)
    laid_out(start, live, _pool(tmp_path))
    images, model = [], Model(start)
    for op in disk.ops:
        images += list(model.images(8, len(images)))
        model.do(op)
    after = Session(tmp_path / "exported2").run({"x": X[:8]})["output"]
    for image in random.Random(0).sample(images, 40):
        shutil.rmtree(live)
        laid_out(image, live, _pool(tmp_path))
        found = answers(Device(at))
        assert np.array_equal(found, before) or np.array_equal(found, after)
        for _ in range(3):
            Device(at, trial=trial_here(at), sleep=lambda s: None).update()
        np.testing.assert_array_equal(answers(Device(at)), after)

    shutil.rmtree(live)
    laid_out(start, live, _pool(tmp_path))
    d = command(capsys, "device", "update", at)  # with the trial in its own process
    assert (d["state"], d["to_seq"]) == ("updated", 2)
    metadata = d["bytes_downloaded"] - said["base"]["bytes"] - said["payload_bytes"]
    assert 0 < metadata < 8000  # nothing but metadata, the pack and the payload came
    status = command(capsys, "device", "status", at)
    assert status["base_id"] == new_base != status["factory_base_id"]
    assert command(capsys, "device", "validate", at)["passed"]
    np.testing.assert_array_equal(answers(Device(at)), after)
    assert command(capsys, "device", "rollback", at)["to_seq"] == 1
    np.testing.assert_array_equal(answers(Device(at)), before)
    assert command(capsys, "publish", "verify", repo)["groups"][0]["seq"] == 2
    command(capsys, "publish", "rollback", repo, "--to", 1)
    assert command(capsys, "device", "update", at)["state"] in ("updated", "rolled_back")
    np.testing.assert_array_equal(answers(Device(at)), before)


def _pool(folder: Path) -> Path:
    pool = folder / "pool"
    pool.mkdir(exist_ok=True)
    return pool
