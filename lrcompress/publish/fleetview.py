"""The fleet at a glance: who serves what, what failed, what it cost, how far a rollout is. As data, and as one HTML page."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .intake import Intake
from .repository import Repository
from .rollouts import tally

#: A device that has said nothing for so long is called silent.
SILENT = timedelta(days=7)


def fleet(repo: str | Path, intake: Intake, *, html: Path | None = None) -> dict[str, Any]:
    """Return groups with versions, failures, bytes and phases; write the page to `html`."""
    repository, now = Repository(Path(repo)), datetime.now(UTC).replace(microsecond=0)
    devices = intake.devices()
    names = sorted({*repository.groups(), *(d["group"] for d in devices)})
    groups = [_group(repository, name, [d for d in devices if d["group"] == name], intake, now) for name in names]
    found = {
        "repository": str(repository.folder), "model": repository.model, "at": now.isoformat(), "groups": groups,
        "devices": len(devices), "refused_records": intake.refusals(),
    }  # fmt: skip
    if html is not None:
        write_atomic(html, page(found).encode())
    return found


def _group(
    repository: Repository, name: str, devices: list[dict[str, Any]], intake: Intake, now: datetime
) -> dict[str, Any]:
    stable, candidate = repository.latest(name), repository.candidate(name)
    served: Counter[tuple[int, str | None, str]] = Counter()
    failing, silent = [], 0
    for d in devices:
        record = d["record"]
        silent += d["received"] is None or now - datetime.fromisoformat(d["received"]) > SILENT
        if record is None:
            continue
        serving = record["serving"]
        served[serving.get("seq") or 0, serving.get("sha256"), record["base_id"]] += 1
        if not record["healthy"] or record["state"] in ("rejected", "failed"):
            failing.append(
                {"device": d["id"], "at": record["at"], "state": record["state"], "reason": record["reason"]}
            )
    rollout = None
    if candidate is not None:
        counted = tally(candidate, intake.reports(name))
        rollout = {
            "seq": candidate.seq, "sha256": candidate.sha256, "percent": candidate.percent or 0,
            "eligible": counted.eligible, "well": counted.well, "failed": counted.failed,
        }  # fmt: skip
    return {
        "group": name, "devices": len(devices), "silent": silent,
        "stable": None if stable is None else {
            "seq": stable.seq, "sha256": stable.sha256, "bytes": stable.target.length, "base_id": next(iter(stable.custom["base_ids"]), None),
        },
        "rollout": rollout,
        "serving": [
            {"seq": s, "sha256": h, "base_id": b, "devices": n} for (s, h, b), n in sorted(served.items(), key=lambda e: (-e[0][0], -e[1]))
        ],
        "failing": failing, "failures": sum(d["failures"] for d in devices),
        "bytes": sum(d["bytes"] for d in devices), "requests": sum(d["requests"] for d in devices),
        "reports": sum(d["reports"] for d in devices),
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Return the HTML page: one file, no script, nothing from elsewhere."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("lrcompress.publish", ""), autoescape=select_autoescape(default=True)
    )
    environment.filters["size"] = _size
    return environment.get_template("fleet.html.j2").render(**found)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
