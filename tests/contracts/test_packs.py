"""Limits of a pack's header; what its content may be is in `tests/attacks`."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

from lrcompress import packs
from lrcompress.errors import PayloadError
from lrcompress.files import canonical_json
from lrcompress.manifest import MANIFEST

SHA = "ab" * 32


def opened(files: list[Any]) -> packs.Pack:
    text = canonical_json({"start": SHA, "result": SHA, "files": files})
    data = packs.MAGIC + zlib.compress(struct.pack("<I", len(text)) + text)
    return packs.Pack([data], most_bytes=1 << 30)


def test_how_many_files_there_may_be() -> None:
    many = [[MANIFEST, [0]], *([f"f{i}", [0]] for i in range(packs.MAX_FILES - 1))]
    assert len(opened(many).recipe.files) == packs.MAX_FILES
    with pytest.raises(PayloadError, match=f"at most {packs.MAX_FILES}"):
        opened([*many, ["one more", [0]]])


def test_how_many_pieces_there_may_be() -> None:
    assert opened([[MANIFEST, [0] * packs.MAX_PIECES]]).recipe.length == 0
    with pytest.raises(PayloadError, match=f"at most {packs.MAX_PIECES} pieces"):
        opened([[MANIFEST, [0] * packs.MAX_PIECES], ["more", [0]]])
