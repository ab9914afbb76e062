"""Records with images through a whole build: tokens, the store, sharing, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vision

from megatron_prefix.data import PreferenceDataset
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.store.verify import verify_dataset

SIZES = [(84, 56), (30, 90), (28, 28), (120, 31), (1, 60)]


@pytest.fixture(scope="module", params=vision.FAMILIES)
def directory(request, tmp_path_factory):
    return vision.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return vision.make(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures 0.png to 4.png."""
    path = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        vision.picture(*size, seed=i).save(path / f"{i}.png")
    return path


IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


RECORDS = [
    {"images": ["0.png"], "prompt": [turn("user", IMAGE, text("What is it?"))]},
    {"images": ["1.png", "0.png"], "prompt": [turn("user", text("Now"), IMAGE, text("or"), IMAGE)]},
    {
        "images": ["2.png", "2.png", "3.png"],
        "prompt": [
            turn("system", text("Be brief.")),
            turn("user", IMAGE, IMAGE, text("Equal?")),
            turn("assistant", text("Yes.")),
            turn("user", text("And here?"), IMAGE),
        ],
    },
    {"images": [], "prompt": [turn("user", text("No image at all."))]},
    {"images": ["4.png"], "prompt": [turn("user", IMAGE)]},
]


def answered(record, chosen="I see.", rejected="I do not."):
    sides = {"chosen": chosen, "rejected": rejected}
    return {**record, **{n: [turn("assistant", text(t))] for n, t in sides.items()}}


def write(folder, records, name="records.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def built(folder, records, tokenizer, output, **options):
    path = write(folder, records, f"{output.name}.jsonl")
    return build_dataset([path], str(tokenizer), output, BuildOptions(**options))


def files_of(prefix):
    """The bytes of all files of a data set but the manifest, by what follows the prefix."""
    paths = prefix.parent.glob(f"{prefix.name}.*")
    paths = [p for path in paths for p in (path.iterdir() if path.is_dir() else [path])]
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in paths if p.suffix != ".json"}


def test_tokens_pixels_and_places_are_those_of_transformers(directory, folder, tmp_path):
    from PIL import Image

    built(folder, map(answered, RECORDS), directory, tmp_path / "data")
    data, reference = PreferenceDataset.verified(tmp_path / "data"), vision.Reference(directory)
    verify_dataset(data)
    token = data.images.processor["image_token_id"]
    for group, record in enumerate(map(answered, RECORDS)):
        pictures = [Image.open(folder / name).convert("RGB") for name in record["images"]]
        tree = data[group]
        for response, side in enumerate(("chosen", "rejected")):
            asked = reference.render(record["prompt"], add_generation_prompt=True)
            whole = reference.render([*record["prompt"], *record[side]])
            assert whole.startswith(asked)
            tokens, loss_start = tree.response_tokens(response)
            expected, pixels = reference(whole, pictures)
            assert tokens.tolist() == expected
            assert loss_start == len(reference(asked, pictures)[0])
        assert int((tree.tokens == token).sum()) == int(tree.images.lengths.sum())
        for start, length in zip(tree.images.starts, tree.images.lengths, strict=True):
            assert (tree.tokens[start : start + length] == token).all()
        for picture, image in zip(pictures, tree.images.ids, strict=True):
            assert np.array_equal(picture, data.images.picture(image))
            assert data.images.sizes[image].tolist() == list(picture.size)
    keys = zip(map(bytes, data.images.hashes), data.images.several, strict=True)
    assert len({(key, int(several)) for key, several in keys}) == len(data.images)
    assert data.images.described["bytes"] == sum(
        (folder / f"{i}.png").stat().st_size for i in range(len(SIZES))
    )
