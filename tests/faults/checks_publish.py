"""Checks of the publisher, to be taken away one at a time (see `checks`)."""

from __future__ import annotations

PUBLISH, KEYS, INTAKE, ROLLOUTS, DELTAS = (
    f"tests/contracts/test_{n}.py" for n in ("publish", "publish_keys", "intake", "rollouts", "deltas")
)
BASES, KILL = "tests/contracts/test_base_updates.py", "tests/faults/test_publish_kill.py"

#: As in `checks`.
PUBLISHER: list[tuple[str, str, str, str, str, str]] = [
    # releases
    ("seq grows", "../publish/releases.py", "return 1 + max([", "return max([1, ", PUBLISH, "seq_grows"),
    ("a seq that was used elsewhere", "../publish/releases.py", 'repository.memory().get(f"seq:{group}", 0)', "0", KEYS, "set_back"),
    ("one release at a time", "../publish/releases.py", "    if candidate is not None:\n        raise CommandError(\n            f\"group", "    if False:\n        raise CommandError(\n            f\"group", ROLLOUTS, "no_step or canaries"),
    ("what devices would refuse for its length", "../publish/releases.py", "if len(encoded.data) > limit:", "if False:", PUBLISH, "for_its_length"),
    ("the bytes that a rollback points at", "../publish/releases.py", "if file.is_file() and sha256_file(file) == release.sha256:", "if True:", PUBLISH, "seq_grows or changed"),
    ("a rollback to what is served", "../publish/releases.py", "if custom[\"sha256\"] == current.sha256:", "if False:", PUBLISH, "seq_grows"),
    ("a rollback says what it undoes", "../publish/releases.py", '"rollback_of": undone,', '"rollback_of": None,', PUBLISH, "seq_grows"),
    ("a payload for another base", "../publish/bases.py", "if base_id is not None and manifest.base_id != base_id:", "if False:", BASES, "in_its_place"),
    ("another model", "../publish/bases.py", "    if new.model != repository.model:", "    if False:", BASES, "could_not_use"),
    ("the ports of applications", "../publish/bases.py", "if ports is not None and [list(p) for p in found] != ports[side]:", "if False:", BASES, "could_not_use"),
    ("the base that devices have", "../publish/bases.py", 'if latest is not None and new.base_id in latest.custom["base_ids"]:', "if False:", BASES, "could_not_use"),
    ("packs stay while a release needs them", "../publish/bases.py", "            change.point(name, target.length, target.hashes[\"sha256\"], target.custom or {})", "            pass", BASES, "back"),
    ("the first base for newer devices", "../publish/bases.py", "    add_packs(change, make(folder, manifest, others), base_id)\n", "    change.add(pack_name(None, base_id), make(folder, manifest, ())[None], {})\n", BASES, "first_base"),
    # the repository
    ("one publisher", "../publish/repository.py", "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", PUBLISH, "one_publisher"),
    ("an older copy", "../publish/repository.py", "            if not older:\n                self._check_memory()\n", "", KEYS, "set_back"),
    ("keys before anything is written", "../publish/repository.py", '        for role in ("snapshot", "timestamp", group if known else "targets"):\n            self.signers(keys, role)\n', "", PUBLISH, "wrong_passphrase"),
    ("expired roles above", "../publish/repository.py", "if expires.replace(tzinfo=UTC) <= now():", "if False:", KEYS, "expired"),
    ("the timestamp last", "../publish/repository.py", '        self.write(keys, "timestamp", timestamp, extra=extra.get("timestamp", ()))\n', "", PUBLISH, "foreign"),
    ("leftovers of a kill", "../publish/repository.py", "left.unlink(missing_ok=True)", "pass", KILL, "kill_anywhere"),
    ("metadata are replaced, not written over", "../publish/repository.py", "    write_atomic(folder / file, metadata.to_bytes(_SERIALIZER))", "    (folder / file).write_bytes(b'')\n    (folder / file).write_bytes(metadata.to_bytes(_SERIALIZER))", KILL, "kill_anywhere"),
    ("names of groups", "../publish/repository.py", "if not is_safe_name(group) or group in ROLES:", "if False:", PUBLISH, "does_not_fit or command_line"),
    ("a delegation for its own paths", "../publish/repository.py", 'paths = [f"{self.model}/{group}/*"]', 'paths = ["*/*/*"]', PUBLISH, "foreign"),
    # keys
    ("keys that others can read", "../publish/keys.py", "if mode & 0o077:", "if False:", PUBLISH, "open_key_file"),
    ("a threshold", "../publish/keys.py", "if len(found) < threshold:", "if False:", KEYS, "several"),
    ("one key signs once", "../publish/keys.py", "and signer.public_key.keyid not in seen", "", KEYS, "several"),
    ("revoked for good", "../publish/upkeep.py", "root.revoke_key(keyid, role)", "pass", KEYS, "revoked or rotation"),
    ("old keys of a root sign the new one", "../publish/upkeep.py", "for s in [*old, *new.get(\"root\", [])]", "for s in [*new.get(\"root\", [])]", KEYS, "rotation"),
    ("what a rotation leaves in a group", "../publish/upkeep.py", "                role.keyids.remove(keyid)\n", "", KEYS, "rotation or revoked"),
    ("roots stay", "../publish/upkeep.py", '{repository.file("timestamp")} | set(repository.metadata.glob("*.root.json"))', '{repository.file("timestamp")}', KEYS, "prune"),
    ("the snapshot before this one", "../publish/upkeep.py", "{version, max(1, version - 1)}", "{version}", KEYS, "after_prune"),
    # encodings
    ("answers like f32", "../publish/encoding.py", "(faithful or name == \"f32\")", "True", PUBLISH, "auto or too_far"),
    ("the smallest", "../publish/encoding.py", "len(data) < len(best[0])) and", "len(data) > len(best[0])) and", PUBLISH, "smallest"),
    ("golden outputs of what is decoded", "../publish/encoding.py", "outputs = self._answers(bare)", "outputs = self._reference", PUBLISH, "golden"),
    ("deltas that save nothing", "../publish/encoding.py", "if must or len(delta) + DELTA_ENTRY_BYTES < len(data)", "if True", DELTAS, "saves_less"),
    # rollouts
    ("failures end it", "../publish/rollouts.py", "if counted.failed > limit:", "if False:", ROLLOUTS, "decisions or cron"),
    ("enough reports", "../publish/rollouts.py", "if counted.eligible and counted.reports < max(wanted, policy.coverage * counted.eligible):", "if False:", ROLLOUTS, "decisions"),
    ("only forward", "../publish/rollouts.py", "elif places is not None and places <= candidate.custom[\"places\"]:", "elif False:", ROLLOUTS, "canaries"),
    ("refused is failed", "../publish/rollouts.py", "bad = candidate.sha256 in d.refused or not d.healthy", "bad = not d.healthy", ROLLOUTS, "counted"),
    ("ill is failed", "../publish/rollouts.py", "bad = candidate.sha256 in d.refused or not d.healthy", "bad = candidate.sha256 in d.refused", ROLLOUTS, "counted"),
    # reports
    ("the signature of a report", "../publish/intake.py", "                key.verify_signature(Signature(record[\"device\"], signature), canonical_json(record))\n", "                pass\n", INTAKE, "forged"),
    ("replays", "../publish/intake.py", "where id = ? and counter < ?", "where id = ? and counter >= 0 * ?", INTAKE, "forward or at_once"),
    ("the future", "../publish/intake.py", "if at > now + SKEW:", "if False:", INTAKE, "future"),
    ("another group", "../publish/intake.py", "if record[\"group\"] != row[2]:", "if False:", INTAKE, "future"),
    ("expelled devices", "../publish/intake.py", "if row is None or row[1]:", "if row is None:", INTAKE, "expelled"),
    ("id and key belong together", "../publish/intake.py", "if len(public) != 32 or about[\"id\"] != known:", "if False:", INTAKE, "identity_is_enrolled"),
    ("how long a report may be", "../publish/intake.py", "if len(body) > MAX_RECORD_BYTES:", "if False:", INTAKE, "form or http"),
    # what verify sees
    ("the hash of what a client fetches", "../publish/checking.py", "        updater.download_target(info, filepath=str(file))\n", "        import shutil\n        shutil.copy(repository.folder / 'targets' / path.rpartition('/')[0] / f\"{info.hashes['sha256']}.{path.rpartition('/')[2]}\", file)\n", PUBLISH, "every_file_that_changes"),
    ("two payloads under one seq", "../publish/checking.py", "if seqs.setdefault(release.seq, release.sha256) != release.sha256:", "if False:", PUBLISH, "under_one_seq"),
    ("the whole pack of a base", "../publish/checking.py", "if packed.get(base[\"base_id\"]) != base[\"manifest\"]:", "if False:", BASES, "no_whole_pack"),
    ("what expires soon", "../publish/checking.py", "if first_to_go[\"days\"] < within_days:", "if False:", PUBLISH, "what_expires"),
]  # fmt: skip
