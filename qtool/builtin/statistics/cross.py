"""Moments of what a linear reads beside what it would read in full precision, for methods that aim at its output.

With ``x`` the input in the model as it is quantized so far and ``f`` the input in full precision, the squared error of
the output ``‖Ŵ x - W f‖²`` depends on ``H`` = E x xᵀ (the statistic ``hessian``), ``C`` = E f xᵀ and ``F`` = E f fᵀ.
All three weigh a token alike, by the norm of ``x``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.gather import Gathering
from qtool.numerics.moments import add_cross_moment

HELD_OUT_SHARE = 10
"""The last tenth of the windows is held out, at least one where there are several."""


class _Weighted:
    """Weighs pairs of tokens and counts the weight."""

    def __init__(self, gathering: Gathering, device: torch.device) -> None:
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.gathering, self.seen = gathering, 0

    def weighed(self, x: Float[Tensor, "tokens n"], exact: Float[Tensor, "tokens n"]) -> tuple[Tensor, Tensor]:
        """Return both, each token times the root of its weight."""
        scales = self.gathering.scales(x, self.seen)
        self.seen += len(x)
        if scales is None:
            self.weight += len(x)
            return x, exact
        self.weight += scales.double().square().sum()
        return x * scales[:, None], exact * scales[:, None]

    def mean(self, total: Tensor) -> Tensor:
        """Return a sum as a weighted mean."""
        return total / self.weight.clamp_min(torch.finfo(torch.float32).tiny).float()


class CrossAccumulator(_Weighted):
    """Sums w f xᵀ and w in float32; of ``f fᵀ`` where it is told so."""

    def __init__(self, n: int, gathering: Gathering, device: torch.device, *, of_exact: bool) -> None:
        super().__init__(gathering, device)
        self.sum = torch.zeros(n, n, device=device)
        self.of_exact = of_exact

    def update_pair(self, x: Float[Tensor, "tokens n"], exact: Float[Tensor, "tokens n"]) -> None:
        """Add some tokens."""
        x, exact = self.weighed(x, exact)
        add_cross_moment(self.sum, exact, exact if self.of_exact else x)

    def result(self) -> Float[Tensor, "n n"]:
        """Return the weighted mean."""
        return self.mean(self.sum)


class HeldOutAccumulator(_Weighted):
    """Sums w x xᵀ and w f xᵀ over the last tenth of the windows, and w over all."""

    def __init__(self, n: int, gathering: Gathering, device: torch.device) -> None:
        super().__init__(gathering, device)
        self.sums = torch.zeros(2, n, n, device=device)
        window = gathering.window or gathering.tokens
        windows = gathering.tokens // window
        held = max(windows // HELD_OUT_SHARE, int(windows > 1))
        self.first = (windows - held) * window

    def update_pair(self, x: Float[Tensor, "tokens n"], exact: Float[Tensor, "tokens n"]) -> None:
        """Add those of some tokens that are held out."""
        held = slice(max(self.first - self.seen, 0), None)
        x, exact = self.weighed(x, exact)
        for total, left in zip(self.sums, (x, exact), strict=True):
            add_cross_moment(total, left[held], x[held])

    def result(self) -> Float[Tensor, "2 n n"]:
        """Return the held-out part of the weighted means ``H`` and ``C``: the rest is what is left of them."""
        return self.mean(self.sums)


class Cross:
    """The statistic ``cross``: ``C``, the weighted mean of f xᵀ, first index full precision."""

    version = 1
    of_products: Literal[True] = True

    def start_pair(self, n: int, gathering: Gathering, device: torch.device) -> CrossAccumulator:
        """Return an accumulator for a site."""
        return CrossAccumulator(n, gathering, device, of_exact=False)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the matrix in float32."""
        del gathering
        return 4 * n * n


class FullHessian:
    """The statistic ``full_hessian``: ``F``, the weighted mean of f fᵀ."""

    version = 1
    of_products: Literal[True] = True

    def start_pair(self, n: int, gathering: Gathering, device: torch.device) -> CrossAccumulator:
        """Return an accumulator for a site."""
        return CrossAccumulator(n, gathering, device, of_exact=True)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of the matrix in float32."""
        del gathering
        return 4 * n * n


class HeldOut:
    """The statistic ``held_out``: what the last tenth of the windows adds to ``H`` and to ``C``."""

    version = 1
    of_products: Literal[True] = True

    def start_pair(self, n: int, gathering: Gathering, device: torch.device) -> HeldOutAccumulator:
        """Return an accumulator for a site."""
        return HeldOutAccumulator(n, gathering, device)

    def nbytes(self, n: int, gathering: Gathering) -> int:
        """Return the bytes of both matrices in float32."""
        del gathering
        return 2 * 4 * n * n
