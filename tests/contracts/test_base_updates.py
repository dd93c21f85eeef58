"""A release may bring a new base model: what is new of it is fetched, tried with its payload, kept and given up with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress import packs, publish
from lrcompress.edge import Device, EdgeSession
from lrcompress.edge.disk import Disk
from lrcompress.edge.state import COPIES, StateFiles, encode
from lrcompress.edge.transport import FolderTransport
from lrcompress.errors import CommandError, PayloadError, UpdateError
from lrcompress.files import canonical_json, sha256_json
from lrcompress.manifest import DATA, MANIFEST, Manifest
from lrcompress.publish import bases as published
from lrcompress.publish.repository import Repository
from lrcompress.publish.rollouts import rollout
from lrcompress.runtime import Session
from tests.attacks.hostile_bases import payload_for, variant
from tests.contracts.test_edge_session import shows
from tests.support.bases import CHANGED, base, files_of, ranges, rebased, release_base, whole_pack
from tests.support.fleet import PASSPHRASE, Fleet, X, answers, made, trial_here


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet whose device serves release 1 on the factory's base."""
    fleet = Fleet(tmp_path)
    fleet.add("first")
    assert fleet.device().update()["to_seq"] == 1
    return fleet


def add_base(fleet: Fleet, name: str | Path, adapter: str | None = "second", **options: Any) -> dict[str, Any]:
    folder = base(name) if isinstance(name, str) else name
    source = None if adapter is None else made() / "adapters" / adapter
    options = {"encoding": "f16", **options}
    return publish.base(fleet.repo, folder, source, passphrase=PASSPHRASE, **options)


def expected(folder: Path, fleet: Fleet) -> np.ndarray:
    """Return what a base answers with the payload that the device serves."""
    from lrcompress.payload import parse

    session = Session(folder)
    sha = fleet.device().serving
    session.swap(None if sha is None else parse((fleet.at / "store" / sha.sha256).read_bytes()))
    return session.run({"x": X[:8]})["output"]


def stored(fleet: Fleet) -> set[str]:
    return (
        {Manifest.load(p).base_id for p in (fleet.at / "bases").iterdir()} if (fleet.at / "bases").exists() else set()
    )


def ids(*names: str) -> set[str]:
    return {Manifest.load(base(n)).base_id for n in names}


# what travels ---------------------------------------------------------------------------------------------------------


def test_only_the_tensors_that_changed_are_sent(fleet: Fleet) -> None:
    said = add_base(fleet, "B")
    about = said["base"]
    assert (about["tensors_changed"], about["tensors"]) == (len(CHANGED["B"]), 11)
    factory = Manifest.load(made() / "exported")
    index = published.Index.read(Repository(fleet.repo), factory.base_id)
    assert index is not None
    pack = packs.Pack(
        [packs.build(files_of(base("B")), published.cuts(base("B"), Manifest.load(base("B"))), result="ab" * 32, start=factory.base_id, known=index.known)],
        most_bytes=1 << 20,
    )  # fmt: skip
    new = {f.name: sum(p.length for p in f.pieces if p.source is None) for f in pack.recipe.files}
    assert new[DATA] == sum(ranges(base("B"))[n][1] for n in CHANGED["B"]) == 6272
    assert (new["model.onnx"], new["device.json"]) == (0, 0)
    assert new["golden.npz"] < 1000 and new[MANIFEST] < 2500
    d = fleet.device().update()
    assert (d["state"], d["to_seq"], d["error"]) == ("updated", 2, None)
    # All that came over the wire: metadata, the pack, the payload. The pack is the changed tensors and little more.
    metadata = d["bytes_downloaded"] - about["bytes"] - said["payload_bytes"]
    assert 0 < metadata < 8000
    assert 5000 < about["bytes"] < 6272 + 2500 < about["whole_bytes"]
    np.testing.assert_array_equal(answers(fleet.device()), expected(base("B"), fleet))
    assert stored(fleet) == ids("B") and fleet.device().status()["base_id"] in ids("B")
    assert not list((fleet.at / "dl").iterdir())


