"""The publisher: plain TUF that any client reads, keys nobody else can, releases that grow, payloads that answer alike."""

from __future__ import annotations

import json
import shutil
import stat
from datetime import timedelta

import numpy as np
import pytest
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater

from lrcompress import publish
from lrcompress.cli.main import run
from lrcompress.errors import CommandError, DeviceStateError, HostError, PayloadError, UpdateError
from lrcompress.files import sha256_bytes, sha256_file
from lrcompress.golden import compare, load_golden
from lrcompress.manifest import Manifest
from lrcompress.payload import build, parse
from lrcompress.publish import repository as repositories
from lrcompress.publish.keys import KeyStore
from lrcompress.runtime import Session
from tests.support.fleet import PASSPHRASE, Fleet, made, payload_bytes, release, served


@pytest.fixture
def repo(tmp_path):
    publish.init_repository(tmp_path / "repo", made() / "exported", tmp_path / "keys", passphrase=PASSPHRASE)
    return tmp_path / "repo"


def add(repo, source="first", **options):
    source = made() / "adapters" / source if isinstance(source, str) else source
    return publish.add(repo, source, passphrase=PASSPHRASE, **options)


def test_a_foreign_client_walks_from_the_first_root_to_the_payload(repo, tmp_path):
    d = add(repo, group="kitchen")
    for name in ("md", "tg"):
        (tmp_path / name).mkdir()
    with served(repo) as url:
        root = (repo / "metadata" / "1.root.json").read_bytes()
        client = Updater(
            str(tmp_path / "md"), f"{url}/metadata/", str(tmp_path / "tg"), f"{url}/targets/", bootstrap=root
        )
        client.refresh()
        info = client.get_targetinfo("small/kitchen/payload.safetensors")
        assert info is not None and info.custom["seq"] == 1 and info.length == d["payload_bytes"]
        path = client.download_target(info)
    assert sha256_file(path) == d["sha256"] == info.custom["sha256"]
    assert (repo / "targets" / "small" / "kitchen" / f"{d['sha256']}.payload.safetensors").is_file()
    assert info.custom["base_ids"] == [Manifest.load(made() / "exported").base_id]
    assert repositories.Repository(repo).role("kitchen").paths == ["small/kitchen/*"]  # its key signs for nothing else


def test_keys_are_encrypted_private_and_outside_the_repository(repo, tmp_path):
    add(repo)
    keys = sorted((tmp_path / "keys").glob("*.key"))
    assert [k.stem for k in keys] == ["default", "root", "snapshot", "targets", "timestamp"]
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert b"ENCRYPTED PRIVATE KEY" in key.read_bytes()
    assert not [p for p in repo.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes()]
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_wrong_passphrase_a_lost_key_and_an_open_key_file_are_named(repo, tmp_path):
    before = {p: p.read_bytes() for p in (repo / "metadata").iterdir()}
    with pytest.raises(UpdateError, match="passphrase"):
        publish.add(repo, made() / "adapters" / "first", passphrase="wrong")
    with pytest.raises(CommandError):
        publish.add(repo, made() / "adapters" / "first", passphrase="")
    key = tmp_path / "keys" / "snapshot.key"
    key.chmod(0o644)
    with pytest.raises(HostError, match="0600"):
        add(repo)
    key.unlink()
    with pytest.raises(UpdateError, match="snapshot key"):
        add(repo)
    assert publish.verify(repo)["groups"] == []
    timestamp = repo / "metadata" / "timestamp.json"
    assert timestamp.read_bytes() == before[timestamp]


def test_nothing_is_replaced(repo, tmp_path):
    for folder, keys in (
        (repo, tmp_path / "k2"),
        (tmp_path / "r2", tmp_path / "keys"),
        (tmp_path / "r3", tmp_path / "r3" / "keys"),
    ):
        with pytest.raises(CommandError):
            publish.init_repository(folder, made() / "exported", keys, passphrase=PASSPHRASE)
    assert not (tmp_path / "r2").exists() and not (tmp_path / "k2").exists()
    with pytest.raises(CommandError):
        add(tmp_path / "nothing")
    with pytest.raises(HostError):
        KeyStore(tmp_path / "keys", PASSPHRASE).create("root")


