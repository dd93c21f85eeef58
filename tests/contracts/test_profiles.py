"""Device profiles: every one that ships is sound, and a typo is told with its line."""

from __future__ import annotations

import json

import pytest
import torch

import lrcompress
from lrcompress.errors import ProfileError
from lrcompress.manifest import load_limits
from lrcompress.model import InputSpec
from lrcompress.plan.profile import load_profile, shipped
from tests.support.nets import small

GOOD = shipped()["raspberry-pi-4"].read_text()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_profile_that_ships_is_sound_and_named_like_its_file(name):
    assert load_profile(name).name == name
    assert load_profile(shipped()[name]) == load_profile(name)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("cores: 4", "core: 4", "did you mean 'cores'"),
        ("cores: 4", "cores: 0", "greater than 0"),
        ("threads: 2", "threads: 8", "as many threads as cores"),
        ("64-bit\n", "32-bit\n", "64-bit system"),
        ("  cores: product brief\n", "", "a source for cores"),
        ("schema: 1", "schema: 2", "schema"),
        ("isa: [armv8-a, neon]", "isa: []", "isa"),
        ("isa: [armv8-a, neon]", "isa: [armv8-a", "YAML"),
    ],
)
def test_a_wrong_profile_is_told_with_its_place(tmp_path, old, new, word):
    path = tmp_path / "d.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ProfileError, match=word) as e:
        load_profile(path)
    assert "d.yaml" in e.value.where and e.value.exit_code == 3


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(ProfileError, match="did you mean 'raspberry-pi-4'"):
        load_profile("rasberry-pi-4")


def test_its_limits_reach_the_device(tmp_path):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(tmp_path / "m.pt", rank=4, arch="tests.support.nets:small", inputs=spec, output=tmp_path / "c")
    lrcompress.export(tmp_path / "c", device="raspberry-pi-zero-2-w", output=tmp_path / "e")
    limits = load_limits(tmp_path / "e")
    assert (limits["threads"], limits["max_payload_bytes"]) == (2, 262144)
    assert json.loads((tmp_path / "e" / "device.json").read_text())["device"] == "raspberry-pi-zero-2-w"
