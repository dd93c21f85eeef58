"""What depends on bytes alone is computed once for them: thousands of disks differ in a file or two.

Only functions that touch neither disk nor clock, and whose results nobody changes; a failure is found anew each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from securesystemslib.signer import Signature, SSlibKey

from lrcompress.edge import device, state
from lrcompress.manifest import Manifest

MOST = 4096


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """While this lasts, states, manifests and payloads are parsed, and signatures verified, once per content."""
    verify, good = SSlibKey.verify_signature, set[tuple[Any, ...]]()
    parse = functools.lru_cache(MOST)(Manifest.parse)

    def verified(self: SSlibKey, signature: Signature, data: bytes) -> None:
        key = (self.keytype, self.scheme, self.keyval["public"], signature.signature, data)
        if key not in good:
            verify(self, signature, data)
            good.add(key)

    with (
        mock.patch.object(state, "decode", functools.lru_cache(MOST)(state.decode)),
        mock.patch.object(device, "parse", functools.lru_cache(MOST)(device.parse)),
        mock.patch.object(Manifest, "parse", parse),
        mock.patch.object(SSlibKey, "verify_signature", verified),
    ):
        yield
