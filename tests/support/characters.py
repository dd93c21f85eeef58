"""The character LSTM of the assets: its weights by the names of `archs.CharStep`, its text, and what it reads on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lrcompress.data import Data
from lrcompress.model import InputSpec

INPUTS = (
    InputSpec("ids", "int64", ("batch",)),
    InputSpec("h", "float32", ("batch", 2, 128)),
    InputSpec("c", "float32", ("batch", 2, 128)),
)
_FOLDER = "models/charrnn_shakespeare"
Arrays = Mapping[str, np.ndarray]


def weights(assets: Path) -> dict[str, np.ndarray]:
    """Return the state of `CharStep`; a cell's rows are outputs here, and columns in the file."""
    found = load_file(assets / _FOLDER / "model.safetensors")
    cell = "rnnlm/multi_rnn_cell/cell_{}/basic_lstm_cell/"
    named = {
        "embedding.weight": found["embedding"],
        "softmax.weight": found["rnnlm/softmax_w"].T,
        "softmax.bias": found["rnnlm/softmax_b"],
    }
    for k in (0, 1):
        named[f"cell{k}.weight"] = found[cell.format(k) + "weights"].T
        named[f"cell{k}.bias"] = found[cell.format(k) + "biases"]
    return {k: np.ascontiguousarray(v) for k, v in named.items()}


def rows(assets: Path, n: int, length: int, *, before: int = 0) -> np.ndarray:
    """Return the last `n` rows of `length` characters of the text (n, length), or those that many characters earlier."""
    vocabulary = json.loads((assets / _FOLDER / "vocab.json").read_text())
    text = (assets / "data/tinyshakespeare.txt").read_text()
    ids = np.array([vocabulary[t] for t in text if t in vocabulary])
    return ids[len(ids) - before - n * length : len(ids) - before].reshape(n, length)


def walk(
    predict: Callable[[dict[str, np.ndarray]], Arrays], ids: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield what a network reads at every character but the last, from a state of zeros on, and the loss of the next (rows,)."""
    state = [np.zeros((len(ids), 2, 128), np.float32) for _ in range(2)]
    for t in range(ids.shape[1] - 1):
        read = {"ids": ids[:, t], "h": state[0], "c": state[1]}
        logits, *state = (np.asarray(v) for v in predict(read).values())
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        nll = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(ids)), ids[:, t + 1]]
        yield read, nll


def read_on(predict: Callable[[dict[str, np.ndarray]], Any], ids: np.ndarray) -> Data:
    """Return everything that a network reads on a text, states included."""
    steps = [read for read, _ in walk(predict, ids)]
    return Data.of_arrays({k: np.concatenate([s[k] for s in steps]) for k in steps[0]})
