"""`lrcompress publish rollout · enroll · collect · fleet`: releases in phases, and what devices say about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import CommandError, HostError
from .output import Result, Shell, common, human_bytes, table
from .publish import passphrase, publish, signing


def _intake(repo: str, db: Path | None) -> Any:
    """Open the database of a fleet: beside the repository, never in it."""
    from ..publish.intake import Intake

    folder = Path(repo)
    path = folder.parent / f"{folder.name}.fleet.db" if db is None else db
    if path.resolve().is_relative_to(folder.resolve()):
        raise CommandError("--db", "a file outside the repository", path, "whoever serves REPO would serve it")
    return Intake(path)


def _db(function: Any) -> Any:
    return click.option("--db", type=click.Path(path_type=Path), help="The fleet's database  [default: REPO.fleet.db]")(
        function
    )


@publish.command(epilog="Example (from cron): lrcompress publish rollout repo --auto --steps 1,10,50,100")
@click.argument("repo", type=click.Path())
@click.option("--group", default="default", show_default=True)
@click.option(
    "--percent",
    type=float,
    help="Offer the candidate to this share of the stable devices; 100: to everybody, for good.",
)
@click.option("--halt", is_flag=True, help="Withdraw it: a new signed release points at what everybody had before.")
@click.option("--auto", is_flag=True, help="Wait, widen, finish or halt, by what devices reported.")
@click.option("--steps", default="1,10,50,100", show_default=True, help="Percentages of --auto.")
@click.option(
    "--max-failures", type=float, default=0.05, show_default=True, help="Share of reporting devices that may fail."
)
@click.option(
    "--min-reports",
    type=int,
    default=5,
    show_default=True,
    help="Reports to wait for, and to judge failures by at least.",
)
@click.option(
    "--coverage", type=float, default=0.8, show_default=True, help="Share of the devices in a phase to wait for."
)
@_db
@signing
@common
def rollout(
    shell: Shell, repo: str, group: str, percent: float | None, halt: bool, auto: bool, steps: str, max_failures: float,
    min_reports: int, coverage: float, db: Path | None, keys: tuple[Path, ...],
) -> Result:  # fmt: skip
    """Widen or withdraw the release that 'publish add --channel canary' began."""
    from ..publish.rollouts import Policy, step
    from ..publish.rollouts import rollout as verb

    if auto + halt + (percent is not None) != 1:
        raise CommandError("lrcompress publish rollout", "one of --percent, --halt and --auto", "none or several")
    if not auto:
        d = verb(repo, group=group, percent=percent, halt=halt, passphrase=passphrase(repo), keys=keys)
        return Result(d, text=_said(d))
    try:
        phases = tuple(float(s) for s in steps.split(","))
    except ValueError:
        raise CommandError("lrcompress publish rollout --steps", "percentages such as 1,10,100", steps) from None
    policy = Policy(phases, max_failures, min_reports, coverage)
    devices = _intake(repo, db).reports(group)
    d = step(repo, devices, policy, group=group, passphrase=passphrase(repo), keys=keys)
    return Result(
        d, text=f"{d['decision']}: {d['reason']}" + ("" if d["decision"] in ("wait", "none") else "\n" + _said(d))
    )


def _said(d: dict[str, Any]) -> str:
    if d["halted"]:
        return f"{d['group']}: seq {d['candidate']} withdrawn; seq {d['seq']} is {d['sha256'][:16]} again"
    if d["percent"] == 100:
        return f"{d['group']}: seq {d['seq']} is for everybody now"
    return f"{d['group']}: seq {d['seq']} is for {d['percent']:g} % of the devices"


@publish.command(epilog="Example: lrcompress publish enroll repo device/identity.json --channel canary")
@click.argument("repo", type=click.Path())
@click.argument("identities", nargs=-1, metavar="IDENTITY.json…", type=click.Path())
@click.option("--group", help="Instead of the group that the device names.")
@click.option("--channel", help="Instead of its channel: stable or canary. What a device takes is its own setting.")
@click.option("--remove", multiple=True, metavar="ID", help="Take no more records of this device; repeatable.")
@_db
@common
def enroll(
    shell: Shell, repo: str, identities: tuple[str, ...], group: str | None, channel: str | None, remove: tuple[str, ...], db: Path | None
) -> Result:  # fmt: skip
    """Know devices by the identity.json that 'device init' wrote: their reports are taken from now on."""
    if not identities and not remove:
        raise CommandError("lrcompress publish enroll", "IDENTITY.json or --remove ID", "neither")
    intake = _intake(repo, db)
    found = [intake.enroll(i, group=group, channel=channel) for i in identities]
    gone = [intake.expel(r) for r in remove]
    lines = [f"{d['device']}: group {d['group']}, {d['channel']}" for d in found] + [
        f"{d['device']}: removed" for d in gone
    ]
    return Result({"enrolled": found, "removed": gone, "db": str(intake.path)}, text="\n".join(lines))


@publish.command(epilog="Example: lrcompress publish collect repo --port 8750   (a reverse proxy in front speaks TLS)")
@click.argument("repo", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8750, show_default=True)
@_db
@common
def collect(shell: Shell, repo: str, host: str, port: int, db: Path | None) -> Result:
    """Receive the signed status records of enrolled devices, until interrupted."""
    from ..publish.collect import Collector

    intake = _intake(repo, db)
    try:
        server = Collector(intake, host, port, shell.note)
    except OSError as e:
        raise HostError(
            f"{host}:{port}", "an address to listen on", e.strerror or str(e), "choose another --port"
        ) from e
    shell.note(f"listening on http://{host}:{server.server_port}, records go to {intake.path}")
    with server:
        server.serve_forever()
    return Result({"db": str(intake.path)})


@publish.command("fleet", epilog="Example: lrcompress publish fleet repo --html fleet.html")
@click.argument("repo", type=click.Path())
@click.option("--html", type=click.Path(path_type=Path), help="Write a page, too.")
@_db
@common
def show(shell: Shell, repo: str, html: Path | None, db: Path | None) -> Result:
    """Show versions, failures, bytes and phases of the enrolled devices."""
    from ..publish.fleetview import fleet as verb

    d = verb(repo, _intake(repo, db), html=html)
    rows = [
        [g["group"], "as delivered" if s["sha256"] is None else f"seq {s['seq']}", (s["sha256"] or "")[:12], s["base_id"][:12], f"{s['devices']}/{g['devices']}"]
        for g in d["groups"]
        for s in g["serving"]
    ]  # fmt: skip
    lines = [table(["group", "serving", "payload", "base", "devices"], rows, left=4)] if rows else ["no report yet"]
    for g in d["groups"]:
        lines.append(
            f"{g['group']}: {g['devices']} devices, {len(g['failing'])} failing, {g['silent']} silent, {human_bytes(g['bytes'])} in {g['requests']} requests"
        )
        if (r := g["rollout"]) is not None:
            lines.append(
                f"{g['group']}: rollout of seq {r['seq']} at {r['percent']:g} %: {r['well']} well, {r['failed']} failed of {r['eligible']}"
            )
        lines += [f"  {f['device'][:12]} {f['at']} {f['reason'] or f['state']}" for f in g["failing"][:10]]
    return Result(d, text="\n".join(lines))
