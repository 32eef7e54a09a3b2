from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.formats.amxfp4 import AMXFP4
from qtool.builtin.formats.integer import Int4
from qtool.numerics import beam, updates
from qtool.numerics.beam import BranchingColumns, beam_round
from qtool.numerics.gptq import ColumnGrid, GPTQResult, ParameterSource, factorize_visits, gptq_round
from qtool.numerics.groups import each_parameter
from qtool.numerics.levels import level_codes
from qtool.numerics.replay import Replayed, ReplayedColumns
from qtool.numerics.triangular import LinearTerm
from qtool.scheme import Format, GroupParameters, TensorScheme
from tests.numerics.frozen_cases import CASES, GLOBAL_SCALE, frozen, problem, to_be_fitted
from tests.oracles.gptq import Order

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHIFTED = {
    "amxfp4": (AMXFP4(), AMXFP4.defaults, 32),
    "int4-offset": (Int4(), TensorScheme("int4", symmetric=False, offset=True), 16),
}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def switch(pays: bool) -> None:
        for module in (updates, beam):
            monkeypatch.setattr(module, "pays", lambda tensor: pays)

    return switch


def grids(case: str, device: str) -> list[ColumnGrid]:
    if case in CASES:

        def moved(parameters: GroupParameters) -> GroupParameters:
            one = each_parameter(parameters, lambda own: own.to(device))
            return one if one.global_scale is None else replace(one, global_scale=one.global_scale.to(device))

        return [
            replace(part, fit=lambda values, start, fit=part.fit: moved(fit(values.cpu(), start)))
            for part in to_be_fitted(case)
        ]
    fmt, scheme, size = SHIFTED[case]
    return [ColumnGrid(size, lambda values, start: fmt.fit(values, scheme), fmt.round, fmt.encode)]


