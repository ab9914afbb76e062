"""Where images are in a record's texts, and which they are."""

from __future__ import annotations

import base64
import json

import pytest

from megatron_prefix.data.images import IMAGE, Picture
from megatron_prefix.data.read import ExampleReader
from megatron_prefix.errors import InputError

CONTENT = b"\x89PNG the bytes of a picture"
BASE64 = base64.b64encode(CONTENT).decode()
OPEN = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def turn(role, content):
    return {"role": role, "content": content}


def sides(**more):
    return {
        "chosen": [turn("assistant", "yes")],
        "rejected": [turn("assistant", "no")],
        **more,
    }


def read(record, **options):
    return ExampleReader(**options).read(record)


def prompts(example):
    """The prompt as (role, content) with <> for images, or as a text, and the paths of images."""
    prompt = example.responses[0].prompt
    assert all(response.prompt == prompt for response in example.responses)
    paths = [picture.path for picture in example.images]
    if isinstance(prompt, str):
        return prompt.replace(IMAGE, "<>"), paths
    return [(m.role, m.content.replace(IMAGE, "<>")) for m in prompt], paths


@pytest.mark.parametrize(
    ("record", "prompt", "paths"),
    [
        (  # TRL: parts without a picture are those of the column, in order
            sides(images=["a", "b"], prompt=[turn("user", [OPEN, text("x"), OPEN])]),
            [("user", "<>x<>")],
            ["a", "b"],
        ),
        (  # TRL: without a part they are before the text of the first user's turn
            sides(
                images=["a", "b"],
                prompt=[
                    turn("system", "s"),
                    turn("user", "x"),
                    turn("assistant", "y"),
                    turn("user", "z"),
                ],
            ),
            [("system", "s"), ("user", "<><>x"), ("assistant", "y"), ("user", "z")],
            ["a", "b"],
        ),
        (  # parts with their own picture, and others
            sides(
                images=["a"],
                prompt=[turn("user", [{**OPEN, "image": "b"}, OPEN, {**OPEN, "path": "c"}])],
            ),
            [("user", "<><><>")],
            ["b", "a", "c"],
        ),
        (
            sides(prompt=[turn("user", [{"type": "image_url", "image_url": {"url": "a"}}])]),
            [("user", "<>")],
            ["a"],
        ),
        (  # whole dialogues: both sides have the prompt's image
            {
                "images": ["a"],
                "chosen": [turn("user", [OPEN, text("x")]), turn("assistant", "yes")],
                "rejected": [turn("user", [OPEN, text("x")]), turn("assistant", "no")],
            },
            [("user", "<>x")],
            ["a"],
        ),
        (  # the same with the pictures in the parts
            {
                side: [turn("user", [{**OPEN, "image": "a"}, text("x")]), turn("assistant", side)]
                for side in ("chosen", "rejected")
            },
            [("user", "<>x")],
            ["a"],
        ),
        (  # LLaMA-Factory
            {
                "images": ["a", "b"],
                "conversations": [
                    {"from": "human", "value": "<image>x"},
                    {"from": "gpt", "value": "y"},
                    {"from": "human", "value": "z<image>"},
                ],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            [("user", "<>x"), ("assistant", "y"), ("user", "z<>")],
            ["a", "b"],
        ),
        (  # RLAIF-V
            {"image": "a", "question": "x", "chosen": "yes", "rejected": "no", "image_path": "i"},
            [("user", "<>x")],
            ["a"],
        ),
        (  # RLHF-V
            {
                "image": "a",
                "text": json.dumps({"question": "x", "chosen": "yes", "rejected": "no"}),
            },
            [("user", "<>x")],
            ["a"],
        ),
        (  # a plain text
            {"images": ["a"], "prompt": "See <image>: ", "chosen": "yes", "rejected": "no"},
            "See <>: ",
            ["a"],
        ),
        (
            {"images": "a", "prompt": [turn("user", "x")], "completion": "yes", "label": True},
            [("user", "<>x")],
            ["a"],
        ),
        (  # JSON texts of conversations
            sides(images=["a"], prompt=json.dumps([turn("user", [OPEN, text("x")])])),
            [("user", "<>x")],
            ["a"],
        ),
        (sides(images=[], prompt=[turn("user", "<image>x")]), [("user", "<image>x")], []),
        (  # places with the number of their picture, in each dialogue; empty fields
            {
                "images": ["a", "b"],
                **{
                    side: [
                        turn("user", [{**OPEN, "index": 0, "text": None}, {**OPEN, "index": 1}]),
                        turn("assistant", side),
                    ]
                    for side in ("chosen", "rejected")
                },
            },
            [("user", "<><>")],
            ["a", "b"],
        ),
    ],
)
def test_places_and_pictures(record, prompt, paths):
    assert prompts(read(record)) == (prompt, paths)


@pytest.mark.parametrize(
    ("value", "picture"),
    [
        ("a/b.png", Picture(path="a/b.png")),
        (CONTENT, Picture(content=CONTENT)),
        ({"bytes": CONTENT, "path": "a.png"}, Picture(content=CONTENT)),
        ({"bytes": None, "path": "a.png"}, Picture(path="a.png")),
        ({"bytes": BASE64}, Picture(content=CONTENT)),
        ({"base64": BASE64[:20] + "\n" + BASE64[20:]}, Picture(content=CONTENT)),
        ({"url": f"data:image/png;base64,{BASE64}"}, Picture(content=CONTENT)),
        (f"data:image/png;base64,{BASE64}", Picture(content=CONTENT)),
    ],
)
def test_forms_of_a_picture(value, picture):
    assert read(sides(images=[value], prompt=[turn("user", "x")])).images == (picture,)
    assert read(sides(image=value, prompt=[turn("user", "x")])).images == (picture,)
    part = {"type": "image", "image": value}
    assert read(sides(prompt=[turn("user", [part])])).images == (picture,)


PROMPT = [turn("user", [OPEN])]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (sides(images=["https://x.y/z.png"], prompt=PROMPT), "pictures are not downloaded"),
        (sides(images=["s3://x/z.png"], prompt=PROMPT), "pictures are not downloaded"),
        (sides(images=[3], prompt=PROMPT), "column 'images' is a number"),
        (sides(images=[{"x": 3}], prompt=PROMPT), "neither bytes nor path"),
        (sides(images=[{"bytes": "???"}], prompt=PROMPT), "not base64"),
        (sides(images=["a" * 5000], prompt=PROMPT), "a text of 5,000 characters"),
        (sides(images=["a", " "], prompt=PROMPT), "no path of a picture"),
        (sides(images=["a"], image="b", prompt=PROMPT), "both hold images"),
        (
            sides(images=["a", "b"], prompt=PROMPT),
            "1 place for images, and the record has 2 im",
        ),
        (sides(prompt=PROMPT), "1 place for images, and the record has 0 images"),
        (sides(images=["a"], prompt=[turn("user", "<image><image>")]), "2 places"),
        (sides(images=["a"], prompt=[turn("system", "x")]), "nor a user's turn"),
        (
            {"images": ["a"], "prompt": "x", "chosen": "y", "rejected": "z"},
            "a text without <image>",
        ),
        (
            {"images": ["a"], "prompt": "<image>", "chosen": "<image>", "rejected": "z"},
            "only prompts may have images",
        ),
        (
            sides(images=["a"], prompt=PROMPT, chosen=[turn("assistant", [OPEN, text("y")])]),
            "only prompts may have images",
        ),
        (
            sides(images=["a"], prompt=[turn("user", [OPEN, text(f"x{IMAGE}y")])]),
            "which stands for",
        ),
        (sides(images=["a"], prompt=[turn("user", [OPEN, text(IMAGE)])]), "which stands for"),
        (sides(prompt=[turn("user", [{"type": "video", "video": "v.mp4"}])]), "but 'video'"),
        (  # what would be lost in silence
            sides(images=["a"], prompt=[turn("user", [{**OPEN, "text": "x"}])]),
            "field 'text', which is not read",
        ),
        (
            sides(prompt=[turn("user", [{**OPEN, "image": "a", "max_pixels": 784}])]),
            "field 'max_pixels', which is not read: .* --ignore-columns message.max_pixels",
        ),
        (
            sides(
                images=["a", "b"],
                prompt=[turn("user", [{**OPEN, "index": 1}, {**OPEN, "index": 0}])],
            ),
            "index 1, and pictures are taken in their order, so it would be number 0",
        ),
        (
            sides(
                images=["a", "b"],
                prompt=[turn("user", [{**OPEN, "index": 0}]), turn("user", [{**OPEN, "index": 0}])],
            ),
            "index 0, .* it would be number 1",
        ),
    ],
)
def test_wrong_images(record, message):
    with pytest.raises(InputError, match=message):
        read(record)


