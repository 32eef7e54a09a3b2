"""QERA, Zhang et al. 2024, arXiv:2410.06040, theorem 1: the low-rank correction with the least output error.

Of all rank-k ``C`` it takes the one with the least ``tr((E − C) H (E − C)ᵀ)``: no other correction of that rank loses
less on the calibration tokens, and full rank loses nothing but what its storage does. The paper whitens by
``H^½`` and divides by it again. The same ``C`` is the projection of ``E`` on the leading eigenvectors of ``E H Eᵀ``,
which takes no root and no inverse; so a Hessian of deficient rank needs no dampening, and dead inputs no floor.
"""

from __future__ import annotations

from qtool.builtin.mitigators.lorc import LoRCConfig, add_correction
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.numerics.lowrank import weighted_truncation


class QERA:
    """Add the rank-k part of the error under the Hessian, from factors in 16 or 8 bits."""

    version = 2
    needs: tuple[str, ...] = ("hessian",)
    Config = LoRCConfig

    def quantize(self, problem: LayerProblem, config: LoRCConfig) -> QuantizedLinear:
        """Correct one layer.

        Raises:
            NumericalError: The weight or the Hessian is not finite, or a factor overflows its storage format.
            UsageError: The rank is larger than the weight, there is a correction already, or no Hessian was gathered.
        """
        hessian = problem.need_hessian()
        return add_correction(
            problem, config, lambda error: weighted_truncation(error, hessian, config.rank, seed=problem.seed)
        )