def equal(one: GPTQResult, other: GPTQResult) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("term", ["none", "moments", "drift"])
@pytest.mark.parametrize(("source", "order"), [("static", "activation"), ("fresh", "natural")])
@pytest.mark.parametrize("case", [*CASES, *SHIFTED])
def test_replayed_columns_are_the_same_bit_for_bit(
    plain: Callable[[bool], None], case: str, source: ParameterSource, order: Order, term: str, device: str
) -> None:
    weight, hessian = (one.float().to(device) for one in problem(3, 40))
    grid = grids(case, device)
    factor = factorize_visits(hessian, grid, dampening_frac=0.01, order=order)
    if term != "none":
        matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).triu(1).to(device) / 20
        factor = replace(factor, term=LinearTerm(matrix, drift=term == "drift"))
    plain(False)
    expected = gptq_round(weight, hessian, grid=grid, parameters=source, order=order, factor=factor, block_size=20)
    plain(True)
    for _ in range(4):  # on a device the third records, and all later ones replay
        found = gptq_round(weight, hessian, grid=grid, parameters=source, order=order, factor=factor, block_size=20)
        assert equal(found, expected)
    other = gptq_round(2.5 * weight, hessian, grid=grid, parameters=source, order=order, factor=factor, block_size=20)
    plain(False)
    expected = gptq_round(
        2.5 * weight, hessian, grid=grid, parameters=source, order=order, factor=factor, block_size=20
    )
    assert equal(other, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_replayed_searches_are_the_same_bit_for_bit(plain: Callable[[bool], None], case: str, device: str) -> None:
    weight, hessian = (one.float() for one in problem(4, 10))
    factor = factorize_visits(hessian.to(device), to_be_fitted(case), dampening_frac=0.01, order="activation")

    def grid(values: Tensor) -> list[BranchingColumns]:
        found = []
        for part, (fmt, *_) in zip(frozen(case, values), CASES[case], strict=True):
            own = each_parameter(part.parameters, lambda one: one.to(device))
            if own.global_scale is not None:
                own = replace(own, global_scale=GLOBAL_SCALE.to(device))
            found.append(BranchingColumns(replace(part, parameters=own), level_codes(fmt).to(device), fmt.decode))
        return found

    for values in (weight, 3 * weight, weight):
        plain(False)
        expected = beam_round(values.to(device), factor, grid=grid(values), beams=3, block_size=8)
        plain(True)
        assert torch.equal(beam_round(values.to(device), factor, grid=grid(values), beams=3, block_size=8), expected)


def test_on_the_cpu_nothing_is_replayed() -> None:
    calls: list[int] = []
    step = Replayed(lambda: calls.append(len(calls)), torch.device("cpu"))
    for _ in range(5):
        step()
    assert calls == [0, 1, 2, 3, 4]


def test_it_is_recorded_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current, recordings, replays = [torch.device("cuda", 0)], [], []

    class Graph:
        def replay(self) -> None:
            replays.append(current[-1])

    class Stream:
        def __init__(self) -> None:
            self.device = current[-1]

        def wait_stream(self, other: Stream) -> None:
            assert other.device == self.device

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    @contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        recordings.append(current[-1])
        yield

    for name, fake in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: entered(stream.device),
        "graph": recording,
        "device": entered,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls: list[torch.device] = []
    second = torch.device("cuda", 1)
    step = Replayed(lambda: calls.append(current[-1]), second)
    for _ in range(4):
        step()
    assert (calls, recordings, replays) == ([second] * 3, [second], [second] * 2)
    assert current == [torch.device("cuda", 0)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_second_gpu() -> None:
    total = torch.zeros((), device="cuda:1")
    step = Replayed(lambda: total.add_(1), total.device)
    for _ in range(5):
        step()
    assert float(total) == 5


def one_column(scale: float, rows: int, device: str) -> list[GroupParameters]:
    return [GroupParameters(torch.full((rows,), scale, device=device))]


@pytest.mark.gpu
def test_what_waits_for_the_device_is_called_as_it_is() -> None:
    calls = []

    def waits(parameters: list[GroupParameters], values: Tensor) -> tuple[Tensor]:
        calls.append(float(values.sum()))
        return (values * parameters[0].scale,)

    run = ReplayedColumns(waits)
    for size in (2.0, 3.0):
        (made,) = run(one_column(size, 4, "cuda"), torch.full((4,), 5.0, device="cuda"))
        assert made.tolist() == [5.0 * size] * 4
    assert calls == [20.0, 20.0]
    torch.rand(3, device="cuda")


@pytest.mark.gpu
def test_each_shape_is_recorded_and_the_oldest_go() -> None:
    calls = []

    def doubled(parameters: list[GroupParameters], values: Tensor) -> tuple[Tensor]:
        calls.append(len(values))
        return (values.mul_(parameters[0].scale),)

    run = ReplayedColumns(doubled)
    with torch.inference_mode():
        for rows in (*range(1, 18), 17, 1):
            (made,) = run(one_column(2.0, rows, "cuda"), torch.full((rows,), 1.5, device="cuda"))
            assert made.tolist() == [3.0] * rows
    # A trial and a call each; the last finds that its own went.
    assert [calls.count(rows) for rows in (1, 2, 17)] == [4, 2, 3]


@pytest.mark.gpu
def test_replay_saves_time(plain: Callable[[bool], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 4096, generator=generator).cuda()
    weight, hessian = torch.randn(1024, 1024, generator=generator).cuda(), inputs @ inputs.T / 4096
    fmt: Format = Int4()
    grid = [ColumnGrid(64, lambda values, start: fmt.fit(values, TensorScheme("int4")), fmt.round, fmt.encode)]
    factor = factorize_visits(hessian, grid, dampening_frac=0.01, order="activation")
    seconds = {}
    for pays in (False, True):
        plain(pays)
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            gptq_round(weight, hessian, grid=grid, parameters="static", factor=factor)
            torch.cuda.synchronize()
            seconds[pays] = time.perf_counter() - begin
    assert seconds[True] < 0.6 * seconds[False]
