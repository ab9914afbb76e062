"""The page: what was run, its curves, evaluations and examples; or several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_prefix.report.figures import Curve, curves
from megatron_prefix.report.record import RunRecord

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "kl", "logps/chosen")
"""Metrics of the training steps that get a plot, if the run has them."""
ACCURACY = "rewards/accuracies"
"""Ends the names of accuracies over all pairs of an evaluation."""
IDENTITY = ("data.", "model.", "loss.", "optimizer.", "train.steps", "train.epochs", "train.seed")
"""Settings that make two runs unlike if they differ, but for those of MEANS."""
MEANS = (
    *("data.sharing", "data.packing", "data.row_capacity", "data.micro_batch_size", "data.plan"),
    *("model.attention_backend", "model.flash_version", "model.recompute", "model.lm_head_chunk"),
    *("data.packing_method", "loss.reference", "loss.ref_logps", "data.pad_rows"),
)
"""Settings that change how a run is computed and not what it computes."""


def report_run(folder: str | Path) -> Path:
    """Write report.html into a run's folder. Raises InputError without metrics, and OSError."""
    run = RunRecord.read(folder)
    path = run.folder / "report.html"
    path.write_text(_page(f"Run {run.name}", [run]), encoding="utf-8")
    return path


def compare_runs(folders: Sequence[str | Path], names: Sequence[str], output: Path) -> Path:
    """Write report.html of several runs into `output`. Raises InputError and OSError."""
    runs = [RunRecord.read(x, name) for x, name in zip(folders, names, strict=True)]
    path = output / "report.html"
    path.write_text(_page(f"{len(runs)} runs side by side", runs), encoding="utf-8")
    return path


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any], bool]]:
    """Settings in which the runs differ: the setting, each run's value, and whether it makes the
    runs unlike."""
    keys = sorted({key for run in runs for key in run.settings})
    differing = []
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            makes_unlike = key.startswith(IDENTITY) and not key.startswith(MEANS)
            differing.append((key, values, makes_unlike))
    return differing


def _page(title: str, runs: Sequence[RunRecord]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    text = files("megatron_prefix.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    differing = differences(runs) if len(runs) > 1 else []
    return environment.from_string(text).render(
        title=title,
        runs=runs,
        totals=_totals(runs),
        differing=differing,
        unlike=[key for key, _, makes_unlike in differing if makes_unlike],
        training=_plots(runs),
        evaluation=_evaluation_plots(runs),
        last=_last_evaluation(runs),
        has_kl=any(len(run.series("kl")[0]) for run in runs),
    )


def _totals(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a quantity, and its value for each run."""
    first = runs[0]
    rows: list[tuple[str, Callable[[RunRecord], float]]] = [
        ("steps", lambda run: len(run.steps)),
        ("tokens executed", lambda run: run.total("tokens/executed")),
        ("tokens logical", lambda run: run.total("tokens/logical")),
        ("pairs", lambda run: run.total("num_pairs")),
        ("seconds in steps", lambda run: run.total("step_time_s")),
    ]
    table = []
    for name, value in rows:
        cells = []
        for run in runs:
            own, base = value(run), value(first)
            share = f" ({own / base:.2f} ×)" if run is not first and base else ""
            cells.append(_number(own) + share)
        table.append((name, cells))
    return table


def _plots(runs: Sequence[RunRecord]) -> list[str]:
    """The metrics over steps, and the loss over tokens and seconds, which shows the saving."""
    plots = []
    for key in SHOWN:
        if data := _present({run.name: run.series(key) for run in runs}):
            plots.append(curves(data, title=key, x="step", marks=_marks(runs)))
    for over, x in (("tokens", "tokens executed"), ("seconds", "seconds in steps")):
        if data := _present({run.name: run.series("loss", over) for run in runs}):
            plots.append(curves(data, title=f"loss over {over}", x=x, marks=_marks(runs, over)))
    return plots


def _marks(runs: Sequence[RunRecord], over: str = "step") -> dict[str, list[float]]:
    return {run.name: run.resumed_at(over) for run in runs}


def _evaluation_plots(runs: Sequence[RunRecord]) -> list[str]:
    keys = {key for run in runs for line in run.evaluations for key in line} - {"step"}
    names = ("loss", "rewards/accuracies", "rewards/margins", "kl")
    chosen = sorted(key for key in keys if key.startswith("eval_") and key.endswith(names))
    plots = []
    for key in chosen:
        if data := _present({run.name: run.evaluated(key) for run in runs}):
            plots.append(curves(data, title=key, x="step", marks=_marks(runs)))
    return plots


def _last_evaluation(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of a table: every metric of the first and the last evaluation, by run; "-" for one that
    an evaluation lacks. Accuracies have their standard error."""
    keys = sorted({key for run in runs for line in run.evaluations for key in line} - {"step"})
    rows = []
    for key in keys:
        cells = []
        for run in runs:
            ends = run.evaluations[:1] + run.evaluations[-1:]
            texts = ["-" if key not in line else _evaluated(line, key) for line in ends]
            cells.append(" → ".join(texts) if {*texts} - {"-"} else "")
        rows.append((key, cells))
    return rows


def _evaluated(line: Mapping[str, float], key: str) -> str:
    """A metric of an evaluation; an accuracy with its standard error.

    An accuracy of 0.75 over 48 pairs has sqrt(0.75 x 0.25 / 48) = 0.0625.
    """
    value, prefix = line[key], key.removesuffix(ACCURACY)
    num_pairs = line.get(f"{prefix}num_pairs", 0)
    if prefix == key or num_pairs < 2 or not 0 <= value <= 1:
        return _number(value)
    return f"{_number(value)} ± {math.sqrt(value * (1 - value) / num_pairs):.2g}"


def _present(data: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in data.items() if len(curve[0])}


def _number(value: object) -> str:
    """A number with at most five digits of significance; whole ones in full."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