@pytest.mark.parametrize(
    ("part", "first", "second"),
    [
        ({"image": "a.png", "url": "b.png"}, "image", "url"),
        ({"image": "a.png", "image_url": {"url": "b.png"}}, "image", "image_url"),
        ({"image": {"bytes": CONTENT}, "path": "b.png"}, "image", "path"),
        ({"image": "a.png", "url": "https://host/a.png"}, "image", "url"),
        ({"path": "a.png", "url": "b.png"}, "path", "url"),
        ({"bytes": CONTENT, "data": BASE64[:-4]}, "bytes", "data"),
        ({"image": {"path": "a.png", "image": "b.png"}}, "path", "image"),
    ],
)
def test_a_part_with_two_pictures_is_refused(part, first, second):
    record = sides(prompt=[turn("user", [OPEN | part, text("x")])])
    message = f"has {first!r} and {second!r}, which are not the same picture: remove {second!r}"
    with pytest.raises(InputError, match=message):
        read(record)


@pytest.mark.parametrize(
    ("part", "picture"),
    [
        ({"image": "a.png", "url": "a.png"}, Picture(path="a.png")),
        ({"image": {"bytes": CONTENT}, "base64": BASE64}, Picture(content=CONTENT)),
        ({"bytes": CONTENT, "path": "name.png"}, Picture(content=CONTENT)),
        ({"bytes": CONTENT, "data": BASE64}, Picture(content=CONTENT)),
        ({"image": "a.png", "url": None}, Picture(path="a.png")),
    ],
)
def test_a_part_may_have_one_picture_twice(part, picture):
    """`datasets` writes the name of a file beside its bytes."""
    example = read(sides(prompt=[turn("user", [OPEN | part, text("x")])]))
    assert example.images == (picture,)


