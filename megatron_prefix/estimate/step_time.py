"""Seconds of a step, from operations, bytes and a GPU's data sheet. An estimate, not a measurement.

The pipeline stage with the most work gives the pace. With m rows per rank, p stages and v chunks:

    a row         (operations of the stage) / (t c x peak x mfu)  +  (bytes sent) / (rate of link)
    a step        m x row x (1 + (p - 1) / (m v))  +  data-parallel traffic  +  optimizer

Operations of a stage are forward passes of its layers: 1, and 2 for backward (of frozen matrices
1, see adapters.py), 1 with a reference model, and what is recomputed; the head of the last stage is
not recomputed. The first stage also has the part that reads images (vision.py). Ranks wait for the
one whose rows have most work. `mfu` is the share of the peak that a GPU reaches while it computes,
so bubble, traffic and recomputation come on top. The utilisation of the whole step is model
operations (3 forward passes; of what is frozen less) over peak and time.

Gradients that are reduced during backward (`overlap_grad_reduce`) cost what exceeds the backward
pass of one row, weights that are gathered during forward (`overlap_param_gather`) what exceeds the
forward pass of one row. Adam reads gradients and state and writes state and weights once, at the
rate of the memory. Other traffic is not hidden. Not counted: evaluation, saving, start-up, slow
rows and slow nodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.estimate.adapters import backward_passes, trained_parameters, training_flops
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.memory import (
    ADAM_BYTES,
    BYTES,
    GRADIENT_BYTES,
    pipeline_bubble,
    stage_layers,
    state_sharers,
)
from megatron_prefix.estimate.traffic import (
    LINK_EFFICIENCY,
    backward_bytes,
    data_bytes,
    forward_bytes,
    link,
    stage_bytes,
)
from megatron_prefix.estimate.vision import KnownVision
from megatron_prefix.platform.gpus import GPUS_PER_NODE, Gpu

DEFAULT_MFU = 0.5
"""Share of the peak that a GPU reaches while it computes, the same for every GPU: an assumption.
Llama 3 (arXiv 2407.21783, table 4) reports 0.38 to 0.43 for whole steps on H100, with bubble and
traffic."""
BACKWARD = 2
"""Forward passes that a backward pass costs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on what."""

    gpu: Gpu
    mfu: float
    model: ModelConfig
    sizes: ModelSizes
    vocab_size: int
    world_size: int
    has_reference: bool = False
    """Whether a frozen model runs in every step."""
    lora: LoraConfig | None = None
    """The lora section, resolved."""
    vision: KnownVision | None = None


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of a step on all ranks together."""

    flops: ForwardFlops
    """Of one forward pass over all rows, padding included."""
    tokens: float
    """Of all rows, padding included."""
    rows: float
    """Rows per data-parallel rank, of the rank with most."""
    busy_ranks: float
    """The work of all data-parallel ranks over that of the busiest one: at most their number."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by cause."""

    compute: float
    """Operations of the model on the busiest stage, without recomputation."""
    recompute: float
    reference: float
    """The frozen model's forward passes."""
    tensor: float
    expert: float
    context: float
    stages: float
    """Activations between pipeline stages."""
    bubble: float
    data: float
    """Gradients and weights of data-parallel ranks, as far as nothing hides them."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def recomputed_share(model: ModelConfig, layers: int, chunks: int) -> float:
    """Layers of a stage that are computed again, over all of its `layers` in `chunks` chunks."""
    if model.recompute_granularity != "full":
        return 0.0
    if model.recompute_method == "uniform":
        return 1.0
    # 20 layers in 5 chunks, 2 recomputed in each: 10 of 20
    return min(model.recompute_num_layers or 0, layers // chunks) * chunks / layers


def step_time(job: Job, parallel: ParallelConfig, work: StepWork) -> StepTime:
    """Seconds of a step at the pace of the pipeline stage that takes longest."""
    stages = range(parallel.pipeline_model_parallel_size)
    times = [_stage_time(job, parallel, work, stage) for stage in stages]
    return max(times, key=lambda time: time.total)


def utilisation(job: Job, work: StepWork, seconds: float) -> float:
    """Model operations of a step over what the GPUs could do in that time."""
    done = training_flops(work.flops, job.lora, job.model.kind, vision=job.vision)
    return done / (seconds * job.world_size * job.gpu.bf16_flops)


def _stage_time(job: Job, parallel: ParallelConfig, work: StepWork, stage: int) -> StepTime:
    gpu, model, sizes = job.gpu, job.model, job.sizes
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    num_stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    layers = stage_layers(sizes.num_layers, parallel)[stage]
    # One pass over the layers and one over the head, in seconds of all rows of a rank.
    rate = gpu.bf16_flops * job.mfu * tensor * context * work.busy_ranks
    share = layers / sizes.num_layers
    attention = share * work.flops.attention / rate
    linear, adapters = share * work.flops.linear / rate, share * work.flops.adapters / rate
    body = linear + attention + adapters
    head = work.flops.head / rate if stage == num_stages - 1 else 0.0
    again = recomputed_share(model, layers, chunks)
    recompute = body * again
    if model.recompute_granularity == "selective":
        recompute = attention
    # Traffic of all rows of a rank; recomputation and reference send what forward sends.
    tokens = work.tokens / work.busy_ranks
    forward = forward_bytes(model, sizes, parallel, tokens)
    backward = backward_bytes(model, parallel, forward)
    rates = {
        "tensor": link(gpu, tensor),
        "expert": link(gpu, tensor * parallel.expert_model_parallel_size),
        "context": link(gpu, tensor * context),
    }
    sent = {
        kind: layers
        * (forward[kind] * (1 + again + job.has_reference) + backward[kind])
        / rates[kind]
        for kind in rates
    }
    span = 1 if job.world_size <= GPUS_PER_NODE else job.world_size
    between = stage_bytes(model, sizes, parallel, tokens) / link(gpu, span)
    between *= 1 + job.has_reference / 2
    of_linear, of_head = backward_passes(job.lora, model.kind)
    gradients = BACKWARD * (attention + adapters) + of_linear * linear + of_head * head
    images, of_images = _image_seconds(job, work) if stage == 0 else (0.0, 0.0)
    gradients += of_images
    compute = body + head + images + gradients
    reference = (body + head + images - adapters) * job.has_reference
    busy = compute + recompute + reference + sum(sent.values()) + between
    return StepTime(
        compute=compute,
        recompute=recompute,
        reference=reference,
        tensor=sent["tensor"],
        expert=sent["expert"],
        context=sent["context"],
        stages=between,
        bubble=busy * pipeline_bubble(parallel, work.rows),
        data=_exposed(job, parallel, stage, (body + head) / work.rows, gradients / work.rows),
        optimizer=_optimizer_seconds(job, parallel, stage),
    )


def _image_seconds(job: Job, work: StepWork) -> tuple[float, float]:
    """Seconds of the part that reads images: (forward, backward). Every tensor- and
    context-parallel rank runs all of it."""
    rate = job.gpu.bf16_flops * job.mfu * work.busy_ranks
    backward = 0.0 if job.vision is None else job.vision.backward(work.flops)
    return (work.flops.tower + work.flops.projector) / rate, backward / rate


def _exposed(
    job: Job, parallel: ParallelConfig, stage: int, row_forward: float, row_backward: float
) -> float:
    """Seconds of data-parallel traffic that no computation hides: that of the forward or backward
    pass of a row, which take so many seconds."""
    trained = _trained(job, parallel, stage)
    traffic = data_bytes(job.model, parallel, trained, job.world_size)
    rate = link(job.gpu, job.world_size // parallel.pipeline_model_parallel_size)
    gradients, weights = traffic.gradients / rate, traffic.weights / rate
    if parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - row_backward)
    if parallel.overlap_param_gather:
        weights = max(0.0, weights - row_forward)
    return gradients + weights


def _trained(job: Job, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    sizes = job.model, job.sizes, parallel, job.lora, job.vocab_size
    dense, experts = trained_parameters(*sizes, stage)
    if job.vision is not None and stage == 0:
        dense += job.vision.trained
    return dense, experts


def _optimizer_seconds(job: Job, parallel: ParallelConfig, stage: int) -> float:
    dense, experts = _trained(job, parallel, stage)
    sharers, expert_sharers = state_sharers(parallel, job.world_size)
    own = dense / sharers + experts / expert_sharers
    moved = GRADIENT_BYTES + 2 * ADAM_BYTES[job.model.dtype] + BYTES[job.model.dtype]
    return own * moved / (LINK_EFFICIENCY * job.gpu.memory_bandwidth)
