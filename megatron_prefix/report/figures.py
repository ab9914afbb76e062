"""Curves as SVG that takes the page's colours, light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y values."""
COLOURS = ("#3b76c4", "#d97a2b", "#3f9e5a", "#b6484c", "#8664b5", "#8a6d4f")
MARK = "resumed"
"""Begins the ids of the lines at marks."""
_TEXT = "#010203"
"""In place of the page's text colour, which the drawing does not know."""


def curves(
    data: Mapping[str, Curve],
    *,
    title: str,
    x: str,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """One plot with a line per entry of `data`; the names are the legend if there are several.

    `x` names the horizontal axis. At `marks` of an entry there are dotted lines of its colour.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.0))
        axis = figure.add_subplot()
        for number, (name, (xs, ys)) in enumerate(data.items()):
            colour = COLOURS[number % len(COLOURS)]
            # The first of several is wide and pale, so that equal ones are seen above it.
            is_below = number == 0 and len(data) > 1
            width, alpha = (5.0, 0.4) if is_below else (1.7, 1.0)
            marker = "o" if len(xs) < 2 else None
            label = name.replace("$", r"\$")
            axis.plot(xs, ys, color=colour, lw=width, alpha=alpha, marker=marker, label=label)
            for place in (marks or {}).get(name, ()):
                line = axis.axvline(place, color=colour, lw=2.0, ls=":")
                line.set_gid(f"{MARK}-{number}-{place:g}")
        axis.set_title(title, color=_TEXT, fontsize=11)
        axis.set_xlabel(x, color=_TEXT, fontsize=9)
        axis.tick_params(colors=_TEXT, labelsize=8)
        axis.grid(color=_TEXT, alpha=0.12)
        axis.set_facecolor("none")
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_TEXT)
        if len(data) > 1:
            axis.legend(frameon=False, fontsize=8, labelcolor=_TEXT)
        figure.patch.set_alpha(0)
        figure.tight_layout()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
