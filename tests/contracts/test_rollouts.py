"""Phases: who takes a candidate, what widens it, what stops it, and that everybody ends with good bytes."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.cli.main import run
from lrcompress.edge import Device
from lrcompress.edge.identity import Identity
from lrcompress.errors import CommandError
from lrcompress.phases import PLACES, place, takes_candidate
from lrcompress.publish.repository import Repository
from lrcompress.publish.rollouts import Policy, Report, Tally, decide, rollout, step, tally
from tests.support.fleet import PASSPHRASE, Fleet, answers, made


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


def member(fleet, name, channel="stable"):
    """Make another device of the fleet."""
    at = fleet.folder / name
    return Device.init(at, made() / "exported", fleet.root, str(fleet.repo), channel=channel)


def go(fleet, **options):
    return rollout(fleet.repo, passphrase=PASSPHRASE, **options)


def test_places_are_uniform_and_stable_and_differ_by_payload():
    ids, sha = [f"{i:032x}" for i in range(20_000)], "ab" * 32
    places = [place(i, sha) for i in ids]
    assert min(places) >= 0 and max(places) < PLACES and places == [place(i, sha) for i in ids]
    counts = np.bincount(np.array(places) * 20 // PLACES, minlength=20)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)  # five standard deviations
    for percent in (0.01, 1, 10, 50):
        n = sum(takes_candidate(i, "stable", sha, round(100 * percent)) for i in ids)
        assert abs(n - 200 * percent) <= 5 * np.sqrt(200 * percent) + 1
    early = {i for i in ids if takes_candidate(i, "stable", sha, 1000)}
    assert early < {i for i in ids if takes_candidate(i, "stable", sha, 2000)}  # growing only adds
    assert len(early & {i for i in ids if takes_candidate(i, "stable", "cd" * 32, 1000)}) < 0.2 * len(early)
    assert place("d", "s") == place("d", "s") == 498  # a frozen value: devices of any version must agree
    assert takes_candidate("x", "canary", sha, 0) and not takes_candidate(None, "stable", sha, 9_999)
    assert takes_candidate(None, "stable", sha, 10_000)


def test_canaries_first_then_a_share_then_everybody(fleet):
    first = fleet.add("first")
    canary, plain = member(fleet, "c", "canary"), [member(fleet, f"s{i}") for i in range(6)]
    for d in (canary, *plain):
        d.update()
    new = fleet.add("second", channel="canary")
    assert new["seq"] == 2 and publish.verify(fleet.repo)["groups"][0]["percent"] == 0
    assert canary.update()["to_seq"] == 2 and {d.update()["to_seq"] for d in plain} == {1}
    places = sorted(place(Identity(d.folder).id, new["sha256"]) for d in plain)
    percent = (places[2] + 1) / 100
    go(fleet, percent=percent)
    assert Counter(d.update()["to_seq"] for d in plain) == {2: 3, 1: 3}
    (fleet.at / "identity.json").unlink()
    assert fleet.device().update()["to_seq"] == 1  # without an identity: with everybody else
    with pytest.raises(CommandError, match="more than"):
        go(fleet, percent=percent)
    with pytest.raises(CommandError, match="rollout under way"):
        fleet.add("loha")
    with pytest.raises(CommandError, match="rollout under way"):
        publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    d = go(fleet, percent=100)
    assert (d["seq"], d["sha256"]) == (2, new["sha256"]) and Repository(fleet.repo).candidate("default") is None
    for device in (canary, *plain):
        got = device.update()
        assert (got["to_seq"], got["serving"]["sha256"]) == (2, new["sha256"])
    assert publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)["sha256"] == first["sha256"]


def test_halting_brings_everybody_back_without_a_download(fleet):
    first = fleet.add("first")
    canary, plain = member(fleet, "c", "canary"), member(fleet, "s")
    for d in (canary, plain):
        d.update()
    good = answers(plain)
    fleet.add("second", channel="canary")
    assert canary.update()["state"] == "updated"
    d = go(fleet, halt=True)
    assert (d["seq"], d["rollback_of"], d["sha256"]) == (3, 2, first["sha256"])
    for device, state in ((canary, "rolled_back"), (plain, "updated")):
        got = device.update()
        assert (got["state"], got["to_seq"], got["serving"]["sha256"]) == (state, 3, first["sha256"])
        assert got["bytes_downloaded"] < first["payload_bytes"]
        np.testing.assert_array_equal(answers(device), good)
    with pytest.raises(CommandError, match="a candidate"):
        go(fleet, halt=True)


def test_halting_the_first_release_goes_back_to_the_model_as_delivered(fleet):
    canary = member(fleet, "c", "canary")
    delivered = answers(canary)
    fleet.add("first", channel="canary")
    canary.update()
    assert np.abs(answers(canary) - delivered).max() > 1e-3
    go(fleet, halt=True)
    assert canary.update()["state"] == "rolled_back"
    np.testing.assert_allclose(answers(canary), delivered, atol=1e-6)
    fleet.add("second")
    d = publish.rollback(fleet.repo, 0, passphrase=PASSPHRASE)
    assert d["payload_bytes"] < 3000 and canary.update()["to_seq"] == d["seq"] == 4
    np.testing.assert_allclose(answers(canary), delivered, atol=1e-6)


@pytest.mark.parametrize("bad", [{}, {"percent": 5, "halt": True}, {"percent": 0}, {"percent": 101}, {"percent": -1}])
def test_what_is_no_step_is_refused(fleet, bad):
    fleet.add("first", channel="canary")
    with pytest.raises(CommandError):
        go(fleet, **bad)


@pytest.mark.parametrize(
    "bad", [{"steps": ()}, {"steps": (10, 5, 100)}, {"steps": (1, 50)}, {"max_failures": 1}, {"coverage": 0}, {"min_reports": 0}]
)  # fmt: skip
def test_a_policy_that_is_none_is_refused(bad):
    with pytest.raises(CommandError):
        Policy(**bad)


def candidate_of(fleet, percent):
    fleet.add("first")
    fleet.add("second", channel="canary")
    if percent:
        go(fleet, percent=percent)
    return Repository(fleet.repo).candidate("default")


def test_decisions(fleet):
    candidate = candidate_of(fleet, 10)
    policy = Policy(steps=(1, 10, 50, 100), max_failures=0.05, min_reports=20, coverage=0.8)
    for eligible, well, failed, expected in [
        (100, 0, 0, "wait"), (100, 79, 0, "wait"), (100, 80, 0, "advance"), (100, 76, 4, "advance"), (100, 90, 5, "halt"),
        (100, 0, 1, "wait"),  # one of the first is no verdict
        (100, 0, 2, "halt"), (10, 8, 0, "wait"), (10, 10, 0, "advance"), (10, 8, 2, "halt"), (0, 0, 0, "advance"),
    ]:  # fmt: skip
        found = decide(candidate, Tally(eligible, well, failed), policy)
        assert found[0] == expected, (eligible, well, failed, found)
    assert decide(candidate, Tally(10, 10, 0), policy)[1] == 50
    strict = Policy(max_failures=0)
    assert decide(candidate, Tally(100, 5, 1), strict)[0] == "halt"


def test_what_is_counted(fleet):
    candidate = candidate_of(fleet, 10)
    sha = candidate.sha256
    ids = [f"{i:032x}" for i in range(300)]
    early = [i for i in ids if takes_candidate(i, "stable", sha, 1000)]
    late = [i for i in ids if i not in early]
    devices = [
        Report(early[0], "stable", sha),
        Report(early[1], "stable", sha, healthy=False),
        Report(early[2], "stable", "cd" * 32, frozenset({sha})),  # refused it, and serves what it had
        *(Report(i, "stable", "cd" * 32) for i in early[3:]),
        *(Report(i, "stable", None, healthy=False) for i in late),  # unwell, but not by this
        Report("c" * 32, "canary", None),
    ]
    assert tally(candidate, devices) == Tally(len(early) + 1, 1, 2)


def test_steps_from_cron_finish_or_halt(fleet, capsys, monkeypatch):
    first = fleet.add("first")
    new = fleet.add("second", channel="canary")
    ids = [f"{i:032x}" for i in range(60)]
    policy = Policy(steps=(20, 100), min_reports=2)
    well = [Report(i, "stable", new["sha256"]) for i in ids]

    def steps(devices):
        return step(fleet.repo, devices, policy, passphrase=PASSPHRASE)

    assert steps([])["decision"] == "advance"  # nobody to wait for
    assert steps([Report(i, "stable", first["sha256"]) for i in ids])["decision"] == "wait"
    d = steps(well)
    assert (d["decision"], d["percent"]) == ("advance", 100) and steps(well)["decision"] == "none"
    fleet.add("loha", channel="canary")
    sha = Repository(fleet.repo).candidate("default").sha256
    d = steps([Report(i, "canary", None, frozenset({sha})) for i in ids[:3]])
    assert (d["decision"], d["halted"], d["sha256"]) == ("halt", True, new["sha256"])
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", PASSPHRASE)
    fleet.add("first", channel="canary")
    assert run(["publish", "rollout", str(fleet.repo), "--auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "advance"
    assert run(["publish", "rollout", str(fleet.repo), "--percent", "50", "--json"]) == 0
    assert run(["publish", "rollout", str(fleet.repo), "--halt"]) == 0
    assert "withdrawn" in capsys.readouterr().out
    for bad in (["--halt", "--auto"], [], ["--auto", "--steps", "x"], ["--auto", "--steps", "5,1"]):
        assert run(["publish", "rollout", str(fleet.repo), *bad]) == 2
