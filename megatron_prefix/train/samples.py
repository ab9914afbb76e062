"""Sample answers of the policy while it trains: `train.generate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.read import Message
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import PathEncoder, Tokenizer, load_tokenizer
from megatron_prefix.distributed import World
from megatron_prefix.engine import Policy
from megatron_prefix.engine.generation import generate
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted
from megatron_prefix.trackers import SamplesFile

MOST_PROMPTS = 256
SETTING = "train.generate"


@dataclass(kw_only=True, eq=False)
class Samples:
    """The prompts of a run, and where the answers go; the first process writes."""

    config: Config
    world: World
    tokenizer: Tokenizer
    texts: list[Any]
    """The prompts as in their file."""
    tokens: list[np.ndarray]
    stop_tokens: frozenset[int]
    file: SamplesFile | None = None

    @classmethod
    def of_run(cls, config: Config, dataset: PreferenceDataset, world: World) -> Samples | None:
        """None without `train.generate`. Raises InputError, on every process, if the prompts cannot
        be read or do not fit. Collective."""
        settings = config.train.generate
        if settings is None:
            return None
        texts = world.once(partial(read_prompts, settings.prompts))
        tokenizer, encoder = _tokenizer_of(dataset)
        tokens = []
        for number, text in enumerate(texts, 1):
            try:
                tokens.append(encoder.prompt_tokens(_text(text)))
            except InputError as error:
                raise InputError(f"{SETTING}: prompt {number}: {error}") from None
            _check_length(config, number, len(tokens[-1]))
        return cls(
            config=config,
            world=world,
            tokenizer=tokenizer,
            texts=texts,
            tokens=tokens,
            stop_tokens=_stop_tokens(config, tokenizer),
        )

    def open(self, step: int) -> None:
        """Begin after `step`, whose later answers are removed. Collective."""
        self.file = self.world.once(partial(SamplesFile, self.config, step))

    def write(self, step: int, policy: Policy) -> None:
        """Answers of the policy after `step` steps: greedy ones and, with a temperature, drawn
        ones. Training goes on as if they had not been asked for. Collective."""
        settings = self.config.train.generate
        file = self.file
        assert settings is not None and file is not None, "opened, so there are settings"
        records = []
        for kind, temperature in (("greedy", 0.0), ("sampled", settings.temperature)):
            if kind == "sampled" and not temperature:
                continue
            answers = generate(
                policy.chunks,
                self.tokens,
                self.world,
                max_new_tokens=settings.max_new_tokens,
                stop_tokens=self.stop_tokens,
                row_capacity=self.config.data.row_capacity or max(map(len, self.tokens)),
                temperature=temperature,
                draw=partial(_share, settings.seed, step),
            )
            records += [self._record(i, kind, answer) for i, answer in enumerate(answers)]
        records.sort(key=lambda record: record["prompt"])
        self.world.once(lambda: file.add(step, records))

    def _record(self, number: int, kind: str, answer: np.ndarray) -> dict[str, Any]:
        ended = int(answer[-1]) in self.stop_tokens
        return {
            "prompt": number,
            "text": self.texts[number],
            "kind": kind,
            "answer": self.tokenizer.decode(answer[: len(answer) - ended].tolist()),
            "num_tokens": len(answer),
            "ended": ended,
        }


def read_prompts(path: str) -> list[Any]:
    """The prompts of a file of JSON Lines: texts, or lists of messages. Raises InputError."""
    setting = f"{SETTING}.prompts = {path}"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{setting}: cannot be read ({error}); name a file of JSON Lines"
        ) from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or set(record) != {"prompt"}:
            raise InputError(
                f'{setting}, line {number}: expected {{"prompt": …}} and no other key; change the '
                "line"
            )
        if not _is_prompt(record["prompt"]):
            raise InputError(
                f"{setting}, line {number}: prompt must be a text, or a list of "
                '{"role": text, "content": text}: change it'
            )
        prompts.append(record["prompt"])
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise InputError(f"{setting}: {counted(len(prompts), 'prompt')}: give 1 to {MOST_PROMPTS}")
    return prompts


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and set(turn) == {"role", "content"}
            and all(isinstance(part, str) for part in turn.values())
            for turn in value
        )
    )


def _text(prompt: Any) -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)


def _tokenizer_of(dataset: PreferenceDataset) -> tuple[Tokenizer, PathEncoder]:
    """The data set's tokenizer with its rule for the beginning of texts. Raises InputError if it is
    not here, or is another now."""
    described = dataset.parts[0].manifest["tokenizer"]
    try:
        tokenizer = load_tokenizer(described["name"])
    except InputError as error:
        raise InputError(f"{SETTING} needs the tokenizer of data.train: {error}") from None
    if tokenizer.fingerprint != described["fingerprint"]:
        raise InputError(
            f"{SETTING}: the tokenizer {described['name']} is not the one that data.train was "
            "built with: put that one back, or build the data set again"
        )
    begin, end = described.get("begin_of_text") or {}, described.get("end_of_text") or {}
    return tokenizer, PathEncoder(tokenizer, begin.get("mode", "auto"), end.get("mode", "auto"))


def _check_length(config: Config, number: int, num_tokens: int) -> None:
    settings, capacity = config.train.generate, config.data.row_capacity
    assert settings is not None
    needed = num_tokens + settings.max_new_tokens
    if not num_tokens or (capacity is not None and needed > capacity):
        raise InputError(
            f"{SETTING}: prompt {number} has {counted(num_tokens, 'token')} and max_new_tokens = "
            f"{settings.max_new_tokens}: a prompt needs a token, and both together fit "
            f"data.row_capacity = {capacity}; shorten it, or lower max_new_tokens"
        )


def _stop_tokens(config: Config, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an answer: the tokenizer's end-of-text, and what the model's own
    generation_config.json names."""
    stops = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    path = Path(config.model.hf or "") / "generation_config.json"
    if config.model.hf is not None and path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not JSON ({error}): put the model's own back") from None
        numbers = named if isinstance(named, list) else [named]
        stops |= {x for x in numbers if isinstance(x, int)}
    return frozenset(stops)


def _share(seed: int, step: int, prompt: int, count: int) -> float:
    """The number by which a token is drawn; the same in every layout."""
    return float(np.random.default_rng([seed, step, prompt, count]).random())
