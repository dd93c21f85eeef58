"""ONNX Runtime's own adapter file, for programs in C, C++, C# and for onnxruntime-genai: an output beside our payload.

    data = pack(payload, manifest)                   # what `OrtCreateLoraAdapter` loads, for the slots of this manifest
    tensors = unpack(data)

It holds what the graph takes: LoHa, LoKr and LoKH expanded, scaling folded in, names sorted. It is no transport format:
the runtime maps it and checks nothing (no hash, no base, no finiteness), so devices get payloads. Layers that the adapter
leaves alone are left out, and keep their default, which is exactly the base.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import PayloadError
from ..manifest import Manifest
from ..payload import Payload

SUFFIX = ".onnx_adapter"
#: Of the format; ONNX Runtime stores the model's version and never compares it.
_VERSION, _MODEL_VERSION = 1, 1


def pack(payload: Payload, manifest: Manifest) -> bytes:
    """Return the adapter file of a payload. Raises `PayloadError` for one that does not fit, or that changes nothing."""
    payload.verify(manifest)
    tensors = {n: v for n, v in sorted(payload.feeds(manifest).items()) if v.size}
    if not tensors:
        raise PayloadError("onnx_adapter", "an adapter that changes a layer", "one of rank 0 everywhere")
    # The bindings keep no reference to what they are given.
    values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in tensors.items()}
    form = ort.AdapterFormat()
    form.set_adapter_version(_VERSION)
    form.set_model_version(_MODEL_VERSION)
    form.set_parameters(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"adapter{SUFFIX}"
        form.export_adapter(str(path))
        return path.read_bytes()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter file. Raises `PayloadError` for bytes that are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"adapter{SUFFIX}"
        path.write_bytes(data)
        try:
            form = ort.AdapterFormat.read_adapter(str(path))
            return {n: v.numpy().copy() for n, v in sorted(form.get_parameters().items())}
        except Exception as e:  # the runtime raises its own private family
            raise PayloadError("onnx_adapter", "a file that ONNX Runtime reads", e) from e
