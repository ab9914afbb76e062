"""Texts scored by a reward model: `evaluate --texts`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_prefix.checkpoint import resolve_checkpoint, resolve_starting_model
from megatron_prefix.config import Config
from megatron_prefix.data import BuildOptions, PreferenceDataset, build_dataset
from megatron_prefix.distributed import open_session
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.reference import frozen_model, score_dataset
from megatron_prefix.text import counted
from megatron_prefix.train.row_costs import ModelCosts
from megatron_prefix.train.samplers import evaluation_sampler

TEXT_KEYS = {"prompt", "response"}


def score_texts(config: Config, load: str | None, path: str) -> list[dict[str, Any]]:
    """The reward of every text of a file of JSON Lines, in its order: {"text", "reward"}, and
    {"attributes"} of a model with several.

    A line is {"prompt", "response"}, both texts or both messages. They become tokens as `build`
    makes them, with the tokenizer of the data sets and its rule for the ends of texts. The model is
    the checkpoint `load`, or the initial one. Raises InputError.
    """
    if config.model.kind != "reward":
        raise InputError(
            f"--texts with model.kind: {config.model.kind}: only a reward model scores texts; for "
            "a language model build a data set, and use --per-response"
        )
    weights = None if load is None else resolve_checkpoint(load)
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    records = read_texts(path)
    with tempfile.TemporaryDirectory() as scratch, open_session(config) as world:
        # every process builds the same small data set for itself, so no disk has to be shared
        dataset = _built(config, records, Path(scratch))
        initial = resolve_starting_model(config.model, [dataset], config.lora)
        model = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
        adapter = initial.load(model) if weights is None or initial.lora is not None else None
        if weights is not None:
            initial.load_trained(weights, model, adapter)
        costs = ModelCosts(initial)
        sampler = evaluation_sampler(
            config, objective, dataset, world, costs, is_scoring=True, sharing="response"
        )
        vector = score_dataset(model, sampler, world, parts=objective.parts)
    own = objective.parts.split(vector, len(dataset.response_lengths))[0]
    attributes = objective.parts.attribute_scores(vector, len(dataset.response_lengths))
    scored = []
    for number, record in enumerate(dataset.group_records.tolist()):
        scored.append({"text": record, "reward": float(own[number])})
        if attributes is not None:
            scored[-1]["attributes"] = attributes[number].tolist()
    return scored


def read_texts(path: str) -> list[dict[str, Any]]:
    """The lines of a file. Raises InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--texts {path}: cannot be read ({error}); give JSON Lines") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or set(record) != TEXT_KEYS:
            raise InputError(
                f'--texts {path}, line {number}: expected {{"prompt": …, "response": …}} and no '
                "other key; change the line"
            )
        records.append(record)
    if not records:
        raise InputError(f"--texts {path}: the file is empty")
    return records


def _built(config: Config, records: list[dict[str, Any]], folder: Path) -> PreferenceDataset:
    """The texts as a data set of unpaired responses, with the tokenizer of the run's data."""
    prefix = next(iter(config.data.valid_sets.values()), config.data.train_sets[0].prefix)
    tokenizer = PreferenceDataset(prefix).manifest["tokenizer"]
    modes = {
        flag: (tokenizer.get(key) or {}).get("mode", "auto")
        for flag, key in (("bos", "begin_of_text"), ("eos", "end_of_text"))
    }
    source = folder / "texts.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for record in records:
            row = {"prompt": record["prompt"], "completion": record["response"], "label": True}
            file.write(json.dumps(row) + "\n")
    try:
        build_dataset([source], tokenizer["name"], folder / "texts", BuildOptions(**modes))
    except InputError as error:
        raise InputError(f"--texts: {error}") from None
    dataset = PreferenceDataset(folder / "texts")
    if dataset.manifest["tokenizer"]["fingerprint"] != tokenizer["fingerprint"]:
        raise InputError(
            f"--texts: the tokenizer {tokenizer['name']} is not the one that {prefix} was built "
            "with: put that one back, or build the data set again"
        )
    if len(dataset.response_lengths) != len(records):
        raise InputError(
            f"--texts: {counted(len(records), 'line')} made "
            f"{counted(len(dataset.response_lengths), 'text')}: a response may not be empty"
        )
    return dataset
