"""Take away one check of a device or a publisher at a time and see which test notices: `python -m tests.faults.checks [WORD]…`.

A fault that survives means that a test is missing; one whose text is gone means that this list is out of date. What is
slow to import is imported once; every fault then has a process of its own, forked before the device's code is loaded.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.checks_publish import PUBLISHER

ROOT = Path(__file__).parents[2]
RULES, UPDATES, FOLDER, CLOCK = (f"tests/attacks/test_{n}.py" for n in ("rules", "updates", "folder", "clock"))
DEVICE, STATE = "tests/contracts/test_device.py", "tests/contracts/test_device_state.py"
BASES = "tests/contracts/test_base_updates.py"
CUTS, ROT, DISKS, NETWORK, TRIAL = (
    f"tests/faults/test_{n}.py" for n in ("powercut", "rot", "disk_failures", "network", "trial")
)

#: (what is taken away, file in lrcompress/edge, text, what it becomes, test file, which of its tests)
CHECKS: list[tuple[str, str, str, str, str, str]] = [
    ("the hash at every read", "store.py", "return data if sha256_bytes(data) == sha256 else None", "return data", ROT, "every_file"),
    ("the hash after the download", "store.py", "if found != sha256:", "if False:", RULES, "bit and flipped"),
    ("deleting a download of another hash", "store.py", "            self._disk.unlink(part)\n            raise UpdateError(", "            raise UpdateError(", UPDATES, "tampered"),
    ("deleting a download that could not be synced", "store.py", "            self._disk.unlink(part)  # after", "            pass  # after", DISKS, "could_not_be_synced"),
    ("room on the disk", "store.py", "if free < need:", "if False:", RULES, "device and full"),
    ("max_disk_bytes", "store.py", "if most is not None and used + length > most:", "if False:", RULES, "no and more and room"),
    ("what is no file is no payload", "store.py", "return path.is_file() and not path.is_symlink()", "return True", FOLDER, "written_through or not_followed"),
    ("links in the store", "disk.py", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK", FOLDER, "not_followed"),
    ("a folder that is a link", "folder.py", "if stat.S_ISLNK(found.st_mode) or not kind(found.st_mode):", "if False:", FOLDER, "is_a_link"),
    ("another owner", "folder.py", "if found.st_uid not in (os.geteuid(), 0):", "if False:", FOLDER, "another_owner"),
    ("what everybody may write", "folder.py", "if found.st_mode & stat.S_IWOTH:", "if False:", FOLDER, "everybody"),
    ("one writer at a time", "folder.py", "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", FOLDER, "two_agents"),
    ("the checksum of a state", "state.py", "if value[\"sha256\"] != sha256_json(body):", "if False:", FOLDER, "forged"),
    ("writing over the older copy", "state.py", "COPIES[ages.index(min(ages))]", "COPIES[ages.index(max(ages))]", STATE, "one_destroyed"),
    ("reading the newer copy", "state.py", "return max(valid", "return min(valid", STATE, "one_destroyed"),
    ("the form of a state", "state.py", "_need(is_sha256(v))", "pass", "tests/attacks/test_parsers.py", "state and not slow"),
    ("how long metadata may be", "trust.py", "if len(found) > max_length:", "if False:", RULES, "endless"),
    ("asking for metadata again", "trust.py", "_TRIES = 3", "_TRIES = 1", NETWORK, "any_link"),
    ("a head that was cut", "web.py", "        if late.is_set():", "        if False:", NETWORK, "head_that_never_ends"),
    ("an empty answer is none", "trust.py", "        if not found:", "        if False:", RULES, "empty and timestamp"),
    ("the device's own clock for expiry", "trust.py", "        self._trusted_set.reference_time = now\n", "", CLOCK, "four_hundred or ahead_stops"),
    ("seq is a number", "trust.py", "type(seq) is int and seq > 0", "seq", RULES, "seq"),
    ("the record names the target's hash", "trust.py", "need(is_sha256(sha256) and custom.get(\"sha256\") == sha256,", "need(True,", RULES, "hash and release"),
    ("bases are hashes", "trust.py", "isinstance(ids, list) and ids and all(map(is_sha256, ids))", "True", RULES, "bases"),
    ("min_version is a version", "trust.py", "isinstance(custom.get(\"min_version\"), str)", "True", RULES, "version and number"),
    ("rollback_of is earlier", "trust.py", "type(undone) is int and 0 < undone < seq", "True", RULES, "rollback"),
    ("seq grows", "updater.py", "if offer.seq < state.seq or (", "if False or (", RULES, "old and one"),
    ("a seq has one payload", "updater.py", "offer.seq == state.seq and offer.sha256 != state.seq_sha256", "False", RULES, "same and seq"),
    ("seq is written", "updater.py", "seq=max(state.seq, entry.seq)", "seq=state.seq", RULES, "old and one"),
    ("refused payloads are remembered", "updater.py", "refusal = None if offer is None else state.refusal(offer.sha256, offer.tried_with)", "refusal = None", UPDATES, "refused_for_good"),
    ("a refusal is written", "updater.py", "state.refuse(pending.sha256, pending.seq, str(error), pending.base)", "state", RULES, "signed and NaN"),
    ("the release is for this base", "bases.py", "if self.factory.manifest.base_id in base_ids:", "if True:", UPDATES, "another_base_waits"),
    ("the release is for this program", "updater.py", "if version_key(offer.min_version) > version_key(__version__):", "if False:", RULES, "newer and program"),
    ("the length of the release", "updater.py", "if not 0 < offer.length <= most:", "if False:", RULES, "larger or bytes"),
    ("the trial", "updater.py", "            self.trial(base, before)(data)\n", "", RULES, "other and answers"),
    ("counting a trial before it", "updater.py", "trials=pending.trials + 1, retry_at=None", "trials=pending.trials, retry_at=None", TRIAL, "crashes_is_survived"),
    ("waiting after trials without a verdict", "updater.py", "elif pending.trials and pending.trials % TRIALS == 0:", "elif False:", DEVICE, "without_a_verdict"),
    ("the wait is kept", "updater.py", "if timedelta(0) < wait <= MAX_BACKOFF:", "if False:", DEVICE, "without_a_verdict"),
    ("the wait is capped", "updater.py", "min(MAX_BACKOFF, BACKOFF", "max(MAX_BACKOFF, BACKOFF", TRIAL, "grows_and_is_capped"),
    ("no verdict is no refusal", "updater.py", "except NoVerdict as e:\n            raise self._no_verdict", "except NoVerdict as e:\n            self._refuse(state, pending, e)\n            raise self._no_verdict", DEVICE, "without_a_verdict"),
    ("deleting nothing while the state is lost (clean)", "staging.py", "    if not state.readable:\n        return\n", "", DISKS, "both_copies"),
    ("a clock that is known to be wrong", "updater.py", "if self.clock() < floor:", "if False:", CLOCK, "set_back"),
    ("the trusted time is a floor", "updater.py", "        if state.trusted_time is not None:\n            floor", "        if False:\n            floor", CLOCK, "set_back"),
    ("a time ahead is not trusted", "updater.py", "if issued - CLOCK_SKEW > self.clock():", "if False:", CLOCK, "ahead_of_this"),
    ("the trusted time only grows", "updater.py", "        return replace(state, trusted_time=issued.isoformat())", "        return state", CLOCK, "only_grows"),
    ("the device is well before", "updater.py", "                self._check_before(state.active)\n", "                pass\n", TRIAL, "no_verdict and already"),
    ("the device is well with it", "updater.py", "                self._check_health(entry)\n", "                pass\n", RULES, "ill"),
    ("going back when it is ill", "updater.py", "back = replace(state, active=before.active, previous=None, probation=None)", "back = replace(state, probation=None)", TRIAL, "ill_payload"),
    ("a probation that nobody saw through", "mending.py", "    if state.probation is None or state.active is None:\n        return state\n", "    return state\n", TRIAL, "after_a_reboot"),
    ("a probation of another boot", "device.py", "tried.boot == boot_id() and ", "", TRIAL, "after_a_reboot"),
    ("a probation that is over", "device.py", " and self._clock() <= datetime.fromisoformat(tried.until)", "", TRIAL, "after_a_reboot"),
    ("a payload fits before it serves", "device.py", "                    payload.verify(base.manifest)\n", "                    pass\n", DEVICE, "does_not_fit"),
    ("the manifest is the one that was installed", "device.py", "        check_hash(self.folder, f\"{FACTORY}/{MANIFEST}\", raw, self._config)\n", "", FOLDER, "tolerances"),
    ("the root is the one that was installed", "device.py", "root = check_hash(self.folder, ROOT, read_root(self.folder / ROOT), self._config)", "root = read_root(self.folder / ROOT)", RULES, "another and root and folder"),
    ("wrong settings stop no serving", "device.py", "except DeviceStateError as e:  # a slip", "except ZeroDivisionError as e:  # a slip", FOLDER, "never_serving"),
    ("the checksum of the configuration", "install.py", "if not good or value.pop(\"sha256\", None) != sha256_json(value):", "if not good:", FOLDER, "never_served"),
    ("an init over a device", "install.py", "    if (folder / CONFIG).exists():\n", "    if False:\n", DEVICE, "init_over"),
    ("where an answer begins", "fetch.py", "if body.start not in (0, had):", "if False:", NETWORK, "another and place"),
    ("how long the answer's file is", "fetch.py", "if body.total is not None and body.total != length:", "if False:", NETWORK, "another_size"),
    ("skipping what is here already", "fetch.py", "skip = had - body.start", "skip = 0", NETWORK, "without_range"),
    ("reading no further than it may", "fetch.py", "block[skip : skip + length - file.size]", "block[skip:]", NETWORK, "endless"),
    ("a part that is too long", "fetch.py", "if file.size > length:", "if False:", STATE, "longer_than"),
    ("giving up", "fetch.py", "if idle > MAX_IDLE_TRIES:", "if False:", STATE, "giving_up"),
    ("what is gone is final", "fetch.py", "elif not e.passing:", "elif False:", STATE, "not_asked"),
    ("a stream that drips", "transport.py", "            if received - since < slowest:\n", "            if False:\n", NETWORK, "body_that_drips"),
    ("the bandwidth limit", "transport.py", "if early > 0:", "if False:", NETWORK, "bandwidth"),
    ("pipes in a repository", "transport.py", "if not file.is_file():", "if False:", RULES, "pipe or folder_in"),
    ("a head that drips", "web.py", "        watch.start()\n", "", NETWORK, "head_that_never_ends"),
    ("206 has a range", "web.py", "            if found is None:\n                answer.close()\n                raise Broken(f\"{path}: 206 without a Content-Range\")\n            begin, total = int(found[1]), _length(found[2])", "            begin, total = (start, None) if found is None else (int(found[1]), _length(found[2]))", NETWORK, "without and range"),
    ("no token in the clear", "web.py", "        _check_token(settings, url)\n", "", NETWORK, "token"),
    ("the payload's size in the trial", "trial.py", "if len(data) > limits.max_payload_bytes:", "if False:", TRIAL, "larger_than_allowed"),
    ("finite answers", "trial.py", "    if bad:\n", "    if False:\n", RULES, "answers and infinity"),
    ("golden outputs are there", "trial.py", "if set(payload.golden) != set(outputs):", "if False:", RULES, "golden"),
    ("golden outputs agree", "trial.py", "    if not report.passed:\n        worst = report.worst\n        raise PayloadError(\n            f\"payload: golden", "    if False:\n        worst = report.worst\n        raise PayloadError(\n            f\"payload: golden", RULES, "other and answers"),
    ("the distance from the base", "trial.py", "if limits.max_distance is not None:", "if False:", RULES, "further"),
    ("latency", "trial.py", "if ms > limits.latency_factor * base_ms:", "if False:", RULES, "slower"),
    ("a child that died says nothing", "trial.py", "    if code < 0:\n", "    if False:\n", TRIAL, "without_an_answer"),
    ("half an answer is none", "trial.py", "    except (ValueError, KeyError, TypeError):\n        raise NoVerdict", "    except (ValueError, KeyError, TypeError):\n        return\n        raise NoVerdict", TRIAL, "without_an_answer"),
    ("a child that never answers", "trial.py", "answer, _ = child.communicate(task.encode() + b\"\\n\" + data, self.timeout_s)", "answer, _ = child.communicate(task.encode() + b\"\\n\" + data)", TRIAL, "without_an_answer and sleep"),
    ("ending what the operator's program started", "health.py", "os.killpg(child.pid, signal.SIGKILL)", "child.kill()", TRIAL, "all_that_it_started"),
    ("a token that everybody can read", "settings.py", "if found.bearer_token and path.lstat().st_mode & (stat.S_IRGRP | stat.S_IROTH):", "if False:", RULES, "token"),
    ("a base's manifest is the one that was signed", "bases.py", "        if sha256_bytes(data) != brought.manifest:", "        if False:", RULES, "base and nobody and manifest"),
    ("a base's files are those of its manifest", "bases.py", "                if found != entry[\"sha256\"]:", "                if False:", RULES, "base and changed and tensor"),
    ("no file of a base is missing, or too many", "bases.py", "            if names != {MANIFEST, *manifest.files}:", "            if False:", RULES, "base and file and missing"),
    ("a base has the id that was signed", "bases.py", "        if manifest.base_id != brought.base_id:", "        if False:", RULES, "base and another and id"),
    ("applications can use a base", "bases.py", "            if new != ours.ports[side]:", "            if False:", RULES, "base and other and inputs"),
    ("the hash of a base at every use", "bases.py", "return all(self._disk.digest(path / n) == e[\"sha256\"] for n, e in manifest.files.items())", "return True", BASES, "rots"),
    ("a base's golden outputs", "trial.py", "    report = compare(golden.compressed, outputs, manifest.tolerance)\n    if not report.passed:", "    report = compare(golden.compressed, outputs, manifest.tolerance)\n    if False:", RULES, "base and other and answers"),
    ("a base's latency", "trial.py", "    if ms > limits.latency_factor * before_ms:", "    if False:", RULES, "base and slower"),
    ("a new base is tried before its payload", "updater.py", "before = None if base.name in (None, serving) else self.bases.find(serving) or self.bases.factory", "before = None", BASES, "in_the_child"),
    ("room for a base", "staging.py", "                self._need_room(way.sha256, way.length, beside=brought.length + 2 * offer.length)\n", "", BASES, "without_room"),
    ("max_update_bytes", "staging.py", "if most is not None and length > most:", "if False:", RULES, "base and fetch and allows"),
    ("a bad pack is remembered", "updater.py", "            self._refuse(state, Pending(offer.sha256, offer.seq, base=e.pack), e)\n", "", RULES, "base and changed and tensor"),
    ("a repaired base is another one", "state.py", "r.sha256 == sha256 and (r.base is None or r.base in bases)", "r.sha256 == sha256", BASES, "repaired"),
    ("base and payload are exchanged together", "device.py", "if self._session is not None and base.name != self._base.name:", "if False:", BASES, "another_process"),
    ("a folder of bases that is a link", "folder.py", "for name in (EMITTED, BASES):", "for name in (EMITTED,):", FOLDER, "bases"),
    ("settings that exist", "settings.py", "    if key not in kinds:\n", "    if key not in kinds:\n        return value\n    if False:\n", RULES, "nobody and knows and settings"),
    # what a pack may say
    ("the magic of a pack", "../packs.py", "if not head.startswith(MAGIC):", "if False:", RULES, "pack and that and none"),
    ("how long a header may be", "../packs.py", "if not 2 <= length <= MAX_HEADER_BYTES:", "if False:", RULES, "longer and may"),
    ("the bytes that were signed", "../packs.py", "if self.recipe.length > most_bytes:", "if False:", RULES, "bytes and signed or bomb"),
    ("a pack between these bases", "../packs.py", "if (recipe.start, recipe.result) != (start, result):", "if False:", RULES, "another and pack"),
    ("ranges within a file", "../packs.py", "p.source is not None and p.offset + p.length > sizes.get(p.source, -1)", "False", RULES, "ranges"),
    ("nothing behind the last file", "../packs.py", "if self._more(1) or self._inflate.unused_data or any(self._blocks):", "if False:", RULES, "more and behind or takes"),
    ("the words of a header", "../packs.py", 'isinstance(value, dict) and set(value) == {"start", "result", "files"}', "True", RULES, "word"),
    ("names of files", "../packs.py", 'need(is_file_name(name), "files"', 'need(True, "files"', RULES, "file and out or absolute or hidden"),
    ("different names", "../packs.py", "need(len(set(names)) == len(names)", "need(True", RULES, "twice"),
    ("a manifest among them", "../packs.py", "need(MANIFEST in names", "need(True", RULES, "manifest"),
    ("no negative piece", "../packs.py", "type(value) is int and 0 <= value < 1 << 40", "type(value) is int and value < 1 << 40", RULES, "negative"),
    ("a piece is a number", "../packs.py", "type(value) is int and 0", "isinstance(value, int) and 0", RULES, "true"),
    ("no ranges from nothing", "../packs.py", "if not good or start is None:", "if not good:", RULES, "nothing"),
    ("how many files", "../packs.py", "len(listed) <= MAX_FILES", "True", "tests/contracts/test_packs.py", "files"),
    ("how many pieces", "../packs.py", "need(count <= MAX_PIECES", "need(True", "tests/contracts/test_packs.py", "pieces"),
    ("what zlib cannot read", "../packs.py", "except zlib.error as e:", "except KeyError as e:", RULES, "stream"),
    ("a stream that is cut", "../packs.py", "                if block is None:\n                    raise", "                if block is None:\n                    return b''\n                    raise", RULES, "cut"),
    ("all new bytes", "../packs.py", "        if not found:\n            raise PayloadError(\"pack\", \"more", "        if not found:\n            return bytes(most)\n            raise PayloadError(\"pack\", \"more", RULES, "fewer"),
    ("text that is no Unicode", "../manifest.py", "json.dumps(value, ensure_ascii=False).encode()", "pass", "tests/contracts/test_manifest.py", "strict_json"),
    ("numbers beyond float64", "../manifest.py", "if not math.isfinite(found):", "if False:", "tests/contracts/test_manifest.py", "strict_json"),
]  # fmt: skip


def plant(file: str, old: str, new: str, test: str, which: str) -> str:
    """Return caught, SURVIVED, STALE or BROKEN for one fault, tried in a forked process."""
    path = (ROOT / "lrcompress" / "edge" / file).resolve()
    if path.read_text().count(old) != 1:
        return "STALE"
    pid = os.fork()
    if pid == 0:
        os._exit(_tried(path, old, new, test, which))
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # 1: tests failed; a process that died of the fault was noticed, too
    return "caught" if code == 1 or code < 0 else "SURVIVED" if code == 0 else "BROKEN"


def _tried(path: Path, old: str, new: str, test: str, which: str) -> int:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.dont_write_bytecode = True
    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        if self.path != str(path):
            return real(self, name)
        return self.source_to_code(path.read_text().replace(old, new, 1).encode(), self.path)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]
    if path.parent.name == "publish":
        for name in [n for n in sys.modules if n.startswith("lrcompress.publish")]:
            del sys.modules[name]
        del sys.modules["lrcompress"].publish
    elif path.parent.name != "edge":  # the publisher's code has imported it
        importlib.reload(sys.modules[f"lrcompress.{path.stem}"])
    import pytest

    fast = [] if test == RULES else ["-m", "not slow"]  # the long ones among those are seconds
    options = ["-q", "-x", "-p", "no:cacheprovider", *fast, "--timeout", "300", "-k", which]
    return int(pytest.main([*options, str(ROOT / test)]))


def main() -> int:
    """Plant every fault whose line has one of the words; print a table; 0 if all were caught."""
    words, missed, count = sys.argv[1:], 0, 0
    made = subprocess.run(
        [sys.executable, "-c", "from tests.support.fleet import made; print(made())"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.environ["LRCOMPRESS_TEST_MADE"] = made.stdout.split()[-1]
    for name in (
        "torch",
        "onnxruntime",
        "tuf.ngclient",
        "hypothesis",
        "lrcompress.publish",
        "lrcompress.export.payloads",
    ):
        importlib.import_module(name)
    assert not any(name.startswith("lrcompress.edge") for name in sys.modules)
    for what, file, old, new, test, which in [*CHECKS, *PUBLISHER]:
        if words and not any(w in f"{what} {file} {test}" for w in words):
            continue
        started = time.perf_counter()
        verdict = plant(file, old, new, test, which)
        missed += verdict != "caught"
        count += 1
        print(f"| {what} ({file}) | {verdict} | {test.removeprefix('tests/')} `-k '{which}'` | {time.perf_counter() - started:.0f} s |", flush=True)  # fmt: skip
    print(f"\n{missed} of {count} were not caught" if missed else f"\nall {count} caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
