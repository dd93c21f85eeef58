"""What statistics are worth, form by form, on layers of real networks: `make bench-forms`.

Every layer is decomposed at half its numbers three times: without data, with input moments, with both sides' moments.
The error is that of the layer's outputs on images and sentences that calibration did not see,

    √( E‖W x + b − Ŵ x − b'‖² / E‖W (x − μ)‖² ),

printed as the median over layers, beside the share of layers where the weighted form wins over its unweighted twin.
With `--curves`: points and processor seconds of the curves of all forms that "auto" chooses from, layer by layer as an
allocator asks for them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as stats
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lrcompress.calibrate import collect
from lrcompress.factorize import Factorization, Refused, Statistics, form, forms
from lrcompress.model import OpenedModel, open_model
from lrcompress.model.surgery import Layer, find_layers
from lrcompress.recipe import load, resolve
from lrcompress.verbs.sources import for_model

ROOT = Path(__file__).resolve().parents[2]
#: (recipe, calibration samples, held-out samples)
MODELS = {"resnet20": ("resnet20-cifar10", 1024, 1000), "minilm": ("minilm-sts", 256, 140)}
#: Too slow, or too far from useful at this size, to wait for here.
SLOW = {"als", "cp", "hadamard", "khatri_rao", "nmf", "shared", "tensor_train"}


def main() -> int:
    """Print the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description="Compare forms with and without statistics on held-out outputs.")
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(MODELS)}; all without")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all-forms", action="store_true", help="also the slow ones")
    parser.add_argument("--layers", type=int, default=0, help="only so many layers of each model")
    parser.add_argument("--curves", action="store_true", help="time the curves instead")
    options = parser.parse_args()
    if options.curves:
        return _print_curves(options.models or list(MODELS), options.layers, as_json=options.json)
    rows = (row for name in options.models or MODELS for row in measure(name, options.all_forms, options.layers))
    if options.json:
        print(json.dumps({"rows": list(rows)}))
        return 0
    print(f"{'model':10}{'form':14}{'layers':>7}{'plain':>8}{'inputs':>8}{'both':>8}{'inputs win':>12}{'seconds':>9}")
    for r in rows:
        numbers = f"{r['plain']:8.3f}{r['activation']:8.3f}{r['two_sided']:8.3f}"
        print(
            f"{r['model']:10}{r['form']:14}{r['layers']:7d}{numbers}{r['wins']:11.0%}{r['seconds']:10.1f}", flush=True
        )
    return 0


def _print_curves(models: list[str], most: int, *, as_json: bool) -> int:
    rows = [row for name in models for row in curves(name, most)]
    if as_json:
        print(json.dumps({"rows": rows}))
        return 0
    print(f"{'model':10}{'form':18}{'points':>8}{'seconds':>9}")
    for r in rows:
        print(f"{r['model']:10}{r['form']:18}{r['points']:8d}{r['seconds']:9.2f}", flush=True)
    return 0


def curves(name: str, most: int) -> list[dict[str, Any]]:
    """Return points and processor seconds of every form's curves under two-sided moments, and of all together."""
    recipe, opened, layers = _opened(name, most)
    seen = _moments(opened, layers, f"{recipe.path}:calibration", MODELS[name][1], gradients=True)
    spent = {key: [0, 0.0] for key in forms() if getattr(form(key), "AUTO", True)}
    for layer in layers:
        for key, total in spent.items():
            module = form(key)
            if layer.kind in module.LAYERS and getattr(module, "serves", lambda shape: True)(layer.shape):
                started = time.process_time()
                total[0] += len(module.curve(layer.weight, seen[layer.name]))
                total[1] += time.process_time() - started
    spent["all"] = [sum(n for n, _ in spent.values()), sum(t for _, t in spent.values())]
    return [{"model": name, "form": key, "points": n, "seconds": t} for key, (n, t) in spent.items()]


