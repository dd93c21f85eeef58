"""`lrcompress device`: everything a device does. Needs the base install only."""

from __future__ import annotations

import io
import signal
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..edge import Device
from ..edge.folder import IDENTITY
from ..errors import CommandError, DataError, DeviceStateError, DownloadError, ParityError
from ..files import write_atomic
from .options import Bits
from .output import Result, Shell, common, human_bytes, table

#: Every command takes the folder of the device last.
place = click.argument("folder", metavar="[DIR]", required=False, type=click.Path())


@click.group(epilog="Example: lrcompress device update /var/lib/model")
def device() -> None:
    """Run a model on a device, and keep it up to date.

    DIR is $LRCOMPRESS_STATE, or /var/lib/lrcompress, where it is left out. What an operator may set stands in
    DIR/device.json: {"schema": 1, "proxy": ..., "health_command": [...]}. The way to updates: url, proxy, ca_file,
    cert_file, key_file, bearer_token, bearer_token_file, max_bytes_per_s. Room: max_disk_bytes, min_free_bytes,
    max_update_bytes. One payload: max_payload_bytes, latency_factor, max_distance, trial_timeout_s. In use: threads, health_command,
    probation_s, health_interval_s, health_timeout_s, poll_s, emit.
    """


@device.command(
    epilog="Example: lrcompress device init dev --exported exported --root repo/metadata/1.root.json --url repo"
)
@place
@click.option("--exported", required=True, type=click.Path(), help="The model, as 'lrcompress export' wrote it.")
@click.option("--root", required=True, type=click.Path(), help="The publisher's root.json: whom this device trusts.")
@click.option("--url", required=True, metavar="URL|FOLDER", help="Where updates are: http(s)://, file:// or a folder.")
@click.option("--group", default="default", show_default=True, help="The group of devices that this one belongs to.")
@click.option("--channel", default="stable", show_default=True, help="canary: take releases before the others do.")
@click.option(
    "--report-url", metavar="URL", help="Where 'lrcompress publish collect' listens: each update is reported there."
)
@common
def init(
    shell: Shell,
    folder: str | None,
    exported: str,
    root: str,
    url: str,
    group: str,
    channel: str,
    report_url: str | None,
) -> Result:
    """Make DIR a device: copy the model and the root into it, remember where updates come from, make its key and id."""
    made = Device.init(folder, exported, root, url, group, channel=channel, report_url=report_url)
    from ..edge.identity import Identity

    identity = Identity(made.folder)
    d = {
        "output": str(made.folder), "device": identity.id, "identity": str(identity.folder / IDENTITY), **made.status(),
    }  # fmt: skip
    return Result(
        d,
        text=f"{made.folder}: {d['model']} as delivered (base {d['base_id'][:16]}), updates of group {group} from {d['url']}",
    )


@device.command(epilog="Example (from cron): lrcompress device update dev --quiet")
@place
@click.option(
    "--emit", type=click.Choice(["onnx-adapter"]), help="Also write DIR/emit/current.json and an .onnx_adapter."
)
@common
def update(shell: Shell, folder: str | None, emit: str | None) -> Result:
    """Bring the newest release of DIR's group, try it, and serve it.

    A payload that fails a check is refused for good, and the device goes on with what it serves: exit 6 says so.
    """
    opened = Device(folder)
    d = opened.update(emit=emit)
    _tell_publisher(opened, d)
    error = d.pop("error")
    moved = (
        f"{human_bytes(d['bytes_downloaded'])} in {d['requests']} requests, {human_bytes(d['bytes_written'])} written, "
        f"{d['fsyncs']} fsyncs, {d['ms']:.0f} ms"
    )
    text = f"{d['state']}: serving {describe_serving(d['serving'])} ({moved})" + (
        f"; {d['reason']}" if d["reason"] else ""
    )
    if error is None:
        return Result(d, text=text)
    shell.note(f"error: {d['reason']}")
    return Result(
        {**d, "error": error},
        text=f"{d['state']}: serving {describe_serving(d['serving'])}",
        exit_code=int(error["code"]),
    )


def _tell_publisher(opened: Device, d: dict[str, Any]) -> None:
    """Report an update where the device was told to; the update is what it is, whether or not that works."""
    from ..edge.identity import Identity

    try:
        identity = Identity.find(opened.folder)
    except DeviceStateError as e:
        d["reported"] = False
        click.echo(f"warning: {e}", err=True)
        return
    if identity is not None and identity.report_url is not None:
        d["reported"] = identity.report(opened.status(), d)


