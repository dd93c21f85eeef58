"""The folder of a device belongs to one user: what somebody else could have put there is refused; nothing follows a link."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress.cli.main import run
from lrcompress.edge import Device
from lrcompress.edge.folder import locked, state_folder
from lrcompress.errors import CommandError, DeviceStateError, ManifestError
from tests.support.fleet import Fleet, answers, made

PARTS = ["", "store", "dl", "metadata", "metadata/root_history", "factory"]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A device that serves release 2."""
    fleet = Fleet(tmp_path)
    for name in ("first", "second"):
        fleet.add(name)
        fleet.device().update()
    return fleet


def refused(fleet: Fleet, word: str) -> None:
    for call in (fleet.device, lambda: Device(fleet.at)):
        with pytest.raises(DeviceStateError, match=word) as caught:
            call()
        assert caught.value.exit_code == 7 and caught.value.remedy


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_that_is_a_link_is_refused(fleet: Fleet, part: str) -> None:
    place = fleet.at / part if part else fleet.at
    place.rename(fleet.folder / "moved")
    place.symlink_to(fleet.folder / "moved")
    refused(fleet, "a symbolic link")


@pytest.mark.parametrize("part", [*PARTS, "config.json", "root.json", "state.0", "state.1", "device.json"])
def test_what_everybody_may_write_is_refused(fleet: Fleet, part: str) -> None:
    (fleet.at / "device.json").write_text('{"schema": 1}')
    place = fleet.at / part if part else fleet.at
    place.chmod(place.stat().st_mode | 0o002)
    refused(fleet, "not everybody may write")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("part", [*PARTS, "config.json", "root.json", "state.0"])
def test_another_owner_is_refused(fleet: Fleet, part: str) -> None:
    os.chown(fleet.at / part if part else fleet.at, 12345, 12345)
    refused(fleet, "user 12345")


@pytest.mark.parametrize("part", ["config.json", "root.json", "state.0", "device.json"])
def test_a_file_that_is_a_link_is_refused(fleet: Fleet, part: str) -> None:
    (fleet.at / "device.json").write_text('{"schema": 1}')
    (fleet.at / part).rename(fleet.folder / "moved")
    (fleet.at / part).symlink_to(fleet.folder / "moved")
    refused(fleet, "a symbolic link")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_in_the_store_is_not_followed(fleet: Fleet, kind: str) -> None:
    """The payload's own bytes behind a link are not the payload: somebody else can change them later."""
    sha = fleet.device().status()["serving"]["sha256"]
    place = fleet.at / "store" / sha
    place.rename(fleet.folder / "moved")
    if kind == "link":
        place.symlink_to(fleet.folder / "moved")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    device = fleet.device()
    assert device.status()["serving"]["seq"] == 1
    d = device.update()
    assert (d["state"], d["serving"]["sha256"]) == ("updated", sha)
    assert place.is_file() and not place.is_symlink() and (fleet.folder / "moved").exists()


def test_a_link_in_the_place_of_a_download_is_not_written_through(fleet: Fleet) -> None:
    added = fleet.add("loha")
    victim = fleet.folder / "victim"
    victim.write_bytes(b"precious")
    part = fleet.at / "dl" / f"{added['sha256']}.part"
    part.symlink_to(victim)
    assert fleet.device().update()["to_seq"] == 3
    assert victim.read_bytes() == b"precious" and not part.is_symlink()


def test_a_folder_of_bases_that_is_a_link_is_refused(fleet: Fleet) -> None:
    (fleet.folder / "moved").mkdir()
    (fleet.at / "bases").symlink_to(fleet.folder / "moved")
    refused(fleet, "a symbolic link")


def test_two_agents_at_once(fleet: Fleet) -> None:
    with locked(fleet.at):
        before = {p: p.read_bytes() for p in fleet.at.rglob("*") if p.is_file()}
        device = fleet.device()
        for change in (device.update, device.rollback):
            with pytest.raises(DeviceStateError, match="one update at a time"):
                change()
        answers(device)
        assert {p: p.read_bytes() for p in fleet.at.rglob("*") if p.is_file()} == before


def test_a_state_that_was_forged_is_no_state(fleet: Fleet) -> None:
    for name in ("state.0", "state.1"):
        value = json.loads((fleet.at / name).read_text())
        value["body"]["seq"] = 10**6
        (fleet.at / name).write_text(json.dumps(value))
    device = fleet.device()
    assert device.status()["serving"]["kind"] == "factory" and not device.status()["state_readable"]
    assert device.update()["to_seq"] == 2


@pytest.mark.parametrize(
    ("name", "error"),
    [("factory/base.data", ManifestError), ("factory/model.onnx", ManifestError), ("factory/golden.npz", ManifestError),
     ("factory/device.json", ManifestError), ("factory/manifest.json", ManifestError), ("config.json", DeviceStateError)],
)  # fmt: skip
def test_a_base_that_was_changed_is_never_served(fleet: Fleet, name: str, error: type[Exception]) -> None:
    path = fleet.at / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"default", b"defaulx") if name == "config.json" else data[:-1] + b"\x55")
    with pytest.raises(error, match=Path(name).name):
        fleet.device()


def test_tolerances_cannot_be_widened(fleet: Fleet) -> None:
    """No identity covers them, so the hash of the whole manifest is part of the configuration."""
    path = fleet.at / "factory" / "manifest.json"
    value = json.loads(path.read_text())
    value["tolerances"]["cpu"] = 1e5
    path.write_text(json.dumps(value))
    with pytest.raises(DeviceStateError, match=r"manifest\.json"):
        fleet.device()


def test_settings_that_are_wrong_stop_updates_and_never_serving(fleet: Fleet) -> None:
    before = answers(fleet.device())
    for content in (
        "",
        "[]",
        "{",
        '{"schema": 2}',
        '{"schema": 1, "treads": 2}',
        '{"schema": 1, "latency_factor": -1}',
    ):
        (fleet.at / "device.json").write_text(content)
        device = fleet.device()
        np.testing.assert_array_equal(answers(device), before)
        d = device.update()
        assert (d["state"], d["error"]["code"], d["error"]["kind"]) == ("failed", 7, "device_state"), content
    assert "threads?" in Device(fleet.at).history()[-2]["reason"]


def test_the_folder_is_where_the_environment_says(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("LRCOMPRESS_STATE", raising=False)
    assert state_folder() == Path("/var/lib/lrcompress")
    monkeypatch.setenv("LRCOMPRESS_STATE", str(fleet.at))
    assert state_folder() == fleet.at and state_folder("x") == Path("x")
    assert Device().status()["serving"]["seq"] == 2
    capsys.readouterr()
    assert run(["device", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seq"] == 2


def test_init_does_not_write_into_what_is_not_empty_or_a_link(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "link", "file"):
        with pytest.raises(CommandError, match="new or empty"):
            Device.init(tmp_path / place, made() / "exported", fleet.root, str(fleet.repo))
    assert (tmp_path / "full" / "a").read_text() == "mine" and not list(tmp_path.glob(".*"))
    (tmp_path / "empty").mkdir()
    Device.init(tmp_path / "empty", made() / "exported", fleet.root, str(fleet.repo))
    Device.init(tmp_path / "deep" / "er" / "device", made() / "exported", fleet.root, str(fleet.repo))
    shutil.rmtree(tmp_path / "deep")
