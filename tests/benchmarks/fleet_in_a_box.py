"""A fleet in one box: many devices with folders of their own, one static server, one receiver, one publisher's cron job.

Releases go out in phases. One is refused by the devices themselves (it does not answer as it was signed to), one passes
every check and is bad in the field (most answers change): both are stopped by what devices report, and at the end every
device must serve a good payload. Bytes and requests are those that the server sent and got; the projection to a million
devices is computed from them.

    python -m tests.benchmarks.fleet_in_a_box --devices 200 [--json] [--html fleet.html]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress import publish
from lrcompress.edge import Device
from lrcompress.edge.identity import Identity
from lrcompress.manifest import Manifest
from lrcompress.payload import build, parse
from lrcompress.phases import CANDIDATE
from lrcompress.publish.collect import Collector
from lrcompress.publish.fleetview import fleet as view
from lrcompress.publish.intake import Intake
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.releases import _record, next_seq
from lrcompress.publish.repository import Change, Repository
from lrcompress.publish.rollouts import Policy, step
from tests.support.fleet import PASSPHRASE, X, made, payload_bytes

#: A device is well when it agrees with the model as delivered on so many of its own inputs.
AGREEMENT = 0.8
POLL_HOURS, UPDATES_A_WEEK = 6, 1
FLEET = 1_000_000


@dataclass
class Traffic:
    """What the server of static files saw."""

    requests: int = 0
    bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def snapshot(self) -> tuple[int, int]:
        return self.requests, self.bytes


def handler(traffic: Traffic) -> type[http.server.SimpleHTTPRequestHandler]:
    class Counting(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            with traffic.lock:
                traffic.requests += 1
            super().do_GET()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            data = source.read()
            with traffic.lock:
                traffic.bytes += len(data)
            outputfile.write(data)

    return Counting


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


class Box:
    """The whole fleet."""

    def __init__(self, folder: Path, devices: int, canaries: int, workers: int, html: Path | None = None) -> None:
        self.html, self.folder, self.repo, self.traffic = html, folder, folder / "repo", Traffic()
        publish.init_repository(self.repo, made() / "exported", folder / "keys", passphrase=PASSPHRASE)
        self.intake = Intake(folder / "fleet.db")
        self.collector = Collector(self.intake, "127.0.0.1", 0)
        serve = functools.partial(handler(self.traffic), directory=str(self.repo))
        self.server = Server(("127.0.0.1", 0), serve)
        for each in (self.collector, self.server):
            threading.Thread(target=each.serve_forever, daemon=True).start()
        self.pool = ThreadPoolExecutor(workers)
        root, url = self.repo / "metadata" / "1.root.json", f"http://127.0.0.1:{self.server.server_port}"
        report = f"http://127.0.0.1:{self.collector.server_port}/status"

        def one(i: int) -> Device:
            at = folder / "devices" / f"{i:04d}"
            at.parent.mkdir(exist_ok=True)
            channel = "canary" if i < canaries else "stable"
            device = Device.init(at, made() / "exported", root, url, channel=channel, report_url=report)
            self.intake.enroll(at)
            return device

        self.devices = list(self.pool.map(one, range(devices)))
        self.expected = self.devices[0].infer({"x": X})["output"].argmax(1)
        self.served: dict[str, set[str]] = {}
        self.ticks = 0

    def close(self) -> None:
        for each in (self.collector, self.server):
            each.shutdown()
            each.server_close()
        self.pool.shutdown()

    def agreement(self, device: Device) -> float:
        return float(np.mean(device.infer({"x": X})["output"].argmax(1) == self.expected))

    def tick(self) -> list[dict[str, Any]]:
        """Let every device look for an update, check itself, and report."""

        def one(device: Device) -> dict[str, Any]:
            outcome = device.update()
            share = self.agreement(device)
            identity = Identity(device.folder)
            well = share >= AGREEMENT
            sent = identity.report(
                device.status(), outcome, healthy=well, reason="" if well else f"agrees on {share:.0%} only"
            )
            if not sent:
                raise SystemExit(f"{device.folder}: a report was not taken")
            return {**outcome, "device": identity.id}

        self.ticks += 1
        found = list(self.pool.map(one, self.devices))
        for d in found:
            self.served.setdefault(str(d["serving"]["sha256"]), set()).add(d["device"])
        return found

    def cron(self, policy: Policy) -> dict[str, Any]:
        return step(self.repo, self.intake.reports("default"), policy, passphrase=PASSPHRASE)

    def release(self, name: str, data: bytes, policy: Policy, *, unchecked: bool = False) -> dict[str, Any]:
        """Publish to canaries and let cron do the rest; return what happened."""
        if unchecked:
            sha256 = self._sign(data)
        else:
            source = self.folder / "next.safetensors"
            source.write_bytes(data)
            sha256 = publish.add(self.repo, source, channel="canary", passphrase=PASSPHRASE)["sha256"]
        before, path = self.traffic.snapshot(), ["canary"]
        for _ in range(4 * len(policy.steps)):
            self.tick()
            decided = self.cron(policy)
            path.append(f"{decided['percent']:g} %" if decided["decision"] == "advance" else str(decided["decision"]))
            if decided["decision"] == "halt" and self.html is not None:
                view(self.repo, self.intake, html=self.html)
            if decided["decision"] == "halt" or decided.get("percent") == 100:
                break
        self.tick()  # everybody follows: to the release, or back
        requests, size = (now - then for now, then in zip(self.traffic.snapshot(), before, strict=True))
        reached = len(self.served.get(sha256, ()))
        return {"name": name, "sha256": sha256, "path": path, "ever_served_by": reached, "reason": decided["reason"], "requests": requests, "bytes": size}  # fmt: skip

    def _sign(self, data: bytes) -> str:
        """Sign a candidate as a publisher that checks nothing would."""
        repository, payload = Repository(self.repo), parse(data)
        store = KeyStore(repository.keys_folder, PASSPHRASE)
        manifest = Manifest.load(made() / "exported")
        seq = next_seq(repository, "default")
        custom = {**_record(manifest, payload.sha256, seq, payload.kind, payload.encoding), "places": 0}
        change = Change()
        change.add(CANDIDATE, data, custom)
        with repository.locked():
            repository.apply(store, "default", change)
        return payload.sha256


def payloads() -> dict[str, bytes]:
    """Return the corrections: small ones that are good, one that lies about its answers, one that ruins most of them."""
    rng = np.random.default_rng(0)

    def scaled(by: float):
        return lambda name, value: (value * by + rng.standard_normal(value.shape) * 0.002 * by).astype(np.float32)

    small = {f"good {i}": payload_bytes("first", encoding="int8", change=scaled(0.02)) for i in (1, 2, 3)}
    lie = parse(payload_bytes("second", encoding="int8", change=scaled(0.02)))
    golden = {k: (v + 1).astype(v.dtype) for k, v in lie.golden.items()}
    manifest = Manifest.load(made() / "exported")
    liar = build(lie.tensors, manifest=manifest, kind=lie.kind, encoding="int8", golden=golden)
    return {
        **small,
        "not what it was signed to be": liar,
        "bad in the field": payload_bytes("second", change=scaled(4.0)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lrcompress-fleet-") as folder:
        found = run(Path(folder), options.devices, options.workers, options.html)
    print(json.dumps(found) if options.json else text(found))
    return 0 if found["all_good"] and found["halted"] == 2 else 1


def run(folder: Path, devices: int, workers: int, html: Path | None = None) -> dict[str, Any]:
    started, data = time.perf_counter(), payloads()
    policy = Policy(steps=(5, 25, 100), max_failures=0.02, min_reports=5, coverage=0.9)
    box = Box(folder, devices, max(2, devices // 40), workers, html)
    try:
        box.traffic.requests = box.traffic.bytes = 0
        rollouts = [
            box.release("good 1", data["good 1"], policy),
            box.release("not what it was signed to be", data["not what it was signed to be"], policy, unchecked=True),
            box.release("good 2", data["good 2"], policy),
            box.release("bad in the field", data["bad in the field"], policy),
        ]
        rollouts.append(box.release("good 3", data["good 3"], policy))
        idle = _cost(box)
        good = {r["sha256"] for r in rollouts if r["name"].startswith("good")}
        serving = [d.status()["serving"]["sha256"] for d in box.devices]
        update = next(r for r in rollouts if r["name"] == "good 3")
        polls = len(update["path"])  # every phase is a look of every device
        per_update = [(update[k] - polls * devices * idle[k]) / devices for k in ("requests", "bytes")]
        publish.verify(box.repo)
        return {
            "devices": devices, "ticks": box.ticks, "rollouts": rollouts, "halted": sum(r["path"][-1] == "halt" for r in rollouts),
            "all_good": all(s in good for s in serving) and all(box.agreement(d) >= AGREEMENT for d in box.devices),
            "serving_newest": sum(s == update["sha256"] for s in serving),
            "requests": box.traffic.requests, "bytes": box.traffic.bytes,
            "reports": sum(d["reports"] for d in box.intake.devices()), "refused_reports": box.intake.refusals(),
            "per_device": {"idle_requests": idle["requests"], "idle_bytes": idle["bytes"], "update_requests": per_update[0], "update_bytes": per_update[1]},
            "projection": project(idle, per_update), "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
    finally:
        box.close()


def _cost(box: Box) -> dict[str, float]:
    """Return requests and bytes of one look of one device that finds nothing new."""
    before = box.traffic.snapshot()
    box.tick()
    after = box.traffic.snapshot()
    return {k: (after[i] - before[i]) / len(box.devices) for i, k in enumerate(("requests", "bytes"))}


def project(idle: dict[str, float], update: Sequence[float]) -> dict[str, float]:
    """Return what a million devices ask for, polls spread evenly, with one update a week."""
    polls = FLEET * 24 / POLL_HOURS
    per_day = FLEET * UPDATES_A_WEEK / 7
    return {
        "devices": FLEET, "poll_hours": POLL_HOURS, "updates_a_week": UPDATES_A_WEEK,
        "requests_per_s": (polls * idle["requests"] + per_day * max(0.0, update[0])) / 86400,
        "gb_per_day": (polls * idle["bytes"] + per_day * max(0.0, update[1])) / 1e9,
        "gb_of_one_update": FLEET * max(0.0, update[1]) / 1e9,
    }  # fmt: skip


def text(d: dict[str, Any]) -> str:
    lines = [f"{d['devices']} devices, {d['ticks']} looks each, {d['seconds']} s"]
    for r in d["rollouts"]:
        lines.append(
            f"  {r['name']:<29} {' → '.join(r['path']):<36} ever served by {r['ever_served_by']:>4}   {r['reason']}"
        )
    p, each = d["projection"], d["per_device"]
    lines += [
        f"every device serves a good payload: {'yes' if d['all_good'] else 'NO'}; {d['serving_newest']} of {d['devices']} the newest; {d['halted']} rollouts halted by themselves",
        f"server: {d['requests']} requests, {d['bytes'] / 1e6:.2f} MB; receiver: {d['reports']} reports, refused {d['refused_reports'] or 'none'}",
        f"a look without news: {each['idle_requests']:.2f} requests, {each['idle_bytes']:.0f} B; an update on top: {each['update_requests']:.2f} requests, {each['update_bytes']:.0f} B",
        f"{p['devices']:,} devices, a look every {p['poll_hours']} h, {p['updates_a_week']} update a week: {p['requests_per_s']:.0f} requests/s, {p['gb_per_day']:.1f} GB/day "
        f"({p['gb_of_one_update']:.1f} GB per update), bodies only: all of it static files that a CDN holds",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
