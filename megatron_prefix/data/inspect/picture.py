"""A picture of one packed row or one tree: which token sees which, and which are predicted.

Queries run down, keys run across. Every segment is a triangle (its own causal part) and a
rectangle for each segment above it in its tree. White entries are never computed. The strips along
both edges show the segments in the colour of their tree, under the number of its group, and in
them the tokens of images. The black
marks are the targets: below the picture the tokens that are predicted, at its right the tokens that
predict them, longer if a token predicts for several responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.text import counted

COLOURS = ("#1f6f9c", "#d1602b", "#2f8f5b", "#8a4f9e", "#b8902a", "#b5364d", "#4a6a72", "#6b7f1f")
PADDING = "#d9d9d9"
INK = "#333333"
IMAGE = "#e8c547"
PROMPT_TINT, SEEN_TINT = 0.62, 0.45


Colour = tuple[float, float, float]


def _tint(colour: str, share: float) -> Colour:
    """`colour` mixed with `share` of white."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share


def _segment_kinds(trees: Sequence[PrefixTree], num_segments: int) -> list[tuple[int, bool]]:
    """(tree, whether it carries loss) of each segment; tree -1 is padding."""
    kinds: list[tuple[int, bool]] = []
    for number, tree in enumerate(trees):
        with_loss = {n for r in range(tree.num_responses) for n in tree.response_nodes(r)}
        kinds += [(number, node in with_loss) for node in range(tree.num_nodes)]
    return kinds + [(-1, False)] * (num_segments - len(kinds))


def _visible_areas(
    layout: TreeLayout, kinds: Sequence[tuple[int, bool]]
) -> tuple[list[np.ndarray], list[Colour]]:
    """Polygons in (key, query) coordinates with their colours.

    Segments [0, 3) and its child [3, 5): triangles over [0, 3) and [3, 5), and one rectangle, keys
    0 to 3 by queries 3 to 5.
    """
    polygons, colours = [], []
    starts, parents = layout.starts.tolist(), layout.parents.tolist()
    ends = (layout.starts + layout.lengths).tolist()
    for segment, (tree, has_loss) in enumerate(kinds):
        colour = COLOURS[tree % len(COLOURS)] if tree >= 0 else PADDING
        own = _tint(colour, 0 if has_loss or tree < 0 else PROMPT_TINT)
        start, end = starts[segment], ends[segment]
        polygons.append(np.array([(start, start), (start, end), (end, end)]))
        colours.append(own)
        # Every ancestor is seen in full by the whole segment, so one rectangle each.
        above = parents[segment]
        while above >= 0:
            left, right = starts[above], ends[above]
            polygons.append(np.array([(left, start), (right, start), (right, end), (left, end)]))
            colours.append(_tint(colour, SEEN_TINT if has_loss else PROMPT_TINT))
            above = parents[above]
    return polygons, colours


def _strips(
    layout: TreeLayout, kinds: Sequence[tuple[int, bool]], width: float
) -> tuple[list[np.ndarray], list[Colour]]:
    """The segments along the top and the left edge."""
    polygons, colours = [], []
    ends = (layout.starts + layout.lengths).tolist()
    near, far = -0.35 * width, -1.35 * width
    for start, end, (tree, has_loss) in zip(layout.starts.tolist(), ends, kinds, strict=True):
        colour = COLOURS[tree % len(COLOURS)] if tree >= 0 else PADDING
        fill = _tint(colour, 0 if has_loss or tree < 0 else PROMPT_TINT)
        polygons.append(np.array([(start, far), (end, far), (end, near), (start, near)]))
        polygons.append(np.array([(far, start), (far, end), (near, end), (near, start)]))
        colours += [fill, fill]
    return polygons, colours


def _image_bands(batch: MicroBatch, width: float) -> list[np.ndarray]:
    """The tokens of images in both strips."""
    bands: list[np.ndarray] = []
    images = batch.images
    if images is None:
        return bands
    near, far = -0.6 * width, -1.1 * width
    for start, length in zip(images.starts.tolist(), images.lengths.tolist(), strict=True):
        end = start + length
        bands.append(np.array([(start, far), (end, far), (end, near), (start, near)]))
        bands.append(np.array([(far, start), (far, end), (near, end), (near, start)]))
    return bands


def _runs(tokens: np.ndarray) -> list[tuple[int, int]]:
    """[1, 1, 2, 5] -> [(1, 3), (5, 6)]: unique tokens as half-open runs."""
    tokens = np.unique(tokens)
    breaks = np.flatnonzero(np.diff(tokens) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(tokens, breaks) if len(run)]


