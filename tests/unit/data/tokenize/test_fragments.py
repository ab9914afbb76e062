"""Pieces between added tokens, encoded once, give the tokens of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.tokenize import fragments
from megatron_prefix.data.tokenize.fragments import Fragments

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers  # noqa: E402

PIECES = ["it's", "abc", " abc", "12", "é", " ", "  ", "\n", "\n\n", ".,", "😀", "tool", "toolbox"]
ADDED = ["<s>", "<s>x", "<|a b|>", "</s>", "[T]", "<lo>"]
texts = st.lists(st.sampled_from([*PIECES, *ADDED]), max_size=12).map("".join)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ByteLevel = pre_tokenizers.ByteLevel


def split(expression, *more):
    first = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence(
        [first, *more, ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def trained(pre_tokenizer, normalizer=None, **options):
    """A tokenizer with special tokens, one that is not special, and one that is "normalized"."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["it's abc 12\n abc  abc.,\n\n toolbox é😀 <tool>"] * 20, trainer)
    core.add_special_tokens([AddedToken(t, normalized=False, **options) for t in ADDED[:4]])
    core.add_tokens([AddedToken("[T]", normalized=False), AddedToken("<lo>", normalized=True)])
    return core


def both(core):
    def encode_all(pieces):
        return [core.encode(piece, add_special_tokens=False).ids for piece in pieces]

    return Fragments(encode_all, core.to_str()), lambda text: encode_all([text])[0]


EXACT = {
    "GPT-2": (ByteLevel(add_prefix_space=False),),
    "a space before each piece": (ByteLevel(add_prefix_space=True),),
    "Qwen": (split(QWEN), normalizers.NFC()),
    "digits": (split(r" ?\p{L}+", pre_tokenizers.Digits(individual_digits=True)),),
    "Llama 2": (
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "Metaspace": (pre_tokenizers.Metaspace(prepend_scheme="always"), normalizers.NFKC()),
    "lower case": (pre_tokenizers.Whitespace(), normalizers.Lowercase()),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_text_has_the_tokens_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(fragments, "MOST_CHARACTERS", 60)
    pieces, whole = both(trained(*EXACT[name]))
    assert pieces.is_exact

    @settings(max_examples=400, deadline=None)
    @given(texts)
    def check(text):
        assert pieces.encode(text).tolist() == whole(text)

    check()
    assert pieces._size <= 60 + 100, "the table was emptied"


ALONE = {
    "the beginning of a text": ((pre_tokenizers.Metaspace(prepend_scheme="first"),), {}),
    "white space before a token": ((ByteLevel(add_prefix_space=False),), {"lstrip": True}),
    "white space after a token": ((ByteLevel(add_prefix_space=False),), {"rstrip": True}),
    "a token that must be a word": ((ByteLevel(add_prefix_space=False),), {"single_word": True}),
}


@pytest.mark.parametrize("name", ALONE)
def test_tokenizers_whose_pieces_depend_on_each_other_are_left_alone(name):
    made, options = ALONE[name]
    core = trained(*made, **options)
    pieces, whole = both(core)
    assert not pieces.is_exact
    sample = "abc <s> abc</s>abc<s>x abcabc<s>abc\n<s>"
    assert pieces.encode(sample).tolist() != whole(sample), "and rightly so"


def test_turns_are_encoded_once():
    core, calls = trained(*EXACT["Qwen"]), []

    def encode_all(pieces):
        calls.extend(pieces)
        return [core.encode(piece, add_special_tokens=False).ids for piece in pieces]

    pieces = Fragments(encode_all, core.to_str())
    prompt = "<s>user\nit's abc 12</s>\n<s>assistant\n"
    for text in (prompt, f"{prompt}abc</s>\n", f"{prompt}12</s>\n"):
        pieces.encode(text)
    assert sorted(calls) == sorted(
        ["user\nit's abc 12", "\n", "assistant\n", "assistant\nabc", "assistant\n12"]
    )
