"""Roles and keys: thresholds, expiry, rotation, what is lost, what is wrong; each ends in one line and its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater

from lrcompress import publish
from lrcompress.cli.main import run
from lrcompress.errors import CommandError, LrcompressWarning, UpdateError
from lrcompress.publish import Setup
from lrcompress.publish import repository as repositories
from lrcompress.publish.keys import PIN
from lrcompress.publish.repository import Repository, put_metadata
from tests.support.fleet import PASSPHRASE, made, served


def new(tmp_path: Path, **setup: object) -> Path:
    publish.init_repository(
        tmp_path / "repo", made() / "exported", tmp_path / "keys", passphrase=PASSPHRASE, setup=Setup(**setup)
    )
    return tmp_path / "repo"


def add(repo: Path, name: str = "first", **options: object) -> dict:
    return publish.add(
        repo, made() / "adapters" / name, passphrase=PASSPHRASE, **{"encoding": "int8", **options}
    )  # fmt: skip


class Client:
    """python-tuf's own client, which remembers; nothing of ours but a web server."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo, self.folder, self.root = repo, folder, (repo / "metadata" / "1.root.json").read_bytes()
        for name in ("md", "tg"):
            (folder / name).mkdir(parents=True)

    def seq(self, group: str = "default") -> int | None:
        with served(self.repo) as url:
            md, tg = str(self.folder / "md"), str(self.folder / "tg")
            client = Updater(md, f"{url}/metadata/", tg, f"{url}/targets/", bootstrap=self.root)
            client.refresh()
            info = client.get_targetinfo(f"small/{group}/payload.safetensors")
            if info is None:
                return None
            client.download_target(info)
            return info.custom["seq"]


def test_a_role_may_need_several_of_its_keys(tmp_path):
    repo = new(tmp_path, roles={"root": (2, 3), "timestamp": (1, 2)})
    root = Repository(repo).role("root")
    assert (root.threshold, len(root.keyids)) == (2, 3)
    assert len(Metadata.from_file(str(repo / "metadata" / "1.root.json")).signatures) == 3
    client = Client(repo, tmp_path / "client")
    add(repo)
    assert client.seq() == 1
    (tmp_path / "keys" / "root.key").unlink()
    (tmp_path / "keys" / "timestamp.key").unlink()
    publish.rotate_keys(repo, ["root"], passphrase=PASSPHRASE)  # two of three are enough
    assert client.seq() == 1 and len(Repository(repo).role("root").keyids) == 3
    other = new(tmp_path / "b", roles={"root": (2, 3)})
    stick = tmp_path / "stick"
    stick.mkdir()
    for name in ("root.key", "root@2.key"):
        shutil.move(tmp_path / "b" / "keys" / name, stick / name)
    with pytest.raises(UpdateError, match=r"2 of the 3 keys.*got 1 in.*--keys") as caught:
        publish.rotate_keys(other, ["root"], passphrase=PASSPHRASE)
    assert caught.value.exit_code == 6 and Repository(other).version("root") == 1
    shutil.copy(tmp_path / "b" / "keys" / "root@3.key", tmp_path / "b" / "keys" / "root@4.key")
    with pytest.raises(UpdateError, match="got 1 in"):  # the same key twice is one signature
        publish.rotate_keys(other, ["root"], passphrase=PASSPHRASE)
    (tmp_path / "b" / "keys" / "root@4.key").unlink()
    publish.rotate_keys(other, ["root"], passphrase=PASSPHRASE, keys=[stick])
    assert Repository(other).version("root") == 2


@pytest.mark.parametrize(
    "setup",
    [
        {"roles": {"root": (3, 2)}},
        {"roles": {"kitchen": (1, 1)}},
        {"roles": {"root": (0, 1)}},
        {"expiry_days": {"timestamp": 0}},
        {"expiry_days": {"x": 3}},
        {"signers": [("x", "hsm:")]},
        {"signers": [("root", "nonsense:")]},
        {"signers": [("root", "hsm:x?label=nothing")]},
        {"signers": [("root", "file2:/nowhere#/nowhere.pem")]},
    ],
)
def test_a_setup_that_no_repository_can_have_leaves_nothing(tmp_path, setup):
    with pytest.raises(CommandError):
        new(tmp_path, **setup)
    assert not list(tmp_path.iterdir())


def test_how_long_signatures_hold(tmp_path):
    repo = new(tmp_path, expiry_days={"timestamp": 3})
    add(repo)
    days = {e["role"]: e["days"] for e in publish.verify(repo)["expires"]}
    assert days.pop("timestamp") in (2, 3)
    assert all(limit - 1 <= days[r] <= limit for r, limit in {"root": 365, "targets": 180, "default": 180}.items())
    publish.verify(repo, within_days=2)
    with pytest.raises(UpdateError, match="timestamp"):
        publish.verify(repo, within_days=4)


