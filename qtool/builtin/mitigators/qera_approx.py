"""QERA-approx, Zhang et al. 2024, arXiv:2410.06040, theorem 2: the best low-rank correction for uncorrelated inputs.

Of all rank-k ``C`` it takes the one with the least ``tr((E − C) diag(H) (E − C)ᵀ)``: columns of the error count by the
root mean square of their input. Where the Hessian is diagonal that is ``qera``. As nothing is divided by the root, dead
inputs need no floor.
"""

from __future__ import annotations

from qtool.builtin.mitigators.lorc import LoRCConfig, add_correction
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.numerics.lowrank import weighted_truncation


class QERAApprox:
    """Add the rank-k part of the error under the Hessian's diagonal, from factors in 16 or 8 bits."""

    version = 2
    needs: tuple[str, ...] = ("hessian",)
    Config = LoRCConfig

    def quantize(self, problem: LayerProblem, config: LoRCConfig) -> QuantizedLinear:
        """Correct one layer.

        Raises:
            NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, there is a correction already, or no Hessian was gathered.
        """
        diagonal = problem.need_hessian().diagonal()
        return add_correction(
            problem, config, lambda error: weighted_truncation(error, diagonal, config.rank, seed=problem.seed)
        )
