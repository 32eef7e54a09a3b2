"""Moments of both streams are what loops over pairs of tokens give, however these come."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qtool.builtin.statistics.cross import Cross, FullHessian, HeldOut
from qtool.builtin.statistics.hessian import Hessian
from qtool.engine.gather import AnyStatistic, Gathering, SiteObserver
from qtool.errors import NumericalError
from qtool.numerics.token_weights import parse_token_weight

STATISTICS: Mapping[str, AnyStatistic] = {
    "hessian": Hessian(),
    "cross": Cross(),
    "full_hessian": FullHessian(),
    "held_out": HeldOut(),
}
N, WINDOW = 6, 5
RULES = ["uniform", "inverse-norm", "inverse-norm:0.5", "clip:1.05"]


def pair(windows: int) -> tuple[Tensor, Tensor]:
    """What a site reads, and what it would read in full precision, whose tokens have other norms."""
    generator = torch.Generator().manual_seed(windows)
    x = torch.randn(windows * WINDOW, N, generator=generator)
    sizes = torch.rand(len(x), 1, generator=generator) * 3 + 0.1
    return x, (x.roll(1, -1) * 0.4 + x) * sizes


def gathered(x: Tensor, exact: Tensor, rule: str = "uniform", *, batch: int = 100) -> dict[str, Tensor]:
    """Show pairs, some windows at a time."""
    gathering = Gathering(len(x), parse_token_weight(rule), window=WINDOW)
    observer = SiteObserver("layers.3.mlp_in", STATISTICS, gathering)
    for start in range(0, len(x), batch * WINDOW):
        rows = slice(start, start + batch * WINDOW)
        observer.remember(exact[rows])
        observer(x[rows])
    return observer.result().entries


def oracle(x: Tensor, exact: Tensor, rule: str) -> dict[str, Tensor]:
    """Token by token in float64: a token weighs what its norm in `x` says, in all of them."""
    name, _, parameter = rule.partition(":")
    number = float(parameter or 1)
    sums = {key: torch.zeros(N, N, dtype=torch.float64) for key in ("hessian", "cross", "full_hessian", "left", "held")}
    windows, total = len(x) // WINDOW, 0.0
    held = max(windows // 10, 1) if windows > 1 else 0
    for index in range(windows):
        rows = [[float(v) for v in row] for row in x[index * WINDOW : (index + 1) * WINDOW]]
        norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
        for place, (row, norm) in enumerate(zip(rows, norms, strict=True)):
            bound = number * sorted(norms)[(WINDOW - 1) // 2]
            weight = {"uniform": 1.0, "inverse-norm": norm ** (-2 * number), "clip": min(1.0, bound / norm) ** 2}[name]
            q, f = torch.tensor(row, dtype=torch.float64), exact[index * WINDOW + place].double()
            for i in range(N):
                for j in range(N):
                    products = {"hessian": q[i] * q[j], "cross": f[i] * q[j], "full_hessian": f[i] * f[j]}
                    if index >= windows - held:
                        products |= {"left": q[i] * q[j], "held": f[i] * q[j]}
                    for key, product in products.items():
                        sums[key][i, j] += weight * product
            total += weight
    means = {key: value / total for key, value in sums.items()}
    parts = torch.stack([means.pop("left"), means.pop("held")])
    return {**means, "held_out": parts}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("windows", [1, 4, 20])
def test_against_loops_over_tokens(rule: str, windows: int) -> None:
    x, exact = pair(windows)
    expected = oracle(x, exact, rule)
    found = gathered(x, exact, rule)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_first_index_is_that_of_full_precision() -> None:
    x, exact = torch.zeros(WINDOW, N), torch.zeros(WINDOW, N)
    x[:, 4], exact[:, 1] = 2.0, 3.0
    cross = gathered(x, exact)["cross"]
    assert float(cross[1, 4]) == 6.0
    assert int((cross != 0).sum()) == 1


@pytest.mark.parametrize("rule", RULES)
def test_equal_streams(rule: str) -> None:
    x, _ = pair(12)
    found = gathered(x, x, rule)
    for other in (found["cross"], found["full_hessian"]):
        torch.testing.assert_close(other, found["hessian"], rtol=1e-6, atol=1e-7)
    assert torch.equal(found["held_out"][0], found["held_out"][1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_batch_does_not_matter(rule: str, batch: int) -> None:
    x, exact = pair(23)
    whole, parts = gathered(x, exact, rule), gathered(x, exact, rule, batch=batch)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("windows", "held"), [(1, 0), (2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (35, 3)])
def test_held_out_are_the_last_tenth_of_the_windows(windows: int, held: int) -> None:
    x, exact = pair(windows)
    last = slice((windows - held) * WINDOW, None)
    found = gathered(x, exact)
    parts = torch.stack([x[last].T @ x[last], exact[last].T @ x[last]]) / len(x)
    torch.testing.assert_close(found["held_out"], parts, rtol=1e-5, atol=1e-6)
    # What is left of the means is the others' part: windows in front of the last tell nothing of it.
    front = slice(0, (windows - held) * WINDOW)
    rest = torch.stack([found["hessian"], found["cross"]]) - found["held_out"]
    others = torch.stack([x[front].T @ x[front], exact[front].T @ x[front]]) / len(x)
    torch.testing.assert_close(rest, others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_full_precision_alone(bad: float) -> None:
    x, exact = pair(2)
    exact[7, 2] = bad
    with pytest.raises(NumericalError, match=r"`cross` of the activations at `layers\.3\.mlp_in` holds NaN or Inf"):
        gathered(x, exact)


def test_an_expert_without_tokens_in_a_batch_does_not_shift_the_pairs() -> None:
    x, exact = pair(4)
    observer = SiteObserver("layers.0.x", {"cross": Cross()}, Gathering(len(x), parse_token_weight("uniform")))
    for rows in (slice(0, 5), slice(5, 5), slice(5, 20)):
        observer.remember(exact[rows])
        observer(x[rows])
    torch.testing.assert_close(observer.result().entries["cross"], exact.T @ x / len(x), rtol=1e-5, atol=1e-6)
