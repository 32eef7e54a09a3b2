"""inspect --plot of a quantized artifact: the loss of each kind of linear over layers, beside rounding to nearest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from qtool.artifacts.store import Artifact
from qtool.errors import ArtifactError
from qtool.model.card import read_card
from qtool.scheme import ModelScheme
from qtool.steps.description import Cell, Description, Table
from qtool.steps.inspect_quantized import Reports, kinds_of, layer_of, loss_name
from qtool.steps.picture_file import needs_matplotlib, write_picture


@dataclass(frozen=True)
class LossLine:
    """The losses of one kind of linear.

    Attributes:
        kind: Name of the kind.
        layers: Blocks that have it.
        losses: Loss in each of them, of experts the mean.
        nearest: Loss of rounding to nearest in each; empty where that is not known.
    """

    kind: str
    layers: tuple[int, ...]
    losses: tuple[float, ...]
    nearest: tuple[float, ...] = ()


def plot_losses(artifact: Artifact, output: Path, suffix: str) -> Description:
    """Draw the loss of each kind of linear over layers.

    Args:
        artifact: What was quantized.
        output: The picture.
        suffix: Which kind of picture.

    Returns:
        The picture's path, and the numbers of its lines.

    Raises:
        ArtifactError: The method reported no losses.
        PluginError: matplotlib is not installed.
        ResourceError: The disk is full.
    """
    try:
        from qtool.steps.loss_picture import render_losses
    except ImportError as error:
        raise needs_matplotlib(error) from error
    manifest = artifact.manifest
    reports: Reports = manifest.details["layers"]
    key = loss_name(reports)
    lines = loss_lines(reports, key)
    if not lines:
        raise ArtifactError(
            f"`{artifact.path.name}` tells no losses to draw",
            facts=(("method", manifest.step.method),),
            hint=f"qtool inspect {artifact.path}",
        )
    scheme = ModelScheme.from_json(manifest.schemes)
    model = read_card(Path(manifest.inputs["model"].path)).name
    title = f"{model}: {manifest.step.method}, {scheme.name or scheme.written('weights')}"
    write_picture(output, render_losses(lines, title, manifest.step.method, key, suffix=suffix))
    facts: dict[str, Cell] = {"path": str(output.resolve()), "kind": suffix, "quantized": manifest.id}
    return Description(facts, {"lines": _table(lines, key)})


def loss_lines(reports: Reports, key: str) -> list[LossLine]:
    """Return a line for each kind of linear, in the order of their names in a block.

    Args:
        reports: By linear, what its method reported.
        key: What the loss is called.
    """
    found: defaultdict[str, defaultdict[int, list[Mapping[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, kind in kinds_of(reports).items():
        layer = layer_of(name)
        if layer is not None and key in reports[name]:
            found[kind][layer].append(reports[name])
    lines = []
    for kind, by_layer in found.items():
        layers = tuple(by_layer)  # sorted, as kinds are
        complete = all(f"{key}_rtn" in one for members in by_layer.values() for one in members)
        ours, nearest = (
            tuple(fmean(one[name] for one in by_layer[layer]) for layer in layers)
            for name in (key, f"{key}_rtn" if complete else key)
        )
        lines.append(LossLine(kind, layers, ours, nearest if complete else ()))
    return lines


def _table(lines: Sequence[LossLine], key: str) -> Table:
    """Return the numbers of the lines."""
    rows: list[tuple[Cell, ...]] = [
        (line.kind, layer, line.nearest[place] if line.nearest else None, line.losses[place])
        for line in lines
        for place, layer in enumerate(line.layers)
    ]
    return Table(("module", "layer", f"{key}_rtn", key), rows)
