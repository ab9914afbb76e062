"""Compositions: which groups make a step, as a function of (data set fingerprint, seed, step).

    GroupBatches    `global_batch_size` groups, taken from one permutation per epoch
    RecordBatches   the same, counted in source records, if groups hold several of them
    SortedBatches   `global_batch_size` groups of similar length; the order of steps is permuted
    RowBatches      `rows_per_step` rows, each packed before steps are made
    PartBatches     the same, if some groups need several rows
    InOrder         all groups in the data set's order, for scoring
    WeightedSets    `global_batch_size` groups from several sets, in proportion to weights
    PackedSteps     any of these but InOrder, written to files by `pack`; see steps/packed

Nothing here depends on the number of ranks, and nothing has a state.
"""

from megatron_prefix.data.steps.compositions.batches import Composition, GroupBatches, InOrder
from megatron_prefix.data.steps.compositions.comparisons import with_comparisons
from megatron_prefix.data.steps.compositions.part_batches import PartBatches
from megatron_prefix.data.steps.compositions.row_batches import RowBatches
from megatron_prefix.data.steps.compositions.settings import StepSettings

__all__ = [
    "Composition",
    "GroupBatches",
    "InOrder",
    "PartBatches",
    "RowBatches",
    "StepSettings",
    "with_comparisons",
]