def test_after_a_rotation_old_clients_walk_on_and_old_keys_count_no_more(tmp_path):
    repo = new(tmp_path)
    add(repo)
    early, late = Client(repo, tmp_path / "early"), Client(repo, tmp_path / "late")
    assert early.seq() == 1
    before = Repository(repo)
    old = {r: list(before.role(r).keyids) for r in before.roles()}
    with_old_key = shutil.copytree(tmp_path / "keys", tmp_path / "stolen")
    d = publish.rotate_keys(repo, passphrase=PASSPHRASE)
    publish.rotate_keys(repo, ["root"], passphrase=PASSPHRASE)
    assert set(d["roles"]) == {"targets", "snapshot", "timestamp", "default"} and d["root_version"] == 2
    after = Repository(repo)
    assert all(not set(old[r]) & set(after.role(r).keyids) for r in old)
    assert not list((tmp_path / "keys").glob("*.new"))
    add(repo, "second")
    assert early.seq() == 2 and late.seq() == 2
    # Whoever holds an old timestamp key can sign what he likes: no client takes it.
    timestamp = after.read("timestamp").signed
    timestamp.version += 1
    thief = repositories.KeyStore(with_old_key, PASSPHRASE)
    put_metadata(repo / "metadata", "timestamp", timestamp, [thief.load("timestamp")], timedelta(days=1))
    from tuf.api.exceptions import RepositoryError

    with pytest.raises(RepositoryError):
        early.seq()
    with pytest.raises(UpdateError):
        publish.verify(repo)
    publish.refresh(repo, passphrase=PASSPHRASE)
    assert early.seq() == 2


def test_a_revoked_key_is_replaced_only_where_too_few_would_be_left(tmp_path):
    repo = new(tmp_path, roles={"snapshot": (1, 2)})
    add(repo)
    client = Client(repo, tmp_path / "client")
    first, second = Repository(repo).role("snapshot").keyids
    d = publish.revoke(repo, first[:12], passphrase=PASSPHRASE)
    assert d["revoked"] == [first] and Repository(repo).role("snapshot").keyids == [second] and client.seq() == 1
    (group,) = Repository(repo).role("default").keyids
    publish.revoke(repo, group, passphrase=PASSPHRASE)
    assert Repository(repo).role("default").keyids != [group] and client.seq() == 1
    for key in ("", first[:12], "zz"):  # too short; gone already; none
        with pytest.raises(CommandError, match="one keyid of"):
            publish.revoke(repo, key, passphrase=PASSPHRASE)


def test_a_lost_key_is_replaced_with_the_root_key(tmp_path):
    repo = new(tmp_path)
    add(repo)
    client = Client(repo, tmp_path / "client")
    for name in ("timestamp", "default"):
        (tmp_path / "keys" / f"{name}.key").unlink()
        with pytest.raises(UpdateError, match=f"{name} key"):
            add(repo, "second")
        with pytest.warns(LrcompressWarning, match="old keys") if name == "timestamp" else contextlib.nullcontext():
            publish.rotate_keys(repo, [name], passphrase=PASSPHRASE)
    add(repo, "second")
    assert client.seq() == 2
    (tmp_path / "keys" / "root.key").unlink()
    with pytest.raises(UpdateError, match="root key"):
        publish.rotate_keys(repo, ["timestamp"], passphrase=PASSPHRASE)


def test_what_has_expired_is_named_and_refreshed(tmp_path, monkeypatch):
    repo = new(tmp_path)
    add(repo)
    monkeypatch.setitem(repositories.EXPIRY, "targets", timedelta(seconds=-5))
    add(repo, "first", group="other")  # which signs targets anew, to be expired at once
    monkeypatch.undo()
    with pytest.raises(UpdateError, match=r"targets that has not expired.*refresh") as caught:
        add(repo, "second")
    assert caught.value.exit_code == 6
    d = publish.refresh(repo, passphrase=PASSPHRASE)
    assert d["renewed"] == ["targets", "snapshot", "timestamp"] and add(repo, "second")["seq"] == 2
    publish.verify(repo)


def test_refresh_does_without_a_key_in_the_safe_until_it_matters(tmp_path, monkeypatch):
    repo = new(tmp_path)
    shutil.move(tmp_path / "keys" / "root.key", tmp_path / "root.key")
    assert publish.refresh(repo, passphrase=PASSPHRASE)["keys_missing"] == []
    monkeypatch.setitem(repositories.EXPIRY, "root", timedelta(days=3650))  # so 365 days are the second half
    with pytest.warns(LrcompressWarning, match="root expires in 36"):
        assert publish.refresh(repo, passphrase=PASSPHRASE)["keys_missing"] == ["root"]
    (tmp_path / "safe").mkdir()
    shutil.move(tmp_path / "root.key", tmp_path / "safe" / "root.key")
    d = publish.refresh(repo, passphrase=PASSPHRASE, keys=[tmp_path / "safe"])
    assert d["renewed"][0] == "root" and Repository(repo).version("root") == 2
    publish.verify(repo)


