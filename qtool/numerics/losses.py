"""How far a quantized weight is from its original, as the layer's output sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.numerics.moments import panels


def relative_loss(
    weight: Float[Tensor, "out in"],
    approximated: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None = None,
) -> float:
    """Return ``tr(E H Eᵀ) / tr(W H Wᵀ)`` with ``E = W - Ŵ``, the squared relative error of the outputs.

    Args:
        weight: Full-precision weight ``W``. Not modified.
        approximated: What stands for it, ``Ŵ``, low-rank correction included. Not modified.
        hessian: Second moment ``H`` of the inputs, without damping; its size cancels. None stands for the
            identity: the squared relative Frobenius error of the weight. Not modified.

    Returns:
        The loss without unit; see ``loss_ratio``.
    """
    error = output_energy(weight - approximated.to(weight.dtype), hessian)
    return loss_ratio(error, output_energy(weight, hessian))


def output_energy(matrix: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None = None) -> float:
    """Return ``tr(M H Mᵀ)``, the mean squared output of ``M``; products in its dtype, the sum in float64."""
    return output_energies([matrix], hessian)[0]


def output_energies(
    matrices: Iterable[Float[Tensor, "out in"]], hessian: Float[Tensor, "in in"] | None = None
) -> list[float]:
    """Return the ``output_energy`` of each of a few matrices, for which a device is waited for once."""
    return [float(energy) for energy in torch.stack([_energy(matrix, hessian) for matrix in matrices]).cpu()]


def _energy(matrix: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> Float[Tensor, ""]:
    """Return ``tr(M H Mᵀ)``: as ``H`` is symmetric, panels of it on and twice those above the diagonal suffice."""
    if hessian is None:
        return matrix.square().sum(-1).double().sum()
    hessian = hessian.to(matrix.dtype)
    energy = matrix.new_zeros((), dtype=torch.float64)
    for start, stop in panels(matrix.shape[1]):
        part = matrix[:, start:stop]
        outputs = part @ hessian[start:stop, start:stop]
        outputs.addmm_(matrix[:, :start], hessian[:start, start:stop], alpha=2)
        energy += (outputs * part).sum(-1).double().sum()
    return energy


def loss_ratio(error: float, signal: float) -> float:
    """Return ``error / signal``: 0 for no error, and infinity for an error without a signal."""
    if error == 0.0:
        return 0.0
    return error / signal if signal else float("inf")


def lasting(report: Mapping[str, float]) -> dict[str, float]:
    """Return what a report says that another method's work on the same codes leaves true.

    That is all but losses, of whatever kind, save ``loss_rtn``: rounding to nearest stays as it was.
    """
    return {name: value for name, value in report.items() if "loss" not in name or name == "loss_rtn"}
