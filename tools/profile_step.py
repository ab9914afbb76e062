"""Profile of a training step: the share of each part of the model, on CPU or CUDA.

python tools/profile_step.py --data build/hh

The parts of the model run inside profiler ranges. An operation in backward belongs to the part
whose forward operation it differentiates. The time of a part is that of its operations and of the
Python between them, without the parts inside it. On CUDA it is the time of the kernels that it
launched.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from bench_common import publish
from bench_model import MODES, add_model, describe, make_config
from bench_runs import Built
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.engine import optimizer as engine
from megatron_prefix.model import unwrap

PREFIX = "part: "
PARTS = (
    (
        {
            "ColumnParallelLinear",
            "RowParallelLinear",
            "TELinear",
            "TEGroupedLinear",
            "TELayerNormColumnParallelLinear",
        },
        "linear layers",
    ),
    ({"TreeCoreAttention"}, "attention"),
    ({"RMSNorm"}, "norms"),
    ({"MLP"}, "activations"),
    ({"Attention"}, "rotary embedding, head layout"),
    ({"TransformerLayer"}, "residual sums"),
)
"""Class names (subclasses count, too), innermost parts first; a part does not include those inside
it. A norm that Transformer Engine fuses into the next linear layer counts as that layer."""
FREE = ("linear layers", "attention", "head", "optimizer")
LARGEST = 0.03
"""Largest share of a step that any other part may take."""


def in_part(function: Callable, name: str) -> Callable:
    def wrapped(*args, **kwargs):
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return wrapped


def part_of_module(module: torch.nn.Module) -> str | None:
    """The part to which a module of Megatron-Core or Transformer Engine belongs."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((part for kinds, part in PARTS if kinds & names), None)


@contextlib.contextmanager
def ranges(run) -> Iterator[None]:
    """Run the parts of `run` inside profiler ranges, until the context ends."""
    update, schedule = engine.Policy.update, engine.run_schedule
    for chunk in [*run.policy.chunks, *run.reference.chunks]:
        model = unwrap(chunk)
        model._postprocess = in_part(model._postprocess, "head")
        model._preprocess = in_part(model._preprocess, "embedding")
        for module in model.decoder.modules():
            if (name := part_of_module(module)) is not None:
                module.forward = in_part(module.forward, name)
    engine.Policy.update = in_part(update, "optimizer")
    engine.run_schedule = in_part(schedule, "schedule, gradient buffers, loss")
    try:
        yield
    finally:
        engine.Policy.update, engine.run_schedule = update, schedule


def parts_of(events: list, on_cuda: bool) -> dict[str, float]:
    """Microseconds of every part, over the whole profile.

    A kernel counts for the operation that launched it. The kernel's own event is left out, and so
    are the events of ranges, which launch nothing.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    part_of_sequence: dict[int, str] = {}
    for event in events:
        part = enclosing_part(event)
        if part and event.sequence_nr >= 0 and not is_backward(event):
            part_of_sequence.setdefault(event.sequence_nr, part)
    times: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total
        if on_cuda:
            own = 0.0 if event.is_user_annotation else event.self_device_time_total
        times[part_of(event, part_of_sequence)] += own
    return times


def is_backward(event) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def enclosing_part(event) -> str | None:
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def part_of(event, part_of_sequence: dict[int, str]) -> str:
    """The part of the operation that an event differentiates, or else the part around the event."""
    parent = event
    while parent is not None and not parent.name.startswith(PREFIX):
        if is_backward(parent) and parent.sequence_nr in part_of_sequence:
            return part_of_sequence[parent.sequence_nr]
        parent = parent.cpu_parent
    return enclosing_part(event) or "between parts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="PREFIX", help="data set that build wrote")
    add_model(parser)
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument(
        "--mode", choices=[x for x in MODES if "precomputed" not in x], default="packed, shared"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--name", default=f"profile_{device}", help="of the files under results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    from megatron_prefix.distributed import open_session

    on_cuda = torch.cuda.is_available()
    dataset = PreferenceDataset(args.data)
    steps = 1 + args.steps  # the first one is a warm-up
    with tempfile.TemporaryDirectory() as scratch:
        mode = MODES[args.mode]
        config = make_config(args, args.data, mode, scratch, args.global_batch_size, steps)
        with open_session(config) as world:
            run = Built(config, dataset, world, True, steps).run(config, dataset)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
            with ranges(run):
                run.train_step()
                with profile(activities=activities) as profiled:
                    for _ in range(args.steps):
                        with record_function(PREFIX + "data, metrics"):
                            run.train_step()
                    if on_cuda:
                        torch.cuda.synchronize()
            run.close()
    times = parts_of(profiled.events(), on_cuda)
    total = sum(times.values())
    rows = [
        {"part": part, "share of a step": f"{100 * time / total:.1f} %"}
        for part, time in sorted(times.items(), key=lambda x: -x[1])
    ]
    over = [p for p, time in times.items() if p not in FREE and time > LARGEST * total]
    notes = (
        f"{describe(args)}; {args.mode}, {args.global_batch_size} groups per step, reference "
        f"computed each step, {args.steps} steps. Above "
        f"{100 * LARGEST:.0f} % beside {', '.join(FREE)}: {', '.join(over) or 'nothing'}."
    )
    publish(args.name, rows, notes)


if __name__ == "__main__":
    main()
