"""A device: what it serves, what it says, how it goes on after a restart; its state files and its downloads."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.cli.main import run
from lrcompress.edge import Device
from lrcompress.edge.disk import Disk
from lrcompress.edge.folder import locked
from lrcompress.edge.state import Entry, State, StateFiles
from lrcompress.edge.trial import NoVerdict
from lrcompress.errors import CommandError, DataError, DeviceStateError, ManifestError, UpdateError
from lrcompress.files import sha256_bytes
from tests.support.fleet import PASSPHRASE, Fleet, X, answers, made, payload_bytes, trial_here
from tests.support.payloads import put_together, taken_apart


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


# life of a device -----------------------------------------------------------------------------------------------------


def test_it_serves_the_factory_model_until_there_is_a_release(fleet):
    device = fleet.device()
    d = device.update()
    assert (d["state"], d["serving"]["kind"], d["to_seq"], d["error"]) == ("up_to_date", "factory", 0, None)
    assert "no release yet" in d["reason"]


@pytest.mark.parametrize("name", ["first", "loha"])
def test_an_update_is_taken_survives_a_restart_and_is_not_taken_twice(fleet, name):
    device = fleet.device()
    before = answers(device)
    added = fleet.add(name, encoding="f32")
    d = device.update()
    assert (d["state"], d["from_seq"], d["to_seq"], d["serving"]["sha256"]) == ("updated", 0, 1, added["sha256"])
    assert d["bytes_downloaded"] >= added["payload_bytes"] and d["requests"] >= 5
    after = answers(device)
    assert np.abs(after - before).max() > 0.05
    again = fleet.device()
    np.testing.assert_array_equal(answers(again), after)
    d = again.update()
    assert (d["state"], d["requests"], d["from_seq"], d["to_seq"]) == ("up_to_date", 2, 1, 1)
    assert d["bytes_downloaded"] < 600


def test_what_the_device_answers_is_what_the_publisher_saw(fleet):
    from lrcompress.payload import parse
    from lrcompress.runtime import Session

    fleet.add("first")
    device = fleet.device()
    device.update()
    session = Session(made() / "exported")
    session.swap(parse(fleet.payload(device.status()["serving"]["sha256"]).read_bytes()))
    np.testing.assert_array_equal(answers(device), session.run({"x": X[:8]})["output"])


def test_a_published_rollback_moves_no_payload(fleet):
    device = fleet.device()
    first = fleet.add("first")
    device.update()
    expected = answers(device)
    fleet.add("second")
    device.update()
    assert np.abs(answers(device) - expected).max() > 0.05
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    d = device.update()
    assert (d["state"], d["to_seq"], d["serving"]["sha256"]) == ("rolled_back", 3, first["sha256"])
    assert d["bytes_downloaded"] < first["payload_bytes"]
    np.testing.assert_array_equal(answers(device), expected)


def test_a_rollback_here_needs_no_network_and_lasts_until_the_next_release(fleet):
    device = fleet.device()
    factory = answers(device)
    fleet.add("first")
    device.update()
    first = answers(device)
    fleet.add("second")
    device.update()
    assert device.rollback()["serving"]["seq"] == 1
    np.testing.assert_array_equal(answers(device), first)
    assert device.rollback()["serving"]["kind"] == "factory"
    np.testing.assert_array_equal(answers(fleet.device()), factory)
    with pytest.raises(DeviceStateError):
        device.rollback()
    assert device.update()["state"] == "up_to_date"  # seq 2 was declined
    fleet.add("loha")
    assert device.update()["to_seq"] == 3


def test_at_most_two_payloads_and_no_download_are_left(fleet):
    device = fleet.device()
    for name in ("first", "second", "loha"):
        fleet.add(name)
        device.update()
    assert len(list((fleet.at / "store").iterdir())) == 2
    assert not list((fleet.at / "dl").iterdir())
    assert device.status()["previous"]["seq"] == 2


def test_a_payload_that_rots_is_replaced_by_the_one_before_and_then_mended(fleet):
    device = fleet.device()
    fleet.add("first")
    device.update()
    first = answers(device)
    second = fleet.add("second")
    device.update()
    good = answers(device)
    file = fleet.at / "store" / second["sha256"]
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    device = fleet.device()
    assert device.status()["serving"]["seq"] == 1
    np.testing.assert_array_equal(answers(device), first)
    d = device.update()
    assert (d["state"], d["to_seq"]) == ("updated", 2)
    np.testing.assert_array_equal(answers(device), good)


def test_a_stored_payload_that_does_not_fit_this_base_is_not_served(fleet):
    """The hash is right and the state names it: of another base, it is passed over all the same."""
    fleet.add("first")
    fleet.device().update()
    header, body = taken_apart(payload_bytes("second"))
    header["__metadata__"]["base_ids"] = json.dumps([sha256_bytes(b"another")])
    other = put_together(header, body)
    files = StateFiles(fleet.at, Disk())
    state = files.read()
    (fleet.at / "store" / sha256_bytes(other)).write_bytes(other)
    files.write(State(seq=2, active=Entry(sha256_bytes(other), 2), previous=state.active))
    device = fleet.device()
    assert device.status()["serving"]["seq"] == 1
    answers(device)


def test_requests_in_flight_never_see_half_an_update(fleet):
    device = fleet.device()
    allowed = [answers(device)]
    for name in ("first", "second"):
        other = Device.init(fleet.folder / f"d-{name}", made() / "exported", fleet.root, str(fleet.repo))
        fleet.add(name)
        other.update()
        allowed.append(answers(other))
    allowed = {a.tobytes() for a in allowed}
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    torn, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            if answers(device).tobytes() not in allowed:
                torn.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    [t.start() for t in threads]
    for to in (2, 3, 4, 5):
        device.update()
        publish.rollback(fleet.repo, to, passphrase=PASSPHRASE)
    device.update()
    stop.set()
    [t.join() for t in threads]
    assert not torn and device.status()["serving"]["seq"] == 7


def test_an_init_over_a_device_is_refused_and_changes_nothing(fleet):
    fleet.add("first")
    fleet.device().update()
    before = (fleet.at / "state.0").read_bytes()
    with pytest.raises(DeviceStateError):
        Device.init(fleet.at, made() / "exported", fleet.root, str(fleet.repo))
    assert (fleet.at / "state.0").read_bytes() == before


def test_init_refuses_what_is_no_root_no_model_or_no_address(fleet, tmp_path):
    (tmp_path / "root.json").write_text("{}")
    for root in (tmp_path / "root.json", tmp_path / "nothing", fleet.repo / "metadata" / "timestamp.json"):
        with pytest.raises(UpdateError):
            Device.init(tmp_path / "d", made() / "exported", root, str(fleet.repo))
    with pytest.raises(ManifestError):
        Device.init(tmp_path / "d", tmp_path, fleet.root, str(fleet.repo))
    with pytest.raises(CommandError):
        Device.init(tmp_path / "d", made() / "exported", fleet.root, "ftp://somewhere/")
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.*"))


def test_a_rotted_base_is_never_served(fleet):
    data = fleet.at / "factory" / "base.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ManifestError, match=r"base\.data"):
        fleet.device()


def test_only_one_process_updates_at_a_time(fleet):
    device = fleet.device()
    with locked(fleet.at):
        for change in (device.update, device.rollback):
            with pytest.raises(DeviceStateError, match="one update at a time"):
                change()
    assert device.update()["state"] == "up_to_date"


def no_memory(data):
    raise NoVerdict("out of memory")


def test_a_trial_without_a_verdict_is_repeated_then_waits_and_is_never_refused(fleet):
    now = [datetime.now(UTC)]
    real, trials = trial_here(fleet.at), [no_memory]
    device = fleet.device(clock=lambda: now[0], trial=lambda data: trials[0](data))
    fleet.add("first")
    for trial in (1, 2, 3):
        d = device.update()
        assert (d["state"], d["error"]["code"], device.status()["pending"]["trials"]) == ("failed", 10, trial)
    assert device.update()["state"] == "pending"
    trials[0] = real
    assert device.update()["state"] == "pending"  # not before its time
    assert device.status()["refused"] == []
    now[0] += timedelta(minutes=11)
    assert device.update()["state"] == "updated"
    now[0] -= timedelta(minutes=10)
    assert device.update()["state"] == "up_to_date"


def test_a_staged_payload_needs_no_network_for_its_trial(fleet):
    fleet.add("first")
    assert fleet.device(trial=no_memory).update()["state"] == "failed"
    fleet.repo.rename(fleet.repo.with_name("gone"))
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 1)
    assert fleet.device().update()["error"]["code"] == 8


def test_every_transition_is_logged_and_the_log_never_stops_the_work(fleet):
    device = fleet.device()
    fleet.add("first")
    device.update()
    assert [e["state"] for e in device.history()] == ["download", "trial", "active"]
    (fleet.at / "log.jsonl").unlink()
    (fleet.at / "log.jsonl").mkdir()
    fleet.add("second")
    assert device.update()["state"] == "updated"


# the command line -----------------------------------------------------------------------------------------------------


def call(capsys, *args):
    capsys.readouterr()
    code = run([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_line_from_init_to_rollback(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", PASSPHRASE)
    repo, device = tmp_path / "repo", tmp_path / "dev"
    code, d = call(capsys, "publish", "init", repo, "--exported", made() / "exported", "--keys", tmp_path / "keys")
    assert code == 0
    code, d = call(capsys, "publish", "add", repo, made() / "adapters" / "first", "--group", "default")
    assert code == 0 and {"seq", "sha256", "encoding", "payload_bytes", "metadata_bytes", "sizes"} <= d.keys()
    root = repo / "metadata" / "1.root.json"
    code, _ = call(capsys, "device", "init", device, "--exported", made() / "exported", "--root", root, "--url", repo)
    assert code == 0
    code, d = call(capsys, "device", "update", device)
    assert code == 0 and d["state"] == "updated"
    assert {"state", "serving", "from_seq", "to_seq", "bytes_downloaded", "requests", "ms", "reason"} <= d.keys()
    np.savez(tmp_path / "x.npz", x=X[:5])
    code, d = call(capsys, "device", "infer", device, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz")
    assert code == 0 and d["outputs"] == {"output": [5, 5]}
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["output"], Device(device).infer({"x": X[:5]})["output"])
    code, d = call(capsys, "device", "validate", device)
    assert code == 0 and d["passed"] and d["payload"]["passed"]
    code, d = call(capsys, "device", "rollback", device)
    assert code == 0 and d["serving"]["kind"] == "factory"
    code, d = call(capsys, "device", "status", device)
    assert code == 0
    assert {
        "serving",
        "previous",
        "pending",
        "refused",
        "base_id",
        "seq",
        "last_trusted_time",
        "free_bytes",
    } <= d.keys()
    for command in (["status"], ["update"], ["validate"]):
        assert run(["device", *command, str(device)]) == 0
    assert "the factory's model" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_named(fleet, tmp_path, capsys):
    np.savez(tmp_path / "wrong.npz", a=X[:2], b=X[:2])
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "shape.npz", x=X[:2, :, :4])
    np.savez(tmp_path / "dtype.npz", x=X[:2].astype(np.float64))
    for name in ("wrong", "text", "shape", "dtype", "missing"):
        code, d = call(
            capsys, "device", "infer", fleet.at, "--input", tmp_path / f"{name}.npz", "--output", tmp_path / "y.npz"
        )
        assert (code, d["error"]["kind"]) == (9, "data"), name
    assert not (tmp_path / "y.npz").exists()
    with pytest.raises(DataError):
        fleet.device().infer({"y": X[:1]})


def test_a_folder_that_is_no_device_is_named(tmp_path, capsys):
    for command in ("update", "status", "rollback", "validate"):
        code, d = call(capsys, "device", command, tmp_path)
        assert (code, d["error"]["kind"]) == (7, "device_state")
