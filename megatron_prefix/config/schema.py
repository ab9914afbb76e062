"""The run's configuration: frozen dataclasses, one per section.

The sections `model`, `loss`, `lora` and `parallel` are in model.py, loss.py, lora/ and parallel.py;
load.py reads them all from YAML; rules.py says which settings exclude each other.
"""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import Discriminator, Field, Tag, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import (
    KNOWN_KEYS,
    Count,
    Epochs,
    NewTokens,
    NoneOrSteps,
    PathText,
    PerStep,
    ProfiledSteps,
    Seed,
    SetEpochs,
    SetName,
    Share,
    Steps,
    Switch,
    Temperature,
)
from megatron_prefix.config.kinds import NOT_OF_REWARD
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.config.loss import LossConfig
from megatron_prefix.config.model import SIZES, ModelConfig
from megatron_prefix.config.optimizer import OptimizerConfig
from megatron_prefix.config.parallel import ParallelConfig

Sharing = Literal["tree", "pair", "response", "none"]


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class TrainSet:
    """One of several data sets to train on."""

    prefix: PathText
    """The PREFIX given to `build --output`."""
    weight: Share | None = None
    """Share of the groups of each step, as a proportion: weights 3 and 1 give three quarters and a
    quarter. Needs `global_batch_size` and `train.steps`."""
    epochs: SetEpochs | None = None
    """How often every group comes, fractions allowed. Needs `train.epochs: 1`."""


