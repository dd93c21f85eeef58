"""Hugging Face folders: `config.json` with weights beside it, opened offline and without the folder's own code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LrcompressWarning, ModelError
from .opened import OpenedModel
from .state_dicts import float32
from .stored import open_index, open_stored
from .tasks import inputs_of, task_of
from .tensors import check_floating, examine

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}
#: What a checkpoint keeps of a folder: configuration and tokenizer, nothing with weights or code.
_KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "preprocessor_config.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def is_folder(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file()


def open_folder(folder: Path, *, trust_remote_code: bool = False) -> OpenedModel:
    """Open a folder with its weights, in float32, with the class that `architectures` names."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    tensors = _read_weights(folder)
    check_floating(tensors, folder)
    kept = b"".join(
        (folder / n).read_bytes()
        for n in ("config.json", "modules.json", "1_Pooling/config.json")
        if (folder / n).is_file()
    )
    digest = examine(tensors, folder, kept)
    kind = _class(folder, config)
    with _loading(folder):
        module, report = kind.from_pretrained(
            None,
            config=_config(kind, config),
            state_dict=float32(tensors),
            output_loading_info=True,
            dtype=torch.float32,
        )
    _check_report(folder, report, module, tensors)
    return _opened(folder, config, module, digest)


def rebuild_folder(folder: Path) -> OpenedModel:
    """Build the class that a checkpoint's `config.json` names, without its weights."""
    config = read_config(folder)
    kind = _class(folder, config)
    with _loading(folder):
        from transformers.modeling_utils import no_init_weights

        with no_init_weights():
            module = kind._from_config(_config(kind, config), dtype=torch.float32)
        module.tie_weights()  # which goes with the initialization that was left out
    return _opened(folder, config, module, "")


def copy_config(source: Path, folder: Path) -> list[str]:
    """Copy configuration and tokenizer, byte for byte; return the names."""
    names = [n for n in _KEPT if (source / n).is_file()]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return names


def read_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return `config.json`; `ModelError` if it names no class, or code of its own that is not trusted."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(path, "a JSON configuration", str(e), "fetch it again") from e
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(
            path,
            "a configuration with architectures",
            "none",
            "name the weight file in the folder, with --arch pkg.mod:callable to make it a network",
        )
    if config.get("quantization_config"):
        raise ModelError(path, "floating-point weights", "a quantized model", "give the model before its quantization")
    if config.get("auto_map"):
        if not trust_remote_code:
            got = "auto_map: the folder brings code of its own"
            raise ModelError(
                path, "a class of transformers", got, "--trust-remote-code if you trust where it comes from"
            )
        config["_lrcompress_remote"] = True
    return config


