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
from qtool.numerics.operators import Operator, carry_hessian, carry_hessian_blocks
from qtool.numerics.second_moments import block_size, diagonal_blocks

SAMPLE = "sample"
HESSIAN, BLOCKS = "hessian", "hessian_blocks"
MOMENTS = frozenset({HESSIAN, BLOCKS})
"""Statistics whose tokens have weights."""
FROM_SAMPLE = ("absmax", "min", "max", "mean_abs")


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site's input vector.

    Attributes:
        tokens: How many tokens were seen.
        entries: Name to tensor: ``hessian`` [n, n] (weighted mean of x xᵀ), ``hessian_blocks`` [blocks, b, b] along
            its diagonal, ``absmax``, ``min``, ``max``, ``mean``, ``mean_abs`` [n], ``sample`` [tokens, n], and what
            plugins gather.
        estimated: Entries that were recomputed from the sample after an operator.
        gathered: What calibrate gathered of the whole model, where that is more than the entries.
    """

    tokens: int
    entries: Mapping[str, Tensor]
    estimated: frozenset[str] = field(default_factory=frozenset)
    gathered: frozenset[str] = field(default_factory=frozenset)

    def need(self, name: str, *, site: str) -> Tensor:
        """Return an entry; blocks of a Hessian also where the whole was gathered.

        Raises:
            ArtifactError: It was not gathered; the hint says how to gather it.
        """
        if name == BLOCKS and HESSIAN in self.entries:
            return diagonal_blocks(self.entries[HESSIAN], block_size(len(self.entries[HESSIAN])))
        if name not in self.entries:
            there = {*self.gathered, *self.entries}
            # Extremes behind a rotation come from the sample, so these alone lead here again.
            wanted = {*there, name, *((SAMPLE,) if name in FROM_SAMPLE else ())}
            lost = "; operators of the plan mix channels of different blocks" if name == BLOCKS in there else ""
            raise ArtifactError(
                f"the statistics lack `{name}` at `{site}`{lost}",
                facts=(("gathered", ", ".join(sorted(there)) or "nothing"),),
                hint=f"qtool calibrate {'PLAN' if lost else 'MODEL'} --gather {','.join(sorted(wanted))}",
            )
        return self.entries[name]

    def carried(self, operators: tuple[Operator, ...]) -> SiteStatistics:
        """Return the statistics of ``x T`` for ``T`` the product of ``operators``.

        ``hessian``, ``mean`` and ``sample`` are exact (a Hessian stays weighted by the tokens' original weights), and
        so is ``hessian_blocks`` where no channels of different blocks are mixed, and dropped otherwise.
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
        if HESSIAN in self.entries:
            entries[HESSIAN] = carry_hessian((operator,), self.entries[HESSIAN], mean=mean)
        blocks = self.entries.get(BLOCKS)
        if blocks is not None and (blocks := carry_hessian_blocks(operator, blocks, mean=mean)) is not None:
            entries[BLOCKS] = blocks
        estimated = set(self.estimated)
        if operator.is_diagonal or operator.is_permutation:
            entries |= self._by_channel(operator)
        elif SAMPLE in entries:
            known = {name: value for name, value in summarize(entries[SAMPLE]).items() if name in self.entries}
            entries |= known
            estimated |= set(known)
        return SiteStatistics(self.tokens, entries, frozenset(estimated), self.gathered)

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
