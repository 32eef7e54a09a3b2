"""Linear regression from moments: of what a block's output lacks on the block's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.moments import add_cross_moment

# Of the mean second moment: settles channels that never change, whose covariance is but rounding errors.
_FLOOR = 1e-13


@dataclass
class Moments:
    """Sums over tokens, in float64.

    Attributes:
        count: Number of tokens.
        inputs: ``Σ x xᵀ``.
        sum_inputs: ``Σ x``.
        cross: ``Σ d xᵀ``, with ``d`` what the outputs lack.
        sum_lacking: ``Σ d``.
        lacking: ``Σ ‖d‖²``.
        energy: ``Σ ‖y‖²`` of what the outputs should be.
    """

    count: int
    inputs: Float[Tensor, "n n"]
    sum_inputs: Float[Tensor, " n"]
    cross: Float[Tensor, "n n"]
    sum_lacking: Float[Tensor, " n"]
    lacking: float = 0.0
    energy: float = 0.0

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Moments:
        """Return the sums over no tokens."""
        square = torch.zeros(n, n, dtype=torch.float64, device=device)
        line = square.new_zeros(n)
        return cls(0, square, line, square.clone(), line.clone())

    def add(
        self, x: Float[Tensor, "tokens n"], lacking: Float[Tensor, "tokens n"], outputs: Float[Tensor, "tokens n"]
    ) -> None:
        """Add some tokens."""
        x, lacking = x.double(), lacking.double()
        self.count += len(x)
        add_cross_moment(self.inputs, x, x)
        add_cross_moment(self.cross, lacking, x)
        self.sum_inputs += x.sum(0)
        self.sum_lacking += lacking.sum(0)
        self.lacking += float(lacking.square().sum())
        self.energy += float(outputs.double().square().sum())

    def error(self, matrix: Float[Tensor, "n n"], bias: Float[Tensor, " n"]) -> float:
        """Return ``Σ ‖d - M x - b‖²`` over the energy of the outputs."""
        m, b = matrix.double(), bias.double()
        explained = 2 * (m * self.cross).sum() + 2 * b @ self.sum_lacking
        spent = (m @ self.inputs * m).sum() + 2 * b @ (m @ self.sum_inputs) + self.count * (b @ b)
        return (self.lacking - float(explained - spent)) / max(self.energy, torch.finfo(torch.float64).tiny)

    def centered(self, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return covariances ``Cov(x)`` with a ridge and ``Cov(d, x)``, and the means of both."""
        mean_x, mean_d = self.sum_inputs / self.count, self.sum_lacking / self.count
        covariance = self.inputs / self.count - torch.outer(mean_x, mean_x)
        cross = self.cross / self.count - torch.outer(mean_d, mean_x)
        floor = _FLOOR * float(self.inputs.diagonal().mean()) / self.count
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + (floor if floor > 0 else 1.0))
        return covariance, cross, mean_x, mean_d


def low_rank_fit(
    moments: Moments, rank: int, ridge: float
) -> tuple[Float[Tensor, "n rank"], Float[Tensor, "rank n"], Float[Tensor, " n"]]:
    """Return ``up``, ``down`` and ``bias`` of the ridge regression ``d ≈ up (down x) + bias`` of a rank.

    Reduced-rank regression: of the full solution ``M`` what lies in the leading eigenvectors of ``M Cov(x) Mᵀ``.

    Args:
        moments: Of inputs and of what is lacking. Not modified.
        rank: 1 to the hidden size, which gives the full solution.
        ridge: Added to the covariance of the inputs, as a fraction of its mean diagonal entry.

    Returns:
        Factors in float64; the two vectors of each component have the same length.

    References:
        Izenman 1975, Reduced-rank regression for the multivariate linear model.
    """
    covariance, cross, mean_x, mean_d = moments.centered(ridge)
    full = torch.linalg.solve(covariance, cross.T).T
    fitted = full @ covariance @ full.T
    leading = torch.linalg.eigh((fitted + fitted.T) / 2)[1][:, -rank:].flip(-1)
    down = leading.T @ full
    root = torch.linalg.vector_norm(down, dim=-1).sqrt()
    up, down = leading * root, down / torch.where(root > 0, root, 1.0).unsqueeze(-1)
    return up, down, mean_d - up @ (down @ mean_x)


def affine_fit(moments: Moments, ridge: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return ``scale`` and ``bias`` of the ridge regression ``d ≈ scale ∘ x + bias`` of each channel, in float64."""
    covariance, cross, mean_x, mean_d = moments.centered(ridge)
    scale = cross.diagonal() / covariance.diagonal()
    return scale, mean_d - scale * mean_x
