"""Tell an ONNX file by its content; needs nothing that is not in Python."""

from __future__ import annotations

from pathlib import Path


def is_onnx(path: Path) -> bool:
    """Tell by its first bytes whether a file is an ONNX model: a protobuf that begins as one, whatever it is called."""
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError:
        return False
    return looks_like_onnx(head)


def looks_like_onnx(head: bytes) -> bool:
    """An ONNX file begins with its IR version (field 1, a small number), then its producer, graph, opsets, …"""
    return len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 99 and head[2] in (0x12, 0x1A, 0x22, 0x32, 0x3A, 0x42)
