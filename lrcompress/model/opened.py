"""An opened model: a module in eval mode or bare tensors, its inputs, and named outputs whatever `forward` returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .inputs import InputSpec

#: What `OpenedModel.kind` may be.
KINDS = ("state_dict", "module", "pickled_module", "pt2", "torchscript", "huggingface")


@dataclass
class OpenedModel:
    """A model and how to call it. `module` is None for a bare state dict, whose tensors are in `tensors`.

    `digest` names the content of the source: its tensors, with the graph or the configuration where it brings one.
    `arch` is `{"spec", "args", "digest"}` where code of the user's built the module.
    """

    path: Path | None
    kind: str
    digest: str
    module: nn.Module | None
    tensors: Mapping[str, Tensor] | None = None
    inputs: tuple[InputSpec, ...] = ()
    arch: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def outputs(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `module` (this one, or one made from it) and return its tensors by name.

        A single tensor is `output`, those of a tuple `output_0`, `output_1`, …; a dict keeps its keys, and what is
        no tensor is left out. A sentence model adds `sentence_embedding`, (batch, width), of unit length.
        """
        found = dict(_named(call(module, inputs), ""))
        if not found:
            raise ModelError(self.path or "the model", "a forward that returns tensors", "none")
        if self.extra.get("pooling") == "mean":
            found["sentence_embedding"] = mean_pooled(found, inputs, self.path)
        return found


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `module` by argument names; by position where there is one input, or as many as forward takes."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return module(**inputs)
    by_name = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if set(inputs) <= by_name or (takes_any and len(inputs) > 1):
        return module(**inputs)
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if len(inputs) == 1 and (positional or takes_any):
        return module(*inputs.values())
    if not set(inputs) & by_name and (takes_any or len(positional) == len(inputs)):
        return module(*inputs.values())
    unknown = sorted(set(inputs) - by_name)
    raise ModelError(
        "the model's inputs",
        f"arguments of forward: {', '.join(parameters)}",
        ", ".join(unknown),
        "name the inputs, or the arrays, as forward does",
    )


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", None)
        for i, item in enumerate(value):
            key = fields[i] if fields else str(i)
            yield from _named(item, f"{name}_{key}" if name else (key if fields else f"output_{key}"))


def mean_pooled(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], where: object) -> Tensor:
    """Return the mean of the token vectors where the mask is 1, divided by its length.

    `last_hidden_state`: (batch, tokens, width); `attention_mask`: (batch, tokens); the result: (batch, width).
    """
    states = outputs.get("last_hidden_state", next(iter(outputs.values())))
    if "attention_mask" not in inputs or states.dim() != 3:
        raise ModelError(
            where or "the model",
            "token vectors and an attention_mask to pool",
            ", ".join(inputs),
            "give attention_mask",
        )
    mask = inputs["attention_mask"].to(states.dtype).unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)
