"""Words that are encoded once give the same tokens as whole texts, for every kind of model."""

import io
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.tokenize.word_cache import MOST_WORDS, WordCache

ALPHABET = [
    "a",
    "be",
    "Ç",
    "e\u0301",
    " ",
    "  ",
    "\u3000",
    "▁",
    "\n",
    "\t",
    "😀",
    "x.",
    "ﬁ",
    "´",
    "\0",
]
texts = st.lists(st.sampled_from(ALPHABET), max_size=20).map("".join)
KINDS = {
    "bpe": {"model_type": "bpe"},
    "bpe, characters as they are": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe, runs of spaces": {
        "model_type": "bpe",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "bpe, no space in front": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe over spaces": {"model_type": "bpe", "split_by_whitespace": False},
    "unigram": {"model_type": "unigram"},
}
LOCAL = ("bpe", "bpe, characters as they are", "bpe, runs of spaces")


def train(**options):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdexyz.,", k=rng.randint(1, 6))) for _ in range(60)]
    gaps = [" ", " ", "  ", "   "]
    sentences = [
        "".join(word + rng.choice(gaps) for word in rng.choices(words, k=9)) for _ in range(400)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=360,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return request.param, train(**KINDS[request.param])


def test_every_text_has_the_models_tokens(model):
    kind, processor = model
    cache = WordCache(processor)
    assert cache._is_exact == (kind in LOCAL)

    @settings(max_examples=300, deadline=None)
    @given(texts, texts)
    def check(prompt, more):
        for text in (prompt, prompt + more, prompt + " " + more, more):
            assert cache.encode(text).tolist() == processor.encode(text)

    check()


def test_the_table_stays_small(model, monkeypatch):
    monkeypatch.setattr("megatron_prefix.data.tokenize.word_cache.MOST_WORDS", 8)
    _, processor = model
    cache, rng = WordCache(processor), random.Random(1)
    for _ in range(50):
        text = " ".join("".join(rng.choices("abcde", k=4)) for _ in range(5))
        assert cache.encode(text).tolist() == processor.encode(text)
        assert len(cache._ids) <= 8 + 5 and len(cache._normal) <= 8 + 5
    assert MOST_WORDS > 8


def test_texts_without_spaces_do_not_fill_the_memory(model, monkeypatch):
    monkeypatch.setattr("megatron_prefix.data.tokenize.word_cache.MOST_CHARACTERS", 100)
    _, processor = model
    cache, rng = WordCache(processor), random.Random(1)
    for _ in range(20):
        text = "".join(rng.choices("abcde", k=60))
        assert cache.encode(text).tolist() == processor.encode(text)
        assert sum(map(len, cache._ids)) <= 100 + 60