@device.command(epilog="Example: lrcompress device agent /var/lib/lrcompress")
@place
@click.option("--unit", is_flag=True, help="Print a systemd unit that runs the agent, and end.")
@common
def agent(shell: Shell, folder: str | None, unit: bool) -> Result:
    """Update DIR again and again, about every poll_s seconds, until stopped; a line on stderr for every poll that moved.

    Ending it at any moment is safe. An application beside it follows with lrcompress.edge.EdgeSession.
    """
    from ..edge import agent as agents

    if unit:
        return Result({"unit": agents.unit()}, text=agents.unit().rstrip())
    polls = {"polls": 0, "updates": 0, "failures": 0}

    def told(said: dict[str, Any]) -> None:
        polls["polls"] += 1
        polls["updates"] += said["state"] in ("updated", "rolled_back")
        polls["failures"] += said["error"] is not None
        if said["state"] != "up_to_date":
            shell.note(f"{said['state']}: {said['reason'] or describe_serving(said['serving'])}")

    running = agents.Agent(Device(folder), told=told)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop.set())
    running.run()
    return Result(polls, text=f"stopped after {polls['polls']} polls")


@device.command(epilog="Example: lrcompress device report dev --failed 'answers are blurred'")
@place
@click.option("--failed", metavar="REASON", help="What is served does not do in the field what it should.")
@common
def report(shell: Shell, folder: str | None, failed: str | None) -> Result:
    """Tell the publisher what DIR serves, and whether that works: a rollout that fails often enough is halted."""
    from ..edge.identity import Identity

    opened = Device(folder)
    identity = Identity(opened.folder)
    sent = identity.report(opened.status(), healthy=failed is None, reason=failed or "")
    if not sent:
        raise DownloadError(identity.report_url or opened.folder, "a publisher that takes the report", "none did")
    return Result({"device": identity.id, "reported": True}, text=f"{identity.id}: reported")


@device.command(epilog="Example: lrcompress device infer dev --input x.npz --output y.npz")
@place
@click.option(
    "--input",
    "source",
    required=True,
    metavar="F.npz",
    type=click.Path(),
    help="Arrays by input name; the first axis is the sample.",
)
@click.option("--output", "dest", required=True, metavar="F.npz", type=click.Path(), help="Where the outputs go.")
@common
def infer(shell: Shell, folder: str | None, source: str, dest: str) -> Result:
    """Answer the inputs in a file with what DIR serves."""
    opened = Device(folder)
    outputs = opened.infer(_read(Path(source), [i["name"] for i in opened.manifest.inputs]))
    buffer = io.BytesIO()
    np.savez(buffer, **outputs)  # type: ignore[arg-type]
    write_atomic(Path(dest), buffer.getvalue())
    shapes = {k: list(v.shape) for k, v in outputs.items()}
    serving = opened.status()["serving"]
    text = f"{dest}: " + ", ".join(f"{k} {v}" for k, v in shapes.items()) + f", from {describe_serving(serving)}"
    return Result({"output": dest, "outputs": shapes, "serving": serving}, text=text)


@device.command(epilog="Example: lrcompress device status dev --json")
@place
@common
def status(shell: Shell, folder: str | None) -> Result:
    """Show what DIR serves, what waits, what was refused and why."""
    d = Device(folder).status()
    rows = [
        ["model", f"{d['model']} (base {d['base_id'][:16]})"],
        *([["factory", f"base {d['factory_base_id'][:16]}"]] if d["factory_base_id"] != d["base_id"] else []),
        ["serving", describe_serving(d["serving"])],
        ["previous", describe_serving(d["previous"]) if d["previous"] else "none"],
        ["pending", _pending(d["pending"])],
        *([["probation", f"until {d['probation']['until']}"]] if d["probation"] else []),
        *(["refused", f"seq {r['seq']}, {r['sha256'][:12]}: {r['reason']}"] for r in d["refused"]),
        ["newest seq", str(d["seq"])],
        ["group", f"{d['group']} from {d['url']}"],
        ["trusted time", d["last_trusted_time"] or "none yet"],
        ["free", human_bytes(d["free_bytes"])],
    ]
    if not d["state_readable"]:
        rows.append(["state", "both copies are damaged: the factory's model is served, the next update repairs it"])
    width = max(len(r[0]) for r in rows)
    return Result(d, text="\n".join(f"{name:{width}}  {value}" for name, value in rows))


