"""Whole token rows of a site's input, the same tokens at every site, for whatever needs more than moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import Gathering


class SampleAccumulator:
    """Keeps the rows of tokens chosen beforehand, in bfloat16."""

    def __init__(self, gathering: Gathering) -> None:
        generator = torch.Generator().manual_seed(gathering.seed)
        chosen = torch.randperm(gathering.tokens, generator=generator)[: gathering.sample_size]
        self.chosen = chosen.sort().values
        self.seen = 0
        self.rows: list[Tensor] = []

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Keep the chosen rows among some tokens."""
        first, last = torch.searchsorted(self.chosen, torch.tensor([self.seen, self.seen + x.shape[0]])).tolist()
        local = self.chosen[first:last] - self.seen
        self.rows.append(x[local.to(x.device)].to(torch.bfloat16).cpu())
        self.seen += x.shape[0]

    def result(self) -> Tensor:
        """Return the rows in the order of the tokens."""
        return torch.cat(self.rows)


class Sample:
    """The statistic ``sample``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> SampleAccumulator:
        """Return an accumulator for a site."""
        del n, device
        return SampleAccumulator(gathering)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the rows in bfloat16."""
        return 2 * n * min(gathering.sample_size, gathering.tokens)