def test_a_tensor_that_moved_is_not_sent(fleet: Fleet, tmp_path: Path) -> None:
    """Ranges are found by content: where a tensor lies in the file is nothing to it."""
    folder = tmp_path / "moved"
    shutil.copytree(made() / "exported", folder)
    data = (folder / DATA).read_bytes()
    cuts = published.cuts(folder, Manifest.load(folder))
    known = published.Index.of(folder, Manifest.load(folder)).known
    files = {MANIFEST: b"{}", DATA: bytes(64) + data}
    shifted = {DATA: [64, *(c + 64 for c in cuts[DATA])]}
    found = packs.Pack(
        [packs.build(files, shifted, result="ab" * 32, start="cd" * 32, known=known)], most_bytes=1 << 20
    )
    moved = next(f for f in found.recipe.files if f.name == DATA)
    assert [(p.source, p.length) for p in moved.pieces] == [(None, 64), (DATA, len(data))]


def test_a_device_with_an_unknown_base_fetches_it_whole(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    shutil.rmtree(fleet.at)
    Device.init(fleet.at, base("D"), fleet.root, str(fleet.repo))
    said = add_base(fleet, "B")
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 1)
    assert d["bytes_downloaded"] > said["base"]["whole_bytes"] > said["base"]["bytes"]
    assert fleet.device().status()["base_id"] in ids("B")


def test_a_device_that_was_made_with_the_new_base_fetches_none(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    shutil.rmtree(fleet.at)
    Device.init(fleet.at, base("B"), fleet.root, str(fleet.repo))
    add_base(fleet, "B")
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 1) and stored(fleet) == set()
    np.testing.assert_array_equal(answers(fleet.device()), expected(base("B"), fleet))


def test_a_pack_that_is_cut_goes_on_after_a_restart(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    said = add_base(fleet, "B")
    from tests.faults.scenes import with_cuts

    device = fleet.device()
    seen = list[int]()
    real = FolderTransport.get

    def get(self: FolderTransport, path: str, start: int = 0) -> Any:
        if path.endswith(".base"):
            seen.append(start)
        return real(self, path, start)

    monkeypatch.setattr(FolderTransport, "get", get)
    with_cuts(device)
    assert seen == [0, 600, 1200, 1200] and said["base"]["bytes"] > 1200
    assert fleet.device().status()["base_id"] in ids("B")


@pytest.mark.slow
def test_where_a_delta_is_of_no_use_the_whole_base_is_fetched(fleet: Fleet) -> None:
    add_base(fleet, "B")
    factory = Manifest.load(made() / "exported").base_id
    delta = next((fleet.repo / "targets").rglob(f"*.{factory[:16]}-*.base"))
    for content in (None, delta.read_bytes()[:-1] + b"?"):
        if content is None:
            delta.rename(delta.with_suffix(".gone"))
        else:
            delta.with_suffix(".gone").rename(delta)
            delta.write_bytes(content)
        shutil.rmtree(fleet.folder / "again", ignore_errors=True)
        shutil.copytree(fleet.at, fleet.folder / "again")
        device = Device(fleet.folder / "again", **{**fleet.options, "trial": lambda data: None})
        d = device.update()
        assert (d["state"], d["to_seq"]) == ("updated", 2), d
        assert device.status()["base_id"] in ids("B")


# one unit -------------------------------------------------------------------------------------------------------------


def test_base_and_payload_go_back_together(fleet: Fleet) -> None:
    before = answers(fleet.device())
    add_base(fleet, "B")
    device = fleet.device()
    device.update()
    status = device.status()
    assert (status["serving"]["seq"], status["previous"]["seq"]) == (2, 1)
    assert status["base_id"] in ids("B") and status["factory_base_id"] not in ids("B")
    assert device.validate()["passed"]
    assert not np.array_equal(answers(device), before)
    d = device.rollback()
    assert (d["to_seq"], stored(fleet)) == (1, set())
    np.testing.assert_array_equal(answers(device), before)
    np.testing.assert_array_equal(answers(fleet.device()), before)
    assert device.update()["reason"].startswith("rolled back here")


def test_the_publisher_brings_everybody_back_to_the_base_before(fleet: Fleet) -> None:
    before = answers(fleet.device())
    add_base(fleet, "B")
    fleet.device().update()
    assert publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)["seq"] == 3
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("rolled_back", 3)
    np.testing.assert_array_equal(answers(fleet.device()), before)
    assert fleet.add("second")["seq"] == 4  # for the base of the group: the first one again
    assert fleet.device().update()["to_seq"] == 4 and fleet.device().status()["base_id"] not in ids("B")
    publish.rollback(fleet.repo, 2, passphrase=PASSPHRASE)  # and forward: its packs are offered again
    assert [r["seq"] for r in publish.verify(fleet.repo)["groups"]] == [5]
    assert fleet.device().update()["to_seq"] == 5 and fleet.device().status()["base_id"] in ids("B")