@pytest.mark.parametrize("images", [[], None])
def test_a_place_without_any_picture_stays_text(images):
    """Whether it may be spelled in a text is a question of the model's placeholder."""
    record = sides(images=images, prompt=[turn("user", "<image>x")])
    assert prompts(read(record)) == ([("user", "<image>x")], [])


def test_the_second_picture_of_a_part_can_be_left_out():
    part = OPEN | {"image": "a.png", "url": "b.png"}
    record = sides(prompt=[turn("user", [part, text("x")])])
    with pytest.raises(InputError, match="--ignore-columns message.url"):
        read(record)
    example = read(record, ignored=("message.url",))
    assert example.images == (Picture(path="a.png"),)


def test_columns_of_images_can_be_mapped_and_left_out():
    record = sides(img=["a"], prompt=[turn("user", "x")])
    assert prompts(read(record, columns={"images": "img"})) == ([("user", "<>x")], ["a"])
    nested = sides(m={"i": "a"}, prompt=[turn("user", "x")])
    assert prompts(read(nested, columns={"image": "m.i"})) == ([("user", "<>x")], ["a"])
    assert prompts(read(record, ignored=["img"])) == ([("user", "x")], [])
    part = {**OPEN, "image": "a", "max_pixels": 784}
    ignored = ["message.max_pixels"]
    assert prompts(read(sides(prompt=[turn("user", [part])]), ignored=ignored))[1] == ["a"]
    with pytest.raises(InputError, match="the record has images, and there are none"):
        read(sides(images=["a"], prompt=PROMPT), ignored=["images"], no_images="there are none")
