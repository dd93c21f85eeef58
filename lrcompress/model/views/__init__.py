"""One view of layers, three back ends: modules, traced programs, ONNX graphs.

view = view_of(open_model("model.pt2"))
statistics = measure(view, data, view.layers)               # lrcompress.calibrate
view.replace("fc", form("svd").decompose(view.layer("fc").weight, 16, statistics["fc"]))
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from ...errors import ModelError
from ..opened import OpenedModel
from .base import LayerView, Reading
from .modules import ModuleView
from .programs import ProgramView
from .walk import Walk, patches, walk_of


def view_of(opened: OpenedModel, module: nn.Module | None = None) -> LayerView:
    """Return the view of an opened model, or of `module` in its place; `ModelError` for a bare state dict."""
    module = opened.module if module is None else module
    if module is None:
        raise ModelError(opened.path, "a network whose layers can be watched", "a state dict", "give --arch")
    traced = isinstance(module, GraphModule) and opened.kind in ("pt2", "torchscript")
    return ProgramView(opened, module) if traced else ModuleView(opened, module)  # type: ignore[arg-type]


__all__ = ["LayerView", "ModuleView", "ProgramView", "Reading", "Walk", "patches", "view_of", "walk_of"]
