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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prefix.config.kinds import NOT_OF_REWARD, with_kind_defaults
from megatron_prefix.config.rules import SIZES, check_rules
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
    plan: str | None = None
    """Packed index of `train` that `pack --output` wrote for these settings; without it the run
    packs its steps by itself, alike."""
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
    packing_method: Literal["first-fit", "best-fit"] = "first-fit"
    """Which row with room takes the next shorter tree: the first one, or the fullest."""
    sort_by_length: Switch = False
    """Steps of groups of like length, their order permuted: less padding and evener steps, but
    length decides who shares a step."""


@_section
class RopeScaling:
    """Rotary frequencies for longer contexts than the model was first trained on."""

    type: Literal["linear", "llama3"]
    """`linear`: all frequencies over `factor`; `llama3`: the low ones, blending in between."""
    factor: Positive
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: PositiveInt | None = None
    """Context length in tokens before scaling."""


@_section
class ModelConfig:
    """Where the model comes from or its sizes, precision, attention and recompute."""

    kind: Literal["lm", "reward"] = "lm"
    """`lm`: a language model, trained as a policy; `reward`: a scalar head on each response's
    last token. A reward model may start from a language model; its head is then drawn."""
    hf: str | None = None
    """Hugging Face model (directory or id) that gives sizes and weights to policy and
    reference: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE. No size may be given beside it."""
    checkpoint: str | None = None
    """Distributed checkpoint whose weights the policy and the reference start from; sizes may
    be left out beside one that `convert import` wrote. Without it and `hf`, both start from
    weights drawn from `train.seed`."""
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_query_groups: PositiveInt | None = None
    """Key-value heads; as many as `num_attention_heads` where not given."""
    kv_channels: PositiveInt | None = None
    """Size of a head; `hidden_size / num_attention_heads` where not given."""
    rotary_base: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: Positive = 1e-5
    add_qkv_bias: Switch = False
    qk_layernorm: Switch = False
    """RMSNorm over each query and key head before rotation."""
    untie_embeddings_and_output_weights: Switch = True
    num_moe_experts: PositiveInt | None = None
    """Experts of every layer, in place of one feed-forward network."""
    moe_router_topk: PositiveInt = 2
    """Experts that each token is sent to."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Size of an expert; `ffn_hidden_size`, that of layers without experts, where not given."""
    moe_router_pre_softmax: Switch = False
    """Weigh the chosen experts by their probability among all experts; without it, among the
    chosen ones."""
    moe_aux_loss_coeff: NonNegative = 0.0
    """Weight of the auxiliary loss that spreads tokens over experts; see docs/design.md."""
    moe_count: Literal["tokens", "responses"] = "tokens"
    """What the auxiliary loss counts: every `token` once, or once for each of the `responses` that
    share it, as if each ran alone."""
    init_method_std: Positive = 0.02
    """Standard deviation of drawn weights; output projections are scaled by 1/sqrt(2 layers)."""
    make_vocab_size_divisible_by: PositiveInt = 64
    """The embedding is padded with zero rows, never predicted, to a multiple of this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention_backend: Literal["auto", "dense", "path", "flash", "te", "flex"] = "auto"
    """`dense` and `path` run anywhere; `flash`, `te` (Transformer Engine) and `flex`
    (FlexAttention) on CUDA; `auto` as attention/auto_table.json says."""
    flash_version: Literal["auto", 2, 3, 4] = "auto"
    """FlashAttention behind `attention_backend: flash`: torch's own 2, or 3 or 4 where they are
    installed; `auto` is 3 on Hopper where that is installed, else 2."""
    lm_head_chunk_size: PositiveInt = 2048
    """Rows projected to logits at a time; more rows are projected again in backward."""
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: PositiveInt | None = None


@_section
class ParallelConfig:
    """Process layout. What the sizes leave of the processes that `torchrun` starts is data
    parallelism."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer's matrices."""
    sequence_parallel: Switch = False
    """Tensor-parallel ranks also share the tokens between those matrices."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that follow one another."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Chunks of layers that each stage holds, interleaved over the stages."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first stage, which also embeds; the other stages share the rest evenly."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Layers of the last stage, which also projects to logits."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each row through all layers."""
    cp_comm: Literal["all_gather", "all_to_all", "needed_rows"] | None = None
    """How context-parallel ranks get keys. `needed_rows` (default): the rows on the root paths of
    their tokens; `all_gather`: all rows; `all_to_all`: all rows for a share of the heads."""
    expert_model_parallel_size: PositiveInt = 1
    """Data-parallel ranks that share the experts of every layer."""
    use_distributed_optimizer: Switch = False
    """Each rank keeps its share of the optimizer's state (ZeRO stage 1)."""
    overlap_grad_reduce: Switch = False
    """Add gradients up over data-parallel ranks while backward still runs."""
    overlap_param_gather: Switch = False
    """With the distributed optimizer, gather updated weights while the next forward pass runs."""
    distributed_timeout_minutes: Positive = 30.0
    """How long ranks may wait for one that does not get on, before all end and name it."""

    @property
    def row_multiple(self) -> int:
        """What a row's length is a multiple of, in tokens: the ranks that share it."""
        slices = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return slices * self.context_parallel_size

    @property
    def count_multiple(self) -> int:
        """What a rank's rows in a step are a multiple of: interleaved stages fill in turns."""
        is_interleaved = self.virtual_pipeline_model_parallel_size is not None
        return self.pipeline_model_parallel_size if is_interleaved else 1


