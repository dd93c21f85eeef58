"""ONNX Runtime with one active payload: used by the device, by validation and by the publisher."""

from .session import Session

__all__ = ["Session"]
