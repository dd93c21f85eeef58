"""One hostile case per rule (see `hostile`): each ends in exactly this error, and what is served never changes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.attacks import hostile, hostile_bases
from tests.support.fleet import Fleet, answers

CASES = {**hostile.CASES, **hostile_bases.CASES}
EXPECTED: dict[str, str] = json.loads((Path(__file__).parent / "expected.json").read_text())
#: Cases that are about the way or this device, not about the payload: it is not refused for good.
FINAL = "signed: "


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet whose device serves release 1."""
    fleet = Fleet(tmp_path)
    fleet.add("second")
    assert fleet.device().update()["to_seq"] == 1
    fleet.serves, fleet.after = 1, lambda: True  # type: ignore[attr-defined]
    return fleet


def as_expected(text: str, name: str) -> bool:
    """Tell whether an error is the case's own; <N> stands for a size that another processor's last digits change."""
    return re.fullmatch(re.escape(EXPECTED[name]).replace("<N>", r"\d+"), text) is not None


def said(text: str, fleet: Fleet) -> str:
    """Return an error without what differs from run to run: hashes, times, places, milliseconds."""
    text = text.replace(str(fleet.folder), "…")
    text = re.sub(r"[0-9a-f]{64}", "SHA", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[+:\d.]*Z?", "TIME", text)
    return re.sub(r"\d+\.\d+ ms", "MS", text)


def test_every_case_has_its_error_and_every_error_its_case() -> None:
    assert CASES.keys() == EXPECTED.keys() and len(CASES) >= 60
    assert hostile_bases.CASES.keys() > hostile_bases.SHORT and not hostile.CASES.keys() & hostile_bases.CASES.keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in hostile.CASES or n in hostile_bases.SHORT else [pytest.mark.slow])
        for n in CASES
    ],
)
def test_it_is_refused_by_its_rule_and_serving_never_changes(fleet: Fleet, name: str) -> None:
    CASES[name](fleet)
    before = answers(fleet.device())
    status = fleet.device().status()
    outside = {p for p in fleet.folder.parent.rglob("*") if not p.is_relative_to(fleet.at)}
    device = fleet.device()
    d = device.update()
    assert d["error"] is not None and d["state"] in ("rejected", "failed"), d
    error = d["error"]
    found = f"{d['state']} {error['code']} {error['kind']} | {error['where']} | {error['expected']} | {error['got']}"
    assert as_expected(said(found, fleet), name), (said(found, fleet), EXPECTED[name])
    assert error["remedy"] and "\n" not in d["reason"]
    assert (d["serving"]["seq"], d["to_seq"]) == (fleet.serves, status["seq"])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(answers(device), before)
    again = fleet.device()
    np.testing.assert_array_equal(answers(again), before)
    now = again.status()
    assert bool(now["refused"]) == name.startswith(FINAL)
    assert now["previous"] == status["previous"] or name.startswith("signed: ill")
    assert {p for p in fleet.folder.parent.rglob("*") if not p.is_relative_to(fleet.at)} == outside
    assert fleet.after()  # type: ignore[attr-defined]
    assert len(list((fleet.at / "store").iterdir())) <= 2
    if name.startswith(FINAL):  # nothing of it is left
        assert not list((fleet.at / "dl").iterdir()) and not list((fleet.at / "bases").glob("*"))
