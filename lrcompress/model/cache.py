"""A decoder with its key/value cache as inputs and outputs: one graph reads a prompt and goes on token by token.

    cached = with_cache(open_model("stories260k"))
    cached.inputs        input_ids (batch, sequence), attention_mask (batch, past_plus_sequence),
                         past_key_values.0.key (batch, heads, past, width), …
    cached.outputs(module, inputs)      logits, present.0.key (batch, heads, past + sequence, width), …

With a past of length 0 the graph reads a prompt; what it gives as `present` is the past of the next call. Names and
axes are those of optimum's decoder configuration, so that what runs its exports runs these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CommandError, ModelError
from .inputs import tensors_of
from .opened import OpenedModel
from .tasks import cached_inputs_of

PAST, PRESENT = "past_key_values.", "present."
_WHERE = "lrcompress export --kv-cache"


class CachedModel(OpenedModel):
    """An opened decoder that is called with a past and returns the present."""

    def outputs(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `module` and return logits and, by layer, keys and values of all positions so far."""
        from transformers import DynamicCache

        cache, layers = DynamicCache(), sum(n.startswith(PAST) and n.endswith(".key") for n in inputs)
        for i in range(layers):
            cache.update(inputs[f"{PAST}{i}.key"], inputs[f"{PAST}{i}.value"], i)
        given = {k: v for k, v in inputs.items() if not k.startswith(PAST)}
        found = module(**given, past_key_values=cache, use_cache=True)
        out = {"logits": found.logits}
        for i, layer in enumerate(found.past_key_values.layers):
            out |= {f"{PRESENT}{i}.key": layer.keys, f"{PRESENT}{i}.value": layer.values}
        return out

    def filled(self, module: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return plain inputs, ids and mask (batch, tokens), with the first half of their tokens read into the cache."""
        tokens = next(v.shape[1] for k, v in inputs.items() if k.endswith("input_ids"))
        half, past = tokens // 2, self.empty(len(next(iter(inputs.values()))))
        first = {k: v[:, :half] for k, v in inputs.items()}
        with torch.no_grad():
            present = self.outputs(module, tensors_of({**first, **past}))
        found = {k: v if "mask" in k else v[:, half:] for k, v in inputs.items()}
        return found | {k.replace(PRESENT, PAST): v.numpy() for k, v in present.items() if k.startswith(PRESENT)}

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """Return a past of no tokens."""
        return empty_past([(s.name, s.dtype, s.shape) for s in self.inputs], batch)


def empty_past(inputs: list[tuple[str, str, tuple[int | str, ...]]], batch: int) -> dict[str, np.ndarray]:
    """Return the cache inputs among (name, dtype, shape) with no positions."""
    return {
        name: np.zeros([d if isinstance(d, int) else (batch if i == 0 else 0) for i, d in enumerate(shape)], dtype)
        for name, dtype, shape in inputs
        if name.startswith(PAST)
    }


def with_cache(opened: OpenedModel) -> CachedModel:
    """Return a decoder with its cache as inputs; refuse what has none."""
    if isinstance(opened, CachedModel):
        return opened
    if opened.kind != "huggingface" or opened.extra.get("task") != "text-generation" or opened.module is None:
        got = opened.extra.get("class") or opened.kind
        raise CommandError(_WHERE, "a Hugging Face decoder that generates text", got, "leave --kv-cache out")
    inputs = cached_inputs_of(opened.module, opened.module.config, opened.extra["task"])
    if not any(s.name.startswith(PAST) for s in inputs):
        raise ModelError(
            _WHERE, "a decoder that optimum knows the cache of", str(opened.extra.get("class")), "leave --kv-cache out"
        )
    values = {f.name: getattr(opened, f.name) for f in fields(OpenedModel)}
    return CachedModel(**{**values, "inputs": inputs})