def test_going_back_to_the_first_base_brings_it_to_devices_made_with_a_later_one(fleet: Fleet) -> None:
    before = answers(fleet.device())
    add_base(fleet, "B")
    newer = fleet.folder / "newer"
    Device.init(newer, base("B"), fleet.root, str(fleet.repo))
    device = Device(newer, sleep=lambda s: None, trial=trial_here(newer))
    assert device.update()["to_seq"] == 2 and device.status()["base_id"] in ids("B")
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    publish.verify(fleet.repo)
    d = device.update()
    assert (d["state"], d["to_seq"]) == ("rolled_back", 3) and device.status()["base_id"] not in ids("B")
    assert d["bytes_downloaded"] < len(whole_pack(made() / "exported"))  # what changed alone
    np.testing.assert_array_equal(answers(device), before)
    publish.rollback(fleet.repo, 2, passphrase=PASSPHRASE)
    publish.rollback(fleet.repo, 0, passphrase=PASSPHRASE)  # the model as delivered, by a payload that corrects nothing
    assert device.update()["to_seq"] == 5 and device.status()["base_id"] not in ids("B")


def test_going_back_where_the_first_base_was_replaced_in_its_place(tmp_path: Path) -> None:
    """Devices that were made with it follow; one that was made with a later base waits, and says so."""
    exported, repo = tmp_path / "exported", tmp_path / "repo"
    shutil.copytree(made() / "exported", exported)
    publish.init_repository(repo, exported, tmp_path / "keys", passphrase=PASSPHRASE)
    publish.add(repo, made() / "adapters" / "first", passphrase=PASSPHRASE)
    old, newer = tmp_path / "old", tmp_path / "newer"
    Device.init(old, exported, repo / "metadata" / "1.root.json", str(repo))
    shutil.rmtree(exported)
    rebased(exported, CHANGED["B"])
    Device.init(newer, exported, repo / "metadata" / "1.root.json", str(repo))
    publish.base(repo, exported, made() / "adapters" / "second", passphrase=PASSPHRASE)
    publish.rollback(repo, 1, passphrase=PASSPHRASE)
    found = {at: Device(at, sleep=lambda s: None, trial=trial_here(at)).update() for at in (old, newer)}
    assert (found[old]["state"], found[old]["to_seq"]) == ("rolled_back", 3)
    assert found[newer]["state"] == "pending" and "base" in found[newer]["reason"], found[newer]


