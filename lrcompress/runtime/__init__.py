"""ONNX Runtime with one active payload: used by the device, by validation and by the publisher."""

from .session import Session, session_options

__all__ = ["Session", "session_options"]
