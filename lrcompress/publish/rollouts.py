"""A release on its way: canaries first, then growing shares of the fleet, and back by itself when devices complain.

add(repo, "adapters/new", channel="canary", passphrase=p)
rollout(repo, percent=10, passphrase=p)            # by hand …
step(repo, reports, Policy(), passphrase=p)        # … or from cron: wait, widen, finish or halt, by what devices report

Halting signs a release with a higher seq that points at the bytes of the last one that everybody got: a device that
never took the candidate fetches nothing, one that did has the old bytes still.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..phases import CANDIDATE, PLACES, STABLE, takes_candidate
from .bases import keep_packs
from .keys import KeyStore
from .releases import back_to, report, stable_bytes
from .repository import Change, Release, Repository, check_group


@dataclass(frozen=True)
class Policy:
    """When a rollout goes on, and when it ends. Shares are of the devices that may have the candidate."""

    steps: tuple[float, ...] = (1, 10, 50, 100)
    max_failures: float = 0.05
    min_reports: int = 5
    coverage: float = 0.8

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not rising or not self.steps[0] > 0 or self.steps[-1] != 100:
            raise CommandError(
                "lrcompress publish rollout --steps", "growing percentages that end with 100", self.steps
            )
        if not 0 <= self.max_failures < 1 or not 0 < self.coverage <= 1 or self.min_reports < 1:
            raise CommandError(
                "lrcompress publish rollout", "0 ≤ --max-failures < 1, 0 < --coverage ≤ 1, --min-reports ≥ 1", self
            )


@dataclass(frozen=True)
class Report:
    """What is known of one enrolled device."""

    device: str
    channel: str
    serving: str | None
    refused: frozenset[str] = frozenset()
    healthy: bool = True


@dataclass(frozen=True)
class Tally:
    """How a candidate fares: devices that may have it, those that serve it and are well, those that failed on it."""

    eligible: int
    well: int
    failed: int

    @property
    def reports(self) -> int:
        return self.well + self.failed


def tally(candidate: Release, devices: Iterable[Report]) -> Tally:
    """Count devices. One that refused the candidate, or serves it and says it is not well, has failed."""
    eligible, well, failed, places = 0, 0, 0, int(candidate.custom.get("places", 0))
    for d in devices:
        if d.serving != candidate.sha256 and candidate.sha256 not in d.refused:
            eligible += takes_candidate(d.device, d.channel, candidate.sha256, places)
            continue
        eligible += 1
        bad = candidate.sha256 in d.refused or not d.healthy
        failed, well = failed + bad, well + (not bad)
    return Tally(eligible, well, failed)


def decide(candidate: Release, counted: Tally, policy: Policy) -> tuple[str, float | None, str]:
    """Return (halt | advance | wait, the next percentage, why)."""
    limit = policy.max_failures * max(counted.reports, policy.min_reports)
    if counted.failed > limit:
        return "halt", None, f"{counted.failed} of {counted.reports} devices that reported failed"
    wanted = max(1, min(policy.min_reports, counted.eligible))
    if counted.eligible and counted.reports < max(wanted, policy.coverage * counted.eligible):
        return "wait", None, f"{counted.reports} of {counted.eligible} devices have reported"
    percent = candidate.percent or 0
    following = next((s for s in policy.steps if s > percent), 100.0)
    if not counted.eligible and percent == 0:
        return "advance", following, "no canary is enrolled"
    return "advance", following, f"{counted.well} of {counted.eligible} devices serve it, {counted.failed} failed"


def step(
    repo: str | Path,
    devices: Sequence[Report],
    policy: Policy,
    *,
    group: str = "default",
    passphrase: str,
    keys: Sequence[Path] = (),
) -> dict[str, Any]:
    """Do what `decide` says about the candidate of `group`; without one, nothing."""
    candidate = Repository(Path(repo)).candidate(group)
    if candidate is None:
        return {
            "group": group,
            "decision": "none",
            "reason": "nothing is being rolled out",
            "seq": None,
            "percent": None,
        }
    counted = tally(candidate, devices)
    decision, percent, reason = decide(candidate, counted, policy)
    counts = {"eligible": counted.eligible, "well": counted.well, "failed": counted.failed}
    about = {"decision": decision, "reason": reason, "candidate": candidate.seq, **counts}
    if decision == "wait":
        return {"group": group, "seq": candidate.seq, "percent": candidate.percent, **about}
    options: dict[str, Any] = {"halt": True} if decision == "halt" else {"percent": percent}
    return {**rollout(repo, group=group, passphrase=passphrase, keys=keys, **options), **about}


def rollout(
    repo: str | Path,
    *,
    group: str = "default",
    percent: float | None = None,
    halt: bool = False,
    passphrase: str,
    keys: Sequence[Path] = (),
) -> dict[str, Any]:
    """Offer the candidate of `group` to a share of the devices, to everybody (100), or to nobody any more (halt)."""
    check_group(group)
    if halt == (percent is not None) or (percent is not None and not 0 < percent <= 100):
        raise CommandError("lrcompress publish rollout", "--percent above 0 and up to 100, or --halt", percent)
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked():
        candidate = repository.candidate(group)
        if candidate is None:
            raise CommandError(
                f"group {group}", "a candidate", "none", "publish one with 'publish add --channel canary'"
            )
        places = None if percent is None else round(percent * PLACES / 100)
        if halt:
            change, custom = back_to(repository, group, repository.latest(group), undone=candidate.seq)
        elif percent == 100:
            custom = {k: v for k, v in candidate.custom.items() if k != "places"}
            tail = f"-{candidate.sha256[:16]}.delta"
            change = Change(drop=lambda n: n == CANDIDATE or (n.endswith(".delta") and not n.endswith(tail)))
            change.point(STABLE, candidate.target.length, candidate.sha256, custom)
            change.files.update(stable_bytes(repository, group, candidate))
            keep_packs(repository, group, change, custom)
        elif places is not None and places <= candidate.custom["places"]:
            raise CommandError(
                "lrcompress publish rollout --percent",
                f"more than the {candidate.percent:g} % of now",
                percent,
                "or --halt",
            )
        else:
            custom = {**candidate.custom, "places": places}
            change = Change()
            change.point(CANDIDATE, candidate.target.length, candidate.sha256, custom)
        repository.apply(store, group, change)
        found = report(repository, group, custom, next(iter(change.put.values())).length)
        return {**found, "candidate": candidate.seq, "percent": 0 if halt else percent, "halted": halt}
