"""Data: what is read is what was written, and whatever does not fit ends in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lrcompress.data import Data, open_data
from lrcompress.errors import DataError


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


X = Spec("x", "float32", ("batch", 3, 4, 4))
ROW = Spec("x", "float32", ("batch", 5))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", image=rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8), y=np.arange(10) % 3)
    return tmp_path / "a.npz"


HOW = {"x": {"layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}}


def test_preprocess_is_layout_scale_mean_std(images: Path) -> None:
    data = open_data(images, inputs=(X,), preprocess=HOW)
    (batch,) = data.batches(10)
    raw = np.load(images)["image"].astype(np.float64)
    expected = ((raw / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch.inputs["x"], expected, atol=2e-6)
    assert batch.inputs["x"].dtype == np.float32
    assert batch.inputs["x"].flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(batch.labels, np.arange(10) % 3)


def test_batches_cover_each_sample_once_and_a_seed_reorders_them_the_same_way(images: Path) -> None:
    data = open_data(images, inputs=(X,), preprocess=HOW)
    assert [len(b.labels) for b in data.batches(4)] == [4, 4, 2]
    shuffled = [np.concatenate([b.inputs["x"] for b in data.batches(3, seed=s)]) for s in (1, 1, 2)]
    plain = next(iter(data.batches(10))).inputs["x"]
    np.testing.assert_array_equal(shuffled[0], shuffled[1])
    assert not np.array_equal(shuffled[0], shuffled[2])
    assert sorted(a.tobytes() for a in shuffled[2]) == sorted(a.tobytes() for a in plain)


def test_take_skip_limit_and_digest(images: Path) -> None:
    data = open_data(images, inputs=(X,), preprocess=HOW)
    part = open_data(images, inputs=(X,), preprocess=HOW, skip=2, limit=5)
    assert len(part) == 5
    np.testing.assert_array_equal(part.labels, data.labels[2:7])
    assert part.digest() == data.take(slice(2, 7)).digest() == data.take([2, 3, 4, 5, 6]).digest()
    assert part.digest() != data.digest()
    other = open_data(images, inputs=(X,), preprocess={"x": {**HOW["x"], "scale": 1.0}})
    assert other.digest() != data.digest()


def test_safetensors_csv_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    save_file({"x": x, "label": np.arange(6)}, tmp_path / "a.safetensors")
    lines = [json.dumps({"x": row.tolist(), "label": i}) for i, row in enumerate(x)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("a.safetensors", "a.jsonl"):
        data = open_data(tmp_path / name, inputs=(ROW,))
        (batch,) = data.batches(6)
        np.testing.assert_array_equal(batch.inputs["x"], x)
        assert data.labels.tolist() == list(range(6)) and data.labels.dtype == np.int64
    (tmp_path / "b.csv").write_text("score,a,b\n0.5,1,2\n1.5,3,4\n")
    two = (Spec("a", "float32", ("batch",)), Spec("b", "int64", ("batch",)))
    (batch,) = open_data(tmp_path / "b.csv", inputs=two).batches(2)
    assert batch.inputs["a"].tolist() == [1, 3] and batch.inputs["b"].dtype == np.int64
    assert batch.labels.tolist() == [0.5, 1.5]


def test_a_callable_may_return_arrays_a_dataset_or_a_loader(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "import numpy as np, torch\n"
        "X = torch.arange(20.).reshape(4, 5); Y = torch.tensor([0, 1, 0, 1])\n"
        "def arrays(n=4): return {'x': X[:n].numpy(), 'y': Y[:n].numpy()}\n"
        "def pair(): return X, Y\n"
        "def dataset(): return torch.utils.data.TensorDataset(X, Y)\n"
        "def loader(): return torch.utils.data.DataLoader(dataset(), batch_size=3)\n"
        "def nothing(): return 3\n"
    )
    expected = torch.arange(20.0).reshape(4, 5).numpy()
    for name in ("arrays", "pair", "dataset", "loader"):
        data = open_data(f"{tmp_path}/code.py:{name}", inputs=(ROW,))
        np.testing.assert_array_equal(next(iter(data.batches(9))).inputs["x"], expected)
        assert data.labels.tolist() == [0, 1, 0, 1]
    assert len(open_data(f"{tmp_path}/code.py:arrays", inputs=(ROW,), args={"n": 2})) == 2
    for source, expected_text in (("arrays", "args"), ("nothing", "DataLoader"), ("array", "there are")):
        with pytest.raises(DataError, match=expected_text):
            open_data(f"{tmp_path}/code.py:{source}", inputs=(ROW,), args={"k": 1} if source == "arrays" else None)


def test_a_folder_of_images_is_resized_cropped_and_labelled(tmp_path: Path) -> None:
    from PIL import Image

    for i, size in enumerate([(8, 4), (4, 8), (4, 4)]):
        Image.new("RGB", size, (10 * i, 0, 255)).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.tsv").write_text("file\tclass_index\n0.png\t2\n1.png\t0\n2.png\t1\n")
    data = open_data(tmp_path, inputs=(X,), preprocess={"x": {"layout": "nhwc_to_nchw", "scale": 1 / 255}})
    (batch,) = data.batches(3)
    assert batch.inputs["x"].shape == (3, 3, 4, 4)
    assert batch.labels.tolist() == [2, 0, 1]
    np.testing.assert_allclose(batch.inputs["x"][:, 2], 1.0)
    with pytest.raises(DataError, match="uint8"):
        open_data(tmp_path, inputs=(X,))
    (tmp_path / "labels.tsv").write_text("file\tclass_index\n../0.png\t2\n")
    with pytest.raises(DataError, match="inside the folder"):
        open_data(tmp_path, inputs=(X,), preprocess=HOW)


def save(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "bad.npz", **arrays)
    return tmp_path / "bad.npz"


GOOD = np.zeros((4, 5), np.float32)
HOLE = GOOD.copy()
HOLE[2, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "expected", "got"),
    [
        ({"x": np.zeros((4, 5), np.uint8)}, "float32 values", "uint8 images"),
        ({"x": np.zeros((4, 6), np.float32)}, "samples of shape (5)", "(6)"),
        ({"x": np.zeros((4, 5, 1), np.float32)}, "samples of shape (5)", "(5, 1)"),
        ({"x": HOLE}, "finite numbers", "NaN or infinity in sample 2"),
        ({"x": GOOD[:0]}, "at least one sample", "none"),
        ({"x": GOOD, "y": np.zeros(3, int)}, "the same number of samples in every array", "x: 4, labels: 3"),
        ({"a": GOOD, "b": GOOD}, "arrays named x", "a, b"),
        ({"x": np.array([["a"] * 5])}, "numbers (float32)", "<U1"),
        ({"y": np.zeros(3, int)}, "at least one array of inputs", "none"),
        ({"x": np.float32(1)}, "an array whose first axis is the sample", "a single number"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str, got: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(save(tmp_path, **arrays), inputs=(ROW,))
    assert (caught.value.expected, caught.value.got) == (expected, got)
    assert caught.value.exit_code == 9
    assert "\n" not in str(caught.value)


def test_ids_must_be_whole_and_in_range(tmp_path: Path) -> None:
    ids = Spec("ids", "int32", ("batch", "sequence"))
    assert len(open_data(save(tmp_path, ids=np.ones((2, 7), np.int64)), inputs=(ids,))) == 2
    with pytest.raises(DataError, match="whole numbers"):
        open_data(save(tmp_path, ids=np.ones((2, 7))), inputs=(ids,))
    with pytest.raises(DataError, match="values that int32 holds"):
        open_data(save(tmp_path, ids=np.full((2, 7), 2**40)), inputs=(ids,))


def test_hostile_and_broken_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}], dtype=object))
    (tmp_path / "cut.npz").write_bytes(save(tmp_path, x=GOOD).read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 30)
    (tmp_path / "ragged.csv").write_text("x,y\n1,2\n3\n")
    (tmp_path / "latin.tsv").write_bytes(b"text\tlabel\n\xe9\xff\t1\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.bin").write_bytes(b"")
    for name in (
        "pickle.npz",
        "cut.npz",
        "cut.safetensors",
        "ragged.csv",
        "latin.tsv",
        "empty.jsonl",
        "a.bin",
        "gone.npz",
    ):
        with pytest.raises(DataError) as caught:
            open_data(tmp_path / name, inputs=(ROW,))
        assert name in caught.value.where and "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [{"layout": "sideways"}, {"mean": (1.0, 2.0)}, {"scale": 1, "sclae": 2}])
def test_preprocess_that_does_not_fit(images: Path, step: dict[str, object]) -> None:
    with pytest.raises(DataError):
        open_data(images, inputs=(X,), preprocess={"x": {"layout": "nhwc_to_nchw", **step}})


def test_skip_beyond_the_end(images: Path) -> None:
    with pytest.raises(DataError, match="10 rows"):
        open_data(images, inputs=(X,), preprocess=HOW, skip=10)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "tok"
    )
    return tmp_path / "tok"


IDS = (Spec("input_ids", "int64", ("batch", "sequence")), Spec("attention_mask", "int64", ("batch", "sequence")))


def test_two_text_columns_are_pairs(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "p.tsv").write_text('score\tsentence1\tsentence2\n1.0\ta "b\ta\n2.5\tb b b\tc d\n3.0\tc\tb\n')
    data = open_data(tmp_path / "p.tsv", inputs=IDS, tokenizer=tokenizer)
    assert data.pairs and len(data) == 6 and data.labels.tolist() == [1.0, 2.5, 3.0]
    first, second = data.batches(4)
    assert len(first.inputs["input_ids"]) == 4 and first.labels.tolist() == [1.0, 2.5]
    assert first.inputs["attention_mask"].sum(1).tolist() == [3, 1, 3, 2]
    assert second.inputs["input_ids"].shape == (2, 1)
    shuffled = list(data.batches(2, seed=3))
    assert sorted(float(b.labels[0]) for b in shuffled) == [1.0, 2.5, 3.0]
    assert data.take(slice(2, 6)).pairs and data.take(slice(2, 6)).labels.tolist() == [2.5, 3.0]
    single = data.take([0, 2, 3])
    assert not single.pairs and single.labels is None and len(single) == 3
    assert len(open_data(tmp_path / "p.tsv", inputs=IDS, tokenizer=tokenizer, skip=1, limit=1)) == 2
    with pytest.raises(DataError, match="tokenizer"):
        open_data(tmp_path / "p.tsv", inputs=IDS)
    with pytest.raises(DataError, match=r"columns\.text"):
        open_data(tmp_path / "p.tsv", inputs=IDS, tokenizer=tokenizer, columns={"text": "sentence"})


def test_of_arrays() -> None:
    data = Data.of_arrays({"x": GOOD}, np.arange(4))
    assert len(data) == 4 and next(iter(data.batches(4))).inputs["x"] is not None
