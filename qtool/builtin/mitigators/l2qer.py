"""L²QER, Zhang et al. 2024, arXiv:2402.02446: a low-rank correction of the error, scaled by what the inputs measure.

Columns of the error count by the mean magnitude of their input: of all rank-k ``C`` it takes the one with the least
``‖(E − C) diag(s)‖``, ``s_j = mean |x_j|`` over all tokens. In the paper ``s`` is the largest of the means of several
texts, divided by ``√(min s · max s)``, which changes nothing, and no less than 1e-4, not needed here, as nothing
is divided by ``s``. Inputs that were never seen weigh nothing.
"""

from __future__ import annotations

import torch

from qtool.builtin.mitigators.lorc import LoRCConfig, add_correction
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import NumericalError, UsageError
from qtool.numerics.lowrank import weighted_truncation


class L2QER:
    """Add the rank-k part of the error under scales from mean magnitudes, from factors in 16 or 8 bits."""

    version = 2
    needs: tuple[str, ...] = ("mean_abs",)
    Config = LoRCConfig

    def quantize(self, problem: LayerProblem, config: LoRCConfig) -> QuantizedLinear:
        """Correct one layer.

        Raises:
            NumericalError: The weight or the statistic is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, there is a correction already, or ``mean_abs`` was not
                gathered.
        """
        magnitudes = problem.entries.get("mean_abs")
        if magnitudes is None:
            raise UsageError(
                f"no `mean_abs` was gathered for `{problem.name}`",
                hint="qtool calibrate MODEL --gather hessian,absmax,mean_abs,sample",
            )
        if not bool(torch.isfinite(magnitudes).all()):
            raise NumericalError(
                f"`mean_abs` of `{problem.name}` holds NaN or Inf",
                hint="look for layers whose activations overflow in the calibration dtype",
            )
        moments = magnitudes.double().square()
        return add_correction(
            problem, config, lambda error: weighted_truncation(error, moments, config.rank, seed=problem.seed)
        )
