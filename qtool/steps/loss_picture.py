"""Draws losses over layers with matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qtool.steps.picture import saved

if TYPE_CHECKING:
    from qtool.steps.plot_losses import LossLine

SIZE = (10.0, 5.4)
"""Inches."""
LABELS = {
    "loss": "loss of the layer's output, ‖(W − Ŵ) x‖² / ‖W x‖²",
    "weight_error": "loss of the weight, ‖W − Ŵ‖² / ‖W‖²",
}
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "os^vDPX"
_NEAREST = "rounding to nearest"


def render_losses(lines: Sequence[LossLine], title: str, method: str, key: str, *, suffix: str) -> bytes:
    """Return the picture as a file's bytes: the same ones for the same losses and version of matplotlib.

    Args:
        lines: What is drawn.
        title: Stands above.
        method: What the solid lines are of.
        key: Name of the loss.
        suffix: ``png`` or ``svg``.
    """
    return saved(lambda: draw_losses(lines, title, method, key), suffix)


def draw_losses(lines: Sequence[LossLine], title: str, method: str, key: str) -> Figure:
    """Draw a solid line for each kind of linear, and a dashed one of its colour for rounding to nearest.

    Where nothing was lost there is no point, since the scale is logarithmic; where every loss is that of rounding to
    nearest there are no dashed lines.
    """
    figure = Figure(figsize=SIZE)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.105, 0.69, 0.82))
    colors = _COLORS if len(lines) <= len(_COLORS) else [to_hex(colormaps["tab20"](place)) for place in range(20)]
    apart = any(line.nearest and line.nearest != line.losses for line in lines)
    kinds = []
    for place, line in enumerate(lines):
        look: dict[str, Any] = {
            "color": colors[place % len(colors)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "markersize": 4,
        }
        (drawn,) = axes.plot(line.layers, _positive(line.losses), linewidth=1.6, label=line.kind, **look)
        kinds.append(drawn)
        if apart and line.nearest:
            look = {**look, "marker": ".", "markersize": 3}  # a point alone has no line to be seen by
            axes.plot(line.layers, _positive(line.nearest), linestyle="--", linewidth=1.1, **look)
    if any(loss > 0 for line in lines for loss in (*line.losses, *line.nearest)):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="layer", ylabel=LABELS[key])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.grid(visible=True, which="minor", axis="y", color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    handles = [Line2D([], [], color="#444444", linewidth=1.6, label=method)]
    if apart:
        handles.append(Line2D([], [], color="#444444", linewidth=1.1, linestyle="--", label=_NEAREST))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.785, 0.935), frameon=False)
    figure.legend(handles=kinds, loc="upper left", bbox_to_anchor=(0.785, 0.84), frameon=False)
    return figure


def _positive(losses: Sequence[float]) -> list[float]:
    """Return the losses with NaN, which draws nothing, in place of what has no logarithm."""
    return [loss if loss > 0 else float("nan") for loss in losses]
