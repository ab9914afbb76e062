"""The run's configuration: frozen dataclasses, one a section, read from YAML with dotted overrides.

    data:
      train: hh                  # PREFIX that `build` wrote
      global_batch_size: 64
    optimizer: {lr: 5e-6}

    load_config("run.yaml", ["optimizer.lr=1e-6"])

Unknown keys, wrong types and settings that exclude each other are refused with an InputError
that names the setting, what was given and what to do. Nothing given is ever ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prefix.errors import InputError

_section = dataclass(kw_only=True, frozen=True, config=ConfigDict(extra="forbid"))

Switch = Annotated[bool, Field(strict=True)]
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]

Sharing = Literal["tree", "pair", "response", "none"]


@_section
class DataConfig:
    """What is trained on, and how it is laid into rows."""

    train: str
    """Data set to train on: the PREFIX given to `build --output`."""
    valid: str | None = None
    """Held-out data set for evaluation: a PREFIX, or nothing for no evaluation."""
    seed: NonNegativeInt = 1234
    """Seed of the order of the groups."""
    sharing: Sharing = "tree"
    """What is computed once: `tree` every token, `pair` a pair's prompt, `response` each
    response with its own prompt, `none` nothing (a sequence per pair and side)."""
    packing: Switch = True
    """Several trees a row; without it, `micro_batch_size` sequences padded to the longest."""
    row_capacity: PositiveInt | None = None
    """Largest number of tokens in a row. Needed with packing; without it an optional bound on
    one sequence. A longer tree or sequence is an error that names its group."""
    micro_batch_size: PositiveInt | None = None
    """Sequences of a micro batch. Needed without packing, refused with it."""
    global_batch_size: PositiveInt | None = None
    """Groups a step, over all data-parallel ranks. This or `rows_per_step`."""
    rows_per_step: PositiveInt | None = None
    """Packed rows a step, over all data-parallel ranks; packing decides who shares a step."""


@_section
class ModelConfig:
    """Sizes under Megatron's names, precision, attention and recompute."""

    checkpoint: str | None = None
    """Distributed checkpoint whose weights the policy and the reference start from;
    without it both start from weights drawn from `train.seed`."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key-value heads; as many as `num_attention_heads` where not given."""
    kv_channels: PositiveInt | None = None
    """Size of a head; `hidden_size / num_attention_heads` where not given."""
    rotary_base: Positive = 10000.0
    norm_epsilon: Positive = 1e-5
    add_qkv_bias: Switch = False
    qk_layernorm: Switch = False
    """RMSNorm over each query and key head before rotation."""
    untie_embeddings_and_output_weights: Switch = True
    init_method_std: Positive = 0.02
    """Standard deviation of drawn weights; output projections are scaled by 1/sqrt(2 layers)."""
    make_vocab_size_divisible_by: PositiveInt = 64
    """The embedding is padded with zero rows, never predicted, to a multiple of this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention_backend: Literal["auto", "dense", "path", "flash"] = "auto"
    lm_head_chunk_size: PositiveInt = 2048
    """Rows projected to logits at a time; more rows are projected again in backward."""
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: PositiveInt | None = None


@_section
class ParallelConfig:
    """Process layout. One process trains the model; there is nothing to set."""


@_section
class LossConfig:
    """The objective over pairs of responses."""

    loss_type: Literal["sigmoid"] = "sigmoid"
    """`sigmoid`: DPO (Rafailov et al. 2023, equation 7)."""
    beta: Positive = 0.1
    """Reward per nat of log-probability ratio."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong (conservative DPO)."""
    weighting: Literal["pair", "group"] = "pair"
    """`pair`: every pair weighs 1 (times its own weight); `group`: every comparison set does."""
    reference: Literal["model"] = "model"
    """`model`: a frozen copy of the initial policy, run over each step's rows."""


@_section
class OptimizerConfig:
    """Adam with decoupled weight decay, and its schedule."""

    lr: Positive
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from `lr` to `min_lr` over the run's steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    weight_decay: NonNegative = 0.0
    """Applied to matrices, not to biases and norms."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_eps: Positive = 1e-8
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 clips nothing."""


@_section
class TrainConfig:
    """Length of the run, checkpoints and evaluation."""

    steps: PositiveInt | None = None
    """Optimizer steps. This or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over `data.train`; a last, smaller step takes what remains."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights."""
    save: str | None = None
    """Directory for checkpoints (`iter_0000100/`, `latest_checkpointed_iteration.txt`)."""
    load: str | None = None
    """Checkpoint directory to resume from; an absent one means a fresh start, which is said."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved where `save` is set."""
    eval_interval: PositiveInt | None = None
    """Steps between evaluations on `data.valid`, which also come before the first step and
    after the last one."""