def _form(value: object) -> str:
    """Which form a setting has that may be one data set or several."""
    if isinstance(value, dict):
        return "(names)"
    return "(list)" if isinstance(value, list | tuple) else "(one)"


Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f/\\\\#?%:]{1,128}$")]
"""A name that a service accepts."""
MetricName = Annotated[str, Field(pattern=r"^eval_[A-Za-z0-9_./-]{1,200}$")]
TrainSets = Annotated[
    Annotated[PathText, Tag("(one)")] | Annotated[tuple[TrainSet, ...], Tag("(list)")],
    Discriminator(lambda value: "(one)" if _form(value) == "(names)" else _form(value)),
]
ValidSets = Annotated[
    Annotated[PathText | None, Tag("(one)")] | Annotated[dict[SetName, PathText], Tag("(names)")],
    Discriminator(lambda value: "(one)" if _form(value) == "(list)" else _form(value)),
]


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class DataConfig:
    """The data sets, and how their trees are put into rows."""

    train: TrainSets
    """Data set to train on: the PREFIX given to `build --output`. Or a list of several, all with
    `weight` or all with `epochs`."""
    valid: ValidSets = None
    """Held-out data set for evaluation: a PREFIX, or several by name as {name: PREFIX}; without it
    there is no evaluation."""
    seed: Seed = 1234
    """Seed of the order of the groups."""
    plan: PathText | None = None
    """Packed steps of `train` that `pack --output` wrote for these settings; without them the run
    packs the same steps by itself."""
    sharing: Sharing = "tree"
    """What is computed once: `tree` every token, `pair` a pair's prompt, `response` each
    response with its own prompt, `none` nothing (one sequence per pair and side)."""
    packing: Switch = True
    """Put several trees into a row; without it, `micro_batch_size` sequences are padded to the
    longest."""
    row_capacity: Count | None = None
    """Largest number of tokens in a row. Needed with packing; without packing an optional bound
    on one sequence. A longer tree or sequence is an error that names its group."""
    oversized: Literal["error", "split"] = "error"
    """A tree, pair or set that does not fit a row is an `error`, or `split` cuts it along its
    branches into parts that fit. Each part repeats the prefix that it shares with others. Without
    packing, sets of more than `micro_batch_size` sequences are cut too."""
    pad_rows: Literal["multiple", "capacity"] = "multiple"
    """Length of a packed row: its trees, rounded up to a `multiple` of the ranks that share it, or
    always the `capacity`, rounded up. Padding has no loss."""
    micro_batch_size: PerStep | None = None
    """Sequences of a micro batch. Needed without packing, refused with it."""
    global_batch_size: PerStep | None = None
    """Groups per step, over all data-parallel ranks. Give this or `rows_per_step`."""
    rows_per_step: PerStep | None = None
    """Packed rows per step, over all data-parallel ranks; packing decides which groups share a
    step."""
    packing_method: Literal["first-fit", "best-fit"] = "first-fit"
    """Which row with enough room takes the next shorter tree: the first one, or the fullest."""
    sort_by_length: Switch = False
    """Put groups of similar length into a step, and permute the steps: less padding. Batches then
    differ, so results do too."""

    @property
    def train_sets(self) -> tuple[TrainSet, ...]:
        """The data sets to train on, one or several."""
        return (TrainSet(prefix=self.train),) if isinstance(self.train, str) else self.train

    def length_multiple(self, row_multiple: int) -> int:
        """A row's length in tokens is a multiple of this, given that of the layout.

        A capacity of 10 and a multiple of 4: 4, or with `pad_rows: capacity` 12, the length of
        every row.
        """
        if self.pad_rows == "multiple" or self.row_capacity is None:
            return row_multiple
        return -(-self.row_capacity // row_multiple) * row_multiple

    @property
    def valid_sets(self) -> dict[str, str]:
        """Name -> PREFIX of the held-out data sets; the name of a single one is ""."""
        if self.valid is None:
            return {}
        return {"": self.valid} if isinstance(self.valid, str) else self.valid

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of a list in `train`, if it has weights."""
        weights = [item.weight for item in self.train_sets if item.weight is not None]
        return tuple(weights) or None

    @property
    def set_epochs(self) -> tuple[float, ...] | None:
        """The epochs of a list in `train`, if it has epochs."""
        epochs = [item.epochs for item in self.train_sets if item.epochs is not None]
        return tuple(epochs) or None


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class BestConfig:
    """Which checkpoint is the best."""

    metric: MetricName
    """A metric of the evaluation with its name in metrics.jsonl, e.g. eval_rewards/accuracies."""
    mode: Literal["max", "min"] = "max"
    """Whether a high or a low value is good."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class GenerateConfig:
    """Sample answers of the policy while it trains."""

    prompts: PathText
    """JSON Lines of at most 256 prompts: {"prompt": text}, or {"prompt": [{"role", "content"}, …]}
    for the chat template."""
    every: Steps
    """Steps between answers; there are also answers before the first step and after the last."""
    max_new_tokens: NewTokens = 128
    """Tokens of an answer at most. Each of them is a forward pass over all prompts and answers."""
    temperature: Temperature = 0.0
    """0: greedy answers only; above, a second answer is drawn at this temperature."""
    seed: Seed = 1234
    """Seed of the drawn answers; those of a step and prompt do not depend on the layout."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class TrainConfig:
    """Length of the run, checkpoints and evaluation."""

    steps: Steps | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: Epochs | None = None
    """Passes over `data.train`; the last step takes the groups that remain."""
    seed: Seed = 1234
    """Seed of the initial weights."""
    save: PathText | None = None
    """Directory for checkpoints (`iter_0000100/`, `latest_checkpointed_iteration.txt`)."""
    load: PathText | None = None
    """Checkpoint directory to resume from; if it does not exist, training starts from scratch and
    prints so."""
    load_fallback: Switch = False
    """If the newest checkpoint of `load` is damaged, resume from the newest whole one."""
    save_interval: Steps | None = None
    """Steps between checkpoints; if `save` is set, the last step is always saved."""
    async_save: Switch = False
    """Save in the background: training waits for a copy of the state in host memory only, not for
    the disk."""
    keep_last: Steps | None = None
    """Checkpoints that stay in `save`: the newest ones, so many; without it all stay."""
    keep_best: BestConfig | None = None
    """The best checkpoint among those of evaluated steps stays in `save`, too, and
    best_checkpoint.json names it."""
    eval_interval: Steps | None = None
    """Steps between evaluations on `data.valid`; there is also one before the first step and one
    after the last."""
    shadow_steps: NoneOrSteps = 0
    """First steps of the run that are computed a second time before their update, with every
    response alone in its row; the run stops if log-probabilities, loss or gradients differ."""
    generate: GenerateConfig | None = None
    """Write sample answers of the policy to `logging.output`/samples.jsonl."""
    profile: ProfiledSteps | None = None
    """First and last step, at most 100, that torch's profiler records on the first process, for
    `logging.output`/profile.json.gz; steps count from 1, as in metrics.jsonl."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class WandbConfig:
    """Weights & Biases."""

    project: Label
    name: Label | None = None
    """Name of the run there; without it the service chooses one."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes below `logging.output`/wandb, for `wandb sync`."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class LoggingConfig:
    """Where the run writes `config.yaml` and `metrics.jsonl`."""

    output: PathText
    tensorboard: Switch = False
    """Also write TensorBoard event files under `output`/tensorboard."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class Config:
    """A whole run."""

    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    lora: LoraConfig | None = None
    """Train adapters on the frozen model; without this section all weights are trained."""
    optimizer: OptimizerConfig
    train: TrainConfig
    logging: LoggingConfig

    def to_yaml(self) -> str:
        """The configuration as YAML, every default included; of the sections loss and lora only
        what is not None, because an objective refuses options that it does not use."""
        tree = TypeAdapter(Config).dump_python(self, mode="json")
        if not isinstance(self.data.train, str):
            sets = tree["data"]["train"]
            tree["data"]["train"] = [
                {key: value for key, value in item.items() if value is not None} for item in sets
            ]
        tree["loss"] = {key: value for key, value in tree["loss"].items() if value is not None}
        if self.lora is None:  # an empty section has every default
            del tree["lora"]
        else:
            tree["lora"] = {key: value for key, value in tree["lora"].items() if value is not None}
        if self.model.num_layers is None:  # hf or checkpoint gives them, also next time
            tree["model"] = {k: v for k, v in tree["model"].items() if k not in SIZES}
        for section, key in NOT_OF_REWARD if self.model.kind == "reward" else ():
            tree[section].pop(key, None)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
