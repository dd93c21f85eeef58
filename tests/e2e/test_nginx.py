"""The web server of the README's lines on private payloads: nginx gives a group's payloads to its own devices only."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.support.certificates import certificates
from tests.support.fleet import Fleet, answers
from tests.support.workshop import ROOT

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def nginx(folder: Path, repo: Path, *, group: str) -> Iterator[str]:
    """Serve a repository as the README says, its paths and port replaced; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [server] = re.findall(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for old, new in (
        ("listen 443", f"listen 127.0.0.1:{port}"), ("/srv/repo", str(repo)), ("devices-ca.pem", f"{folder}/ca.pem"),
        ("server.pem", f"{folder}/server.pem"), ("server.key", f"{folder}/server.key"), ("MODEL", "small"), ("GROUP", group),
    ):  # fmt: skip
        assert old in server
        server = server.replace(old, new)
    places = "".join(f"{n}_temp_path {folder}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log {folder}/access.log; {places}\n{server}}}\n"
    )
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.PIPE)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.05)
        yield f"https://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(NGINX is None, reason="needs nginx: apt install nginx-light")
def test_payloads_of_a_group_are_for_its_devices_only(tmp_path: Path) -> None:
    """A device of the group takes the update; others, by no certificate, another OU or one that only begins alike, do not."""
    fleet = Fleet(tmp_path)
    fleet.add("first")
    before = answers(fleet.device())
    certificates(tmp_path, {"ours": "default", "theirs": "cameras", "alike": "default2", "nobody": None})
    with nginx(tmp_path, fleet.repo, group="default") as url:

        def update(name: str | None) -> dict:
            settings = {"schema": 1, "url": url, "ca_file": str(tmp_path / "ca.pem")}
            if name is not None:
                settings |= {"cert_file": str(tmp_path / f"{name}.pem"), "key_file": str(tmp_path / f"{name}.key")}
            (fleet.at / "device.json").write_text(json.dumps(settings))
            return fleet.device().update()

        for name, status in ((None, "400"), ("theirs", "403"), ("alike", "403"), ("nobody", "403")):
            d = update(name)
            assert (d["state"], d["error"]["code"]) == ("failed", 8) and status in d["error"]["got"], (name, d)
            np.testing.assert_array_equal(answers(fleet.device()), before)
        d = update("ours")
        assert (d["state"], d["to_seq"]) == ("updated", 1), d
        assert not np.array_equal(answers(fleet.device()), before)
