"""`lrcompress publish …`: what the owner of the keys does. The fleet's part (`rollout`, `enroll`, …) stands in `fleet`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import CommandError
from .output import Result, Shell, common, human_bytes, table


@click.group(epilog="Example: lrcompress publish init repo --exported exported --keys keys")
def publish() -> None:
    """Sign corrections and publish them as static files that any web server, bucket or CDN can serve.

    Keys are encrypted with a passphrase: from LRCOMPRESS_KEY_PASSPHRASE, or asked for.
    """


def passphrase(repo: str | None = None) -> str:
    """Return the passphrase of the environment, or ask for it: twice for a new repository, for `repo` only if it is one."""
    import sys

    from ..publish.keys import PASSPHRASE, passphrase_from_environment
    from ..publish.repository import Repository

    if repo is not None:
        Repository(Path(repo))
    found = passphrase_from_environment()
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise CommandError(
            "signing keys", f"a passphrase in {PASSPHRASE}", "none, and nobody to ask", f"export {PASSPHRASE}=…"
        )
    return str(click.prompt("Passphrase of the keys", hide_input=True, confirmation_prompt=repo is None, err=True))


def signing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --keys: further folders with keys, beside the one of `publish init`."""
    return click.option(
        "--keys", multiple=True, type=click.Path(path_type=Path), help="A further folder with keys, such as a USB stick; repeatable."
    )(function)  # fmt: skip


