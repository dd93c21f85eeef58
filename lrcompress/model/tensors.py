"""Named tensors: their digest, their finiteness, and whether they fit a module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files import canonical_json
from .stored import described, reader

_SHOWN = 3
#: Numbers that are looked at together.
_BLOCK = 4_000_000


class Hash(Protocol):
    """What `hashlib.sha256()` returns."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def digest_tensors(tensors: Mapping[str, Tensor], *extra: bytes) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and bytes in name order, then over `extra` in the order given.

    One tensor is in memory at a time beyond what the mapping holds itself, and no container format takes part: the
    same weights have the same digest in a `.pt` and in a `.safetensors`.
    """
    return _digest(tensors, extra, lambda name, value: None)


def examine(tensors: Mapping[str, Tensor], where: object, *extra: bytes) -> str:
    """Return the digest of `tensors`, each of which is read once, and checked to be finite on the way.

    Raises `ModelError` naming the first tensor, by name, with NaN or infinity.
    """
    return _digest(tensors, extra, lambda name, value: _check_finite(name, value, where))


def _digest(tensors: Mapping[str, Tensor], extra: Sequence[bytes], look: Callable[[str, Tensor], None]) -> str:
    total, read = hashlib.sha256(), reader(tensors)
    for name in sorted(tensors):
        value = read(name).detach()
        look(name, value)
        update_digest(total, name, value)
        del value  # or it would be there beside the next one
    for part in extra:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()


def update_digest(total: Hash, name: str, value: Tensor) -> None:
    """Add a tensor to a hash: its name, dtype, shape and bytes."""
    value = value.cpu()
    total.update(canonical_json([name, str(value.dtype), list(value.shape)]))
    if value.numel():
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_finite(tensors: Mapping[str, Tensor], where: object = None) -> None:
    """Raise `ModelError` naming the first tensor with NaN or infinity; an attention mask may hold infinities."""
    for name, value in tensors.items():
        _check_finite(name, value, where)


def _check_finite(name: str, value: Tensor, where: object) -> None:
    if not (value.is_floating_point() or value.is_complex()) or value.is_meta:
        return
    nans = infinities = 0
    # In blocks: what is compared takes memory too.
    for block in torch.split(value.detach().reshape(-1), _BLOCK):
        block = block.float() if block.element_size() == 1 else block
        if not bool(torch.isfinite(block).all()):
            nans, infinities = nans + int(torch.isnan(block).sum()), infinities + int(torch.isinf(block).sum())
    if nans == infinities == 0 or (nans == 0 and "mask" in name.rpartition(".")[2]):
        return
    got = f"{nans} NaN and {infinities} infinite of {value.numel()}"
    place = name if where is None else f"{where}: {name}"
    raise ModelError(place, "finite weights", got, "take an earlier checkpoint: this one diverged or is damaged")


def check_present(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise `ModelError` naming the first tensor on the meta device, which has a shape and no numbers."""
    for name, value in tensors.items():
        if value.is_meta:
            raise ModelError(
                f"{where}: {name}", "weights with numbers", "one on the meta device", "load the weights first"
            )


def check_floating(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise `ModelError` unless at least one tensor is floating point: integers alone cannot be factorized."""
    about = described(tensors).values()
    if not any(v.is_floating_point() for v in about):
        kinds = sorted({str(v.dtype).removeprefix("torch.") for v in about})
        raise ModelError(
            where,
            "floating-point weights",
            f"only {', '.join(kinds) or 'an empty dict'}",
            "give the model before its quantization",
        )


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: object, arch: str) -> None:
    """Fill `module` with `tensors`; `ModelError` names the first ones that are missing, unexpected or of another shape.

    Counters of batch norm may be missing (they do not act in inference), and so may a second name of a tied tensor.
    """
    own = module.state_dict()
    present = {_place(own[n]) for n in tensors if n in own and own[n].numel()}
    missing = [
        n for n in own if n not in tensors and not n.endswith("num_batches_tracked") and _place(own[n]) not in present
    ]
    unexpected = [n for n in tensors if n not in own]
    shapes = [
        f"{n} {tuple(v.shape)} instead of {tuple(own[n].shape)}"
        for n, v in tensors.items()
        if n in own and tuple(v.shape) != tuple(own[n].shape)
    ]
    faults = [
        f"{what} {_first(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if faults:
        raise ModelError(where, f"exactly the tensors of {arch}", "; ".join(faults), "check --arch and --arch-arg")
    module.load_state_dict(dict(tensors), strict=False)


def _place(value: Tensor) -> tuple[int, tuple[int, ...]]:
    return value.data_ptr(), tuple(value.shape)


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
