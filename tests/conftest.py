"""What holds for every test: nothing is read from, or written to, the caches of whoever runs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    before = os.environ.get("LRCOMPRESS_CACHE")
    with tempfile.TemporaryDirectory(prefix="lrcompress-cache-") as folder:
        # A folder of one's own choice spares whoever works on the ARM tests the making of the emulated machine.
        os.environ["LRCOMPRESS_CACHE"] = os.environ.get("LRCOMPRESS_TEST_CACHE", folder)
        yield
        if before is None:
            del os.environ["LRCOMPRESS_CACHE"]
        else:
            os.environ["LRCOMPRESS_CACHE"] = before
