"""What `plan --search` prints: a table of layouts, and the settings of the first."""

from __future__ import annotations

from typing import Any

from megatron_prefix.text import align, counted

COLUMNS = {
    "TP": "parallel.tensor_model_parallel_size",
    "PP": "parallel.pipeline_model_parallel_size",
    "VPP": "parallel.virtual_pipeline_model_parallel_size",
    "CP": "parallel.context_parallel_size",
    "EP": "parallel.expert_model_parallel_size",
}
NOTE = """\
TP, PP, VPP, CP, EP, DP: sizes of tensor, pipeline, virtual pipeline, context, expert and data
parallelism; dist: the distributed optimizer; recomputed: layers of each chunk; row:
data.row_capacity or data.micro_batch_size. Times are estimates, not measurements: see
docs/parallelism.md."""


def layout_table(result: dict[str, Any], is_default_gpu: bool) -> str:
    """The result of a search as text."""
    layouts, own = result["layouts"], result["own"]
    speed = f"{result['gpu']} at {result['mfu']:.2f} of its peak"
    if is_default_gpu:
        speed += " (no --gpu is named, so speed and links of this one)"
    lines = [
        f"{counted(result['world_size'], 'GPU')}, {result['usable_gib']:.1f} of "
        f"{result['memory_gib']:g} GiB usable, {speed}: {counted(result['tried'], 'layout')} and "
        f"sizes of rows tried, {result['fitting']:,} fit",
        "",
    ]
    heads = [*COLUMNS, "DP", "dist", "recomputed", "row", "rows/rank", "bubble", "GiB", "s/step"]
    table = [["", *heads, "of the first"]]
    first = layouts[0]["seconds_per_step"]
    for number, layout in enumerate(layouts, 1):
        table.append([f"{number}", *_cells(layout), f"{layout['seconds_per_step'] / first:.2f} x"])
    if own is not None:
        table.append(["this file", *_cells(own), f"{own['seconds_per_step'] / first:.2f} x"])
    lines += align(table)
    if own is None:
        lines.append("this file: its layout does not run on so many GPUs, or does not fit them")
    lines += ["", NOTE, "", f"to run the first: {_difference(result['settings'], layouts[0])}"]
    lines += [f"advice: {line}" for line in result["advice"]]
    return "\n".join(lines)


def _difference(of_file: dict[str, Any], layout: dict[str, Any]) -> str:
    """The settings to give besides the file."""
    settings = layout["settings"]
    changed = [f"{key}={_value(x)}" for key, x in settings.items() if x != of_file[key]]
    return " ".join(changed) or "the file as it is"


def _cells(layout: dict[str, Any]) -> list[str]:
    settings = layout["settings"]
    sizes = [str(settings[key] or "-") for key in COLUMNS.values()]
    rows = settings["data.micro_batch_size"] or settings["data.row_capacity"]
    return [
        *sizes,
        str(layout["data_parallel_size"]),
        "yes" if settings["parallel.use_distributed_optimizer"] else "no",
        _recomputed(settings),
        f"{rows:,}",
        str(layout["rows_per_rank"]),
        f"{100 * layout['bubble']:.1f} %",
        f"{layout['needed_gib']:.1f}",
        f"{layout['seconds_per_step']:.3g}",
    ]


def _recomputed(settings: dict[str, Any]) -> str:
    granularity = settings["model.recompute_granularity"]
    if granularity != "full":
        return granularity or "no"
    return f"{settings['model.recompute_method']} {settings['model.recompute_num_layers']}"


def _value(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