def offering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --group and --channel: whom a release is for."""
    channel = click.option(
        "--channel", default="stable", show_default=True, help="canary: for canary devices only, until 'publish rollout' widens it.",
    )  # fmt: skip
    return click.option("--group", default="default", show_default=True, help="Devices that get it.")(channel(function))


def _pairs(option: str, values: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not rest:
            raise CommandError(f"lrcompress publish init {option}", "NAME=VALUE", value)
        found.append((name, rest))
    return found


def _setup(role: tuple[str, ...], expires: tuple[str, ...], signer: tuple[str, ...]) -> Any:
    from ..publish import Setup

    roles, days = {}, {}
    for name, value in _pairs("--role", role):
        need, slash, count = value.partition("/")
        if not need.isdecimal() or (slash and not count.isdecimal()):
            raise CommandError(
                "lrcompress publish init --role", "ROLE=THRESHOLD/KEYS, such as root=2/3", f"{name}={value}"
            )
        roles[name] = (int(need), int(count or need))
    for name, value in _pairs("--expires", expires):
        if not value.isdecimal():
            raise CommandError("lrcompress publish init --expires", "ROLE=DAYS, such as timestamp=7", f"{name}={value}")
        days[name] = int(value)
    return Setup(roles, _pairs("--signer", signer), days)


@publish.command(epilog="Example: lrcompress publish init repo --exported exported --keys keys --role root=2/3")
@click.argument("repo", type=click.Path())
@click.option("--exported", required=True, type=click.Path(), help="The exported model that devices run.")
@click.option("--keys", type=click.Path(), help="Folder for the signing keys, outside REPO  [default: REPO.keys]")
@click.option(
    "--role",
    multiple=True,
    metavar="ROLE=N/M",
    help="N of M keys must sign for root, targets, snapshot or timestamp  [default: 1/1]",
)
@click.option(
    "--expires",
    multiple=True,
    metavar="ROLE=DAYS",
    help="How long signatures hold  [default: root 365, targets, group, snapshot 180, timestamp 14]",
)
@click.option(
    "--signer",
    multiple=True,
    metavar="ROLE=URI[#PUB.pem]",
    help="A key that is no file: hsm: for a PKCS#11 token (PIN in LRCOMPRESS_KEY_PIN), or another URI of securesystemslib with its public key.",
)
@common
def init(
    shell: Shell, repo: str, exported: str, keys: str | None, role: tuple[str, ...], expires: tuple[str, ...], signer: tuple[str, ...]
) -> Result:  # fmt: skip
    """Make the repository REPO and its keys. Devices need REPO/metadata/1.root.json, once, from a safe place."""
    from ..publish import init_repository

    setup = _setup(role, expires, signer)
    setup.check()
    d = init_repository(repo, exported, keys, passphrase=passphrase(), setup=setup)
    lines = [
        f"repository {d['repository']} for model {d['model']}",
        f"keys in {d['keys']}: keep a copy offline; root and targets are needed rarely, and are best kept there only",
        *(f"{n}: {r['threshold']} of {len(r['keys'])} keys" for n, r in d["roles"].items() if len(r["keys"]) > 1),
        f"give devices {d['root']}",
    ]
    return Result(d, text="\n".join(lines))


@publish.command(epilog="Example: lrcompress publish add repo adapters/first --group default")
@click.argument("repo", type=click.Path())
@click.argument("source", type=click.Path())
@click.option("--encoding", default="auto", show_default=True, help="auto, f32, f16, int8, int4 or delta.")
@offering
@signing
@common
def add(
    shell: Shell, repo: str, source: str, group: str, encoding: str, channel: str, keys: tuple[Path, ...]
) -> Result:
    """Publish SOURCE, an adapter folder or a payload file, to a group of devices.

    auto keeps the smallest encoding that answers like f32, and a delta from the payload before it where that is shorter;
    a device that lacks that payload gets the whole one.
    """
    from ..publish import add as verb

    d = verb(repo, source, group=group, encoding=encoding, channel=channel, passphrase=passphrase(repo), keys=keys)
    others = ", ".join(f"{k} {human_bytes(v)}" for k, v in d["sizes"].items() if k != d["encoding"])
    text = f"{group} seq {d['seq']}: {human_bytes(d['payload_bytes'])} as {d['encoding']}" + (
        f" ({others})" if others else ""
    )
    if channel == "canary":
        text += "\nfor canary devices only; go on with 'lrcompress publish rollout'"
    return Result(d, text=f"{text}, {human_bytes(d['metadata_bytes'])} of metadata\n{d['sha256']}")


@publish.command(epilog="Example: lrcompress publish base repo adapters/second --exported exported2")
@click.argument("repo", type=click.Path())
@click.argument("source", required=False, type=click.Path())
@click.option("--exported", required=True, type=click.Path(), help="The new exported model.")
@click.option("--encoding", default="auto", show_default=True, help="Of the payload: auto, f32, f16, int8 or delta.")
@offering
@signing
@common
def base(
    shell: Shell,
    repo: str,
    source: str | None,
    exported: str,
    group: str,
    encoding: str,
    channel: str,
    keys: tuple[Path, ...],
) -> Result:
    """Publish a new base model to a group of devices, with SOURCE (an adapter folder or a payload file) as its payload.

    A device fetches the tensors that changed since the base it has, or all of it where it has none of the bases known
    here, and takes base and payload as one update; what 'add' publishes from then on is for this base. Devices keep
    the limits that they were made with.
    """
    from ..publish import base as verb

    d = verb(
        repo, exported, source, group=group, encoding=encoding, channel=channel, passphrase=passphrase(repo), keys=keys
    )
    b = d["base"]
    text = (
        f"{group} seq {d['seq']}: base {b['base_id'][:16]}, {human_bytes(b['bytes'])} of {human_bytes(b['whole_bytes'])} "
        f"({b['tensors_changed']} of {b['tensors']} tensors changed), and {human_bytes(d['payload_bytes'])} as {d['encoding']}"
    )
    if not b["from"]:
        text += "\nnothing that devices have is of use for it: all of them fetch the whole base"
    if channel == "canary":
        text += "\nfor canary devices only; go on with 'lrcompress publish rollout'"
    return Result(d, text=f"{text}, {human_bytes(d['metadata_bytes'])} of metadata\n{d['sha256']}")


@publish.command(epilog="Example: lrcompress publish rollback repo --to 1 --group default")
@click.argument("repo", type=click.Path())
@click.option(
    "--to", "to_seq", type=int, required=True, help="The release whose bytes to go back to; 0: the model as delivered."
)
@click.option("--group", default="default", show_default=True)
@signing
@common
def rollback(shell: Shell, repo: str, to_seq: int, group: str, keys: tuple[Path, ...]) -> Result:
    """Sign a new release that points at the bytes of an old one."""
    from ..publish import rollback as verb

    d = verb(repo, to_seq, group=group, passphrase=passphrase(repo), keys=keys)
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
        [g["group"], str(r["seq"]), r["sha256"][:12], r["kind"], r["encoding"], human_bytes(r["bytes"]), r["issued"], _remark(r)]
        for g in d["groups"]
        for r in g["releases"]
    ]  # fmt: skip
    lines = (
        [table(["group", "seq", "payload", "kind", "encoding", "bytes", "issued", ""], rows)]
        if rows
        else ["no release yet"]
    )
    return "\n".join([*lines, *(f"{role} expires {when}" for role, when in d["expires"].items())])


def _remark(release: dict[str, Any]) -> str:
    if release["rollback_of"] is not None:
        return f"undoes {release['rollback_of']}"
    return "" if release.get("percent") is None else f"rollout, {release['percent']:g} %"


@publish.command(epilog="Example (from cron): lrcompress publish refresh repo --quiet")
@click.argument("repo", type=click.Path())
@click.option("--recover", is_flag=True, help="REPO is an older copy: make versions that devices accept again.")
@signing
@common
def refresh(shell: Shell, repo: str, recover: bool, keys: tuple[Path, ...]) -> Result:
    """Sign the timestamp again before it expires (every few days), and what is past half of its time if its key is here."""
    from ..publish import refresh as verb

    d = verb(repo, passphrase=passphrase(repo), keys=keys, recover=recover)
    return Result(d, text=f"signed {', '.join(d['renewed'])}; timestamp expires {d['expires']['timestamp']}")


@publish.command("rotate-keys", epilog="Example: lrcompress publish rotate-keys repo --role timestamp")
@click.argument("repo", type=click.Path())
@click.option(
    "--role",
    "roles",
    multiple=True,
    help="root, targets, snapshot, timestamp or a group; repeatable  [default: all but root]",
)
@signing
@common
def rotate_keys(shell: Shell, repo: str, roles: tuple[str, ...], keys: tuple[Path, ...]) -> Result:
    """Replace keys by new ones. Devices follow by themselves, also those that were off for long. Needs the root key."""
    from ..publish import rotate_keys as verb

    d = verb(repo, roles, passphrase=passphrase(repo), keys=keys)
    return Result(d, text=_rekeyed(d))


@publish.command(epilog="Example: lrcompress publish revoke repo --key 4f1c0a27")
@click.argument("repo", type=click.Path())
@click.option("--key", required=True, help="The keyid, or its first 8 digits or more ('publish verify' lists them).")
@signing
@common
def revoke(shell: Shell, repo: str, key: str, keys: tuple[Path, ...]) -> Result:
    """Take a key that is lost or stolen out of every role; where too few are left, new ones take its place."""
    from ..publish import revoke as verb

    d = verb(repo, key, passphrase=passphrase(repo), keys=keys)
    return Result(d, text=_rekeyed(d))


def _rekeyed(d: dict[str, Any]) -> str:
    lines = [f"{n}: {len(r['removed'])} out, now {', '.join(k[:12] for k in r['keys'])}" for n, r in d["roles"].items()]
    return "\n".join([*lines, f"root version {d['root_version']}"])


@publish.command(epilog="Example: lrcompress publish verify repo --within 7")
@click.argument("repo", type=click.Path())
@click.option(
    "--within", type=int, default=0, metavar="DAYS", help="Fail (exit 6) if a signature ends within so many days."
)
@common
def verify(shell: Shell, repo: str, within: int) -> Result:
    """Check REPO as a client would, down to every payload; say what expires when."""
    from ..publish import verify as verb

    d = verb(repo, within_days=within)
    first = d["expires_first"]
    lines = [f"{g['group']} seq {g['seq']}: {human_bytes(g['bytes'])}, verified" for g in d["groups"]] or [
        "no release yet; metadata verified"
    ]
    rows = [[e["role"], str(e["days"]), e["at"], ", ".join(k[:12] for k in e["keys"])] for e in d["expires"]]
    lines += [
        table(["role", "days", "expires", "keys"], rows),
        f"first to expire: {first['role']}, in {first['days']} days",
    ]
    return Result(d, text="\n".join(lines))


@publish.command(epilog="Example: lrcompress publish prune repo --keep 3")
@click.argument("repo", type=click.Path())
@click.option(
    "--keep", type=int, default=3, show_default=True, help="Releases of each group that 'rollback' can still go to."
)
@common
def prune(shell: Shell, repo: str, keep: int) -> Result:
    """Delete files that no client can ask for any more. Needs no key."""
    from ..publish import prune as verb

    d = verb(repo, keep=keep)
    return Result(d, text=f"{d['deleted']} files deleted ({human_bytes(d['bytes'])}), {d['kept']} kept")


from . import fleet  # noqa: E402, F401  (adds its commands to the group)