def measure(name: str, all_forms: bool, most: int) -> Iterator[dict[str, Any]]:
    """Yield one row per form that serves some layer of the model."""
    recipe, opened, layers = _opened(name, most)
    _, n_calibration, n_held_out = MODELS[name]
    seen = _moments(opened, layers, f"{recipe.path}:calibration", n_calibration, gradients=True)
    unseen = _moments(opened, layers, f"{recipe.path}:select", n_held_out, gradients=False)
    for key in forms():
        if key in SLOW and not all_forms:
            continue
        row = _row(key, layers, seen, unseen)
        if row is not None:
            yield {"model": name, **row}


def _opened(name: str, most: int) -> tuple[Any, OpenedModel, list[Layer]]:
    """Return the recipe of a model, the model, and the layers to look at."""
    recipe = load(ROOT / "recipes" / f"{MODELS[name][0]}.yaml")
    assert recipe.model.source is not None
    arch = None if recipe.model.arch is None else resolve(recipe, recipe.model.arch)
    opened = open_model(resolve(recipe, recipe.model.source), arch=arch, inputs=recipe.inputs)
    assert opened.module is not None
    layers = [n for n in find_layers(opened.module) if n.reason is None and n.kind in ("linear", "conv")]
    layers = [n for n in layers if "embeddings" not in n.name and "pooler" not in n.name and n.weight.numel() > 500]
    return recipe, opened, layers[:most] if most else layers


def _moments(
    opened: OpenedModel, layers: list[Layer], source: str, limit: int, *, gradients: bool
) -> dict[str, Statistics]:
    data = for_model(source, opened)
    data = data.take(slice(0, min(limit, len(data))))
    assert opened.module is not None
    return collect(opened, opened.module, data, layers, gradient_samples=limit // 2 if gradients else 0)


def _row(
    key: str, layers: list[Layer], seen: dict[str, Statistics], unseen: dict[str, Statistics]
) -> dict[str, Any] | None:
    module, started = form(key), time.perf_counter()
    errors: dict[str, list[float]] = {"plain": [], "activation": [], "two_sided": []}
    for layer in layers:
        if layer.kind not in module.LAYERS or not getattr(module, "serves", lambda shape: True)(layer.shape):
            continue
        rank = half(key, layer.shape)
        if rank is None:
            continue
        full = seen[layer.name]
        one_sided = Statistics(gram=full.gram, mean=full.mean, count=full.count)
        try:
            made = {
                label: module.decompose(layer.weight, rank, metric)
                for label, metric in (("plain", None), ("activation", one_sided), ("two_sided", full))
            }
        except Refused:
            continue
        for label, found in made.items():
            errors[label].append(output_error(layer.weight, found, unseen[layer.name]))
    if not errors["plain"]:
        return None
    wins = stats.mean(a < p for a, p in zip(errors["activation"], errors["plain"], strict=True))
    medians = {k: stats.median(v) for k, v in errors.items()}
    return {
        "form": key,
        "layers": len(errors["plain"]),
        **medians,
        "wins": wins,
        "seconds": time.perf_counter() - started,
    }


def half(key: str, shape: tuple[int, ...]) -> Any:
    """Return the largest rank that `--rank n` can mean at half the numbers, or None."""
    module, best = form(key), None
    top = min(shape[0], math.prod(shape[1:]))
    for n in range(1, top + 1):
        rank = module.clip(shape, n)
        if module.n_params(shape, rank) <= math.prod(shape) // 2:
            best = rank
    return best


def output_error(weight: torch.Tensor, found: Factorization, held_out: Statistics) -> float:
    """Return the relative error of the outputs under the moments of unseen data, the bias correction included."""
    error = (weight.double() - found.to_tensor().double()).reshape(len(weight), -1)
    w = weight.double().reshape(len(weight), -1)
    assert held_out.gram is not None and held_out.mean is not None
    gram, mean = held_out.gram.double(), held_out.mean.double()
    offset = error @ mean - (0 if found.bias_shift is None else found.bias_shift.double())
    total = float(((w @ gram) * w).sum())
    return math.sqrt((float(((error @ gram) * error).sum()) + float(offset.square().sum())) / total)


if __name__ == "__main__":
    sys.exit(main())
