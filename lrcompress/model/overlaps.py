"""Tensors of a module that lie in the same memory without being the same tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STRIDED = torch.strided


def overlapping(model: nn.Module) -> dict[int, str]:
    """Return {id of a tensor: the name of another that its memory overlaps}.

    A slice of a larger parameter cannot be replaced: the rest of the memory, and who reads it, would stay as it was.
    One tensor under two names is a tie, and is not listed.
    """
    named: dict[int, tuple[str, Tensor]] = {}
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if value.numel() and not value.is_meta and value.layout == _STRIDED:
            named.setdefault(id(value), (name, value))
    by_storage: dict[int, list[tuple[int, int, int, str]]] = {}
    for key, (name, value) in named.items():
        start = int(value.storage_offset()) * value.element_size()
        last = int(sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)))
        end = start + (last + 1) * value.element_size()
        by_storage.setdefault(value.untyped_storage().data_ptr(), []).append((start, end, key, name))
    found: dict[int, str] = {}
    for spans in by_storage.values():
        spans.sort()
        for i, (_, end, key, name) in enumerate(spans):
            for other_start, _, other, other_name in spans[i + 1 :]:
                if other_start >= end:
                    break
                found.setdefault(key, other_name)
                found.setdefault(other, name)
    return found
