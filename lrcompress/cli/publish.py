"""`lrcompress publish …`: what the owner of the keys does."""

from __future__ import annotations

from typing import Any

import click

from ..errors import CommandError
from .output import Result, Shell, common, human_bytes, table


@click.group(epilog="Example: lrcompress publish init repo --exported exported --keys keys")
def publish() -> None:
    """Sign corrections and publish them as static files that any web server, bucket or CDN can serve.

    Keys are encrypted with a passphrase: from LRCOMPRESS_KEY_PASSPHRASE, or asked for.
    """


def passphrase(*, new: bool = False) -> str:
    """Return the passphrase of the environment, or ask for it."""
    import sys

    from ..publish.keys import PASSPHRASE, passphrase_from_environment

    found = passphrase_from_environment()
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise CommandError(
            "signing keys", f"a passphrase in {PASSPHRASE}", "none, and nobody to ask", f"export {PASSPHRASE}=…"
        )
    return str(click.prompt("Passphrase of the keys", hide_input=True, confirmation_prompt=new, err=True))


@publish.command(epilog="Example: lrcompress publish init repo --exported exported --keys keys")
@click.argument("repo", type=click.Path())
@click.option("--exported", required=True, type=click.Path(), help="The exported model that devices run.")
@click.option("--keys", type=click.Path(), help="Folder for the signing keys, outside REPO  [default: REPO.keys]")
@common
def init(shell: Shell, repo: str, exported: str, keys: str | None) -> Result:
    """Make the repository REPO and its keys. Devices need REPO/metadata/1.root.json, once, from a safe place."""
    from ..publish import init_repository

    d = init_repository(repo, exported, keys, passphrase=passphrase(new=True))
    lines = [
        f"repository {d['repository']} for model {d['model']}",
        f"keys in {d['keys']}: keep a copy, offline",
        f"give devices {d['root']}",
    ]
    return Result(d, text="\n".join(lines))


@publish.command(epilog="Example: lrcompress publish add repo adapters/first --group default")
@click.argument("repo", type=click.Path())
@click.argument("source", type=click.Path())
@click.option("--group", default="default", show_default=True, help="Devices that get it.")
@click.option("--encoding", default="auto", show_default=True, help="auto, f32, f16 or int8.")
@common
def add(shell: Shell, repo: str, source: str, group: str, encoding: str) -> Result:
    """Publish SOURCE, an adapter folder or a payload file, to a group of devices."""
    from ..publish import add as verb

    d = verb(repo, source, group=group, encoding=encoding, passphrase=passphrase())
    others = ", ".join(f"{k} {human_bytes(v)}" for k, v in d["sizes"].items() if k != d["encoding"])
    text = f"{group} seq {d['seq']}: {human_bytes(d['payload_bytes'])} as {d['encoding']}" + (
        f" ({others})" if others else ""
    )
    return Result(d, text=f"{text}, {human_bytes(d['metadata_bytes'])} of metadata\n{d['sha256']}")


@publish.command(epilog="Example: lrcompress publish rollback repo --to 1 --group default")
@click.argument("repo", type=click.Path())
@click.option("--to", "to_seq", type=int, required=True, help="The release whose bytes to go back to.")
@click.option("--group", default="default", show_default=True)
@common
def rollback(shell: Shell, repo: str, to_seq: int, group: str) -> Result:
    """Sign a new release that points at the bytes of an old one."""
    from ..publish import rollback as verb

    d = verb(repo, to_seq, group=group, passphrase=passphrase())
    return Result(d, text=f"{group} seq {d['seq']} undoes {d['rollback_of']}: {d['sha256'][:16]} again")


@publish.command(epilog="Example: lrcompress publish status repo")
@click.argument("repo", type=click.Path())
@common
def status(shell: Shell, repo: str) -> Result:
    """Show releases by group, and when signatures expire."""
    from ..publish import status as verb

    d = verb(repo)
    return Result(d, text=describe(d))


def describe(d: dict[str, Any]) -> str:
    rows = [
        [g["group"], str(r["seq"]), r["sha256"][:12], r["kind"], r["encoding"], human_bytes(r["bytes"]), r["issued"], "" if r["rollback_of"] is None else f"undoes {r['rollback_of']}"]
        for g in d["groups"]
        for r in g["releases"]
    ]  # fmt: skip
    lines = (
        [table(["group", "seq", "payload", "kind", "encoding", "bytes", "issued", ""], rows)]
        if rows
        else ["no release yet"]
    )
    return "\n".join([*lines, *(f"{role} expires {when}" for role, when in d["expires"].items())])


@publish.command(epilog="Example (from cron): lrcompress publish refresh repo --quiet")
@click.argument("repo", type=click.Path())
@common
def refresh(shell: Shell, repo: str) -> Result:
    """Sign snapshot and timestamp again before they expire (every few days)."""
    from ..publish import refresh as verb

    d = verb(repo, passphrase=passphrase())
    return Result(d, text=f"timestamp expires {d['expires']['timestamp']}")


@publish.command(epilog="Example: lrcompress publish verify repo")
@click.argument("repo", type=click.Path())
@common
def verify(shell: Shell, repo: str) -> Result:
    """Check REPO as a client would, down to every payload; say what expires first."""
    from ..publish import verify as verb

    d = verb(repo)
    first = d["expires_first"]
    lines = [f"{g['group']} seq {g['seq']}: {human_bytes(g['bytes'])}, verified" for g in d["groups"]] or [
        "no release yet; metadata verified"
    ]
    return Result(d, text="\n".join([*lines, f"first to expire: {first['role']}, in {first['days']} days"]))