def test_prune_leaves_what_clients_ask_for_and_the_last_releases(tmp_path):
    repo = new(tmp_path)
    for name in ("first", "second", "first", "loha"):
        add(repo, name)
    publish.rotate_keys(repo, ["root"], passphrase=PASSPHRASE)
    client = Client(repo, tmp_path / "client")
    files = len(list(repo.rglob("*.*")))
    d = publish.prune(repo, keep=2)
    assert d["deleted"] > 4 and len(list(repo.rglob("*.*"))) == files - d["deleted"] and d["bytes"] > 0
    assert [r.seq for r in Repository(repo).history("default")] == [3, 4]
    assert client.seq() == 4 and publish.prune(repo, keep=2)["deleted"] == 0
    with pytest.raises(CommandError, match="a seq of group default: 3, 4"):
        publish.rollback(repo, 2, passphrase=PASSPHRASE)
    assert publish.rollback(repo, 3, passphrase=PASSPHRASE)["seq"] == 5 and client.seq() == 5
    with pytest.raises(CommandError):
        publish.prune(repo, keep=0)


def test_a_client_that_began_before_the_last_release_goes_on_after_prune(tmp_path):
    repo = new(tmp_path)
    for name in ("first", "second", "loha"):
        add(repo, name)
    repository = Repository(repo)
    before = repository.read("snapshot", repository.version("snapshot") - 1).signed.meta
    publish.prune(repo, keep=1)
    assert before["default.json"].version < repository.version("default")
    for name, meta in before.items():
        assert (repo / "metadata" / f"{meta.version}.{name}").is_file(), name
    for target in repository.read("default", before["default.json"].version).signed.targets.values():
        folder, _, name = target.path.rpartition("/")
        assert (repo / "targets" / folder / f"{target.hashes['sha256']}.{name}").is_file()


@pytest.mark.parametrize(
    "name", ["timestamp.json", "2.snapshot.json", "2.targets.json", "1.root.json", "1.default.json"]
)
@pytest.mark.parametrize("left", [None, 40])
def test_a_half_written_repository_is_named(tmp_path, name, left, capsys):
    repo = new(tmp_path)
    add(repo)
    path = repo / "metadata" / name
    path.write_bytes(path.read_bytes()[:left]) if left else path.unlink()
    for verb in (publish.verify, publish.status, lambda r: add(r, "second")):
        try:
            verb(repo)
        except UpdateError as e:
            assert "\n" not in str(e) and e.exit_code == 6
        else:
            assert verb is not publish.verify
    assert run(["publish", "verify", str(repo), "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "update"


def test_a_repository_that_is_set_back_signs_no_seq_twice(tmp_path):
    repo = new(tmp_path)
    add(repo)
    client = Client(repo, tmp_path / "client")
    backup = shutil.copytree(repo, tmp_path / "backup")
    add(repo, "second")
    assert client.seq() == 2
    shutil.rmtree(repo)
    shutil.copytree(backup, repo)
    for act in (lambda: add(repo, "loha"), lambda: publish.refresh(repo, passphrase=PASSPHRASE)):
        with pytest.raises(UpdateError, match=r"older copy.*--recover"):
            act()
    publish.refresh(repo, passphrase=PASSPHRASE, recover=True)
    assert client.seq() == 1  # the bytes of then; our own devices keep what they have until a higher seq
    assert add(repo, "loha")["seq"] == 3 and client.seq() == 3
    publish.verify(repo)


def test_a_signer_by_uri_signs_like_a_file(tmp_path):
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "token.pem", tmp_path / "token.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    repo = new(tmp_path, signers=[("targets", f"file2:{private}#{public}")])
    add(repo)
    assert Client(repo, tmp_path / "client").seq() == 1
    assert not (tmp_path / "keys" / "targets.key").exists()
    private.rename(tmp_path / "unplugged")
    with pytest.raises(UpdateError, match="a signer that answers"):
        add(repo, group="other")


def test_a_pkcs11_token_signs(tmp_path, monkeypatch):
    pytest.importorskip("pkcs11", reason="needs the extra [hsm]: python-pkcs11")
    tool = shutil.which("softhsm2-util") or os.environ.get("SOFTHSM2_UTIL")
    library = next((p for p in (os.environ.get("SOFTHSM2_LIB", ""), "/usr/lib/softhsm/libsofthsm2.so") if Path(p).is_file()), None)  # fmt: skip
    if tool is None or library is None:
        pytest.skip("needs SoftHSM: apt install softhsm2")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path}/tokens\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm.conf"))
    monkeypatch.setenv("PYKCS11LIB", library)
    monkeypatch.setenv(PIN, "1234")
    subprocess.run(
        [tool, "--module", library, "--init-token", "--free", "--label", "t", "--pin", "1234", "--so-pin", "1234"],
        check=True,
    )
    import pkcs11
    import pkcs11.util.ec

    token = pkcs11.lib(library).get_token(token_label="t")
    with token.open(user_pin="1234", rw=True) as session:
        curve = pkcs11.util.ec.encode_named_curve_parameters("secp256r1")
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: curve}, local=True
        )
        parameters.generate_keypair(store=True, id=bytes([2]), label="k")
    repo = new(tmp_path, signers=[("targets", "hsm:2?label=t")])
    assert (tmp_path / "keys" / "targets.signer").is_file()
    add(repo)
    assert Client(repo, tmp_path / "client").seq() == 1
    monkeypatch.setenv(PIN, "9999")
    with pytest.raises(UpdateError):
        add(repo, group="other")