@pytest.mark.slow
def test_the_old_base_stays_until_the_commit_and_only_what_is_named_is_kept(fleet: Fleet) -> None:
    for seq, name in ((2, "B"), (3, "C"), (4, "D")):
        add_base(fleet, name)
        assert fleet.device().update()["to_seq"] == seq
        assert stored(fleet) == ids(*{2: "B", 3: "BC", 4: "CD"}[seq])
        np.testing.assert_array_equal(answers(fleet.device()), expected(base(name), fleet))
    assert fleet.add("loha", encoding="f16")["seq"] == 5  # a payload alone, for the newest base
    assert fleet.device().update()["to_seq"] == 5
    assert stored(fleet) == ids("D")
    assert fleet.device().rollback()["to_seq"] == 4
    assert fleet.device().status()["base_id"] in ids("D")
    names = {t.rpartition("/")[2] for t in Repository(fleet.repo).read("default").signed.targets}
    assert all(n[-21:-5] in next(iter(ids("D"))) for n in names if n.endswith(".base"))


def test_a_base_that_rots_is_fetched_again_and_nothing_of_it_is_served(fleet: Fleet) -> None:
    before = answers(fleet.device())
    add_base(fleet, "B")
    fleet.device().update()
    (path,) = (fleet.at / "bases").glob(f"*/{DATA}")
    path.write_bytes(bytes(len(path.read_bytes())))
    np.testing.assert_array_equal(answers(fleet.device()), before)
    assert fleet.device().update()["state"] == "updated"
    np.testing.assert_array_equal(answers(fleet.device()), expected(base("B"), fleet))


def test_a_pack_from_a_base_that_has_rotted_is_no_way(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that waits for its trial again lies among those in use; the state goes on naming it when it rots."""
    (fleet.at / "device.json").write_text(
        json.dumps({"schema": 1, "health_command": ["/bin/true"], "probation_s": 0.1})
    )
    add_base(fleet, "B")

    def gone(seconds: float) -> None:
        raise KeyboardInterrupt  # the process ends in its probation

    with pytest.raises(KeyboardInterrupt):
        fleet.device(sleep=gone).update()
    (path,) = (fleet.at / "bases").glob(f"*/{DATA}")
    path.write_bytes(bytes(len(path.read_bytes())))
    add_base(fleet, "C")
    assert fleet.device().update()["to_seq"] == 3 and stored(fleet) == ids("C")


def test_a_session_in_another_process_follows_base_and_payload(fleet: Fleet) -> None:
    with EdgeSession(fleet.at) as session:
        add_base(fleet, "B")
        device = fleet.device()
        device.infer({"x": X[:8]})  # loaded, so that it has to be exchanged
        assert device.update()["to_seq"] == 2
        shows(session, 2)
        np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], expected(base("B"), fleet))
        np.testing.assert_array_equal(answers(device), expected(base("B"), fleet))
        device.rollback()
        shows(session, 1)
        np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], answers(fleet.device()))


def test_the_trial_is_in_the_child_and_on_the_new_base(fleet: Fleet) -> None:
    wrong = variant("golden")
    release_base(fleet, wrong, payload_for(base("B")), {None: whole_pack(wrong)}, seq=2)
    d = fleet.device(trial=None).update()
    assert (d["state"], d["serving"]["seq"]) == ("rejected", 1) and "base: golden output" in d["reason"]
    release_base(fleet, base("C"), payload_for(base("C")), {None: whole_pack(base("C"))}, seq=3)
    assert "payload: golden" in fleet.device(trial=None).update()["reason"]  # it has B's golden outputs
    release_base(fleet, base("B"), payload_for(base("B")), {None: whole_pack(base("B"))}, seq=4)
    assert fleet.device(trial=None).update()["state"] == "updated"


def test_a_repaired_base_is_tried_again_with_the_same_payload(fleet: Fleet) -> None:
    """What was refused is a payload on a base: neither is to blame for the other's fault."""
    payload, wrong = payload_for(base("B")), variant("golden")
    release_base(fleet, wrong, payload, {None: whole_pack(wrong)}, seq=2)
    for _ in range(2):
        assert fleet.device().update()["state"] == "rejected"
    assert len(fleet.device().history()) == len([e for e in fleet.device().history() if e["state"] != "trial"]) + 2
    release_base(fleet, base("B"), payload, {None: whole_pack(base("B"))}, seq=3)
    assert fleet.device().update()["to_seq"] == 3


@pytest.mark.slow
def test_other_languages_are_told_which_base(fleet: Fleet) -> None:
    add_base(fleet, "B")
    fleet.device().update(emit="onnx-adapter")
    said = json.loads((fleet.at / "emit" / "current.json").read_text())
    assert {said["base_id"]} == ids("B") and (fleet.at / said["base"] / "model.onnx").exists()
    fleet.device().rollback()
    fleet.device().update(emit="onnx-adapter")
    assert json.loads((fleet.at / "emit" / "current.json").read_text())["base"] == "factory"


# waiting --------------------------------------------------------------------------------------------------------------


def test_a_payload_for_a_base_that_is_not_here_waits(fleet: Fleet) -> None:
    """It is no error, it is not refused, it is asked about again; when something leads to its base, it is taken."""
    shutil.rmtree(fleet.at)
    Device.init(fleet.at, base("C"), fleet.root, str(fleet.repo))
    before = answers(fleet.device())
    for _ in range(2):
        d = fleet.device().update()
        assert (d["state"], d["error"], d["to_seq"]) == ("pending", None, 0) and d["reason"].startswith(
            "waiting: release seq 1"
        )
        assert fleet.device().status()["refused"] == [] and not list((fleet.at / "dl").iterdir())
        np.testing.assert_array_equal(answers(fleet.device()), before)
    assert fleet.device().history()[-1]["state"] == "waiting"
    add_base(fleet, "B")
    assert fleet.device().update()["to_seq"] == 2


# limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"max_update_bytes": 3000}, 6, "at most 3000 bytes to fetch"),
        ({"max_disk_bytes": 20_000}, 10, "at most 20000 bytes"),
    ],
)
def test_limits_are_checked_before_anything_is_fetched(
    fleet: Fleet, settings: dict[str, int], code: int, words: str
) -> None:
    add_base(fleet, "B")
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, **settings}))
    d = fleet.device().update()
    assert d["error"]["code"] == code and words in d["reason"] and d["bytes_downloaded"] < 5000
    assert (d["serving"]["seq"], fleet.device().status()["refused"]) == (1, [])
    (fleet.at / "device.json").unlink()
    assert fleet.device().update()["to_seq"] == 2


