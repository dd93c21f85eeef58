"""The inputs of a Hugging Face model: from optimum where it knows the model, from `forward` where it does not.

The only file that imports optimum. Its registry is empty until `model_configs` is imported.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn

from .inputs import InputSpec

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForConditionalGeneration": "text2text-generation",
}
#: `forward` counts positions itself, and a cache has no place in a graph that is run once.
_LEFT_OUT = ("position_ids", "past_key_values", "use_cache_branch")
_IDS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
_WORDS = {
    "batch_size": "batch", "sequence_length": "sequence", "encoder_sequence_length": "sequence", "past_sequence_length": "past",
    "past_sequence_length + sequence_length": "past_plus_sequence",
}  # fmt: skip


def task_of(architecture: str) -> str:
    """Return the task that the name of an architecture tells."""
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), "feature-extraction")


def inputs_of(module: nn.Module, config: Any, task: str) -> tuple[InputSpec, ...]:
    """Return the inputs of a transformers model with their dynamic axes."""
    names = set(inspect.signature(module.forward).parameters)
    found = _from_optimum(config, task)
    return tuple(s for s in found if s.name in names) if found else _from_forward(module, config, names)


def cached_inputs_of(module: nn.Module, config: Any, task: str) -> tuple[InputSpec, ...]:
    """Return the inputs of a decoder with its key/value cache among them; nothing where optimum does not know it."""
    names = set(inspect.signature(module.forward).parameters)
    found = _from_optimum(config, task, past=True)
    return tuple(s for s in found if s.name in names or s.name.startswith("past_key_values."))


def _from_optimum(config: Any, task: str, *, past: bool = False) -> tuple[InputSpec, ...]:
    try:
        import optimum.exporters.onnx.model_configs  # noqa: F401
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = TasksManager.get_exporter_config_constructor(
                "onnx", model_type=config.model_type, task=task, library_name="transformers"
            )
            onnx_config = make(config, use_past=True, use_past_in_inputs=True) if past else make(config)
            axes = onnx_config.inputs
            dummies = onnx_config.generate_dummy_inputs(framework="pt", batch_size=2, sequence_length=9)
            if past:
                for i, pair in enumerate(dummies.pop("past_key_values", ())):
                    dummies |= {f"past_key_values.{i}.{k}": v for k, v in zip(("key", "value"), pair, strict=True)}
    except (KeyError, ValueError, AttributeError, TypeError, NotImplementedError, RuntimeError):
        return ()  # a model it does not know: forward tells
    found = []
    for name, dynamic in axes.items():
        if (
            name.startswith(_LEFT_OUT[: 1 if past else None])
            or name not in dummies
            or not hasattr(dummies[name], "shape")
        ):
            continue
        shape: list[int | str] = [int(d) for d in dummies[name].shape]
        for axis, word in dynamic.items():
            if axis == 0 or name in _IDS or name.startswith("past_key_values"):
                shape[axis] = _WORDS.get(word, word.replace(" ", "_").replace("+", "plus"))
        if name == "pixel_values":
            shape = _pixels(config, shape)
        found.append(InputSpec(name, str(dummies[name].dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)


def _from_forward(module: nn.Module, config: Any, names: set[str]) -> tuple[InputSpec, ...]:
    if "pixel_values" in names and "input_ids" not in names:
        return (InputSpec("pixel_values", "float32", tuple(_pixels(config, ["batch", 3, 224, 224]))),)
    if "input_ids" not in names:
        return ()
    wanted = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) and config.type_vocab_size > 1:
        wanted.append("token_type_ids")
    return tuple(InputSpec(n, "int64", ("batch", "sequence")) for n in wanted if n in names)


def _pixels(config: Any, shape: list[int | str]) -> list[int | str]:
    size = getattr(config, "image_size", None)
    sides = [size, size] if isinstance(size, int) else (list(size) if isinstance(size, list | tuple) else shape[2:])
    return ["batch", getattr(config, "num_channels", shape[1]), *sides]
