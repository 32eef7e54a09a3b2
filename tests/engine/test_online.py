"""Online Hadamards run through the preferred kernel of the device and stay what they are."""

from __future__ import annotations

from dataclasses import dataclass

import pluggy
import pytest
import torch
from torch import Tensor

from qtool.engine.online import KernelHadamard, with_kernels
from qtool.hookspecs import Entry
from qtool.kernels.fast_hadamard import FastHadamard
from qtool.kernels.triton_hadamard import TritonHadamard
from qtool.numerics.hadamard import hadamard_rotate, random_signs
from qtool.numerics.operators import Hadamard, HeadMix, JsonScalar, Operator
from qtool.plugins import Offer, Plugins, Provider
from tests.oracles.hadamard import sylvester_oracle

GPU, CPU = torch.device("cuda"), torch.device("cpu")
ELSEWHERE = torch.device("meta")
"""A device that is not the CPU, on any machine."""


def signs(n: int) -> Tensor:
    return random_signs(n, torch.Generator().manual_seed(n)).to(torch.int8)


OPERATORS: list[Hadamard | HeadMix] = [
    Hadamard(64),
    Hadamard(64, signs(64), block_size=16),
    Hadamard(60, signs(60)),
    Hadamard(120, signs(120), block_size=40),
    Hadamard(184, signs(184)),
    HeadMix(8, 6),
    HeadMix(12, 4),
    HeadMix(28, 3),
]


class Dense:
    """The operation ``sylvester`` by its definition; remembers the orders that it was asked for."""

    operation = "sylvester"

    def __init__(self, preference: int = 0) -> None:
        self.preference = preference
        self.orders: list[int] = []

    def supports(self, device: torch.device) -> bool:
        return device.type != "cpu"

    def run(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        self.orders.append(n)
        return x @ sylvester_oracle(n).to(x) / n**0.5


@dataclass
class Holding(Operator):
    """As much of an operator as holds a tensor."""

    tensor: Tensor

    @property
    def dim(self) -> int:
        return len(self.tensor)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JsonScalar]]:
        return {"tensor": self.tensor}, {}


class Another(Dense):
    operation = "another"


def offering(**kernels: object) -> Plugins:
    """Plugins that offer these kernels and nothing else."""
    offers = {name: Offer(Entry(name, "nowhere", ""), Provider("?", "?")) for name in kernels}
    made = {("kernels", name): kernel for name, kernel in kernels.items()}
    return Plugins({"kernels": offers}, {}, {}, pluggy.PluginManager("qtool"), made)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda one: f"{one.kind}-{one.dim}")
def test_through_a_kernel_an_operator_is_its_dense_self(operator: Hadamard | HeadMix, transposed: bool) -> None:
    chosen = operator.inverse() if transposed else operator
    through = KernelHadamard(chosen, Dense())
    x = torch.randn(3, 5, operator.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = operator.to_dense()
    expected = x @ (matrix.mT if transposed else matrix)
    torch.testing.assert_close(through.act(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(through.weight_in(x), expected, rtol=0, atol=1e-12)


def test_several_vectors_in_one_axis_and_the_dtype_of_the_values() -> None:
    operator = Hadamard(24, signs(24))
    x = torch.randn(5, 3 * 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (x.reshape(5, 3, 24) @ operator.to_dense()).flatten(1)
    torch.testing.assert_close(KernelHadamard(operator, Dense()).act(x), expected, rtol=0, atol=1e-12)
    narrow = KernelHadamard(operator, Dense()).act(x.bfloat16())
    assert torch.equal(narrow, operator.act(x.bfloat16()))


@pytest.mark.parametrize(
    ("operator", "orders"),
    [(Hadamard(40), [2]), (Hadamard(64, block_size=16), [16]), (HeadMix(12, 4), []), (HeadMix(8, 3), [8])],
)
def test_the_kernel_runs_the_power_of_two(operator: Hadamard | HeadMix, orders: list[int]) -> None:
    kernel = Dense()
    KernelHadamard(operator, kernel).act(torch.ones(2, operator.dim))
    assert kernel.orders == orders


def test_every_hadamard_and_head_mix_is_replaced_and_nothing_else() -> None:
    kernel, other = Dense(), Holding(torch.ones(40, device=ELSEWHERE))
    operators: list[Operator] = [Hadamard(40), other, Hadamard(40, block_size=8).inverse(), HeadMix(8, 5)]
    found = with_kernels(operators, offering(one=kernel), ELSEWHERE)
    assert [one.kernel if isinstance(one, KernelHadamard) else one for one in found] == [
        kernel,
        other,
        kernel,
        kernel,
    ]
    assert [one.operator for one in found if isinstance(one, KernelHadamard)] == [operators[0], *operators[2:]]


def test_the_lowest_preference_runs_then_the_first_name() -> None:
    last, first, same = Dense(30), Dense(5), Dense(5)

    def chosen(**kernels: object) -> object:
        (found,) = with_kernels([Hadamard(8)], offering(**kernels), GPU)
        return found.kernel if isinstance(found, KernelHadamard) else None

    assert chosen(a=last, b=first) is first
    assert chosen(z=same, a=first) is first
    assert chosen(a=same, z=first) is same
    assert chosen(a=Another(0), b=last) is last
    assert chosen(a=Another(0)) is None
    assert chosen() is None


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"fast_hadamard_transform", "triton"}, FastHadamard),
        ({"triton"}, TritonHadamard),
        ({"fast_hadamard_transform"}, FastHadamard),
        (set(), None),
    ],
)
def test_what_runs_on_a_gpu_follows_from_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, there: set[str], expected: type | None
) -> None:
    plugins = Plugins.discover()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in there else None)
    (found,) = with_kernels([Hadamard(8)], plugins, GPU)
    assert (type(found.kernel) if isinstance(found, KernelHadamard) else None) is expected
    assert with_kernels([Hadamard(8)], plugins, CPU)[0].act(torch.eye(8)).equal(hadamard_rotate(torch.eye(8)))
    assert not any(isinstance(one, KernelHadamard) for one in with_kernels(OPERATORS, plugins, CPU))


def test_operators_are_put_on_the_device() -> None:
    """Else each run would copy them, and a recording of one would fail."""
    here = Holding(torch.ones(3))
    (moved,) = with_kernels([here], offering(), ELSEWHERE)
    assert isinstance(moved, Holding)
    assert moved.tensor.device == ELSEWHERE
    (kept,) = with_kernels([here], offering(), CPU)
    assert kept is here
