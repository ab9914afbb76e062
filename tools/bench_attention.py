"""Attention alone, forward and backward: trees compared with the same kernel on sequences.

Useful work is the visible area: 4 N H operations per visible pair of tokens in forward (N heads
of H dimensions), 2.5 times that in backward. For every row three layouts are timed in turn:

    tree       the row's trees
    unshared   each root-to-leaf path as a sequence of its own
    causal     one plain causal sequence with the tree's area

`of unshared` and `of causal` are the tree's rate divided by theirs, per area. `tiled` rounds the
areas up to the kernel's tiles first, so that short responses do not count against the kernel.
Absolute rates are printed on CUDA only.

    python tools/bench_attention.py --rows 2048
    python tools/bench_attention.py --update-table        # also change what `auto` chooses
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from bench_common import NOT_RUN, Results, environment, unless_out_of_memory
from bench_shapes import SPREAD, fill, first_paths, plain_causal, shapes, tiled_area, unshared
from tqdm import tqdm

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.auto import FIELDS, TABLE, read_table
from megatron_prefix.attention.backends import (
    BACKENDS,
    flash_version,
    load_backend,
    resolve_flash_version,
)
from megatron_prefix.layout import TreeLayout

FORWARD_AND_BACKWARD = 3.5
UP_TO = {"dense": 4096, "path": 32768}
"""Longest sequence, in tokens, on which a backend is timed: `dense` needs quadratic memory, and on
CUDA `path` loops over pieces."""
MOST_UNSHARED = 524288
"""Most tokens of unshared paths that are timed. Of longer rows only the first paths are timed:
rates are compared, not times."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEASURED_S, MOST_CALLS = 0.02, 20
"""Seconds of calls between two readings of the device's clock, and their largest number."""
GATHER_BOUNDS = ((None, 2.0), (2.0, 4.0), (4.0, None))
"""Ranges of gather factors. Each gets an entry of the table."""


