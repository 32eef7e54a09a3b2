"""E2E-QP, the end-to-end half of EfficientQAT, Chen et al. 2024, arXiv:2407.11062: scales learned from the whole model.

Codes stay as they are. What multiplies them is learned by Adam from the output of the model as it is executed: the
scales of the groups, where they are stored in 16 bits or more, and beside them, as in Norm Tweaking, Li et al. 2023,
arXiv:2309.02784, the gains of the norms in front of linears and of the last one, which cost nothing and are there also
where scales are coarse. Both are learned as factors, with steps that fall to 0.

Differences from the paper: the objective is the divergence KL(full precision ‖ quantized) of the predicted tokens, not
the likelihood of the text, which the calibration text would be fitted to; and steps are relative to a scale, where the
paper's are 1e-5 to 2e-5 for each, over more text. Rates and epochs are those measured in ``recipes/README.md``.

What is learned last is kept, whatever it does on the calibration text: methods to the left that learn from blocks have
fitted the very rounding of these windows, which any change undoes. Chosen by them, the start would win (measured in
``recipes/README.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from qtool.engine.model_problem import ModelProblem, ModelResult, Values
from qtool.errors import NumericalError, UsageError

_JUDGED_SHARE = 16
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class E2EQPConfig:
    """Options of E2E-QP.

    Attributes:
        epochs: Times that all windows are learned from.
        batch: Windows to a step.
        rate: First step of a scale's factor; 0 leaves scales as they are.
        norm_rate: First step of the factor of a norm's gain; 0 leaves norms as they are.
    """

    epochs: int = 4
    batch: int = 4
    rate: float = 3e-3
    norm_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: A value is out of range.
        """
        if self.epochs < 0:
            raise UsageError(f"`epochs` is 0 or more, not {self.epochs}", hint="--set epochs=4")
        if self.batch < 1:
            raise UsageError(f"`batch` is a number of windows, not {self.batch}", hint="--set batch=4")
        for name in ("rate", "norm_rate"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UsageError(f"`{name}` is from 0 to 1, not {value:g}", hint=f"leave `{name}` out")


class E2EQP:
    """Learn scales and gains by which a whole model is nearest to what it was."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = E2EQPConfig

    def windows_run(self, windows: int, config: E2EQPConfig) -> int:
        """Return how many windows run through the model, one with gradients counted four times."""
        return 4 * config.epochs * windows + 2 * len(_judged(windows))

    def tune(self, model: ModelProblem, config: E2EQPConfig) -> ModelResult:
        """Learn, and report the divergence on some of the windows at the start and at the end.

        Raises:
            NumericalError: The divergence is not finite.
        """
        judged = _judged(model.windows)
        before = _finite(model.loss(judged, {}), "run it in float32: --dtype float32")
        values = _learned(model, config)
        after = _finite(model.loss(judged, values), "learn less at a step: --set e2e-qp.norm_rate=0.001")
        return ModelResult(values, {"kl_before": before, "kl": after})


def _learned(model: ModelProblem, config: E2EQPConfig) -> dict[str, Tensor]:
    """Return what has been learned when the steps have fallen to 0; nothing where nothing is to be learned."""
    rates = ((model.norms, config.norm_rate), (model.scales, config.rate))
    kinds = [(values, rate) for values, rate in rates if values and rate]
    start = {name: value for values, _ in kinds for name, value in values.items()}
    steps = config.epochs * -(-model.windows // config.batch)
    if not start or not steps:
        return {}
    factors = {name: torch.ones_like(value) for name, value in start.items()}
    groups = [{"params": [factors[name] for name in values], "lr": rate} for values, rate in kinds]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    falling = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps)
    generator = torch.Generator().manual_seed(model.seed)
    for _ in range(config.epochs):
        for rows in torch.split(torch.randperm(model.windows, generator=generator), config.batch):
            _, gradients = model.descend(rows.tolist(), _multiplied(start, factors))
            for name, factor in factors.items():
                factor.grad = gradients[name] * start[name]
            optimizer.step()
            falling.step()
    return _multiplied(start, factors)


def _finite(loss: float, hint: str) -> float:
    """Return a divergence.

    Raises:
        NumericalError: It is not finite.
    """
    if not isfinite(loss):
        raise NumericalError("the output of the model is not finite", hint=hint)
    return loss


def _multiplied(start: Values, factors: Values) -> dict[str, Tensor]:
    return {name: value * factors[name] for name, value in start.items()}


def _judged(windows: int) -> list[int]:
    """Return some windows, spread over all of them."""
    count = max(1, windows // _JUDGED_SHARE)
    return [index * windows // count for index in range(count)]