@_section
class LoggingConfig:
    """Where the run writes `config.yaml` and `metrics.jsonl`."""

    output: str
    tensorboard: Switch = False
    """Also write TensorBoard event files under `output`/tensorboard."""


@_section
class Config:
    """A whole run."""

    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig
    train: TrainConfig
    logging: LoggingConfig


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings say a key once; the stock loader drops all but the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                problem = f"{name} is given twice: remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml_loader() -> type[yaml.SafeLoader]:
    """YAML 1.1 reads `1e-5` as a string; YAML 1.2, and every user, as a number."""
    loader = type("Loader", (_UniqueKeys,), {})
    number = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return loader


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    `overrides` are `section.key=value` with the value in YAML. Raises InputError.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader())
    except OSError as error:
        raise InputError(
            f"config {path}: {error.strerror}; give --config an existing file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected sections (data, model, …), found {raw!r}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config({k: {} if v is None else v for k, v in raw.items()}, str(path))


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Check nested dictionaries against the sections. Raises InputError naming every fault."""
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors(include_url=False))
        raise InputError(f"{source}: {faults}") from None
    _check(config)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default included."""
    tree = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise InputError(
            f"override {override!r}: expected section.key=value, e.g. optimizer.lr=1e-6"
        )
    try:
        value = yaml.load(text, _yaml_loader())
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML") from None
    if not isinstance(raw.get(section) or {}, dict):
        raise InputError(f"override {override!r}: {section} is not a section in the file")
    raw[section] = {**(raw.get(section) or {}), key: value}


def _explain(fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known) or 'none'}"
        return f"unknown key {where} ({hint})"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where} is missing"
    return f"{where} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _known_keys(location: tuple) -> list[str]:
    sections = {name: f.type for name, f in Config.__dataclass_fields__.items()}
    if not location:
        return list(sections)
    section = globals().get(str(sections.get(location[0])))
    return list(section.__dataclass_fields__) if section else []


def _check(config: Config) -> None:
    """Settings that exclude each other, or that do not divide."""
    faults = [*_data_faults(config.data), *_model_faults(config.model), *_run_faults(config)]
    if faults:
        raise InputError("; ".join(faults))


def _data_faults(data: DataConfig) -> Iterator[str]:
    if data.packing and data.row_capacity is None:
        yield "data.row_capacity is missing: packing needs the size of a row in tokens"
    if data.packing and data.micro_batch_size is not None:
        yield (
            f"data.micro_batch_size = {data.micro_batch_size} counts only without packing: "
            "remove it, or set data.packing: false"
        )
    if not data.packing and data.micro_batch_size is None:
        yield "data.micro_batch_size is missing: data.packing: false needs it"
    if not data.packing and data.rows_per_step is not None:
        yield (
            f"data.rows_per_step = {data.rows_per_step} counts packed rows: "
            "set data.packing: true, or use data.global_batch_size"
        )
    if (data.global_batch_size is None) == (data.rows_per_step is None):
        yield (
            f"data.global_batch_size = {data.global_batch_size} and "
            f"data.rows_per_step = {data.rows_per_step}: give exactly one"
        )


def _model_faults(model: ModelConfig) -> Iterator[str]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if groups and heads % groups:
        yield (
            f"model.num_attention_heads = {heads} is not a multiple of "
            f"model.num_query_groups = {groups}"
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size = {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads = {heads}: change one, or set model.kv_channels"
        )
    elif (model.kv_channels or model.hidden_size // heads) % 2:
        yield (
            f"a head of {model.kv_channels or model.hidden_size // heads} channels is odd and "
            "rotary embedding rotates pairs: change model.hidden_size or model.kv_channels"
        )
    full = model.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        if (getattr(model, key) is not None) != full:
            yield (
                f"model.{key} = {getattr(model, key)}: needed with "
                "model.recompute_granularity: full, and only there"
            )


def _run_faults(config: Config) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if (train.steps is None) == (train.epochs is None):
        yield f"train.steps = {train.steps} and train.epochs = {train.epochs}: give exactly one"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}"
    if train.save_interval is not None and train.save is None:
        yield "train.save_interval is set but train.save is not: name a directory"
    if train.eval_interval is not None and config.data.valid is None:
        yield "train.eval_interval is set but data.valid is not: name a data set"
