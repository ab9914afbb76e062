"""The same preferences about images from files, tables and data sets of `datasets`."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import vision
from data_sets import inspect

from megatron_prefix.data import PreferenceDataset
from megatron_prefix.data.build import BuildOptions, build_dataset, from_hf_dataset

datasets = pytest.importorskip("datasets")

QUESTIONS = ["What is it?", "Which colour?", "How many?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return vision.make(tmp_path_factory.mktemp("model"), "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        vision.picture(40 + 20 * i, 60, i).save(path / f"{i}.png")
    return path


def texts(i):
    return {"question": QUESTIONS[i], "chosen": f"It is {i}.", "rejected": "I do not know."}


def turns(i):
    parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[i]}]
    return {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": f"It is {i}."}]}],
        "rejected": [
            {"role": "assistant", "content": [{"type": "text", "text": "I do not know."}]}
        ],
    }


def sharegpt(i):
    return {
        "conversations": [{"from": "human", "value": f"<image>{QUESTIONS[i]}"}],
        "chosen": {"from": "gpt", "value": f"It is {i}."},
        "rejected": {"from": "gpt", "value": "I do not know."},
    }


def rows(folder, layout):
    """Three records in a layout; the pictures are bytes, base64 or paths."""
    for i in range(3):
        content = (folder / f"{i}.png").read_bytes()
        yield {
            "rlaif-v": {"image": {"bytes": content, "path": "x"}, **texts(i), "image_path": "x"},
            "rlhf-v": {"image": {"bytes": content, "path": ""}, "text": json.dumps(texts(i))},
            "trl": {"images": [{"bytes": content, "path": None}], **turns(i)},
            "llama-factory": {"images": [f"{i}.png"], **sharegpt(i)},
            "base64": {"images": [{"bytes": base64.b64encode(content).decode()}], **turns(i)},
        }[layout]


@pytest.fixture(scope="module")
def expected(model, folder, tmp_path_factory):
    """The data set of records in JSON with paths."""
    lines = [json.dumps({"image": f"{i}.png", **texts(i)}) + "\n" for i in range(3)]
    (folder / "in.jsonl").write_text("".join(lines))
    build_dataset([folder / "in.jsonl"], str(model), prefix := tmp_path_factory.mktemp("d") / "x")
    return PreferenceDataset(prefix)


def same(data, expected):
    return data.fingerprint == expected.fingerprint and np.array_equal(data.tokens, expected.tokens)


@pytest.mark.parametrize("layout", ["rlaif-v", "rlhf-v", "trl", "llama-factory"])
def test_layouts_in_parquet(model, folder, tmp_path, expected, layout):
    import pyarrow
    from pyarrow import parquet

    # beside the pictures, as paths count from there
    path = folder / f"{layout}.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([*rows(folder, layout)]), path)
    build_dataset([path], str(model), tmp_path / "out")
    assert same(PreferenceDataset.verified(tmp_path / "out"), expected)


def test_base64_in_json(model, folder, tmp_path, expected):
    (tmp_path / "in.json").write_text(json.dumps([*rows(folder, "base64")]))
    build_dataset([tmp_path / "in.json"], str(model), tmp_path / "out", BuildOptions(workers=2))
    assert same(PreferenceDataset(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "memory"])
def test_data_sets_with_images_keep_their_bytes(model, folder, tmp_path, expected, kind):
    columns = {name: [texts(i)[name] for i in range(3)] for name in texts(0)}
    columns["images"] = [[str(folder / f"{i}.png")] for i in range(3)]
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in texts(0)},
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    if kind == "memory":
        assert same(from_hf_dataset(data, str(model)), expected)
        return
    if kind == "parquet":
        (tmp_path / "in").mkdir()
        data.to_parquet(tmp_path / "in" / "a.parquet")
    else:
        data.save_to_disk(str(tmp_path / "in"))
    build_dataset([tmp_path / "in"], str(model), tmp_path / "out")
    assert same(PreferenceDataset(tmp_path / "out"), expected)


def test_pictures_in_memory_become_png(model, folder, tmp_path, expected):
    pictures = [vision.picture(40 + 20 * i, 60, i) for i in range(3)]
    data = datasets.Dataset.from_list([{"image": p, **texts(i)} for i, p in enumerate(pictures)])
    built = from_hf_dataset(data, str(model))
    assert np.array_equal(built.tokens, expected.tokens)
    for i, picture in enumerate(pictures):
        assert np.array_equal(built.images.picture(i), picture)
        assert built.images.bytes(i).startswith(b"\x89PNG")


def test_plain_texts_get_the_placeholder(folder, tmp_path):
    for family in vision.FAMILIES:
        directory = vision.make(tmp_path / family, family)
        record = {"images": ["0.png", "1.png"], "prompt": "A <image> and B <image>: <eos>"}
        record |= {"chosen": " red", "rejected": " blue"}
        (folder / "plain.jsonl").write_text(json.dumps(record))
        build_dataset([folder / "plain.jsonl"], str(directory), tmp_path / f"{family}.out")
        tree = PreferenceDataset(tmp_path / f"{family}.out")[0]
        reference, place = vision.Reference(directory), vision.PLACES[family]
        pictures = [vision.picture(40, 60, 0), vision.picture(60, 60, 1)]
        before, _ = reference(f"A {place} and B {place}: ", pictures)
        spelled = [reference.tokenizer.convert_tokens_to_ids(c) for c in "<eos>"]
        after = reference.tokenizer(" red<eos>", add_special_tokens=False)["input_ids"]
        tokens, loss_start = tree.response_tokens(0)
        assert tokens.tolist() == [*before, *spelled, *after]
        assert loss_start == len(before) + len(spelled)


def test_inspect_shows_images(expected, capsys, tmp_path):
    code, out, _ = inspect(capsys, expected.prefix, "--verify")
    assert code == 0 and "images  3 of 0.0 MB in 3 places, 48 tokens (" in out
    code, out, _ = inspect(capsys, expected.prefix, "--tree", 1, "--json")
    (image,) = json.loads(out)["tree"]["images"]
    assert image["size"] == [60, 60] and image["tokens"] == 16 and image["node"] == 0
    assert image["sha256"] == expected.images.hashes[1].tobytes().hex()
    _, out, _ = inspect(capsys, expected.prefix, "--tree", 1)
    assert "'user: [image 1: 16 tokens]Which colour?" in out and "60 x 60 pixels" in out
    pytest.importorskip("matplotlib")
    picture = tmp_path / "tree.svg"
    assert inspect(capsys, expected.prefix, "--tree", 1, "--picture", picture)[0] == 0
    assert "#e8c547" in picture.read_text()


def test_a_processor_in_memory_is_that_of_its_directory(model, folder, expected):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(model)
    rows = [{"images": [str(folder / f"{i}.png")], **texts(i)} for i in range(3)]
    data = datasets.Dataset.from_list(rows)
    built = from_hf_dataset(data, processor)
    assert same(built, expected)
    assert built.images.processor == expected.images.processor


def test_bytes_of_images_end_a_chunk(model, folder, tmp_path, monkeypatch):
    """A chunk must not hold thousands of images: their bytes count as those of texts do."""
    import pyarrow
    from pyarrow import parquet

    from megatron_prefix.data.build.chunks import read_chunks
    from megatron_prefix.data.read import ExampleReader, Inputs

    parquet.write_table(pyarrow.Table.from_pylist([*rows(folder, "trl")]), tmp_path / "a.parquet")
    reader, inputs = ExampleReader(), Inputs([tmp_path / "a.parquet"])
    assert [len(records) for records, _ in read_chunks(inputs, reader)] == [3]
    monkeypatch.setattr("megatron_prefix.data.build.chunks.CHUNK_BYTES", 3000)
    sizes = [(folder / f"{i}.png").stat().st_size for i in range(3)]
    assert min(sizes) > 3000
    assert [len(records) for records, _ in read_chunks(inputs, reader)] == [1, 1, 1]