def inputs(num_tokens: int, args: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, drawn on the device."""
    torch.manual_seed(num_tokens)
    shape = {"device": args.device, "dtype": DTYPES[args.dtype]}
    heads = (args.heads, args.groups, args.groups, args.heads)
    drawn = [torch.randn(num_tokens, n, args.head_dim, **shape) for n in heads]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def step_of(plan: TreePlan, backend: str, tensors: list[torch.Tensor]) -> Callable[[], None]:
    """One forward and backward pass over a row."""
    q, k, v, grad = tensors

    def step() -> None:
        out = tree_attention(q, k, v, plan, backend=backend)
        torch.autograd.grad(out, (q, k, v), grad)

    return step


def seconds_on_cuda(step: Callable[[], None], calls: int) -> float:
    """Seconds per call on the device. `calls` calls are launched at once, so that Python launches
    one while the device works on another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def seconds_on_cpu(step: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def in_turn(
    steps: dict[tuple, Callable[[], None]], rounds: int, on_cuda: bool
) -> dict[tuple, np.ndarray]:
    """Seconds of each step, [rounds]. In a round all steps are timed in turn: on CPU one call each,
    on CUDA as many calls as take about `MEASURED_S`."""
    timed = seconds_on_cuda if on_cuda else seconds_on_cpu
    once = {key: timed(step, 1) for key, step in steps.items()}  # warms up
    most = MOST_CALLS if on_cuda else 1
    calls = {key: int(np.clip(MEASURED_S / once[key], 1, most)) for key in steps}
    seconds: dict[tuple, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            seconds[key].append(timed(step, calls[key]))
    return {key: np.array(times) for key, times in seconds.items()}


def that_fit(steps: dict[tuple, Callable[[], None]], backends: list[str], on_cuda: bool) -> list:
    """The backends that have enough memory for all their steps: each step is run once."""

    def runs(backend: str) -> bool:
        for key, step in steps.items():
            if key[0] == backend:
                step()
        if on_cuda:
            torch.cuda.synchronize()
        return True

    return [x for x in backends if unless_out_of_memory(lambda x=x: runs(x))]


def measure(
    name: str, layout: TreeLayout, backends: list[str], args: argparse.Namespace
) -> list[dict]:
    """One entry per backend: the tree's rate divided by the sequences' rates, and seconds."""
    paths = unshared(layout)
    kinds = {
        "tree": layout,
        "unshared": first_paths(paths, MOST_UNSHARED),
        "causal": plain_causal(layout.area()),
    }
    on_cuda = args.device == "cuda"
    longest = max(row.num_tokens for row in kinds.values())
    is_slow = {"dense": True, "path": on_cuda}
    chosen = [x for x in backends if not is_slow.get(x) or longest <= UP_TO[x]]
    if not chosen:
        return []
    plans = {kind: TreePlan(row, args.device) for kind, row in kinds.items()}
    tensors = {kind: inputs(row.num_tokens, args) for kind, row in kinds.items()}
    steps = {
        (backend, kind): step_of(plans[kind], backend, tensors[kind])
        for backend in chosen
        for kind in kinds
    }
    fitting = that_fit(steps, chosen, on_cuda)
    steps = {key: step for key, step in steps.items() if key[0] in fitting}
    seconds = in_turn(steps, args.rounds, on_cuda)
    case = {
        "trees": name,
        "tokens": layout.num_tokens,
        "gather factor": f"{plans['tree'].path.gather_factor:.2f}",
    }
    columns = rates(kinds, paths.area(), fitting, seconds, args)
    return [{**case, "backend": x, **columns.get(x, {"of unshared": NOT_RUN})} for x in chosen]


def rates(
    kinds: dict[str, TreeLayout],
    unshared_area: int,
    backends: list[str],
    seconds: dict[tuple, np.ndarray],
    args: argparse.Namespace,
) -> dict[str, dict[str, str]]:
    """For each backend, the columns that follow from its seconds for each of the `kinds`.

    `unshared_area` is the area of all paths; only the first ones were timed.
    """
    areas = {kind: row.area() for kind, row in kinds.items()}
    tiled = {kind: tiled_area(row, args.q_tile, args.kv_tile) for kind, row in kinds.items()}
    times = {backend: seconds[backend, "tree"] for backend in backends}
    fastest = min(backends, key=lambda backend: np.median(times[backend]), default=None)
    whole = unshared_area / areas["unshared"]
    columns = {}
    for backend, tree in times.items():

        def rate_over(kind: str, area: dict[str, int], tree=tree, backend=backend) -> str:
            """The tree's rate per area divided by another layout's: the median of rounds."""
            over = np.median(seconds[backend, kind] / tree)
            return f"{over * area['tree'] / area[kind]:.3f}"

        entry = {
            "useful / tiled": f"{areas['tree'] / tiled['tree']:.3f}",
            "of unshared": rate_over("unshared", areas),
            "of unshared, tiled": rate_over("unshared", tiled),
            "of causal": rate_over("causal", areas),
            "of causal, tiled": rate_over("causal", tiled),
            "time unshared / tree": f"{whole * np.median(seconds[backend, 'unshared'] / tree):.3f}",
            "time over fastest": f"{np.median(tree / times[fastest]):.2f}",
        }
        if args.device == "cuda":
            flops = 4 * args.heads * args.head_dim * FORWARD_AND_BACKWARD / 1e12
            for kind, area in areas.items():
                entry[f"TFLOP/s {kind}"] = f"{flops * area / np.median(seconds[backend, kind]):.1f}"
        columns[backend] = entry
    return columns


def table_entries(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """For every measured range of gather factors, the fastest backend.

    It has the lowest geometric mean of its times divided by the fastest backend's. Only backends
    that ran on all rows of the range compete; `dense` does not, as its memory is quadratic.
    """
    entries = []
    for low, high in GATHER_BOUNDS:
        times: dict[str, dict] = {}
        for row in (row for row in rows if "time over fastest" in row):
            factor = float(row["gather factor"])
            if (low is None or factor >= low) and (high is None or factor < high):
                case = (row["trees"], row["tokens"])
                times.setdefault(row["backend"], {})[case] = float(row["time over fastest"])
        most = max(map(len, times.values()), default=0)
        means = {
            backend: round(float(np.exp(np.mean(np.log(list(of.values()))))), 3)
            for backend, of in times.items()
            if len(of) == most
        }
        competing = {backend: mean for backend, mean in means.items() if backend != "dense"}
        if competing:
            entry = dict.fromkeys(FIELDS)
            entry |= {
                "device_type": args.device,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else None,
                "dtypes": [args.dtype],
                "head_dim": [args.head_dim, args.head_dim + 1],
                "gather_factor": [low, high],
                "backend": min(competing, key=competing.get),
                "measured": {**environment(), "rows": most, "time over fastest": means},
            }
            entries.append(entry)
    return entries


def update_table(entries: list[dict]) -> None:
    """Put measured entries first, and remove older ones for the same device and sizes."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    place = FIELDS[: FIELDS.index("backend")]
    new = [[entry[key] for key in place] for entry in entries]
    others = [old for old in table["entries"] if [old[key] for key in place] not in new]
    table["entries"] = entries + others
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    read_table.cache_clear()


def arguments() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = [2048, 8192, 32768, 131072] if on_cuda else [2048]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, help="tokens")
    parser.add_argument("--trees", nargs="+", default=list(shapes()), choices=list(shapes()))
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, help="default: all that run on this machine"
    )
    parser.add_argument("--heads", type=int, default=32 if on_cuda else 4)
    parser.add_argument("--groups", type=int, default=8 if on_cuda else 2)
    parser.add_argument("--head-dim", type=int, default=128 if on_cuda else 64)
    dtype = "bfloat16" if on_cuda else "float32"
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype)
    parser.add_argument("--flash-version", default="auto", choices=["auto", "2", "3", "4"])
    parser.add_argument("--rounds", type=int, default=10 if on_cuda else 5)
    parser.add_argument("--q-tile", type=int, default=128, help="queries per tile of the kernel")
    parser.add_argument("--kv-tile", type=int, default=128, help="keys per tile of the kernel")
    parser.add_argument(
        "--update-table", action="store_true", help="write the table that auto reads"
    )
    parser.add_argument("--name", default=f"attention_{'cuda' if on_cuda else 'cpu'}")
    args = parser.parse_args()
    args.device = "cuda" if on_cuda else "cpu"
    return args


def main() -> None:
    args = arguments()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    obstacles = {x: load_backend(x).why_not(device, dtype, args.head_dim) for x in BACKENDS}
    backends = args.backends or [x for x, obstacle in obstacles.items() if obstacle is None]
    version = args.flash_version
    version = resolve_flash_version(version if version == "auto" else int(version), device)
    left_out = "; ".join(f"{x}: {obstacle}" for x, obstacle in obstacles.items() if obstacle)
    notes = (
        f"{args.heads} query heads, {args.groups} key/value heads of {args.head_dim}, "
        f"{args.dtype}, forward and backward; FlashAttention-{version} for backend flash; "
        f"lengths log-normal around the published medians, spread {SPREAD} assumed; tiles of "
        f"{args.q_tile} x {args.kv_tile}; ratios are medians of {args.rounds} rounds; a round "
        f"times every layout of one row in turn. "
        f"Backends not run here: {left_out or 'none'}. Trees longer than the row: "
    )
    results, too_long = Results(args.name), []
    with flash_version(version):
        for num_tokens in args.rows:
            for name in tqdm(args.trees, desc=f"{num_tokens} tokens", disable=None):
                rng = np.random.default_rng(num_tokens)
                layout = fill(shapes()[name](rng), num_tokens)
                if layout is None:
                    too_long.append(f"{name} in {num_tokens}")
                    continue
                measured = unless_out_of_memory(
                    lambda name=name, layout=layout: measure(name, layout, backends, args)
                )
                if measured is None:
                    measured = [{"trees": name, "tokens": num_tokens, "of unshared": NOT_RUN}]
                results.notes = f"{notes}{', '.join(too_long) or 'none'}."
                results.append(*measured)
    results.notes = f"{notes}{', '.join(too_long) or 'none'}."
    results.finish()
    if args.update_table:
        update_table(table_entries(results.rows, args))


if __name__ == "__main__":
    main()
