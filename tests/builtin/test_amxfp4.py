"""AMXFP4 beyond one block (``test_formats.py`` has that): what solvers make of two scales a group, and how they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtool.builtin.mitigators.beam import Beam, BeamConfig
from qtool.builtin.mitigators.cd import CD, CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import LayerProblem
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import SchemeError
from tests.builtin.format_cases import read


@pytest.fixture
def of() -> LayerProblem:
    """A layer whose groups lean to one side of zero, and whose inputs are correlated."""
    form, scheme = read("amxfp4")
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1.5, 1.5, 24)[:, None]
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1))
    x = x @ (torch.eye(96) + torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) / 10)
    return LayerProblem("layer", weight, Grid.of(scheme, form), hessian=x.T @ x / len(x))


def test_both_scales_are_stored_and_read_back(of: LayerProblem) -> None:
    found = RTN().quantize(of, ClipOptions())
    tensors = linear_tensors("layer", found, of.grid)
    assert {name: one.nbytes for name, one in tensors.items()} == {
        "layer.codes": 24 * 48,
        "layer.scale": 24 * 3,
        "layer.negative_scale": 24 * 3,
    }
    assert sum(one.nbytes for one in tensors.values()) * 8 == 4.5 * of.weight.numel()
    again = read_linear("layer", 96, tensors, of.grid)
    assert torch.equal(again.weight(of.grid), found.weight(of.grid))
    plain = replace(again, parameters=(replace(again.parameters[0], negative=None),))
    assert not torch.equal(plain.weight(of.grid), found.weight(of.grid))


@pytest.mark.parametrize("config", [GPTQConfig(), GPTQConfig(parameters="fresh", order="groups", clip="none")])
def test_gptq_makes_up_for_errors_with_both(of: LayerProblem, config: GPTQConfig) -> None:
    found = GPTQ().quantize(of, config)
    assert found.report["loss"] < 0.75 * found.report["loss_rtn"]
    halves = GPTQ().quantize_siblings([replace(of, weight=of.weight[:10]), replace(of, weight=of.weight[10:])], config)
    assert torch.equal(torch.cat([half.weight(of.grid) for half in halves]), found.weight(of.grid))


def test_gptq_on_inputs_without_correlations_rounds_to_nearest(of: LayerProblem) -> None:
    alone = replace(of, hessian=torch.eye(96))
    found = GPTQ().quantize(alone, GPTQConfig(clip="none"))
    assert torch.equal(found.weight(of.grid), RTN().quantize(alone, ClipOptions()).weight(of.grid))


def test_codes_are_searched_on_both(of: LayerProblem) -> None:
    start = GPTQ().quantize(of, GPTQConfig())
    for found in (CD().quantize(of.after(start), CDConfig()), Beam().quantize(of, BeamConfig())):
        assert found.report["loss"] < start.report["loss"]
        read_back = read_linear("layer", 96, linear_tensors("layer", found, of.grid), of.grid)
        assert torch.equal(read_back.weight(of.grid), found.weight(of.grid))


def test_ranges_are_not_learned_for_two(of: LayerProblem) -> None:
    with pytest.raises(SchemeError, match="the groups of `layer` have two"):
        LearnedBlock({"layer": of}, {"layer": RTN().quantize(of, ClipOptions())})
