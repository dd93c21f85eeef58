"""Every kind of adapter on every kind of layer in every form that has a place for it, as small as possible."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrcompress.adapt import adapter_class, kinds
from lrcompress.factorize import form
from lrcompress.model.surgery import replace_layer

#: Layer, input, and the forms it is factorized with besides staying dense.
LAYERS = {
    "linear": (lambda: nn.Linear(14, 10), (3, 5, 14), ("svd", "pivoted", "als", "kronecker", "tensor_train")),
    "linear_no_bias": (lambda: nn.Linear(6, 9, bias=False), (2, 6), ()),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=3), (2, 6, 11), ("svd", "spatial_svd", "cp", "kronecker")),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7), ("svd", "tucker", "spatial_svd", "pivoted", "pivoted_tucker", "pivoted_spatial", "cp", "kronecker")),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5), ("svd",)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1)), (2, 4, 3, 4, 4), ("svd", "tucker", "cp", "kronecker")),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, stride=(1, 2)), (2, 4, 8, 8), ("spatial_svd", "cp", "kronecker")),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6), ("tucker", "cp")),
    "circular": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9), ()),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 6), ("grouped_svd",)),
    "two_groups": (lambda: nn.Conv1d(6, 4, 3, groups=2, padding_mode="replicate", padding=1), (2, 6, 9), ()),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 6, 6), ()),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 4, 4), ()),
    "transposed_grouped": (lambda: nn.ConvTranspose1d(6, 8, 4, groups=2, stride=2, dilation=2), (2, 6, 5), ()),
    "transposed_3d": (lambda: nn.ConvTranspose3d(4, 4, 2, bias=False), (1, 4, 3, 3, 3), ()),
    "embedding": (lambda: nn.Embedding(24, 10, padding_idx=0), (4, 3), ("svd",)),
}  # fmt: skip


#: Options of the kinds that change their tensors.
OPTIONS = {
    "lora": [{}, {"rslora": True}, {"tucker": True}],
    "loha": [{}, {"tucker": True}],
    "lokr": [{}, {"decompose_both": True, "factor": 2}, {"tucker": True, "factor": 2}],
    "lokh": [{}],
    "core": [{}],
}


#: Every kind goes on every layer in every form, but a core only where the chain of factors passes one activation:
#: why not, by form and kind of layer.
WITHOUT_CORE = {
    ("dense", "linear"): "not factorized", ("dense", "conv"): "not factorized", ("dense", "embedding"): "not factorized",
    ("dense", "conv_transpose"): "not factorized",
    ("hadamard", "linear"): "rebuilt", ("hadamard", "conv"): "rebuilt", ("hadamard", "embedding"): "rebuilt",
    ("khatri_rao", "linear"): "rebuilt", ("khatri_rao", "conv"): "rebuilt", ("khatri_rao", "embedding"): "rebuilt",
    ("kronecker", "embedding"): "all of its digits", ("tensor_train", "embedding"): "all of its digits",
}  # fmt: skip


KIND_OF = {
    layer: "embedding" if layer == "embedding" else "linear" if "linear" in layer else "conv_transpose" if "transposed" in layer else "conv"
    for layer in LAYERS
}  # fmt: skip


CASES = [
    (kind, layer, form_name, options)
    for kind in kinds()
    for layer, (_, _, forms) in LAYERS.items()
    for form_name in ("dense", *forms)
    if (form_name, KIND_OF[layer]) not in WITHOUT_CORE or not adapter_class(kind).in_core
    for options in OPTIONS.get(kind, [{}])
]


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def case(layer: str, form_name: str) -> tuple[nn.Sequential, Tensor]:
    """Return a network of that one layer, factorized, and inputs."""
    make, shape, _ = LAYERS[layer]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()
    if form_name != "dense":
        weight = model[0].weight.detach()
        if form_name == "grouped_svd":
            weight = weight.reshape(model[0].groups, -1, *weight.shape[1:])
        chosen = form(form_name)
        replace_layer(model, "0", chosen.decompose(weight, chosen.clip(tuple(weight.shape), 4)))
    if layer == "embedding":
        return model, torch.randint(0, 24, shape, generator=generator())
    return model, torch.randn(shape, generator=generator(), dtype=torch.float64)


def random_values(adapter: nn.Module, std: float = 0.3) -> None:
    """Fill an adapter with random numbers."""
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(i + 1), dtype=torch.float64) * std)
