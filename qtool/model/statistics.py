"""What calibration knows of a site's input, and how it is carried through operators.

A rotation of the inputs rotates their second moment, mean and sample exactly; what it cannot carry (the largest
magnitude of each channel) is taken from the carried sample instead, and says so. Carrying is what makes
"calibrate once, quantize many times" possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import ArtifactError
from qtool.numerics.operators import Operator, carry_hessian

SAMPLE = "sample"
FROM_SAMPLE = ("absmax", "min", "max", "mean_abs")


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site's input vector.

    Attributes:
        tokens: How many tokens were seen.
        entries: Name to tensor: ``hessian`` [n, n] (weighted mean of x xᵀ), ``absmax``, ``min``, ``max``, ``mean``,
            ``mean_abs`` [n], ``sample`` [tokens, n], and what plugins gather.
        estimated: Entries that were recomputed from the sample after an operator.
    """

    tokens: int
    entries: Mapping[str, Tensor]
    estimated: frozenset[str] = field(default_factory=frozenset)

    def need(self, name: str, *, site: str) -> Tensor:
        """Return an entry.

        Raises:
            ArtifactError: It was not gathered; the hint says how to gather it.
        """
        if name not in self.entries:
            # Behind a rotation extremes come from the sample, so gathering them alone would lead here again.
            wanted = {*self.entries, name, *((SAMPLE,) if name in FROM_SAMPLE else ())}
            raise ArtifactError(
                f"the statistics lack `{name}` at `{site}`",
                facts=(("gathered", ", ".join(sorted(self.entries)) or "nothing"),),
                hint=f"qtool calibrate MODEL --gather {','.join(sorted(wanted))}",
            )
        return self.entries[name]

    def carried(self, operators: tuple[Operator, ...]) -> SiteStatistics:
        """Return the statistics of ``x T`` for ``T`` the product of ``operators``.

        ``hessian``, ``mean`` and ``sample`` are exact (a Hessian stays weighted by the tokens' original weights).
        The others are exact behind a diagonal or a permutation, and are otherwise estimated from the sample, or
        dropped without one.
        """
        statistics = self
        for operator in operators:
            statistics = statistics._carried(operator)
        return statistics

    def _carried(self, operator: Operator) -> SiteStatistics:
        """Return the statistics behind one operator."""
        mean = self.entries.get("mean")
        entries = {name: operator.act(self.entries[name]) for name in ("mean", SAMPLE) if name in self.entries}
        if "hessian" in self.entries:
            entries["hessian"] = carry_hessian((operator,), self.entries["hessian"], mean=mean)
        estimated = set(self.estimated)
        if operator.is_diagonal or operator.is_permutation:
            entries |= self._by_channel(operator)
        elif SAMPLE in entries:
            known = {name: value for name, value in summarize(entries[SAMPLE]).items() if name in self.entries}
            entries |= known
            estimated |= set(known)
        return SiteStatistics(self.tokens, entries, frozenset(estimated))

    def _by_channel(self, operator: Operator) -> dict[str, Tensor]:
        """Return each channel's extremes behind an operator that leaves channels apart: exact.

        Where a channel is flipped, its maximum is known only with its minimum, and the other way round.
        """
        scaled = {n: operator.act(v) for n, v in self.entries.items() if n in FROM_SAMPLE}
        low, high = scaled.get("min"), scaled.get("max")
        if low is not None and high is not None:
            scaled |= {"min": torch.minimum(low, high), "max": torch.maximum(low, high)}
        for name in {"min", "max"} & scaled.keys() if low is None or high is None else ():
            if bool((operator.act(torch.ones_like(scaled[name])) < 0).any()):
                del scaled[name]
        return scaled | {name: scaled[name].abs() for name in ("absmax", "mean_abs") if name in scaled}


def summarize(sample: Float[Tensor, "tokens n"]) -> dict[str, Tensor]:
    """Return each channel's largest magnitude, extremes and mean magnitude over tokens."""
    return {
        "absmax": sample.abs().amax(0),
        "min": sample.amin(0),
        "max": sample.amax(0),
        "mean_abs": sample.abs().mean(0),
    }
