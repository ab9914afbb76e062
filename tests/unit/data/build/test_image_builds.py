"""Records with images through a whole build: tokens, the store, sharing, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal

import numpy as np
import pytest
import vision

from megatron_prefix.data import PreferenceDataset
from megatron_prefix.data.build import BuildOptions, build_dataset, merge_datasets
from megatron_prefix.data.images import ImageWriter
from megatron_prefix.data.store import join_datasets
from megatron_prefix.data.store.roles import mismatched_responses, own_responses
from megatron_prefix.data.store.verify import verify_dataset
from megatron_prefix.errors import InputError

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
    {"images": ["1.png", "0.png"], "prompt": [turn("user", text("Now"), IMAGE, IMAGE)]},
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


def numbered(count, sizes=5):
    """Records of `count` questions about the pictures 0 to `sizes` - 1, two images in every 4th."""
    records = []
    for i in range(count):
        names = [f"{i % sizes}.png"] + [f"{(i + 2) % sizes}.png"] * (i % 4 == 3)
        parts = [IMAGE] * len(names) + [text(f"Question {i % 7}?")]
        record = {"images": names, "prompt": [turn("user", *parts)]}
        records.append(answered(record, f"Answer {i}.", f"Other {i % 5}."))
    return records


def test_the_files_do_not_depend_on_the_number_of_workers(llava, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prefix.data.build.chunks.CHUNK", 8)
    monkeypatch.setattr("megatron_prefix.data.build.chunks.FIRST_CHUNK", 3)
    path = write(folder, numbered(40))
    for workers in (1, 3):
        options = BuildOptions(workers=workers, kto=True, holdout=0.3)
        build_dataset([path], str(llava), tmp_path / str(workers) / "data", options)
    ones, threes = (sorted((tmp_path / n).rglob("*.*")) for n in "13")
    assert len(ones) == len(threes) > 40
    for one, three in zip(ones, threes, strict=True):
        assert one.name == three.name
        assert one.is_dir() or one.read_bytes() == three.read_bytes(), one


def test_parts_merge_to_the_files_of_one_build(llava, folder, tmp_path):
    records = numbered(24)
    built(folder, records, llava, tmp_path / "whole")
    for i in range(3):
        built(folder, records[8 * i : 8 * i + 8], llava, tmp_path / f"part{i}")
    merge_datasets([tmp_path / f"part{i}" for i in range(3)], tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    verify_dataset(PreferenceDataset(tmp_path / "merged"))
    other = vision.make(tmp_path / "other", "llava", image_mean=[0.5, 0.5, 0.5])
    built(folder, records[:8], other, tmp_path / "foreign")
    with pytest.raises(InputError, match="two image processors"):
        merge_datasets([tmp_path / "part0", tmp_path / "foreign"], tmp_path / "both")
    with pytest.raises(InputError, match="two image processors"):
        join_datasets([PreferenceDataset(tmp_path / n) for n in ("part0", "foreign")])


def test_joined_data_sets_number_their_images_through(llava, folder, tmp_path):
    built(folder, numbered(6, 3), llava, tmp_path / "a")
    built(folder, [answered(RECORDS[3])], llava, tmp_path / "none")
    built(folder, numbered(6), llava, tmp_path / "b")
    parts = [PreferenceDataset(tmp_path / name) for name in ("a", "none", "b")]
    joined = join_datasets(parts)
    assert len(joined.images) == len(parts[0].images) + len(parts[2].images)
    group = 0
    for part in parts:
        for own in range(len(part)):
            ours, theirs = joined[group].images, part[own].images
            if theirs is None:
                assert len(ours) == 0
            else:
                assert np.array_equal(ours.starts, theirs.starts)
                for a, b in zip(ours.ids, theirs.ids, strict=True):
                    assert joined.images.bytes(a) == part.images.bytes(b)
                    assert joined.images.num_tokens[a] == part.images.num_tokens[b]
            group += 1


def test_prompts_with_other_images_are_other_prompts(directory, folder, tmp_path):
    """Four records ask the same: two about one picture, two about others, one of them twice."""
    shutil.copy(folder / "0.png", folder / "copy.png")
    names = [["0.png"], ["1.png"], ["copy.png"], ["0.png", "0.png"]]
    records = []
    for i, images in enumerate(names):
        asked = [turn("user", *[IMAGE] * len(images), text("What is it?"))]
        records.append(answered({"images": images, "prompt": asked}, f"Answer {i}"))
    built(folder, records, directory, tmp_path / "data", merge_prompts=True)
    data = PreferenceDataset(tmp_path / "data")
    verify_dataset(data)
    assert data.group_num_records.tolist() == [2, 1, 1]
    assert data.group_records.tolist() == [0, 1, 3]
    assert data[0].num_responses == 4 and len(data[0].images) == 1
    assert data.images.described["bytes"] == sum(
        (folder / f"{i}.png").stat().st_size for i in (0, 1)
    )


def test_records_that_differ_in_their_image_are_no_duplicates(llava, folder, tmp_path):
    asked = {"prompt": [turn("user", IMAGE, text("What?"))]}
    records = [answered({"images": [name], **asked}) for name in ("0.png", "1.png", "0.png")]
    report = built(folder, records, llava, tmp_path / "data")
    assert report.duplicates == {"num_records": 1, "records": [[2, 0]]}


def test_mismatches_follow_the_groups_own_images(directory, folder, tmp_path):
    built(folder, numbered(9), directory, tmp_path / "data", kto=True, merge_prompts=True)
    data = PreferenceDataset(tmp_path / "data")
    verify_dataset(data)
    own, others = own_responses(data), mismatched_responses(data)
    for group in range(len(data)):
        whole, wrong = data[group], others[group]
        assert np.array_equal(whole.images.ids, wrong.images.ids)
        assert np.array_equal(own[group].images.ids, wrong.images.ids)
        tokens, loss_start = wrong.response_tokens(0)
        expected, expected_start = whole.response_tokens(0)
        assert loss_start == expected_start
        assert np.array_equal(tokens[:loss_start], expected[:loss_start])
        assert not np.array_equal(tokens[loss_start:], expected[loss_start:])


def test_held_out_groups_have_a_store_of_their_own(llava, folder, tmp_path):
    built(folder, numbered(20), llava, tmp_path / "data", holdout=0.3)
    for name in ("data", "data_valid"):
        data = PreferenceDataset.verified(tmp_path / name)
        verify_dataset(data)
        used = {int(image) for group in range(len(data)) for image in data[group].images.ids}
        assert used == {*range(len(data.images))}


@pytest.mark.parametrize("overflow", ["truncate-prompt", "drop", "error"])
def test_a_prompt_with_images_is_never_truncated(llava, folder, tmp_path, overflow):
    long = answered({"prompt": [turn("user", text("x" * 200))]})
    records = [*map(answered, RECORDS), long]
    if overflow == "error":
        with pytest.raises(InputError, match=r"is 60: raise it, or give --overflow drop$"):
            built(folder, records, llava, tmp_path / "data", max_length=60)
        return
    report = built(folder, records, llava, tmp_path / "data", max_length=60, overflow=overflow)
    data = PreferenceDataset(tmp_path / "data")
    verify_dataset(data)
    assert data.response_lengths.max() <= 60
    lost = "over --max-length with images (such prompts are never truncated)"
    assert report.dropped[lost].groups == 2
    assert len(data) == (4 if overflow == "truncate-prompt" else 3)
    kept = [data.images.bytes(i) for i in range(len(data.images))]
    assert kept == [(folder / name).read_bytes() for name in ("0.png", "4.png")]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["missing.png"], "missing.png cannot be read"),
        (["."], "cannot be read"),
        (["records.jsonl"], "records.jsonl is no picture"),
        (["/dev/zero"], "cannot be read .it is no file"),
        ([{"bytes": base64.b64encode(b"GIF89a").decode()}], "an image of the record is"),
        (["0.png", "1.png"], "1 place for images, and the record has 2 images"),
    ],
)
def test_a_wrong_image_stops_the_build_with_its_record(llava, folder, tmp_path, images, message):
    records = [*map(answered, RECORDS[:2]), answered({**RECORDS[0], "images": images})]
    write(folder, records)
    with pytest.raises(InputError, match=f"records.jsonl, line 3: .*{message}"):
        build_dataset([folder / "records.jsonl"], str(llava), tmp_path / "data")
    assert not [*tmp_path.iterdir()]
    options = BuildOptions(on_error="skip")
    report = build_dataset([folder / "records.jsonl"], str(llava), tmp_path / "data", options)
    assert report.wrong.num_records == 1 and report.manifest["counts"]["groups"] == 2


@pytest.mark.parametrize("spelled", ["<image>", "<video>", "<|image_pad|>", "<|video_pad|>"])
def test_spelled_placeholders_are_refused_where_the_processor_refuses_them(
    directory, folder, tmp_path, spelled
):
    reference = vision.Reference(directory)
    is_token = spelled in vision.SPECIAL[reference.family]
    for record in (RECORDS[3], RECORDS[0]):
        for place in ("prompt", "response"):
            asked = [turn("user", *record["prompt"][0]["content"], text(spelled))]
            changed = answered({**record, "prompt": asked}) if place == "prompt" else None
            changed = changed or answered(record, chosen=f"See {spelled}.")
            if is_token:
                with pytest.raises(InputError, match="which the model's processor takes for"):
                    built(folder, [changed], directory, tmp_path / "data", overwrite=True)
            else:
                built(folder, [changed], directory, tmp_path / "data", overwrite=True)
                data = PreferenceDataset(tmp_path / "data")
                whole = reference.render([*changed["prompt"], *changed["chosen"]])
                pictures = [vision.picture(*SIZES[0])] if changed["images"] else []
                assert data[0].response_tokens(0)[0].tolist() == reference(whole, pictures)[0]


def test_images_need_a_directory_with_an_image_processor(llava, folder, tmp_path):
    with pytest.raises(InputError, match="tokenizer bytes has no image processor"):
        built(folder, [answered(RECORDS[0])], "bytes", tmp_path / "data")
    bare = shutil.copytree(llava, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="bare has no image processor"):
        built(folder, [answered(RECORDS[0])], bare, tmp_path / "data")


def test_a_set_without_images_has_no_files_of_images(llava, folder, tmp_path):
    built(folder, map(answered, RECORDS), llava, tmp_path / "data")
    assert (tmp_path / "data.images").exists()
    built(folder, [answered(RECORDS[3])], llava, tmp_path / "data", overwrite=True)
    data = PreferenceDataset.verified(tmp_path / "data")
    assert data.images is None and "images" not in data.manifest and data[0].images is None
    assert not (tmp_path / "data.images").exists()
    assert not [*(tmp_path / "data.tree").glob("image*")]
    (tmp_path / "other.images").write_bytes(b"x")
    with pytest.raises(InputError, match=r"other.images is there already"):
        built(folder, [answered(RECORDS[3])], llava, tmp_path / "other")


def test_a_file_that_changes_during_the_build_is_found_out(llava, folder, tmp_path, monkeypatch):
    from megatron_prefix.data.images import StoredPicture

    measured = StoredPicture.measured.__func__

    def replaced(cls, content, source, *rest):
        result = measured(cls, content, source, *rest)
        source.write_bytes(content + b"more")
        return result

    shutil.copy(folder / "0.png", folder / "changing.png")
    monkeypatch.setattr(StoredPicture, "measured", classmethod(replaced))
    with pytest.raises(InputError, match=r"changing.png changed while the data set was built"):
        built(
            folder, [answered({**RECORDS[0], "images": ["changing.png"]})], llava, tmp_path / "data"
        )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "name",
    [
        ".images",
        *sorted(
            f".tree/{n}.npy"
            for n in (
                "image_spans",
                "image_hashes",
                "image_tokens",
                "occurrence_images",
                "occurrence_tokens",
            )
        ),
    ],
)
def test_damage_is_found(llava, folder, tmp_path, name):
    built(folder, map(answered, RECORDS), llava, tmp_path / "data")
    path = tmp_path / f"data{name}"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged|build the data set again"):
        PreferenceDataset.verified(tmp_path / "data")
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="bytes"):
        PreferenceDataset(tmp_path / "data")
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        PreferenceDataset(tmp_path / "data")


def test_a_full_disk_leaves_nothing(llava, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ImageWriter, "add", full)
    with pytest.raises(InputError, match="cannot be written: .*No space left"):
        built(folder, map(answered, RECORDS), llava, tmp_path / "data")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("has_data", [False, True])
def test_a_killed_build_leaves_nothing_that_is_read(llava, folder, tmp_path, monkeypatch, has_data):
    """Killed after all images were written; the next build removes what it left."""
    if has_data:
        built(folder, [answered(RECORDS[0])], llava, tmp_path / "data")
    before = sorted(tmp_path.iterdir())
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(ImageWriter, "finish", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        built(folder, map(answered, RECORDS), llava, tmp_path / "data", overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (left,) = {*tmp_path.iterdir()} - {*before}
    assert left.name.endswith(".building") and (left / "images").exists()
    if has_data:
        assert len(PreferenceDataset.verified(tmp_path / "data")) == 1
    built(folder, map(answered, RECORDS), llava, tmp_path / "data", overwrite=True)
    assert len(PreferenceDataset.verified(tmp_path / "data")) == len(RECORDS)
    assert not left.exists()
