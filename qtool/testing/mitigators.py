"""The checks of mitigators and of what says where they aim."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.statistics.cross import HELD_OUT_SHARE
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear, Retargeter
from qtool.errors import UsageError
from qtool.numerics.groups import from_groups
from qtool.numerics.losses import relative_loss
from qtool.numerics.two_streams import TwoStreams
from qtool.scheme import Format, TensorScheme
from qtool.testing.promise import CheckError, refuse_changes


def correlated_problem(
    fmt: Format, scheme: TensorScheme, *, seed: int = 0, n_out: int = 32, n_in: int = 64
) -> LayerProblem:
    """Return a layer with random weights and strongly correlated inputs.

    Its entries are ``hessian``, ``absmax``, ``mean_abs`` and ``sample`` of the inputs x, and ``cross`` (x_f xᵀ) and
    ``full_hessian`` (x_f x_fᵀ) with what the full-precision model would show in their place, ``x_f = x + noise``.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in) * 0.3
    x = torch.randn(512, n_in, generator=generator) @ mixing @ mixing
    weight = torch.randn(n_out, n_in, generator=generator)
    full = x + 0.3 * x.std() * torch.randn(x.shape, generator=generator)
    scale = fmt.global_scale(weight.abs().amax(), scheme)
    entries = {
        "hessian": x.T @ x / len(x),
        "cross": full.T @ x / len(x),
        "full_hessian": full.T @ full / len(x),
        "absmax": x.abs().amax(0),
        "mean_abs": x.abs().mean(0),
        "sample": x,
    }
    return LayerProblem("layer", weight, Grid.of(scheme, fmt), entries["hessian"], entries, (scale,))


