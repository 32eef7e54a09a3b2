"""What each channel of a site's input does over all tokens: extremes and means."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import Gathering


class Extreme:
    """Keeps the largest value of each channel of ``sign * x``, or of |x| for ``sign`` 0."""

    def __init__(self, n: int, sign: int, device: torch.device) -> None:
        self.sign = sign
        self.value = torch.full((n,), 0.0 if sign == 0 else -torch.inf, device=device)

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Take in some tokens."""
        seen = x.abs().amax(0) if self.sign == 0 else (x.amax(0) if self.sign > 0 else -x.amin(0))
        self.value = torch.maximum(self.value, seen)

    def result(self) -> Float[Tensor, " n"]:
        """Return the extreme of all tokens."""
        return -self.value if self.sign < 0 else self.value


class Average:
    """Averages each channel, or its magnitude, in float64."""

    def __init__(self, n: int, *, magnitude: bool, device: torch.device) -> None:
        self.magnitude = magnitude
        self.sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Float[Tensor, "tokens n"]) -> None:
        """Take in some tokens."""
        self.sum += (x.abs() if self.magnitude else x).sum(0)
        self.tokens += x.shape[0]

    def result(self) -> Float[Tensor, " n"]:
        """Return the mean over all tokens."""
        return (self.sum / max(self.tokens, 1)).float()


class _ByChannel:
    """A statistic of one float32 number a channel."""

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the vector."""
        del gathering
        return 4 * n


class AbsMax(_ByChannel):
    """The statistic ``absmax``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Extreme:
        """Return an accumulator for a site."""
        del gathering
        return Extreme(n, 0, device)


class Minimum(_ByChannel):
    """The statistic ``min``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Extreme:
        """Return an accumulator for a site."""
        del gathering
        return Extreme(n, -1, device)


class Maximum(_ByChannel):
    """The statistic ``max``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Extreme:
        """Return an accumulator for a site."""
        del gathering
        return Extreme(n, 1, device)


class Mean(_ByChannel):
    """The statistic ``mean``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Average:
        """Return an accumulator for a site."""
        del gathering
        return Average(n, magnitude=False, device=device)


class MeanAbs(_ByChannel):
    """The statistic ``mean_abs``."""

    version = 1

    def start(self, n: int, gathering: Gathering, device: torch.device) -> Average:
        """Return an accumulator for a site."""
        del gathering
        return Average(n, magnitude=True, device=device)
