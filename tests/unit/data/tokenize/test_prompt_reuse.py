"""Prompts that are encoded once give the same tokens as texts encoded as a whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.tokenize.hf_tokenizer import HuggingFaceTokenizer
from megatron_prefix.data.tokenize.prompt_reuse import EXPRESSIONS

tokenizers = pytest.importorskip("tokenizers")
PIECES = [
    "it's",
    "I'LL",
    "abc",
    "12",
    "345",
    "é",
    "\u00a0",
    " ",
    "  ",
    "\n",
    " \n",
    ".,",
    "😀",
    "<s>",
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
byte_level = tokenizers.pre_tokenizers.ByteLevel


def steps(expression):
    if expression is None:
        return byte_level(add_prefix_space=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    return tokenizers.pre_tokenizers.Sequence(
        [split, byte_level(add_prefix_space=False, use_regex=False)]
    )


def make(folder, pre_tokenizer, normalizer=None):
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), special_tokens=["<s>"]
    )
    corpus = ["it's abc 12 345. abc  abc\n abc, I'LL it's", " abc 12\u00a0abc 345é 😀.,"] * 20
    core.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>").save_pretrained(folder)
    return HuggingFaceTokenizer(str(folder))


@pytest.mark.parametrize("expression", [None, *sorted(EXPRESSIONS), r"\p{L}+ ?|."])
def test_every_text_has_the_tokens_of_the_whole(tmp_path, expression):
    tokenizer = make(tmp_path, steps(expression))
    assert tokenizer._reuse._is_exact == (expression is None or expression in EXPRESSIONS)
    whole = tokenizer._tokenizer.backend_tokenizer

    @settings(max_examples=300, deadline=None)
    @given(texts, texts)
    def check(prompt, more):
        for text in (prompt, prompt + more, prompt + " " + more):
            ids = tokenizer.encode(text).tolist()
            if "<s>" not in text:
                assert ids == whole.encode(text, add_special_tokens=False).ids

    check()


def test_normalisers_and_prefixes_are_left_alone(tmp_path):
    lower = tokenizers.normalizers.Lowercase()
    for number, made in enumerate(((byte_level(add_prefix_space=False), lower), (byte_level(),))):
        assert not make(tmp_path / str(number), *made)._reuse._is_exact