def test_a_disk_without_room_for_the_base_is_not_begun_on(fleet: Fleet) -> None:
    class Small(Disk):
        def free_bytes(self, path: Path) -> int:
            return (256 << 10) + 20_000

    add_base(fleet, "B")
    d = fleet.device(disk=Small()).update()
    assert d["error"]["code"] == 10 and "bytes free" in d["reason"] and not list((fleet.at / "dl").iterdir())


# old devices ----------------------------------------------------------------------------------------------------------


def test_states_of_before_are_read(fleet: Fleet) -> None:
    """Neither the entries nor the refusals of an older version name a base: they are of the factory's."""
    state = StateFiles(fleet.at, Disk()).read()
    body = json.loads(encode(state))["body"]
    for part in (body["active"], *body["refused"]):
        del part["base"]
    for name in COPIES:
        (fleet.at / name).write_bytes(canonical_json({"body": body, "sha256": sha256_json(body)}) + b"\n")
    assert StateFiles(fleet.at, Disk()).read() == state
    assert fleet.device().status()["serving"]["seq"] == 1
    add_base(fleet, "B")
    assert fleet.device().update()["to_seq"] == 2


# the publisher --------------------------------------------------------------------------------------------------------


def test_a_payload_is_not_needed(fleet: Fleet) -> None:
    said = add_base(fleet, "B", None)
    fleet.device().update()
    np.testing.assert_array_equal(answers(fleet.device()), Session(base("B")).run({"x": X[:8]})["output"])
    assert said["payload_bytes"] < 3000