def test_seq_grows_by_group_and_a_rollback_is_a_new_release(repo):
    first, second, other = add(repo), add(repo, "second"), add(repo, "loha", group="other")
    assert [d["seq"] for d in (first, second, other)] == [1, 2, 1]
    d = publish.rollback(repo, 1, passphrase=PASSPHRASE)
    assert (d["seq"], d["sha256"], d["rollback_of"]) == (3, first["sha256"], 2)
    groups = {g["group"]: g for g in publish.status(repo)["groups"]}
    assert [r["seq"] for r in groups["default"]["releases"]] == [1, 2, 3]
    assert groups["other"]["seq"] == 1 and groups["other"]["releases"][0]["kind"] == "loha"
    for to in (9, 3, 1):  # not there; the newest itself; the payload that is served already
        with pytest.raises(CommandError):
            publish.rollback(repo, to, passphrase=PASSPHRASE)
    file = next((repo / "targets").rglob(f"{second['sha256']}.*"))
    file.write_bytes(b"rot")
    with pytest.raises(PayloadError, match="gone or changed"):
        publish.rollback(repo, 2, passphrase=PASSPHRASE)


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8"])
def test_golden_outputs_are_those_of_the_encoded_payload(repo, encoding):
    d = add(repo, encoding=encoding)
    payload = parse(next((repo / "targets").rglob("*.safetensors")).read_bytes())
    assert payload.encoding == encoding and d["sizes"] == {encoding: d["payload_bytes"]}
    exported = made() / "exported"
    session = Session(exported)
    session.swap(payload)
    outputs = session.run(load_golden(exported / "golden.npz").inputs)
    assert sum(v.nbytes for v in payload.golden.values()) <= max(1024, d["payload_bytes"] // 10)
    np.testing.assert_allclose(payload.golden["output"], outputs["output"], rtol=2e-3, atol=2e-3)


def test_auto_takes_the_smallest_that_answers_like_f32(repo, monkeypatch):
    d = add(repo)
    assert d["encoding"] == "int8" and d["sizes"]["int8"] < d["sizes"]["f16"] < d["sizes"]["f32"]
    monkeypatch.setattr("lrcompress.publish.encoding.ENCODING_TOLERANCE", 1e-6)
    assert add(repo, "second")["whole"]["encoding"] == "f32"


def test_auto_takes_four_bits_only_where_nothing_is_lost(repo, tmp_path):
    """An adapter that was rounded to them answers as before; of another one they take a tenth of every number."""
    rough = parse(payload_bytes("second", encoding="int4"))
    # Another scaling leaves no number exactly where it was rounded to.
    tensors = {n: v * np.float32(0.7) for n, v in rough.tensors.items()}
    exact = build(tensors, manifest=Manifest.load(made() / "exported"), kind=rough.kind, encoding="f32")
    (tmp_path / "p.safetensors").write_bytes(exact)
    d = add(repo, tmp_path / "p.safetensors")
    assert d["encoding"] == "int4" and d["sizes"]["int4"] < d["sizes"]["int8"]
    found = parse(next((repo / "targets").rglob(f"{d['sha256']}.*")).read_bytes())
    for name, value in tensors.items():
        np.testing.assert_allclose(found.tensors[name], value, rtol=2e-6)
    other = add(repo, "second")
    assert "int4" not in other["sizes"] and other["whole"]["encoding"] == "int8"
    with pytest.raises(PayloadError, match="adapt --encoding int4"):
        add(repo, "first", encoding="int4")


def test_a_payload_file_is_taken_as_well_as_an_adapter(repo, tmp_path):
    (tmp_path / "p.safetensors").write_bytes(payload_bytes("second", encoding="f32"))
    from_file, from_adapter = add(repo, tmp_path / "p.safetensors", encoding="f32"), add(repo, "second", encoding="f32")
    assert from_file["sha256"] == from_adapter["sha256"]


def test_the_same_adapter_gives_the_same_payload_in_another_repository(repo, tmp_path):
    publish.init_repository(tmp_path / "r2", made() / "exported", tmp_path / "k2", passphrase=PASSPHRASE)
    assert add(repo)["sha256"] == add(tmp_path / "r2")["sha256"]


def test_what_does_not_fit_is_not_published(repo, tmp_path):
    adapter = tmp_path / "a"
    shutil.copytree(made() / "adapters" / "first", adapter)
    marker = json.loads((adapter / "lrcompress.json").read_text())
    (adapter / "lrcompress.json").write_text(json.dumps({**marker, "base": "0" * 64}))
    with pytest.raises(PayloadError, match="adapter for the base"):
        add(repo, adapter)
    (tmp_path / "p").write_bytes(payload_bytes("first")[:-3])
    with pytest.raises(PayloadError):
        add(repo, tmp_path / "p")
    with pytest.raises(PayloadError):
        add(repo, tmp_path / "nothing")
    for group in ("../x", "root", "A b", ""):
        with pytest.raises(CommandError):
            add(repo, group=group)
    with pytest.raises(CommandError):
        add(repo, encoding="zip")
    assert publish.status(repo)["groups"] == []


def test_what_devices_would_refuse_for_its_length_is_not_published(tmp_path):
    """The limit is the one that devices were made with."""
    data = payload_bytes("first")
    (tmp_path / "p").write_bytes(data)
    for name, most in (("tight", len(data) - 200), ("wide", len(data) + 400)):
        exported, repo = tmp_path / name, tmp_path / f"repo-{name}"
        shutil.copytree(made() / "exported", exported)
        limits = json.dumps({**json.loads((exported / "device.json").read_text()), "max_payload_bytes": most}).encode()
        (exported / "device.json").write_bytes(limits)
        manifest = json.loads((exported / "manifest.json").read_text())
        manifest["files"]["device.json"] = {"bytes": len(limits), "sha256": sha256_bytes(limits)}
        (exported / "manifest.json").write_text(json.dumps(manifest))
        publish.init_repository(repo, exported, tmp_path / f"keys-{name}", passphrase=PASSPHRASE)
        if name == "wide":
            assert add(repo, tmp_path / "p", encoding="f32")["seq"] == 1
            continue
        with pytest.raises(PayloadError, match=rf"at most {most} bytes, as device.json says"):
            add(repo, tmp_path / "p", encoding="f32")
        assert publish.status(repo)["groups"] == []


def test_a_changed_artifact_is_noticed(repo, tmp_path):
    config = json.loads((repo / "publisher.json").read_text())
    changed = tmp_path / "exported"
    shutil.copytree(made() / "exported", changed)
    data = (changed / "base.data").read_bytes()
    (changed / "base.data").write_bytes(data[:-1] + b"\x55")
    (repo / "publisher.json").write_text(json.dumps({**config, "exported": "../exported"}))
    from lrcompress.errors import ManifestError

    with pytest.raises(ManifestError, match=r"base\.data"):
        add(repo)


def test_one_publisher_at_a_time(repo):
    with repositories.Repository(repo).locked(), pytest.raises(DeviceStateError):
        add(repo)


def test_refresh_and_verify_say_what_expires_first(repo, monkeypatch):
    add(repo)
    before = Metadata.from_file(str(repo / "metadata" / "timestamp.json")).signed.version
    d = publish.verify(repo)
    assert d["expires_first"]["role"] == "timestamp" and d["groups"][0]["seq"] == 1
    publish.refresh(repo, passphrase=PASSPHRASE)
    assert Metadata.from_file(str(repo / "metadata" / "timestamp.json")).signed.version == before + 1
    assert publish.verify(repo, within_days=13)["expires_first"]["days"] in (13, 14)
    with pytest.raises(UpdateError, match=r"hold for 15 days.*timestamp: 1[34] days.*refresh"):
        publish.verify(repo, within_days=15)
    monkeypatch.setitem(repositories.EXPIRY, "timestamp", timedelta(seconds=-1))
    publish.refresh(repo, passphrase=PASSPHRASE)
    with pytest.raises(UpdateError):
        publish.verify(repo)


def test_verify_notices_two_payloads_under_one_seq(tmp_path):
    """As a publisher would make them who restored an older copy and went on by another program."""
    fleet = Fleet(tmp_path)
    for name in ("first", "second"):
        release(fleet, payload_bytes(name), seq=1)
    with pytest.raises(UpdateError, match=r"one payload for seq 1 of default.*two"):
        publish.verify(fleet.repo)


def test_verify_notices_every_file_that_changes(repo):
    add(repo)
    current = [repositories.Repository(repo).version(r) for r in ("snapshot", "targets", "default")]
    names = [
        "1.root.json",
        "timestamp.json",
        *(f"{v}.{r}.json" for v, r in zip(current, ("snapshot", "targets", "default"), strict=True)),
    ]
    for path in [*(repo / "metadata" / n for n in names), next((repo / "targets").rglob("*.safetensors"))]:
        good = path.read_bytes()
        path.write_bytes(good.replace(b"2", b"3", 1) if path.suffix == ".json" else good[:-1] + b"\x01")
        with pytest.raises(UpdateError):
            publish.verify(repo)
        path.write_bytes(good)
    publish.verify(repo)


def test_the_command_line_asks_for_a_passphrase_where_there_is_none(repo, capsys, monkeypatch):
    monkeypatch.delenv("LRCOMPRESS_KEY_PASSPHRASE", raising=False)
    code = run(["publish", "add", str(repo), str(made() / "adapters" / "first"), "--json"])
    out = capsys.readouterr()
    assert (
        code != 0
        and not json.loads(out.out.splitlines()[-1])["ok"]
        and "LRCOMPRESS_KEY_PASSPHRASE" in out.err + out.out
    )
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", PASSPHRASE)
    assert run(["publish", "add", str(repo), str(made() / "adapters" / "first")]) == 0
    assert "seq 1" in capsys.readouterr().out
    for command in (["status"], ["verify"], ["refresh"]):
        assert run(["publish", *command, str(repo)]) == 0
    assert "timestamp expires" in capsys.readouterr().out


def test_an_encoding_that_moves_the_answers_too_far_is_refused_or_passed_over(repo):
    exported = made() / "exported"
    golden = load_golden(exported / "golden.npz")
    session = Session(exported)
    outputs = []
    for encoding in ("f32", "int8"):
        session.swap(parse(payload_bytes("first", encoding=encoding)))
        outputs.append(session.run(golden.inputs))
    assert compare(outputs[0], outputs[1], 1e-2).passed