@_section
class LossConfig:
    """The objective over pairs of responses. `megatron_prefix.objectives.check` says which of
    the options an objective uses; None is "not given"."""

    loss_type: str = "sigmoid"
    """Name of the objective. For language models: `sigmoid` (DPO, Rafailov et al. 2023,
    equation 7) or `ipo` (Azar et al. 2023, equation 17, with log-ratios per token); for reward
    models: `bradley_terry`, their default (Ouyang et al. 2022, equation 1)."""
    beta: Positive | None = None
    """Reward per nat of log-probability ratio; 0.1 if not given."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] | None = None
    """Probability that a label is wrong (conservative DPO); 0 if not given."""
    weighting: Literal["pair", "group"] | None = None
    """`pair` (default): every pair weighs 1 (times its own weight); `group`: every comparison
    set does."""
    reference: Literal["model", "precomputed", "none"] | None = None
    """`model`: a frozen copy of the initial policy, run over each step's rows; `precomputed`:
    log-probabilities that `score` wrote, read from `ref_logps`; `none`: no reference. Default:
    `model` if the objective needs a reference, else `none`."""
    ref_logps: str | None = None
    """Sidecar for `data.train` that `score --output` wrote; with `reference: precomputed`."""
    margin: Switch | None = None
    """The chosen reward has to exceed the rejected one by the pair's own margin, which every
    pair of the data sets must have."""
    center_rewards_coefficient: Positive | None = None
    """Adds this times (chosen + rejected reward)^2 to a pair's loss."""


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected sections (data, model, …), found {raw!r}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config({k: {} if v is None else v for k, v in raw.items()}, str(path))


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Check nested dictionaries against the sections. Raises InputError naming every fault."""
    try:
        config = TypeAdapter(Config).validate_python(with_kind_defaults(raw))
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors(include_url=False))
        raise InputError(f"{source}: {faults}") from None
    try:
        check_rules(config, raw)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default included; of the loss section what was
    given, because an objective refuses options that it does not use."""
    tree = TypeAdapter(Config).dump_python(config, mode="json")
    tree["loss"] = {key: value for key, value in tree["loss"].items() if value is not None}
    if config.model.num_layers is None:  # they come from hf or checkpoint, next time too
        tree["model"] = {k: v for k, v in tree["model"].items() if k not in SIZES}
    for section, key in NOT_OF_REWARD if config.model.kind == "reward" else ():
        tree[section].pop(key, None)
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
    except (yaml.YAMLError, ValueError, RecursionError):
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
    """Keys of the section at `location`, e.g. ("model", "rope_scaling")."""
    section: type = Config
    for part in location:
        known = section.__dataclass_fields__.get(part)
        name = str(known.type).split(" | ")[0] if known else ""
        section = globals().get(name, object)
        if not hasattr(section, "__dataclass_fields__"):
            return []
    return list(section.__dataclass_fields__)
