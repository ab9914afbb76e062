"""Chat templates of vision models, and where they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vision

from megatron_prefix.data.images import IMAGE
from megatron_prefix.data.read import Message
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize import PathEncoder, load_tokenizer
from megatron_prefix.data.tree import common_tokens
from megatron_prefix.data.tree_images import Placed
from megatron_prefix.errors import InputError

OF_TYPE = "message['content'] | selectattr('type', 'equalto', '{}')"
IMAGES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in " + OF_TYPE.format("image") + " %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in " + OF_TYPE.format("text") + " %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: it reads contents in parts only, and writes images before the texts."""
OTHER_PROMPT = (
    "{% for message in messages %}{{ '<<' + message['role'] + ' ' }}"
    "{% for content in " + OF_TYPE.format("image") + " %}{{ '<image>' }}{% endfor %}"
    "{% for content in " + OF_TYPE.format("text") + " %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{ '>>' }}{% endfor %}{% if add_generation_prompt %}{{ '<<assistant\n' }}{% endif %}"
)
"""As LLaVA-OneVision's: the prompt is written otherwise once it is answered."""
TYPES = "{{ 'Say which type it is. ' }}" + vision.TEMPLATE.replace("PLACE", "<image>")
"""Its own text has the word "type"."""


@pytest.fixture
def directory(tmp_path):
    return vision.make(tmp_path, "llava")


def use(directory, template, place="chat_template.jinja"):
    for name in ("chat_template.jinja", "chat_template.json"):
        (directory / name).unlink(missing_ok=True)
    if place.endswith("jinja"):
        (directory / place).write_text(template)
    elif place == "processor_config.json":
        own = json.loads((directory / place).read_text())
        (directory / place).write_text(json.dumps({**own, "chat_template": template}))
    else:
        (directory / place).write_text(json.dumps({"chat_template": template}))


PROMPT = (
    Message(role="user", content=f"Now {IMAGE} or{IMAGE}"),
    Message(role="assistant", content="Well"),
    Message(role="user", content=f"{IMAGE}And this?"),
)
PICTURES = [vision.picture(28, 28, 1), vision.picture(60, 30, 2), vision.picture(28, 90, 3)]


def in_parts(message):
    parts = []
    for i, piece in enumerate(message.content.split(IMAGE)):
        parts += [{"type": "image"}] * bool(i)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return {"role": message.role, "content": parts}


@pytest.mark.parametrize("template", [IMAGES_FIRST, OTHER_PROMPT, TYPES])
@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "processor_config.json"]
)
def test_templates_of_processors(directory, template, place):
    use(directory, template, place)
    tokenizer, reference = load_tokenizer(directory), vision.Reference(directory)
    answer = Message(role="assistant", content="Yes.")
    example = Example(responses=(ExampleResponse(prompt=PROMPT, response=(answer,)),), pairs=())
    images = [Placed(7, 16), Placed(8, 16), Placed(7, 16)]
    (path,), _ = PathEncoder(tokenizer, eos="never").encode(example, images)
    turns = [in_parts(message) for message in (*PROMPT, answer)]
    whole = reference.processor.apply_chat_template(turns)
    asked = reference.processor.apply_chat_template(turns[:-1], add_generation_prompt=True)
    expected, _ = reference(whole, PICTURES)
    placeholder = tokenizer.image_processor().image_token_id
    assert np.where(path.tokens < 0, placeholder, path.tokens).tolist() == expected
    runs = path.tokens[path.tokens < 0]
    assert runs.tolist() == [-8] * 16 + [-9] * 16 + [-8] * 16
    before, _ = reference(asked, PICTURES)
    assert path.loss_start == common_tokens(np.array(before), np.array(expected))


def test_a_template_for_texts_only_is_refused_with_images(directory):
    use(directory, "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(directory)
    plain = Message(role="user", content="Hi")
    assert tokenizer.render([plain], False).text == "userHi"
    with pytest.raises(InputError, match="does not read contents in parts"):
        tokenizer.render(PROMPT, False)


def test_a_template_that_loses_an_image_is_refused(directory):
    use(
        directory,
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
    )
    with pytest.raises(InputError, match="writes 0 places .* for 3 images"):
        load_tokenizer(directory).render(PROMPT, False)


def test_texts_without_images_have_the_tokens_of_before(directory):
    """Caches and special tokens behave as in a directory without an image processor."""
    bare = load_tokenizer(directory)
    (directory / "preprocessor_config.json").unlink()
    plain = load_tokenizer(directory)
    assert bare.fingerprint == plain.fingerprint and plain.no_images and not bare.no_images
    for content in ("Hi", "say <eos>", "", "<image>", "a\n\nb <pad>"):
        turns = [Message(role="user", content=content), Message(role="assistant", content="x")]
        rendered, expected = bare.render(turns, False), plain.render(turns, False)
        assert rendered == expected
        assert bare.encode_rendered(rendered).tolist() == plain.encode_rendered(expected).tolist()
        assert bare.encode(content).tolist() == plain.encode(content).tolist()
