"""Draws magnitudes with matplotlib (extra ``plot``), which is imported by the modules ``picture`` alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from qtool.steps.magnitudes import SiteMagnitudes, middles

DPI = 100
WIDTH, ROW = 12.0, 4.6
"""Inches: of the picture, and of the row of a site."""
COLORS = ("#7f7f7f", "#1f77b4")
RATIO = 30.0
"""Bars further apart than this are drawn on a logarithmic scale."""
_LOOK = {"font.size": 9.0, "axes.titlesize": 10.0, "svg.hashsalt": "qtool", "axes.grid": False}
_SURFACE = {"linewidth": 0, "antialiased": False}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "qtool"}}


def render(sites: Sequence[SiteMagnitudes], title: str, note: str, *, suffix: str) -> bytes:
    """Return the picture as a file's bytes: the same ones for the same magnitudes and version of matplotlib.

    Args:
        sites: What is drawn, a row each.
        title: Stands above.
        note: Stands below, small.
        suffix: ``png`` or ``svg``.
    """
    return saved(lambda: draw(sites, title, note), suffix)


def saved(drawn: Callable[[], Figure], suffix: str) -> bytes:
    """Return what a figure is as a file, drawn in qtool's look whatever the user's settings."""
    buffer = io.BytesIO()
    with mpl.rc_context(), style.context(["default", _LOOK]):
        drawn().savefig(buffer, format=suffix, dpi=DPI, metadata=_METADATA[suffix])
    return buffer.getvalue()


def draw(sites: Sequence[SiteMagnitudes], title: str, note: str = "") -> Figure:
    """Draw a row for each site: a surface for each stage, all of one height scale, and bars over layers."""
    figure = Figure(figsize=(WIDTH, ROW * len(sites) + 0.6))
    FigureCanvasAgg(figure)
    margin = 0.3 / figure.get_figheight()
    figure.suptitle(title, fontsize=12, y=1 - margin / 2, va="center")
    figure.text(0.5, margin / 2, note, ha="center", va="center", fontsize=8, color="#555555")
    height = (1 - 2 * margin) / len(sites)
    for index, site in enumerate(sites):
        bottom = 1 - margin - height * (index + 1)
        _surfaces(figure, site, bottom, height)
        _bars(figure, site, bottom, height)
    return figure


def _surfaces(figure: Figure, site: SiteMagnitudes, bottom: float, height: float) -> None:
    """Draw the surfaces of one site side by side, with one scale of heights and colours."""
    top = max(float(stage.surface.max()) for stage in site.stages)
    width = 0.7 / len(site.stages)
    for index, stage in enumerate(site.stages):
        axes: Axes3D = figure.add_axes((index * width, bottom, width, height * 0.92), projection="3d")
        rows, columns = stage.surface.shape
        x, y = np.meshgrid(middles(site.channels, columns), middles(site.tokens, rows))
        heights = stage.surface.numpy()
        drawn = axes.plot_surface(x, y, heights, cmap="turbo", vmin=0, vmax=top, rstride=1, cstride=1, **_SURFACE)
        drawn.set_rasterized(True)
        axes.patch.set_visible(False)
        axes.set(xlabel="channel", ylabel="token", zlabel="|x|", zlim=(0, top or 1))
        axes.set(xlim=(0, site.channels), ylim=(0, site.tokens))
        axes.locator_params(nbins=5)
        axes.tick_params(pad=0)
        axes.zaxis.labelpad = -2
        axes.view_init(elev=24, azim=-58)
        axes.set_box_aspect((1.5, 1.1, 0.9), zoom=0.9)
        place = site.layers.index(site.layer)
        said = f"largest {stage.absmax[place]:.3g}, kurtosis {stage.kurtosis[place]:.3g}"
        axes.set_title(f"{site.site}: {stage.name}\n{said}", y=1.0)


def _bars(figure: Figure, site: SiteMagnitudes, bottom: float, height: float) -> None:
    """Draw kurtosis and largest magnitude over layers, one above the other."""
    left, width = 0.765, 0.22
    upper = figure.add_axes((left, bottom + 0.53 * height, width, 0.31 * height))
    lower = figure.add_axes((left, bottom + 0.12 * height, width, 0.31 * height), sharex=upper)
    _stages(upper, site, [stage.kurtosis for stage in site.stages], "kurtosis (normal: 3)")
    upper.axhline(3, color="black", linewidth=0.8, linestyle=":")
    _stages(lower, site, [stage.absmax for stage in site.stages], "largest |x|")
    upper.legend(
        title=f"{site.name} of every layer", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
    )
    lower.set_xlabel("layer")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))


def _stages(axes: Axes, site: SiteMagnitudes, values: Sequence[Sequence[float]], label: str) -> None:
    """Draw the bars of every stage beside each other."""
    width = 0.8 / len(site.stages)
    for index, (stage, heights) in enumerate(zip(site.stages, values, strict=True)):
        places = [layer + (index - (len(site.stages) - 1) / 2) * width for layer in site.layers]
        axes.bar(places, heights, width, color=COLORS[index], label=stage.name.split()[0])
    positive = [one for heights in values for one in heights if one > 0]
    if positive and max(positive) > RATIO * min(positive):
        axes.set_yscale("log")
        label += ", log"
    axes.set_ylabel(label)
