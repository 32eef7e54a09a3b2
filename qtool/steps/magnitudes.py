"""How large activations are, by token and channel and over layers, before a plan and behind it: from samples only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from qtool.artifacts.store import Artifact
from qtool.engine.carry import CarriedStatistics
from qtool.errors import ArtifactError
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.model.statistics import SAMPLE

GRID = (64, 128)
"""The most points of a surface along tokens and channels."""


@dataclass(frozen=True)
class Stage:
    """The inputs of a site as they are, or as a plan leaves them.

    Attributes:
        name: What pictures call it.
        surface: Magnitudes by token and channel; where there are more than ``GRID``, the largest around each point.
        absmax: The largest magnitude in the sample of each layer that has one.
        kurtosis: Mean over tokens of the kurtosis of a token's channels, of each layer that has a sample.
    """

    name: str
    surface: Float[Tensor, "rows columns"]
    absmax: tuple[float, ...]
    kurtosis: tuple[float, ...]


@dataclass(frozen=True)
class SiteMagnitudes:
    """A site of one layer, and beside it the same site of every layer.

    Attributes:
        site: Its id.
        layer: Its layer.
        name: Its name without the layer.
        layers: The layers that have this site and a sample of it.
        tokens: How many the sample holds.
        channels: How many the site has.
        stages: Without a plan, one; with a plan, before it and behind it.
    """

    site: str
    layer: int
    name: str
    layers: tuple[int, ...]
    tokens: int
    channels: int
    stages: tuple[Stage, ...]


class _Samples(Artifact):
    """Statistics of which nothing but samples is seen, so that no second moment is read and carried."""

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """Return the names of the samples that begin with ``prefix``, sorted."""
        return tuple(name for name in super().names(prefix) if name.endswith(f".{SAMPLE}"))


def magnitudes(statistics: Artifact, model: Model, plans: Mapping[str, Plan], site_id: str) -> SiteMagnitudes:
    """Measure a site in its own layer and in all others.

    Args:
        statistics: What calibrate gathered on the model.
        model: The model.
        plans: Name of a stage to the plan behind which it lies; an empty plan for what was gathered.
        site_id: An input site: ``layers.3.mlp_in``.

    Raises:
        ArtifactError: There is no sample of this site.
    """
    _, layer, name = site_id.split(".", 2)
    require_sample(statistics, site_id)
    samples = _Samples(statistics.path, statistics.manifest)
    layers = tuple(_layers_of(name, statistics, model))
    stages: list[Stage] = []
    tokens = channels = 0
    for title, plan in plans.items():
        carried, peaks, tails = CarriedStatistics(samples, model, plan), [], []
        for index in layers:
            sample = carried[f"layers.{index}.{name}"].entries[SAMPLE]
            peaks.append(float(sample.abs().max()))
            tails.append(kurtosis(sample))
            if index == int(layer):
                (tokens, channels), surface = sample.shape, largest_around(sample)
        stages.append(Stage(title, surface, tuple(peaks), tuple(tails)))
    return SiteMagnitudes(site_id, int(layer), name, layers, tokens, channels, tuple(stages))


def require_sample(statistics: Artifact, site_id: str) -> None:
    """Refuse a site of which nothing can be drawn.

    Raises:
        ArtifactError: There is no sample of it; the hint says how to gather one.
    """
    gathered = {name.rpartition(".")[2] for name in statistics.names(f"{site_id}.")}
    slot = statistics.header.slots.get(f"{site_id}.{SAMPLE}")
    if slot is None or not slot.shape[0]:
        wanted = ",".join(sorted({*gathered, SAMPLE}))
        raise ArtifactError(
            f"the statistics have no `{SAMPLE}` of `{site_id}`, and it is what pictures show",
            facts=(("gathered", ", ".join(sorted(gathered)) or "nothing"),),
            hint=f"qtool calibrate MODEL --gather {wanted}",
        )


def kurtosis(sample: Float[Tensor, "tokens n"]) -> float:
    """Return the mean over tokens of ``m4 / m2**2`` of a token's channels, for central moments ``m``.

    It is 3 for normally distributed channels, and up to the number of channels where one of them holds everything.
    Tokens whose channels are all alike do not count.
    """
    centred = sample.double() - sample.double().mean(1, keepdim=True)
    variance = centred.square().mean(1)
    fourth = centred.square().square().mean(1)
    varied = variance > 0
    return float((fourth[varied] / variance[varied].square()).mean()) if bool(varied.any()) else 0.0


def largest_around(sample: Float[Tensor, "tokens n"]) -> Float[Tensor, "rows columns"]:
    """Return magnitudes on at most ``GRID`` points, each the largest of its share of tokens and channels."""
    size = tuple(min(points, length) for points, length in zip(GRID, sample.shape, strict=True))
    return adaptive_max_pool2d(sample.abs()[None], size)[0]


def middles(length: int, points: int) -> list[float]:
    """Return where the shares that ``largest_around`` makes of an axis have their middles."""
    return [(2 * index + 1) * length / (2 * points) - 0.5 for index in range(points)]


def _layers_of(name: str, statistics: Artifact, model: Model) -> Iterator[int]:
    """Yield the layers that have a sample of a site."""
    for layer in range(model.graph.dims.num_layers):
        slot = statistics.header.slots.get(f"layers.{layer}.{name}.{SAMPLE}")
        if slot is not None and slot.shape[0]:
            yield layer