def two_stream_problem(
    fmt: Format, scheme: TensorScheme, *, seed: int = 0, n_out: int = 32, n_in: int = 64
) -> LayerProblem:
    """Return a layer as ``correlated_problem`` does that reads something else than in full precision.

    Its entries have the moments of both, as ``mitigate`` gathers them.
    """
    problem = correlated_problem(fmt, scheme, seed=seed, n_out=n_out, n_in=n_in)
    exact = problem.entries["sample"]
    generator = torch.Generator().manual_seed(1000 + seed)
    drift = torch.randn(n_in, n_in, generator=generator) * (0.2 / n_in**0.5)
    x = exact @ (torch.eye(n_in) * 0.9 + drift)
    x = x + 0.1 * x.std() * torch.randn(x.shape, generator=generator)
    held = slice(len(x) - len(x) // HELD_OUT_SHARE, None)
    entries = {
        "hessian": x.T @ x / len(x),
        "cross": exact.T @ x / len(x),
        "full_hessian": exact.T @ exact / len(x),
        "held_out": torch.stack([x[held].T @ x[held], exact[held].T @ x[held]]) / len(x),
        "absmax": x.abs().amax(0),
        "mean_abs": x.abs().mean(0),
        "sample": x,
    }
    return replace(problem, hessian=entries["hessian"], entries=entries)


def check_mitigator(
    mitigator: Mitigator, fmt: Format, config: object = None, *, scheme: TensorScheme | None = None
) -> None:
    """Check a mitigator on correlated random layers.

    It must not modify its inputs, give the same codes and scales twice, keep to the format's codes, report the loss
    that one measures, and be no worse than rounding to nearest over several layers together: by that loss, or if it
    needs ``cross`` by how far outputs are from those in full precision.

    Args:
        mitigator: The method.
        fmt: Format of the weights.
        config: Its options; None for its defaults.
        scheme: Scheme of the weights; None for the format's default.

    Raises:
        CheckError: A promise is broken.
    """
    chosen = scheme or fmt.defaults
    options = mitigator.Config() if config is None else config
    name = type(mitigator).__name__
    total = nearest = 0.0
    for seed in range(4):
        problem = correlated_problem(fmt, chosen, seed=seed)
        given = {"weight": problem.weight, **problem.entries}
        kept = {label: tensor.clone() for label, tensor in given.items()}
        result, again = mitigator.quantize(problem, options), mitigator.quantize(problem, options)
        refuse_changes(name, kept, given)
        if not torch.equal(result.codes, again.codes):
            raise CheckError(f"{name} gives other codes when it is asked again")
        if not all(torch.equal(a.scale, b.scale) for a, b in zip(result.parameters, again.parameters, strict=True)):
            raise CheckError(f"{name} gives other scales when it is asked again")
        if int(result.codes.max()) >= 2**fmt.bits:
            raise CheckError(f"{name} gives codes beyond {fmt.bits} bits")
        stands = _stands(result, problem)
        measured = float(relative_loss(problem.weight, stands, problem.need_hessian()))
        reported = result.report.get("loss", math.nan)
        if not abs(measured - reported) <= 1e-3 * max(measured, 1e-6):
            raise CheckError(f"{name} reports the loss {reported:.6g}, measured {measured:.6g}")
        aims = "cross" in mitigator.needs
        total += _distance(stands, problem) if aims else measured
        plain = nearest_weight(problem)
        nearest += (
            _distance(plain, problem) if aims else float(relative_loss(problem.weight, plain, problem.need_hessian()))
        )
    if not total <= nearest * (1 + 1e-6):
        raise CheckError(f"{name} is worse than rounding to nearest: {total:.6g} against {nearest:.6g}")


def check_retargeter(
    retargeter: Retargeter, fmt: Format, config: object = None, *, scheme: TensorScheme | None = None
) -> None:
    """Check what says where other methods aim, with GPTQ behind it, on layers that do not read what they should.

    It must not modify its inputs, give the same weight twice, change nothing else of the problem but its report, refuse
    a layer that is rounded already, and bring GPTQ's outputs nearer to those in full precision over several layers
    together.

    Args:
        retargeter: The method.
        fmt: Format of the weights.
        config: Its options; None for its defaults.
        scheme: Scheme of the weights; None for the format's default.

    Raises:
        CheckError: A promise is broken.
    """
    chosen = scheme or fmt.defaults
    options = retargeter.Config() if config is None else config
    name = type(retargeter).__name__
    total = alone = 0.0
    for seed in range(4):
        problem = two_stream_problem(fmt, chosen, seed=seed)
        given = {"weight": problem.weight, **problem.entries}
        kept = {label: tensor.clone() for label, tensor in given.items()}
        result = retargeter.retarget(problem, options)
        again = retargeter.retarget(replace(problem, memory={}), options)
        refuse_changes(name, kept, given)
        if not torch.equal(result.weight, again.weight):
            raise CheckError(f"{name} gives another weight when it is asked again")
        if result.weight.shape != problem.weight.shape or result.weight.dtype != problem.weight.dtype:
            raise CheckError(f"{name} gives a weight of another shape or dtype")
        changed = [one for one in vars(problem) if getattr(result, one) is not getattr(problem, one)]
        if others := set(changed) - {"weight", "report"}:
            raise CheckError(f"{name} changes the {min(others)} of the problem")
        plain = GPTQ().quantize(problem, GPTQConfig())
        total += _distance(_stands(GPTQ().quantize(result, GPTQConfig()), problem), problem)
        alone += _distance(_stands(plain, problem), problem)
        try:
            retargeter.retarget(problem.after(plain), options)
        except UsageError:
            continue
        raise CheckError(f"{name} does not refuse a layer that is rounded already")
    if not total <= alone * (1 + 1e-6):
        raise CheckError(f"{name} leads GPTQ away from full precision: {total:.6g} against {alone:.6g}")


def _distance(weight: Tensor, problem: LayerProblem) -> float:
    """Return ``E ‖W f - Ŵ x‖²`` over ``E ‖W f‖²``."""
    hessian, cross, full = (problem.entries[name] for name in ("hessian", "cross", "full_hessian"))
    streams = TwoStreams.of(hessian, cross, full, dampening_frac=0.0)
    distance = streams.energy(problem.weight, weight)
    return distance / streams.energy(problem.weight, torch.zeros_like(problem.weight))


def _stands(result: QuantizedLinear, problem: LayerProblem) -> Tensor:
    """Return what stands for the weight."""
    weight = result.weight(problem.grid)
    return weight if result.adapter is None else weight + result.adapter.product()


def nearest_weight(problem: LayerProblem) -> Tensor:
    """Return a weight rounded to nearest on the range that the scheme keeps, without looking at a method."""
    rounded = []
    places = problem.grid.places(problem.weight.shape[1])
    for (columns, part), scale in zip(places, problem.global_scales, strict=True):
        values = problem.weight[:, columns]
        groups = part.groups(values)
        fitted = part.fit(groups, global_scale=scale)
        rounded.append(from_groups(part.format.round(groups, fitted), values.shape))
    return torch.cat(rounded, dim=1)