@pytest.mark.slow
def test_a_base_is_rolled_out_and_halted_like_a_payload(fleet: Fleet) -> None:
    before = answers(fleet.device())
    add_base(fleet, "B", channel="canary")
    assert fleet.device().update()["state"] == "up_to_date"
    rollout(fleet.repo, percent=99.99, passphrase=PASSPHRASE)
    assert fleet.device().update()["to_seq"] == 2
    rollout(fleet.repo, halt=True, passphrase=PASSPHRASE)
    assert fleet.device().update()["state"] == "rolled_back"
    np.testing.assert_array_equal(answers(fleet.device()), before)
    names = {t.rpartition("/")[2] for t in Repository(fleet.repo).read("default").signed.targets}
    assert not [n for n in names if n.endswith(".base")]
    add_base(fleet, "C", channel="canary")
    rollout(fleet.repo, percent=100, passphrase=PASSPHRASE)
    assert fleet.device().update()["to_seq"] == 4 and stored(fleet) == ids("C")
    publish.verify(fleet.repo)


def test_the_export_that_was_replaced_in_its_place_is_known_by_its_tensors(tmp_path: Path) -> None:
    """The usual way: `export` writes over the folder that the repository was made for."""
    exported = tmp_path / "exported"
    shutil.copytree(made() / "exported", exported)
    repo = tmp_path / "repo"
    publish.init_repository(repo, exported, tmp_path / "keys", passphrase=PASSPHRASE)
    publish.add(repo, made() / "adapters" / "first", passphrase=PASSPHRASE)
    shutil.rmtree(exported)
    rebased(exported, CHANGED["B"])
    with pytest.raises(PayloadError, match="publish base"):
        publish.add(repo, made() / "adapters" / "second", passphrase=PASSPHRASE)
    said = publish.base(repo, exported, made() / "adapters" / "second", passphrase=PASSPHRASE)
    assert said["base"]["bytes"] < said["base"]["whole_bytes"] and said["base"]["tensors_changed"] == 2
    assert publish.add(repo, made() / "adapters" / "first", passphrase=PASSPHRASE)["seq"] == 3
    publish.verify(repo)


@pytest.mark.slow
def test_prune_keeps_the_packs_that_can_be_asked_for(fleet: Fleet) -> None:
    for name in ("B", "C"):
        add_base(fleet, name)
    before = len(list((fleet.repo / "targets").rglob("*.base")))
    fleet.add("first", encoding="f16")  # clients that are reading the snapshot before this one need no pack of B
    publish.prune(fleet.repo, keep=1)
    publish.verify(fleet.repo)
    left = list((fleet.repo / "targets").rglob("*.base"))
    assert (before, len(left)) == (5, 3)
    assert fleet.device().update()["to_seq"] == 4
    with pytest.raises(CommandError):
        publish.rollback(fleet.repo, 2, passphrase=PASSPHRASE)


def test_verify_misses_a_base_that_no_whole_pack_brings(fleet: Fleet) -> None:
    factory = Manifest.load(made() / "exported").base_id
    index = published.Index.of(made() / "exported", Manifest.load(made() / "exported"))
    pack = published.make(base("B"), Manifest.load(base("B")), [index])[factory]
    release_base(fleet, base("B"), payload_for(base("B")), {factory: pack}, seq=2)
    with pytest.raises(UpdateError, match="a whole pack of base"):
        publish.verify(fleet.repo)


def other_ports(raw: dict[str, Any]) -> None:
    raw["inputs"][0]["shape"] = ["batch", 3, 16, 16]


REFUSED: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "the base that devices have": (lambda at: made() / "exported", CommandError, "another base than devices have"),
    "another model": (lambda at: rebased(at, CHANGED["B"], lambda raw: raw.update(model="other")), PayloadError, "the model small"),
    "other inputs": (lambda at: rebased(at, CHANGED["B"], other_ports), PayloadError, "those that applications know"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_devices_could_not_use_is_not_published(fleet: Fleet, tmp_path: Path, what: str) -> None:
    make, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words):
        add_base(fleet, make(tmp_path / "new"))
    assert [r["seq"] for r in publish.verify(fleet.repo)["groups"]] == [1]
