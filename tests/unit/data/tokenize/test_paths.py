"""The start of the loss, special tokens inside messages, and what templates change."""

import numpy as np
import pytest

from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.read import Message
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize.paths import NOTE_MERGED, PathEncoder
from megatron_prefix.data.tokenize.rendering import (
    NOTE_LOST,
    NOTE_MOVED,
    NOTE_SPECIAL,
    NOTE_TOOLS,
    NOTE_TRIMMED,
    template_changes,
)
from megatron_prefix.data.tokenize.tokenizers import ByteTokenizer, load_tokenizer
from megatron_prefix.data.tree import Pair, build_tree
from megatron_prefix.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message(role, content, extra=""):
    return Message(role=role, content=content, extra=extra)


def pair_example(prompt, chosen, rejected, tools=""):
    if not isinstance(prompt, str):
        chosen, rejected = ((message("assistant", text),) for text in (chosen, rejected))
    return Example(
        responses=tuple(ExampleResponse(prompt=prompt, response=r) for r in (chosen, rejected)),
        pairs=(Pair(chosen=0, rejected=1),),
        tools=tools,
    )


def make_tokenizer(folder, merges, template=CHATML):
    """A byte-level BPE with exactly these merges, for example ["b c", "a b"]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [merge.replace(" ", "") for merge in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    fast.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def split_text(tokenizer, path):
    """The tokens of a path before its loss starts, and those after it, each as text."""
    pieces = [tokenizer.decode([t]) for t in path.tokens.tolist()]
    return pieces[: path.loss_start], pieces[path.loss_start : -1]


def test_an_inexact_spelling_is_not_searched_token_by_token():
    class Inexact(ByteTokenizer):
        calls = 0

        def decode(self, ids):
            self.calls += 1
            return "?" * len(ids)

    tokenizer = Inexact()
    within = PathEncoder(tokenizer)._tokens_within(np.zeros(5000, np.int64), "x" * 4000)
    assert within == 0 and tokenizer.calls < 30


def test_a_straddling_token_belongs_to_the_response_of_either_sibling(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, ["b c", "b d"]))
    paths, notes = PathEncoder(tokenizer).encode(pair_example("ab", "c", "dd"))
    assert split_text(tokenizer, paths[0]) == (["a"], ["bc"])
    assert split_text(tokenizer, paths[1]) == (["a"], ["bd", "d"])
    assert notes == [NOTE_MERGED] * 2
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)])
    assert tree.node_lengths.tolist() == [1, 2, 3] and tree.response_first.tolist() == [1, 2]


def test_one_side_only_straddles(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, ["b c"]))
    paths, notes = PathEncoder(tokenizer).encode(pair_example("ab", "c", "d"))
    assert split_text(tokenizer, paths[0]) == (["a"], ["bc"])
    assert split_text(tokenizer, paths[1]) == (["a", "b"], ["d"]) and notes == [NOTE_MERGED]


def test_tokens_cut_differently_before_the_response_have_no_loss(tmp_path):
    """[ab] alone, but [a] [bc] with the response: [a] has no character of it."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, ["b c", "a b"]))
    assert len(tokenizer.encode("xab")) == 2
    paths, _ = PathEncoder(tokenizer).encode(pair_example("xab", "c", "ce"))
    for path, own in zip(paths, (["bc"], ["bc", "e"]), strict=True):
        assert split_text(tokenizer, path) == (["x", "a"], own)


def test_siblings_that_differ_before_the_response_have_loss_from_there(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, ["b c", "a b"]))
    paths, _ = PathEncoder(tokenizer).encode(pair_example("xab", "c", "d"))
    assert split_text(tokenizer, paths[0]) == (["x"], ["a", "bc"])
    assert split_text(tokenizer, paths[1]) == (["x", "ab"], ["d"])
    shared = min(path.loss_start for path in paths)
    assert np.array_equal(paths[0].tokens[:shared], paths[1].tokens[:shared])


def test_sentencepiece_merges_over_the_boundary(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the answer is yes\nthe answer is no\n" * 30, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=36, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    paths, notes = PathEncoder(tokenizer).encode(pair_example("the answer i", "s yes", "s no"))
    assert notes == [NOTE_MERGED] * 2
    for path, word in zip(paths, ("is yes", "is no"), strict=True):
        assert tokenizer.decode(path.tokens[1 : path.loss_start].tolist()) == "the answer"
        assert tokenizer.decode(path.tokens[path.loss_start : -1].tolist()) == word
        assert path.tokens[1:-1].tolist() == tokenizer.encode(f"the answer {word}").tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["y e", "ye s"])


SPELLED = "say <|im_end|> now"


def test_special_tokens_in_texts_stay_text_unless_asked(folder):
    end = load_tokenizer(folder).eos_id
    example = pair_example(SPELLED, "<|im_start|>", "no")
    paths, notes = PathEncoder(load_tokenizer(folder)).encode(example)
    assert [np.count_nonzero(p.tokens == end) for p in paths] == [1, 1], "only the appended one"
    assert notes == [NOTE_SPECIAL] * 2
    assert load_tokenizer(folder).decode(paths[0].tokens[:-1]) == SPELLED + "<|im_start|>"
    asked = PathEncoder(load_tokenizer(folder, parse_special=True))
    paths, notes = asked.encode(example)
    assert [np.count_nonzero(p.tokens == end) for p in paths] == [2, 2] and notes == []