def _target_marks(
    layout: TreeLayout, kinds: Sequence[tuple[int, bool]], logit_token: np.ndarray, width: float
) -> list[np.ndarray]:
    """Tokens that predict at the right edge, wider for several responses; targets below."""
    size, marks = layout.num_tokens, []
    tokens, counts = np.unique(logit_token, return_counts=True)
    for several, reach in ((False, 0.75), (True, 1.35)):
        # A branch point predicts several first tokens; its mark is wider.
        left, right = size + 0.35 * width, size + reach * width
        for start, stop in _runs(tokens[(counts > 1) == several]):
            marks.append(np.array([(left, start), (right, start), (right, stop), (left, stop)]))
    top, bottom = size + 0.35 * width, size + 0.75 * width
    starts, ends = layout.starts.tolist(), (layout.starts + layout.lengths).tolist()
    for start, stop, (_, has_loss) in zip(starts, ends, kinds, strict=True):
        if has_loss:
            marks.append(np.array([(start, top), (stop, top), (stop, bottom), (start, bottom)]))
    return marks


def _name_trees(
    axes: Any,
    layout: TreeLayout,
    kinds: Sequence[tuple[int, bool]],
    groups: Sequence[int],
    width: float,
) -> None:
    """Write the number of each tree's group above its part of the strip, if there is room."""
    starts = layout.starts.tolist()
    ends = (layout.starts + layout.lengths).tolist()
    for tree, group in enumerate(groups):
        segments = [i for i, (number, _) in enumerate(kinds) if number == tree]
        start, stop = starts[segments[0]], ends[segments[-1]]
        name = f"group {group}" if stop - start > 3 * width else str(group)
        if stop - start > width:
            axes.text(
                (start + stop) / 2,
                -1.6 * width,
                name,
                color=COLOURS[tree % len(COLOURS)],
                fontsize=8,
                ha="center",
                va="bottom",
            )


def draw_row(
    dataset: PreferenceDataset,
    batch: MicroBatch,
    groups: Sequence[int],
    row_capacity: int,
    path: str | Path,
    title: str,
) -> None:
    """Write the picture of one row, or of one tree as a row.

    The file's ending (.png, .svg, .pdf) sets its format. Raises InputError if matplotlib is not
    installed or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError("--picture needs matplotlib: pip install matplotlib") from error
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--picture {path} cannot be written: end it in .png, .svg or .pdf")
    trees = [dataset[group] for group in groups]
    layout = batch.layout
    kinds = _segment_kinds(trees, len(layout.starts))
    size = layout.num_tokens
    figure = Figure(figsize=(8.6, 9.3), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.075, 0.885, 0.815))
    width = size / 42
    for make in (_visible_areas(layout, kinds), _strips(layout, kinds, width)):
        polygons, colours = make
        axes.add_collection(
            PolyCollection(polygons, facecolors=colours, edgecolors="white", linewidths=0.25)
        )
    bands = _image_bands(batch, width)
    axes.add_collection(PolyCollection(bands, facecolors=IMAGE, edgecolors="none"))
    marks = _target_marks(layout, kinds, batch.logit_token, width)
    axes.add_collection(PolyCollection(marks, facecolors=INK, edgecolors="none"))
    _name_trees(axes, layout, kinds, groups, width)
    axes.plot([0, size, size, 0, 0], [0, 0, size, size, 0], color="#bbbbbb", linewidth=0.8)
    axes.set(xlim=(-1.6 * width, size + 1.6 * width), ylim=(size + 1.6 * width, -2.6 * width))
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_ticks([tick for tick in axis.get_majorticklocs() if 0 <= tick <= size])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors="#666666")
    axes.set_xlabel("key token (one colour per tree)", fontsize=9, color=INK)
    axes.set_ylabel("query token", fontsize=9, color=INK)
    _caption(figure, axes, batch, trees, row_capacity, title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"picture {path} cannot be written: {error}") from error


def _caption(
    figure: Any,
    axes: Any,
    batch: MicroBatch,
    trees: Sequence[PrefixTree],
    row_capacity: int,
    title: str,
) -> None:
    from matplotlib.patches import Patch

    figure.text(0.085, 0.968, title, fontsize=13, color=INK, weight="bold", va="center")
    fill = 100 * batch.num_tokens / row_capacity
    facts = (
        f"{batch.num_tokens:,} of {counted(row_capacity, 'token')} ({fill:.1f} % full), "
        f"{counted(len(trees), 'tree')}, {counted(batch.num_responses, 'response')}, "
        f"{counted(len(batch.pairs), 'pair')}; {counted(len(batch.logit_token), 'target')} from "
        f"{counted(batch.num_projected, 'token')}"
    )
    figure.text(0.085, 0.942, facts, fontsize=9.5, color=INK, va="center")
    colour = COLOURS[0]
    handles = [
        Patch(color=_tint(colour, PROMPT_TINT), label="prompt"),
        Patch(color=colour, label="response"),
        Patch(color=_tint(colour, SEEN_TINT), label="seen by a response"),
        Patch(color=INK, label="targets (below) and the tokens that predict them (right)"),
    ]
    if batch.images is not None and len(batch.images.starts):
        handles.append(Patch(color=IMAGE, label="images"))
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(0.078, 0.915),
        ncols=len(handles),
        fontsize=8.5,
        frameon=False,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        labelcolor=INK,
    )
