"""Open any model, and know what goes in and comes out.

images = parse_input("x:float32:batch,3,32,32")
opened = open_model("resnet20.safetensors", arch="archs/cifar_resnet.py:resnet20", inputs=[images])
logits = opened.outputs(opened.module, {"x": pixels})["output"]

A `.pt2` program and, where it is trusted, TorchScript become modules too: every call of the graph that multiplies by
a stored weight is a layer (`calls`). `views` reads what layers read, from modules, programs and ONNX graphs alike;
`ties` factorizes a weight that two layers hold once.
"""

from __future__ import annotations

from .describing import describe, skeleton
from .inputs import InputSpec, parse_input, tensors_of
from .opened import OpenedModel
from .opening import open_model
from .state_dicts import clean_state_dict
from .tensors import check_finite, digest_tensors

__all__ = [
    "InputSpec",
    "OpenedModel",
    "check_finite",
    "clean_state_dict",
    "describe",
    "digest_tensors",
    "open_model",
    "parse_input",
    "skeleton",
    "tensors_of",
]
