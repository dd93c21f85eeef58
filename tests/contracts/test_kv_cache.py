"""A decoder with its key/value cache: prompt and single tokens through one graph, as the network answers at once."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lrcompress
from lrcompress.cli.main import run as command
from lrcompress.data import Data
from lrcompress.errors import CommandError
from lrcompress.model import InputSpec, open_model
from lrcompress.model.cache import with_cache
from lrcompress.model.checkpoint import load_compressed
from lrcompress.verbs.predict import predictor
from tests.support.nets import small


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A small decoder whose output layer is its embedding table."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("decoder") / "source"
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def ids(n=4, tokens=12, seed=0):
    return np.random.default_rng(seed).integers(0, 40, (n, tokens))


def test_a_tied_table_that_stays_dense_comes_back_tied(decoder, tmp_path):
    made = lrcompress.factorize(decoder, rank=4, exclude=["*embed*", "lm_head"], output=tmp_path / "compressed").model
    back = load_compressed(tmp_path / "compressed").module
    assert back.lm_head.weight is back.model.embed_tokens.weight
    x = torch.as_tensor(ids())
    torch.testing.assert_close(back(input_ids=x).logits, made(input_ids=x).logits)


def test_one_graph_reads_a_prompt_and_goes_on(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", input_ids=ids(), attention_mask=np.ones_like(ids()))
    np.savez("y.npz", input_ids=ids(seed=3), attention_mask=np.ones_like(ids()), y=ids(seed=3))
    assert command(["factorize", str(decoder), "--rank", "6", "--calib", "x.npz", "--quick", "-q"]) == 0
    assert command(["export", "--kv-cache", "--calib", "x.npz", "--slots", "none", "-q"]) == 0
    capsys.readouterr()
    inputs = {i["name"]: i["shape"] for i in json.loads((tmp_path / "exported/manifest.json").read_text())["inputs"]}
    assert inputs == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "past_plus_sequence"],
        "past_key_values.0.key": ["batch", 2, "past", 4], "past_key_values.0.value": ["batch", 2, "past", 4],
    }  # fmt: skip
    assert command(["validate", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["targets"]
    assert {o["name"] for o in rows[0]["outputs"]} == {"logits", "present.0.key", "present.0.value"}
    with np.load("exported/golden.npz") as golden:
        assert golden["input/past_key_values.0.key"].shape == (4, 2, 6, 4), "half of the tokens are in the cache"
        assert golden["input/attention_mask"].shape == (4, 12)
    opened = open_model(decoder)
    network = load_compressed(tmp_path / "compressed").module
    whole = predictor(opened, network)({"input_ids": ids(seed=5), "attention_mask": np.ones_like(ids())})["logits"]
    session = ort.InferenceSession("exported/model.onnx")
    names = [o.name for o in session.get_outputs()]
    past = {n: np.zeros((4, 2, 0, 4), np.float32) for n in inputs if n.startswith("past")}
    at, logits = 0, []
    for step in (5, 1, 1, 3, 1, 1):
        feeds = {
            "input_ids": ids(seed=5)[:, at : at + step],
            "attention_mask": np.ones((4, at + step), np.int64),
            **past,
        }
        answers = dict(zip(names, session.run(names, feeds), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in answers.items() if k.startswith("present")}
        at, logits = at + step, [*logits, answers["logits"]]
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5, rtol=1e-4)
    assert command(["validate", "--data", "y.npz", "--metric", "cosine_to_original", "--max-drop", "1", "--json"]) == 0
    capsys.readouterr()


def test_what_has_no_cache_is_told(tmp_path):
    net = open_model(small(), inputs=(InputSpec("x", "float32", ("batch", 3, 8, 8)),))
    with pytest.raises(CommandError, match="a Hugging Face decoder that generates text"):
        lrcompress.export(net, kv_cache=True, output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_cache_is_filled_with_what_the_network_saw(decoder):
    opened = with_cache(open_model(decoder))
    assert with_cache(opened) is opened
    given = {"input_ids": ids(), "attention_mask": np.ones_like(ids())}
    found = opened.filled(opened.module, given)
    assert found["input_ids"].shape == (4, 6) and found["past_key_values.0.key"].shape == (4, 2, 6, 4)
    rest = predictor(opened, opened.module)(found)["logits"]
    whole = predictor(open_model(decoder), opened.module)(given)["logits"]
    np.testing.assert_allclose(rest, whole[:, 6:], atol=1e-5)
    assert len(Data.of_arrays(given).mapped(lambda b: b)) == 4
