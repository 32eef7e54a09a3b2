"""Plans: which invertible operators act where, how many of them are folded, and the contract of a transform.

At a site the activations become ``x T`` with ``T = T1 T2 … Tk`` and every consumer weight ``W T^{-T}``. The producers
absorb the first ``folded`` operators; the rest runs online in front of the consumers. A plan holds operators only,
never weights, so it is small and a model can be transformed block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from qtool.model.graph import RESIDUAL, ModelGraph, Site
from qtool.numerics.operators import Operator, operator_from_state
from qtool.scheme import ModelScheme

if TYPE_CHECKING:
    from qtool.model.statistics import SiteStatistics


@dataclass(frozen=True)
class Segment:
    """Channels at the end of a site that are quantized in a format of their own, weights and activations alike.

    Attributes:
        channels: How many.
        format: Name of the format, such as ``int8``; the rest of its scheme is that of the other channels.
    """

    channels: int
    format: str


@dataclass(frozen=True)
class Proposal:
    """What a transform proposes.

    Attributes:
        operators: Operators by site id, in the order in which activations meet them.
        segments: By id of an input site, what its last channels are to be quantized in, behind the operators.
    """

    operators: Mapping[str, Sequence[Operator]] = field(default_factory=dict)
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SitePlan:
    """What a plan does at one site.

    Attributes:
        operators: In the order in which activations meet them.
        folded: How many of them, from the first on, the producers absorb.
        segments: What the site's last channels are quantized in; those before them as the scheme says.
    """

    operators: tuple[Operator, ...]
    folded: int
    segments: tuple[Segment, ...] = ()

    @property
    def online(self) -> tuple[Operator, ...]:
        """The operators that run in the forward pass."""
        return self.operators[self.folded :]


@dataclass(frozen=True)
class Plan:
    """Operators for a whole model.

    Attributes:
        sites: Site id to its operators.
        fold_norms: Every norm's weight is moved into the linears behind it before anything else, which a rotation of
            the residual needs; then a tied head gets weights of its own.
        notes: What the planner did besides, one sentence each.
    """

    sites: Mapping[str, SitePlan] = field(default_factory=dict)
    fold_norms: bool = False
    notes: tuple[str, ...] = ()

    def at(self, site_id: str) -> SitePlan:
        """Return the operators at a site; none if the plan does not speak of it."""
        return self.sites.get(site_id, SitePlan((), 0))

    @property
    def empty(self) -> bool:
        """Whether the plan leaves the model as it is."""
        return not self.fold_norms and not any(site.operators or site.segments for site in self.sites.values())

    def unties_head(self, *, tied: bool) -> bool:
        """Whether the transformed model needs a head of its own."""
        return tied and (self.fold_norms or bool(self.at(RESIDUAL).operators) or bool(self.at("head_in").operators))

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the plan as tensors and JSON: ``sites/<site>/<i>.<kind>/<parameter>`` and a description."""
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for site_id, site in self.sites.items():
            rows = []
            for index, operator in enumerate(site.operators):
                state, parameters = operator.state()
                tensors |= {f"sites/{site_id}/{index}.{operator.kind}/{name}": t for name, t in state.items()}
                rows.append({"kind": operator.kind, "parameters": parameters})
            segments = [asdict(segment) for segment in site.segments]
            described[site_id] = {"operators": rows, "folded": site.folded, "segments": segments}
        return tensors, {"sites": described, "fold_norms": self.fold_norms, "notes": list(self.notes)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Plan:
        """Read what ``to_state`` wrote."""
        sites: dict[str, SitePlan] = {}
        for site_id, site in described["sites"].items():
            operators = []
            for index, row in enumerate(site["operators"]):
                prefix = f"sites/{site_id}/{index}.{row['kind']}/"
                state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                operators.append(operator_from_state(row["kind"], state, row["parameters"]))
            segments = tuple(Segment(**segment) for segment in site["segments"])
            sites[site_id] = SitePlan(tuple(operators), site["folded"], segments)
        return cls(sites, described["fold_norms"], tuple(described["notes"]))


@dataclass(frozen=True)
class TransformContext:
    """What a transform may look at when it proposes operators.

    Attributes:
        graph: The sites and linears of the model.
        statistics: Site id to what calibration gathered there, already carried through the methods to the left.
        weights: Reads a linear's weight ``[out, in]`` by module name, transformed by the methods to the left.
        scheme: How the model is going to be quantized, as far as is known.
        seed: Seeds whatever is random.
        trials: Runs the blocks one after the other on some calibration tokens, for methods that measure what a block's
            output becomes; takes about how many tokens. None where there are no statistics.
        residual: Statistics of the residual in front of an input site that reads it, by site id: of what the norm makes
            of it before its weight, behind what the methods to the left did to the residual and to nothing else.
    """

    graph: ModelGraph
    statistics: Mapping[str, SiteStatistics]
    weights: WeightReader
    scheme: ModelScheme
    seed: int
    trials: Callable[[int], Iterator[BlockTrial]] | None = None
    residual: Mapping[str, SiteStatistics] = field(default_factory=dict)

    def schemes_at(self, site: Site) -> tuple[ModelScheme, ...]:
        """Return the schemes of the linears that read a site, each once."""
        return tuple(dict.fromkeys(self.scheme.of(linear.name) for linear in self.graph.consumers(site)))


@runtime_checkable
class WeightReader(Protocol):
    """Reads one linear's weight by its full module name."""

    def __call__(self, name: str) -> Tensor:
        """Return the weight ``[out, in]`` in float32."""


@runtime_checkable
class BlockTrial(Protocol):
    """One block, as the methods to the left transformed it, with the inputs that full precision gives it."""

    layer: int

    def error(self, operators: Mapping[str, Sequence[Operator]]) -> float:
        """Try operators at sites of the block, everything else in full precision.

        Args:
            operators: By site id. The weights of the linears that read these sites are rounded to nearest as the
                scheme says, behind the operators; so are their inputs where the scheme quantizes activations.

        Returns:
            Mean squared error of the block's output over all tokens and channels, in units of the output squared.
        """
        ...


@runtime_checkable
class Transform(Protocol):
    """Proposes operators; never edits weights, so that invariance is checked in one place.

    Class attributes: ``version`` (raised whenever output bits change), ``needs`` (names of the statistics that it
    reads) and ``Config`` (a frozen dataclass of its options).
    """

    version: int
    needs: tuple[str, ...]
    Config: type

    def plan(self, context: TransformContext, config: Any) -> Proposal:  # noqa: ANN401 - each method has its Config
        """Return operators by site id; the planner checks them and decides what is folded."""