@device.command(epilog="Example: lrcompress device rollback dev")
@place
@common
def rollback(shell: Shell, folder: str | None) -> Result:
    """Serve what DIR served before, until the next release; at once and without network."""
    d = Device(folder).rollback()
    return Result(d, text=f"rolled back from seq {d['from_seq']}: serving {describe_serving(d['serving'])}")


@device.command(epilog="Example: lrcompress device validate dev")
@place
@common
def validate(shell: Shell, folder: str | None) -> Result:
    """Check DIR's model, and the payload it serves, against their golden outputs. Exit 5 for a miss."""
    opened = Device(folder)
    d = opened.validate()
    rows = [
        [what, o["name"], f"{o['max_abs_diff']:.2e}", f"{o['tolerance']:.2e}"]
        for what in ("base", "payload")
        for o in (d[what] or {}).get("outputs", ())
    ]
    text = (
        table(["what", "output", "max |diff|", "allowed"], rows, left=2) + f"\n{'passed' if d['passed'] else 'missed'}"
    )
    if d["passed"]:
        return Result(d, text=text)
    reason = (d["payload"] or {}).get("reason") or "the base's golden outputs"
    error = ParityError(
        opened.folder,
        "answers within tolerance",
        reason,
        "lrcompress device rollback, and look at the device's storage",
    )
    return Result({**d, "error": error.as_dict()}, text=text, exit_code=error.exit_code)


def describe_serving(serving: dict[str, Any]) -> str:
    return "the factory's model" if serving["kind"] == "factory" else f"seq {serving['seq']} ({serving['sha256'][:12]})"


def _pending(pending: dict[str, Any] | None) -> str:
    if pending is None:
        return "none"
    wait = f", next trial {pending['retry_at']}" if pending["retry_at"] else ""
    return f"seq {pending['seq']} ({pending['sha256'][:12]}), {pending['trials']} trials without a verdict{wait}"


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz; a single array fits a single input whatever its name."""
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {k: found[k] for k in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        got = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise DataError(path, "an .npz of arrays", got, "write it with numpy.savez") from e
    if len(names) == 1 and len(arrays) == 1:
        return {names[0]: next(iter(arrays.values()))}
    return {k: v for k, v in arrays.items() if k in names} or arrays


@device.command(epilog="Example: lrcompress device profile -o table.json --threads 1,2")
@click.option("-o", "--output", default="latency.json", show_default=True, type=click.Path(), help="File to write.")
@click.option(
    "--threads", type=Bits(), default="1,2", show_default=True, metavar="LIST", help="Threads of the runtime."
)
@click.option("--quick", is_flag=True, help="Fewer sizes and rounds: less than a minute on a fast machine.")
@common
def profile(shell: Shell, output: str, threads: tuple[int, ...], quick: bool) -> Result:
    """Measure how long operators take here, for 'plan --latency' and 'validate --latency'.

    Leave the machine alone meanwhile: minutes on a fast one, half an hour on a small board.
    """
    from ..latency import check_table_output, machine, profile_device, write_table

    wrong = [t for t in threads if not 1 <= t <= 256]
    if wrong:
        raise CommandError("lrcompress device profile --threads", "numbers of threads, at least 1", wrong[0])
    cores = machine()["cores"]
    if max(threads) > cores:
        raise CommandError(
            "lrcompress device profile --threads", f"at most the {cores} cores of this machine", max(threads)
        )
    check_table_output(Path(output))
    found = profile_device(threads=tuple(dict.fromkeys(threads)), quick=quick, progress=shell.progress)
    write_table(Path(output), found)
    spread = {str(k): v for k, v in found.retest_spread.items()}
    d = {
        "output": output, "machine": dict(found.machine), "ort": found.ort, "threads": found.threads, "rows": len(found.rows),
        "retest_spread": spread, "rank_multiple": {str(k): v for k, v in found.rank_multiple.items()}, "quick": quick,
    }  # fmt: skip
    told = ", ".join(f"{v:.1%} at {k}" for k, v in spread.items())
    text = f"{output}: {len(found.rows)} times of {found.machine['cpu']}, ONNX Runtime {found.ort}; repeated ones differ by {told}"
    if max(found.retest_spread.values()) > 0.1:
        shell.note(
            "the machine was not quiet: repeated times differ by more than 10 %; profile it again when it is idle"
        )
    return Result(d, text=text)
