"""The check of mitigators that look at the output of a whole block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.block_problem import BlockMitigator, BlockProblem, BlockResult
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.numerics.losses import relative_loss
from qtool.scheme import Format, TensorScheme
from qtool.testing.mitigators import nearest_weight
from qtool.testing.promise import CheckError, refuse_changes

UP, DOWN = "layers.0.up", "layers.0.down"
_TOLERANCE = 1e-3


def block_problem(
    fmt: Format, scheme: TensorScheme, *, seed: int = 0, windows: int = 16, tokens: int = 16, hidden: int = 32
) -> BlockProblem:
    """Return a block ``x + down tanh(up x)`` with random weights, whose inputs are not those of its targets.

    Args:
        fmt: Format of the weights.
        scheme: Their scheme.
        seed: Seeds everything.
        windows: Number of windows.
        tokens: Tokens to a window.
        hidden: Size of the hidden states; inside the block there are twice as many.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=generator) / hidden**0.5 + torch.eye(hidden) * 0.3
    exact = torch.randn(windows, tokens, hidden, generator=generator) @ mixing @ mixing
    states = exact * 0.97 + 0.05 * torch.randn(exact.shape, generator=generator)
    weights = {
        UP: torch.randn(2 * hidden, hidden, generator=generator) / hidden**0.5,
        DOWN: torch.randn(hidden, 2 * hidden, generator=generator) / hidden**0.5,
    }

    def inner(given: Mapping[str, Tensor], x: Float[Tensor, "batch tokens hidden"]) -> Tensor:
        return torch.tanh(x @ given[UP].T)

    def forward(
        given: Mapping[str, Tensor], x: Float[Tensor, "batch tokens hidden"]
    ) -> Float[Tensor, "batch tokens hidden"]:
        return x + inner(given, x) @ given[DOWN].T

    reads = {UP: states.flatten(0, 1), DOWN: inner(weights, states).flatten(0, 1)}
    targets = forward(weights, exact)
    return BlockProblem(
        layer=0,
        problems={name: _layer(name, weights[name], reads[name], Grid.of(scheme, fmt)) for name in weights},
        inputs=lambda rows: states[list(rows)],
        targets=lambda rows: targets[list(rows)],
        forward=forward,
        windows=windows,
        fixed=True,
        device=torch.device("cpu"),
        seed=seed,
    )


def check_block_mitigator(
    mitigator: BlockMitigator, fmt: Format, config: object = None, *, scheme: TensorScheme | None = None
) -> None:
    """Check a mitigator that looks at the output of a block, on small random blocks.

    It must not modify its inputs, give the same codes, scales and compensation twice, solve every linear, keep to the
    format's codes, report the losses that one measures, and be no worse than rounding to nearest. ``loss`` is that of a
    linear. ``block_loss`` is that of the block, on all windows or, where the method holds some out, on the last ones;
    on these windows it is compared with rounding to nearest.

    Args:
        mitigator: The method.
        fmt: Format of the weights.
        config: Its options; None for its defaults.
        scheme: Scheme of the weights; None for the format's default.

    Raises:
        CheckError: A promise is broken.
    """
    options = mitigator.Config() if config is None else config
    name = type(mitigator).__name__
    for seed in range(2):
        block = block_problem(fmt, scheme or fmt.defaults, seed=seed)
        given = dict(_given(block))
        kept = {label: tensor.clone() for label, tensor in given.items()}
        result, again = mitigator.refine(block, options), mitigator.refine(block, options)
        refuse_changes(name, kept, given)
        if set(result.linears) != set(block.problems):
            raise CheckError(f"{name} does not give every linear of the block, and no other")
        first, second = dict(_found(result)), dict(_found(again))
        for label, found in first.items():
            if label not in second or not torch.equal(found, second[label]):
                raise CheckError(f"{name} gives other {label} when it is asked again")
        if any(int(linear.codes.max()) >= 2**fmt.bits for linear in result.linears.values()):
            raise CheckError(f"{name} gives codes beyond {fmt.bits} bits")
        _check_losses(name, block, result)


def _check_losses(name: str, block: BlockProblem, result: BlockResult) -> None:
    for label, linear in result.linears.items():
        problem = block.problems[label]
        measured = relative_loss(problem.weight, _stands(linear, problem), problem.need_hessian())
        reported = linear.report.get("loss", math.nan)
        if not _same(reported, measured):
            raise CheckError(f"{name} reports the loss {reported:.6g} of `{label}`, measured {measured:.6g}")
    reported = result.report.get("block_loss", math.nan)
    tails = [range(first, block.windows) for first in range(block.windows)]
    judged = next((rows for rows in tails if _same(reported, _loss(block, result, rows))), None)
    if judged is None:
        measured = _loss(block, result, tails[0])
        raise CheckError(f"{name} reports the block loss {reported:.6g}, measured {measured:.6g} on all windows")
    nearest = _block_loss(block, {label: nearest_weight(one) for label, one in block.problems.items()}, judged, None)
    if not reported <= nearest * (1 + _TOLERANCE):
        raise CheckError(f"{name} is worse than rounding to nearest: {reported:.6g} against {nearest:.6g}")


def _same(reported: float, measured: float) -> bool:
    return abs(reported - measured) <= _TOLERANCE * max(measured, 1e-6)


def _layer(name: str, weight: Tensor, x: Float[Tensor, "tokens n"], grid: Grid) -> LayerProblem:
    hessian = x.T @ x / len(x)
    return LayerProblem(name, weight, grid, hessian, {"hessian": hessian}, grid.global_scales(weight.abs().amax(0)))


def _given(block: BlockProblem) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that must stay as it is, and what to call it."""
    for label, problem in block.problems.items():
        yield f"weight of `{label}`", problem.weight
        yield f"hessian of `{label}`", problem.need_hessian()


def _found(result: BlockResult) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that must come out again, and what to call it."""
    for label, linear in result.linears.items():
        yield f"codes of `{label}`", linear.codes
        for index, parameters in enumerate(linear.parameters):
            yield f"scales of `{label}`" + f", part {index}" * bool(index), parameters.scale
    for part in ("bias", "scale", "down", "up"):
        tensor = getattr(result.compensation, part, None)
        if tensor is not None:
            yield f"compensation ({part})", tensor


def _stands(linear: QuantizedLinear, problem: LayerProblem) -> Tensor:
    """Return what stands for a weight, low-rank correction included."""
    decoded = linear.weight(problem.grid)
    return decoded if linear.adapter is None else decoded + linear.adapter.product()


def _loss(block: BlockProblem, result: BlockResult, rows: Sequence[int]) -> float:
    weights = {label: _stands(linear, block.problems[label]) for label, linear in result.linears.items()}
    return _block_loss(block, weights, rows, result)


def _block_loss(
    block: BlockProblem, weights: Mapping[str, Tensor], rows: Sequence[int], result: BlockResult | None
) -> float:
    """Return the squared error of the block's outputs over their energy, for some windows."""
    with torch.no_grad():
        x, targets = block.inputs(rows), block.targets(rows)
        outputs = block.forward(weights, x)
        if result is not None and result.compensation is not None:
            outputs = result.compensation.added(x, outputs)
        return float((outputs - targets).double().square().sum() / targets.double().square().sum())