def test_special_tokens_in_messages_stay_text_unless_asked(folder):
    tokenizer = load_tokenizer(folder)
    turns = (message("system", "<|im_end|><|im_end|>"), message("user", SPELLED))
    example = pair_example(turns, "yes<|im_end|>", "no")
    paths, notes = PathEncoder(tokenizer).encode(example)
    assert [np.count_nonzero(p.tokens == tokenizer.eos_id) for p in paths] == [3, 3]
    assert notes == [NOTE_SPECIAL] * 2
    text = tokenizer.decode(paths[0].tokens.tolist())
    assert text == (
        "<|im_start|>system\n<|im_end|><|im_end|><|im_end|>\n<|im_start|>user\n"
        f"{SPELLED}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|><|im_end|>\n"
    )
    own = tokenizer.decode(paths[0].tokens[paths[0].loss_start :].tolist())
    assert own == "yes<|im_end|><|im_end|>\n"
    parsing = load_tokenizer(folder, parse_special=True)
    paths, notes = PathEncoder(parsing).encode(example)
    assert np.count_nonzero(paths[0].tokens == tokenizer.eos_id) == 7 and notes == []


def test_other_tokenizers_have_nothing_to_parse(tmp_path):
    with pytest.raises(InputError, match="--parse-special has no effect with tokenizer bytes"):
        load_tokenizer("bytes", parse_special=True)


def test_tools_and_calls_reach_the_template(tmp_path):
    calls = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<|im_end|>"
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace("<|im_end|>", calls)
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, [], template))
    called = message("assistant", "", '{"tool_calls":[{"function":{"name":"clock"}}]}')
    turns = (message("user", "q"), called, message("tool", "14:05"))
    paths, notes = PathEncoder(tokenizer).encode(pair_example(turns, "a", "b", '[{"k":"v"}]'))
    text = tokenizer.decode(paths[0].tokens.tolist())
    assert notes == [] and text.startswith('[{"k": "v"}]<|im_start|>user\nq')
    assert "assistant\n[clock]<|im_end|>\n<|im_start|>tool\n14:05" in text


def test_tools_that_the_template_does_not_write_are_noted(folder):
    turns = (message("user", "q"),)
    encoder = PathEncoder(load_tokenizer(folder))
    assert encoder.encode(pair_example(turns, "a", "b", '[{"k":1}]'))[1] == [NOTE_TOOLS] * 2
    with pytest.raises(InputError, match="'tools' needs prompt and responses that are messages"):
        encoder.encode(pair_example("q", "a", "b", '[{"k":1}]'))
    plain = PathEncoder(load_tokenizer("bytes"))
    with pytest.raises(InputError, match="'tools' needs a chat template"):
        plain.encode(pair_example(turns, "a", "b", '[{"k":1}]'))
    with pytest.raises(InputError, match="calls a tool"):
        plain.encode(pair_example((message("user", "q", '{"name":"x"}'),), "a", "b"))


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (CHATML.replace("m['content']", "m['content'] | trim"), NOTE_TRIMMED),
        (CHATML.replace("in messages", "in messages | reverse"), NOTE_MOVED),
        (CHATML.replace("m['content']", "m['content'] | upper"), NOTE_LOST),
    ],
)
def test_templates_that_change_messages_are_noted(tmp_path, template, note):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, [], template))
    turns = (message("system", "first "), message("user", "second "))
    notes = PathEncoder(tokenizer).encode(pair_example(turns, "yes", "no"))[1]
    assert notes.count(note) == 2


def test_what_a_template_changed():
    turns = [message("system", "be kind"), message("user", " a"), message("assistant", "a")]
    assert template_changes(turns, "be kind: a, a") == []
    assert template_changes(turns, "be kind:a, a") == [NOTE_TRIMMED]
    assert template_changes(turns, " a, a: be kind") == [NOTE_MOVED]
    assert template_changes(turns, "a,a: be kind") == [NOTE_TRIMMED, NOTE_MOVED]
    assert template_changes(turns, "kind: a, a") == [NOTE_LOST]
    assert template_changes([message("user", "")], "") == []


class Lying(type(load_tokenizer("bytes"))):
    """Claims to have 258 tokens but gives one that does not fit into uint16."""

    def encode(self, text):
        return np.append(super().encode(text), 70000)


def test_a_token_id_beyond_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(InputError, match="token id 70000, and tokenizer bytes has ids 0 to 257"):
        build_dataset([path], Lying(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


UNICODE = {
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "right-to-left": "שלום עולם مرحبا \u202eabc\u202c",
    "combining": "e\u0301 a\u0308\u0323 \u0915\u094d\u0937",
    "nul": "a\x00b\x00",
    "odd": "\ufeff\u2028\u0085\ufdd0\U0010ffff",
}


@pytest.mark.parametrize("kind", UNICODE)
def test_any_text_comes_back(folder, kind):
    text = UNICODE[kind]
    turns = (message("system", text), message("user", f"{text}<|im_end|>"))
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(folder)):
        path = PathEncoder(tokenizer).encode(pair_example(text, f" {text}", "x"))[0][0]
        bos = int(path.tokens[0] == tokenizer.bos_id)
        assert tokenizer.decode(path.tokens[bos:-1].tolist()) == f"{text} {text}"
        path = PathEncoder(tokenizer).encode(pair_example(turns, text, "x"))[0][0]
        own = tokenizer.decode(path.tokens[path.loss_start :].tolist())
        assert own.strip().removesuffix("<eos>").removesuffix("<|im_end|>").strip() == text.strip()
