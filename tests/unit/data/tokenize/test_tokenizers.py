import contextlib
import json

import numpy as np
import pytest

from megatron_prefix.data.read import ExampleReader, Inputs, Message
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize import PathEncoder, Tokenizer, TooLong, load_tokenizer, select
from megatron_prefix.data.tokenize.base import plain_layout, vocabulary_digest
from megatron_prefix.data.tokenize.paths import NOTE_NO_END, NOTE_TEMPLATE
from megatron_prefix.data.tree import Pair
from megatron_prefix.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message(role, content):
    return Message(role=role, content=content)


def pair_example(prompt, chosen, rejected):
    return Example(
        responses=tuple(ExampleResponse(prompt=prompt, response=r) for r in (chosen, rejected)),
        pairs=(Pair(chosen=0, rejected=1),),
    )


def answers(*texts):
    return [(message("assistant", text),) for text in texts]


def encode(tokenizer, example, **more):
    return PathEncoder(tokenizer, **more).encode(example)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    corpus = folder / "corpus.txt"
    corpus.write_text("the cat sat on the mat\nthe dog ate the cat food\nhello there\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """A tiny BPE that merges letters, and a space with the letter after it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["say yes or say no", "yes yes no no"] * 20, trainer)
    folder = tmp_path_factory.mktemp("hf")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def edit_template(hf_dir, tmp_path, template):
    """A copy of the tokenizer with another chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert tokenizer.encode("aé").dtype == np.int64
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.decode([256, 97, 195, 169, 257]) == "<bos>aé<eos>"
    assert tokenizer.decode([195]) == "\ufffd"
    assert tokenizer.describe()["fingerprint"] == load_tokenizer("bytes").fingerprint


def test_begin_and_end_of_text_occur_once():
    (chosen, rejected), notes = encode(load_tokenizer("bytes"), pair_example("ab", "c", "d"))
    assert chosen.tokens.tolist() == [256, 97, 98, 99, 257] and chosen.loss_start == 3
    assert rejected.tokens.tolist() == [256, 97, 98, 100, 257] and notes == []
    bare = encode(load_tokenizer("bytes"), pair_example("ab", "c", "d"), eos="never")[0][0]
    assert bare.tokens.tolist() == [256, 97, 98, 99]


def test_plain_layout():
    turns = [message("system", "S"), message("user", "Q"), message("assistant", "A")]
    assert plain_layout(turns, False) == "\n\nSystem: S\n\nHuman: Q\n\nAssistant: A"
    assert plain_layout(turns[:2], True) == "\n\nSystem: S\n\nHuman: Q\n\nAssistant:"
    with pytest.raises(InputError, match="'tool'"):
        plain_layout([message("tool", "x")], False)
    example = pair_example((message("user", "Q"),), *answers("yes", "no"))
    path = encode(load_tokenizer("bytes"), example)[0][0]
    text = load_tokenizer("bytes").decode(path.tokens[path.loss_start :])
    assert text == " yes<eos>"


def test_sentencepiece(sentencepiece_model, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat" and ids.max() < tokenizer.vocab_size == 60
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode([1, *ids, 2]) == "<s>the cat sat</s>"
    assert not set(tokenizer.encode("<s>the</s>")) & {1, 2}, "control symbols in text stay text"
    copy = tmp_path / "other-name.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    path = encode(tokenizer, pair_example("the cat", " sat", " ate"))[0][0]
    assert path.tokens[0] == 1 and path.tokens[-1] == 2
    assert path.tokens[1:-1].tolist() == tokenizer.encode("the cat sat").tolist()


def test_a_token_merged_over_the_boundary_belongs_to_the_response(hf_dir):
    tokenizer = load_tokenizer(hf_dir)
    assert len(tokenizer.encode(" yes")) == 1
    example = pair_example("say ", "yes", "no")
    for path, text in zip(encode(tokenizer, example)[0], ("say yes", "say no"), strict=True):
        assert path.tokens[:-1].tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.decode(path.tokens[: path.loss_start]) == "say"
        assert tokenizer.decode(path.tokens[path.loss_start : -1]) == text[3:]


def test_unmerged_boundary_is_the_prompts_end(hf_dir):
    tokenizer = load_tokenizer(hf_dir)
    path = encode(tokenizer, pair_example("say", " yes", " no"))[0][0]
    assert path.loss_start == len(tokenizer.encode("say"))


def test_chat_template_that_ends_with_end_of_text_gets_no_second_one(hf_dir):
    tokenizer = load_tokenizer(hf_dir)
    assert tokenizer.has_chat_template and tokenizer.bos_id is None
    example = pair_example((message("user", "say"),), *answers("yes", "no"))
    paths, notes = encode(tokenizer, example)
    prompt = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\n"
    assert notes == []
    for path, word in zip(paths, ("yes", "no"), strict=True):
        assert tokenizer.decode(path.tokens[: path.loss_start]) == prompt
        assert tokenizer.decode(path.tokens[path.loss_start :]) == f"{word}<|im_end|>\n"


def test_texts_are_not_templated(hf_dir):
    tokenizer = load_tokenizer(hf_dir)
    path = encode(tokenizer, pair_example("say", " yes", " no"))[0][0]
    assert tokenizer.decode(path.tokens) == "say yes<|im_end|>"


def test_begin_of_text_of_a_template_is_not_repeated(hf_dir, tmp_path):
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(
        edit_template(hf_dir, tmp_path, "{{ bos_token }}" + CHATML)
    )
    base.add_special_tokens({"bos_token": "<bos>"})
    base.save_pretrained(tmp_path / "with-bos")
    tokenizer = load_tokenizer(tmp_path / "with-bos")
    example = pair_example((message("user", "say"),), *answers("yes", "no"))
    for mode in ("auto", "always"):
        for path in encode(tokenizer, example, bos=mode)[0]:
            assert path.tokens[0] == tokenizer.bos_id
            assert (path.tokens == tokenizer.bos_id).sum() == 1
            text = tokenizer.decode(path.tokens[path.loss_start :])
            assert text.strip() in ("yes<|im_end|>", "no<|im_end|>")


def test_begin_of_text_that_the_tokenizer_does_not_write(hf_dir, tmp_path):
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(hf_dir)
    base.add_special_tokens({"bos_token": "<bos>"})
    base.save_pretrained(tmp_path / "with-bos")
    tokenizer = load_tokenizer(tmp_path / "with-bos")
    conversation = pair_example((message("user", "say"),), *answers("yes", "no"))
    for example in (conversation, pair_example("say", " yes", " no")):
        for mode, count in (("auto", 0), ("always", 1), ("never", 0)):
            encoder = PathEncoder(tokenizer, bos=mode)
            for path in encoder.encode(example)[0]:
                assert (path.tokens == tokenizer.bos_id).sum() == count
                assert tokenizer.decode(path.tokens).startswith("<bos>" * count)
            assert (encoder.added.begin_of_text, encoder.added.num_responses) == (2 * count, 2)
    assert PathEncoder(tokenizer).describe()["begin_of_text"]["text"] == []
    with pytest.raises(InputError, match="--bos is always and tokenizer .* no begin-of-text"):
        PathEncoder(load_tokenizer(hf_dir), bos="always")
    with pytest.raises(InputError, match="--eos is 'some': give one of auto, always, never"):
        PathEncoder(tokenizer, eos="some")


def test_the_vocabulary_is_known_apart_from_the_template(hf_dir, tmp_path, sentencepiece_model):
    other = load_tokenizer(edit_template(hf_dir, tmp_path, CHATML + " "))
    tokenizer = load_tokenizer(hf_dir)
    assert other.vocabulary == tokenizer.vocabulary and other.fingerprint != tokenizer.fingerprint
    digests = {load_tokenizer(t).vocabulary for t in ("bytes", hf_dir, sentencepiece_model)}
    assert len(digests) == 3
    pieces = {"a": 0, "b": 1, "<s>": 2}
    known = vocabulary_digest(pieces, ["<s>"])
    assert known == vocabulary_digest(dict(reversed(pieces.items())), ["<s>"])
    assert known != vocabulary_digest({**pieces, "a": 1, "b": 0}, ["<s>"])
    assert known != vocabulary_digest(pieces, [])


def test_template_without_an_end_gets_one_only_if_asked(hf_dir, tmp_path):
    plain = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = load_tokenizer(edit_template(hf_dir, tmp_path, plain))
    example = pair_example((message("user", "say"),), *answers("yes", "no"))
    (path, _), notes = encode(tokenizer, example)
    assert tokenizer.decode(path.tokens) == "u: say\na: yes\n" and notes == [NOTE_NO_END] * 2
    (path, _), notes = encode(tokenizer, example, eos="always")
    assert tokenizer.decode(path.tokens) == "u: say\na: yes\n<|im_end|>" and notes == []
    assert tokenizer.decode(path.tokens[path.loss_start :]) == " yes\n<|im_end|>"
    assert tokenizer.fingerprint != load_tokenizer(hf_dir).fingerprint


def test_template_that_opens_an_answer_differently_is_noted(hf_dir, tmp_path):
    tokenizer = load_tokenizer(
        edit_template(hf_dir, tmp_path, CHATML.replace("assistant\n", "assistant\n<think>"))
    )
    example = pair_example((message("user", "say"),), *answers("yes", "no"))
    paths, notes = encode(tokenizer, example)
    assert notes == [NOTE_TEMPLATE] * 2
    for path in paths:
        assert tokenizer.decode(path.tokens[: path.loss_start]).endswith("assistant\n")
    assert paths[0].tokens[: paths[0].loss_start].tolist() == (
        paths[1].tokens[: paths[1].loss_start].tolist()
    )


def test_template_that_refuses_the_roles_is_bad_input(hf_dir, tmp_path):
    strict = "{{ raise_exception('user first') if messages[0]['role'] != 'user' }}" + CHATML
    tokenizer = load_tokenizer(edit_template(hf_dir, tmp_path, strict))
    turns = (message("system", "s"), message("user", "q"))
    with pytest.raises(InputError, match="user first.*system, user"):
        encode(tokenizer, pair_example(turns, *answers("a", "b")))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.foo() }}",
        "{{ 1 // 0 }}",
        "{{ ''.join(1) }}",
        "{{ '%d' % 'x' }}",
        "{{ messages[0]['content'].encode('ascii', 'x') }}{{ 'é'.encode('ascii') }}",
        "{{ messages[9]['content'] }}",
        "{{ '{0.__class__}'.format(messages) }}{{ messages.__class__() }}",
        "{% for m in",
    ],
)
def test_any_error_of_a_template_is_bad_input(hf_dir, tmp_path, template):
    tokenizer = load_tokenizer(edit_template(hf_dir, tmp_path, template))
    turns = (message("user", "q"),)
    with pytest.raises(InputError, match="chat template refuses the messages .*roles are user"):
        encode(tokenizer, pair_example(turns, *answers("a", "b")))


def test_a_text_that_the_tokenizer_cannot_encode(tmp_path):
    from tokenizers import Tokenizer as Core
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    core = Core(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))  # which it lacks
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(InputError, match="cannot encode a text"):
        tokenizer.encode("b")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}",
        "[]",
        "5",
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        '{"model": {"type": "WordLevel", "vocab": 5, "unk_token": ""}}',
        '{"added_tokens": 5, "model": {}}',
    ],
)
def test_a_damaged_tokenizer_file_is_bad_input(hf_dir, tmp_path, text):
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = shutil.copytree(hf_dir, tmp_path / name)
        (folder / name).write_text(text)
        with contextlib.suppress(InputError):
            load_tokenizer(folder).encode("a")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "absent.model")
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(garbage)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")


def test_code_in_a_tokenizer_directory_is_not_run(hf_dir, tmp_path):
    import shutil

    folder = tmp_path / "evil"
    shutil.copytree(hf_dir, folder)
    (folder / "evil.py").write_text("raise SystemExit('the code was run')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except InputError:
        pass  # refusing is as good as reading only the data


class NoSpecials(Tokenizer):
    """Letters as code points; neither begin-of-text nor end-of-text."""

    kind = name = "letters"
    vocab_size, bos_id, eos_id, fingerprint = 0x110000, None, None, "0"

    def encode(self, text):
        return np.array([ord(c) for c in text], np.int64)

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_appending_needs_an_end_of_text_token():
    with pytest.raises(InputError, match="--eos never"):
        PathEncoder(NoSpecials())


def choose(example, tokenizer=None, eos="auto", **limits):
    encoder = PathEncoder(tokenizer or load_tokenizer("bytes"), eos=eos)
    paths, _ = encoder.encode(example)
    return select(example, paths, encoder=encoder, **limits)


def test_responses_and_prompts_of_no_token_are_dropped():
    selection = choose(pair_example("p", "", "a"), NoSpecials(), eos="never")
    assert selection.pairs == [] and selection.dropped["no response token"] == (1, 1)
    selection = choose(pair_example("", "a", "b"), NoSpecials(), eos="never")
    assert selection.dropped["no prompt token"] == (2, 1)
    selection = choose(pair_example("p", "", "a"))
    assert len(selection.pairs) == 1 and len(selection.paths[0].tokens) == 3


def test_equal_tokens_are_no_comparison():
    class Upper(NoSpecials):
        def encode(self, text):
            return super().encode(text.upper())

    selection = choose(pair_example("p", "a", "A"), Upper(), eos="never")
    assert selection.pairs == [] and selection.dropped["chosen equals rejected"] == (0, 1)


def ranked_example(prompt, *responses):
    pairs = [(i, j) for i in range(len(responses)) for j in range(i + 1, len(responses))]
    return Example(
        responses=tuple(ExampleResponse(prompt=prompt, response=r) for r in responses),
        pairs=tuple(Pair(chosen=i, rejected=j) for i, j in pairs),
    )


def test_max_length_counts_the_whole_path():
    example = pair_example("pppp", "aa", "b")  # bos + 4 + 2 + eos = 8
    assert len(choose(example, max_length=8).pairs) == 1
    with pytest.raises(TooLong, match="takes 8 tokens.*--max-length is 7"):
        choose(example, max_length=7)


def test_drop_takes_the_branch_and_its_pairs():
    selection = choose(ranked_example("p", "a", "bbbb", "c"), max_length=5, overflow="drop")
    assert [p.tokens.tolist() for p in selection.paths] == [
        [256, 112, 97, 257],
        [256, 112, 99, 257],
    ]
    assert [(p.chosen, p.rejected) for p in selection.pairs] == [(0, 1)]
    assert selection.dropped == {"over --max-length": (1, 2)}


def test_drop_counts_responses_that_lose_their_last_pair():
    example = Example(
        responses=tuple(
            ExampleResponse(prompt="p", response=r, set_id=s)
            for r, s in (("a", 0), ("bbbb", 0), ("c", 1), ("d", 1))
        ),
        pairs=(Pair(chosen=0, rejected=1), Pair(chosen=2, rejected=3)),
    )
    selection = choose(example, max_length=5, overflow="drop")
    assert [p.set_id for p in selection.paths] == [0, 0]
    assert selection.dropped == {"over --max-length": (1, 1), "left without a pair": (1, 0)}


def test_truncation_cuts_all_responses_of_a_set_equally():
    example = ranked_example("0123456789", "a", "bbb")  # 13 and 15 tokens
    selection = choose(example, max_length=11, overflow="truncate-prompt")
    decode = load_tokenizer("bytes").decode
    texts = [decode(p.tokens.tolist()) for p in selection.paths]
    assert texts == ["<bos>456789a<eos>", "<bos>456789bbb<eos>"]
    assert [p.loss_start for p in selection.paths] == [7, 7]
    assert (selection.num_cut, selection.cut_tokens) == (2, 8)


def test_truncation_keeps_a_prompt_token_and_drops_what_still_does_not_fit():
    example = ranked_example("0123456789", "a", "b" * 20, "cc")
    selection = choose(example, max_length=5, overflow="truncate-prompt")
    texts = [load_tokenizer("bytes").decode(p.tokens.tolist()) for p in selection.paths]
    assert texts == ["<bos>9a<eos>", "<bos>9cc<eos>"]
    assert selection.dropped == {"over --max-length with the shortest prompt": (1, 2)}


def test_truncation_takes_no_prompts_last_token():
    example = pair_example("0123", "a", "b")
    assert len(choose(example, max_length=4, overflow="truncate-prompt").pairs) == 1
    selection = choose(example, max_length=3, overflow="truncate-prompt")
    assert selection.pairs == [] and selection.num_cut == 0


def test_truncation_keeps_the_system_message():
    turns = (message("system", "S"), message("user", "0123456789"))
    example = pair_example(turns, *answers("a", "b"))
    tokenizer = load_tokenizer("bytes")
    whole = choose(example).paths[0].tokens
    selection = choose(example, max_length=len(whole) - 9, overflow="truncate-prompt")
    text = tokenizer.decode(selection.paths[0].tokens.tolist())
    assert text == "<bos>\n\nSystem: S\n\nHuman: 9\n\nAssistant: a<eos>"


def test_truncation_with_a_chat_template_keeps_the_system_message(hf_dir, tmp_path):
    wants_user = "{{ raise_exception('no user') if messages|length < 2 }}" + CHATML
    for folder in (hf_dir, edit_template(hf_dir, tmp_path, wants_user)):
        tokenizer = load_tokenizer(folder)
        turns = (message("system", "say"), message("user", "yes no " * 9))
        example = pair_example(turns, *answers("yes", "no"))
        whole = choose(example, tokenizer).paths[0].tokens
        limits = {"max_length": len(whole) - 6, "overflow": "truncate-prompt"}
        text = tokenizer.decode(choose(example, tokenizer, **limits).paths[0].tokens.tolist())
        assert text.startswith("<|im_start|>system\nsay<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_start|>assistant\nyes<|im_end|>\n")


def test_real_dialogues_with_a_boundary_merging_tokenizer(data_dir, sentencepiece_model):
    from itertools import islice

    tokenizer, reader = load_tokenizer(sentencepiece_model), ExampleReader()
    for record in islice(Inputs([data_dir / "hh_pairs.jsonl.gz"]).read(), 50):
        example = reader.read(record.value)
        paths, _ = encode(tokenizer, example)
        shared = min(p.loss_start for p in paths)
        assert len({tuple(p.tokens[:shared].tolist()) for p in paths}) == 1
        for path, response in zip(paths, example.responses, strict=True):
            ids = tokenizer.encode(response.prompt + response.response)
            assert path.tokens.tolist() == [1, *ids.tolist(), 2]
