"""What an application in C or C++ loads: the adapter of the payload that is served, replaced by rename only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from lrcompress.files import sha256_bytes
from tests.support.fleet import Fleet, X, answers


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path)
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "emit": "onnx-adapter"}))
    return fleet


def current(fleet: Fleet) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((fleet.at / "emit" / "current.json").read_text())
    return found


def as_an_application_would(fleet: Fleet) -> np.ndarray:
    """Load the plain graph and the adapter that current.json names, and run them: no code of ours."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(fleet.at / "factory" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    run, adapter = ort.RunOptions(), ort.LoraAdapter()
    if current(fleet)["adapter"] is not None:
        adapter.Load(str(fleet.at / "emit" / current(fleet)["adapter"]))
        run.add_active_adapter(adapter)
    return session.run(["output"], {"x": X[:8]}, run)[0]


def test_it_answers_as_the_device_does(fleet: Fleet) -> None:
    assert fleet.device().update()["state"] == "up_to_date"
    assert current(fleet)["adapter"] is None
    for seq, name in ((1, "first"), (2, "loha"), (3, "second")):
        fleet.add(name)
        device = fleet.device()
        d = device.update()
        said = current(fleet)
        assert (said["seq"], said["sha256"], said["base_id"]) == (seq, d["serving"]["sha256"], device.manifest.base_id)
        assert sha256_bytes((fleet.at / "emit" / said["adapter"]).read_bytes()) == said["adapter_sha256"]
        np.testing.assert_allclose(as_an_application_would(fleet), answers(device), rtol=0, atol=1e-6)
        assert len(list((fleet.at / "emit").iterdir())) <= 3  # the one before stays: somebody may have it mapped
    fleet.device().rollback()
    assert current(fleet)["seq"] == 2
    np.testing.assert_allclose(as_an_application_would(fleet), answers(fleet.device()), rtol=0, atol=1e-6)


def test_a_live_adapter_is_never_written_to(fleet: Fleet) -> None:
    fleet.add("first")
    fleet.device().update()
    file = fleet.at / "emit" / current(fleet)["adapter"]
    with open(file, "rb") as f:
        before, inode = f.read(), file.stat().st_ino
        fleet.add("second")
        fleet.device().update()
        assert file.read_bytes() == before and file.stat().st_ino == inode
        fleet.add("loha")
        fleet.device().update()
        assert not file.exists()
        f.seek(0)
        assert f.read() == before


def test_what_is_right_already_is_not_written_again_and_what_rotted_is(fleet: Fleet) -> None:
    fleet.add("first")
    fleet.device().update()
    assert fleet.device().update()["bytes_written"] == 0
    file = fleet.at / "emit" / current(fleet)["adapter"]
    file.write_bytes(b"rot")
    (fleet.at / "emit" / "stray").write_text("x")
    d = fleet.device().update()
    assert d["bytes_written"] > 1000 and sha256_bytes(file.read_bytes()) == current(fleet)["adapter_sha256"]
    assert not (fleet.at / "emit" / "stray").exists()


def test_a_disk_that_refuses_it_takes_nothing_back(fleet: Fleet) -> None:
    (fleet.at / "emit").write_text("in the way")
    fleet.add("first")
    with pytest.raises(Exception, match="emit"):
        fleet.device()
    (fleet.at / "emit").unlink()
    device = fleet.device()
    (fleet.at / "emit").write_text("in the way")
    assert device.update()["state"] == "updated"
    assert "not_emitted" in [e["state"] for e in device.history()]
