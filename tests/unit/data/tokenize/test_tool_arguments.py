"""Arguments of tool calls reach a chat template in the form that it writes well."""

import json

import pytest
from test_paths import CHATML, make_tokenizer

from megatron_prefix.data.read import Message
from megatron_prefix.data.tokenize import load_tokenizer
from megatron_prefix.data.tokenize.tool_arguments import ArgumentForm
from megatron_prefix.errors import InputError

AS_JSON = "{% for c in m['tool_calls'] or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
CONCATENATED = "{% for c in m['tool_calls'] or [] %}{{ '' + c.function.arguments }}{% endfor %}"
EITHER = (
    "{% for c in m['tool_calls'] or [] %}{% if c.function.arguments is string %}"
    "{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}"
)
OBJECT, TEXT = {"a": 1}, '{"a":1}'


def written(tmp_path, template, arguments):
    """What a template writes for the arguments of a call."""
    template = CHATML.replace("<|im_end|>", template + "<|im_end|>", 1)
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, [], template))
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    extra = json.dumps({"tool_calls": calls})
    turns = (
        Message(role="user", content="q"),
        Message(role="assistant", content="", extra=extra),
    )
    text = tokenizer.render(turns, False).text
    return text.rpartition("assistant\n")[2].removesuffix("<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (AS_JSON, OBJECT, '{"a": 1}'),
        (AS_JSON, TEXT, '{"a": 1}'),
        (AS_JSON, "no JSON", '"no JSON"'),
        (AS_JSON, "[1]", '"[1]"'),
        (CONCATENATED, OBJECT, '{"a": 1}'),
        (CONCATENATED, TEXT, TEXT),
        (EITHER, OBJECT, '{"a": 1}'),
        (EITHER, TEXT, TEXT),
    ],
)
def test_forms(tmp_path, template, arguments, expected):
    assert written(tmp_path, template, arguments) == expected


def test_a_template_is_tried_only_for_calls():
    def apply(turns):
        calls.append(turns)
        raise InputError("no calls")

    calls = []
    form = ArgumentForm(apply)
    plain = [{"role": "user", "content": "q"}]
    assert form.adapt(plain) == plain and calls == []
    turns = [{"role": "assistant", "tool_calls": [{"function": {"arguments": TEXT}}]}]
    for _ in range(2):
        assert form.adapt(turns) == turns, "what fails with both forms is left as it is"
    assert len(calls) == 2


def test_values_that_a_template_reads_are_given_to_it(tmp_path):
    template = CHATML + "{% if add_generation_prompt and fast %}<fast>{% endif %}"
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, [], template))
    turns = (Message(role="user", content="q"),)
    plain = tokenizer.render(turns, True).text
    assert tokenizer.render(turns, True, "", '{"fast": true}').text == plain + "<fast>"
    assert tokenizer.render(turns, False, "", '{"add_generation_prompt": true}').text != plain
    with pytest.raises(InputError, match="'chat_template_kwargs' needs a chat template"):
        load_tokenizer("bytes").render(turns, True, "", '{"fast": true}')