def _class(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the model class; from the folder itself only where `read_config` was told to trust it."""
    name = config["architectures"][0]
    with offline(), _quiet():
        if config.get("_lrcompress_remote"):
            return _remote_class(folder, config, name)
        import transformers

        kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
        fits = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if not fits or kind.config_class is None:
            got = f"{name!r}, which transformers {transformers.__version__} does not have"
            raise ModelError(
                folder / "config.json", "a model class of transformers", got, "or name the weight file and --arch"
            )
        return kind


def _remote_class(folder: Path, config: Mapping[str, Any], name: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto = {k: v[0] if isinstance(v, list) else v for k, v in config["auto_map"].items()}
    wanted = next((v for k, v in auto.items() if k.startswith("AutoModel") and str(v).rpartition(".")[2] == name), None)
    if wanted is None or "--" in wanted:
        raise ModelError(
            folder / "config.json",
            f"an auto_map entry in this folder for {name}",
            wanted or "none",
            "fetch the code into the folder",
        )
    try:
        kind = get_class_from_dynamic_module(wanted, str(folder), local_files_only=True)
        if "AutoConfig" in auto:
            kind.config_class = get_class_from_dynamic_module(auto["AutoConfig"], str(folder), local_files_only=True)
    except Exception as e:  # the folder's own code may raise anything
        raise ModelError(
            folder, "code that can be imported", f"{type(e).__name__}: {e}", "install what it needs"
        ) from e
    return kind


def _config(kind: Any, config: Mapping[str, Any]) -> Any:
    """Return the configuration object: no cache, outputs by name, and no attention kernel of the file's choosing."""
    plain = {
        k: v
        for k, v in config.items()
        if k not in ("_lrcompress_remote", "attn_implementation", "_attn_implementation", "use_kernels")
    }
    plain.update(
        return_dict=True, use_cache=False, output_attentions=False, output_hidden_states=False, torchscript=False
    )
    plain.pop("torch_dtype", None)
    plain.pop("dtype", None)
    return kind.config_class.from_dict(plain)


def _read_weights(folder: Path) -> Mapping[str, Tensor]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return open_index(path) if name.endswith(".json") else open_stored(path)
    raise ModelError(folder, f"one of {', '.join(WEIGHTS)}", "none of them", "fetch the weights too")


def _check_report(folder: Path, report: Mapping[str, Any], module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    missing, mismatched = sorted(report["missing_keys"]), sorted(str(k) for k in report["mismatched_keys"])
    errors = list(report.get("error_msgs") or ())
    if missing or mismatched or errors:
        faults = [f"missing {', '.join(missing[:3])}"] if missing else []
        faults += [f"shape {', '.join(mismatched[:3])}"] if mismatched else []
        faults += [str(e) for e in errors[:1]]
        remedy = "config.json and the weights belong to different models"
        raise ModelError(folder, f"exactly the tensors of {type(module).__name__}", "; ".join(faults), remedy)
    unexpected = sorted(k for k in report["unexpected_keys"] if not k.endswith("position_ids"))
    if unexpected:
        text = (
            f"{folder}: {len(unexpected)} tensors are not used by {type(module).__name__}: {', '.join(unexpected[:3])}"
        )
        warnings.warn(text, LrcompressWarning, stacklevel=4)


def _opened(folder: Path, config: Mapping[str, Any], module: nn.Module, digest: str) -> OpenedModel:
    module.eval()
    name = config["architectures"][0]
    task = task_of(name)
    extra = {"folder": str(folder), "task": task, "class": name, "pooling": _pooling(folder)}
    if config.get("_lrcompress_remote"):
        extra["remote_code"] = True
    with offline(), _quiet():
        inputs = inputs_of(module, module.config, task)
    return OpenedModel(folder, "huggingface", digest, module, inputs=inputs, extra=extra)


def _pooling(folder: Path) -> str | None:
    """Return "mean" where the folder says that token vectors are averaged into one of the sentence."""
    if not (folder / "modules.json").is_file() or not (folder / "1_Pooling/config.json").is_file():
        return None
    try:
        modes = json.loads((folder / "1_Pooling/config.json").read_text())
        chosen = [k for k, v in modes.items() if k.startswith("pooling_mode_") and v is True]
    except (ValueError, AttributeError) as e:
        raise ModelError(folder / "1_Pooling/config.json", "a JSON configuration", str(e), "fetch it again") from e
    if chosen == ["pooling_mode_mean_tokens"] or modes.get("pooling_mode") == "mean":
        return "mean"
    text = f"{folder}: pooling {', '.join(chosen) or 'of no known kind'} is left to you; token vectors are the output"
    warnings.warn(text, LrcompressWarning, stacklevel=4)
    return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Set the offline and no-telemetry switches that the environment does not set itself, for as long as this lasts."""
    unset = [k for k in _OFFLINE if k not in os.environ]
    os.environ.update({k: _OFFLINE[k] for k in unset})
    try:
        yield
    finally:
        for key in unset:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("always", category=LrcompressWarning)
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Turn what transformers raises about a configuration into one line."""
    with offline(), _quiet():
        try:
            yield
        except (MemoryError, ModelError):
            raise
        except Exception as e:  # a configuration is data: it can lead transformers into any error
            got = f"{type(e).__name__}: {e}"
            raise ModelError(
                folder, "a configuration that its class accepts", got, "config.json is damaged or of another version"
            ) from e
