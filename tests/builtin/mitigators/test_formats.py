"""Methods of every kind on formats whose levels, scales or codes are unlike those of the others."""

from __future__ import annotations

import pytest

from qtool.builtin.mitigators.autoround import AutoRound, AutoRoundConfig
from qtool.builtin.mitigators.beam import Beam
from qtool.builtin.mitigators.cd import CD
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.builtin.mitigators.rtn import RTN
from qtool.scheme import parse_tensor_scheme
from qtool.testing.blocks import block_problem, check_block_mitigator
from qtool.testing.mitigators import check_mitigator, correlated_problem
from tests.builtin.format_cases import FORMATS

TEXTS = [
    "fp8_e5m2",
    "fp6_e2m3-g16",
    "fp6_e3m2-tensor",
    "mxfp8",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "fp4-g16-sue5m3",
    "fp4-g16-se2m1",
    "fp4-g32-sint4",
    "mxfp4-search",
    "nvfp4-four_over_six",
    "nf4-g32",
    "int4-g16-narrow",
    "fp4_e1m2-g16",
    "fp4_e3m0-g16",
    "int3-asym-g16-offset",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_methods_of_layers_keep_their_promises(method: type[RTN | GPTQ], text: str) -> None:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    check_mitigator(method(), FORMATS[scheme.format], scheme=scheme)


@pytest.mark.parametrize("text", TEXTS)
def test_methods_of_blocks_keep_their_promises(text: str) -> None:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    check_block_mitigator(AutoRound(), FORMATS[scheme.format], AutoRoundConfig(steps=4), scheme=scheme)


@pytest.mark.parametrize("text", ["int2-g8-narrow", "int4-g16-narrow"])
def test_no_method_uses_the_lowest_code_of_narrow_integers(text: str) -> None:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    full = parse_tensor_scheme(text.replace("narrow", "full"), FORMATS.__getitem__)
    usual, problem = (correlated_problem(FORMATS[scheme.format], one) for one in (full, scheme))
    assert int(GPTQ().quantize(usual, GPTQ.Config()).codes.min()) == 0
    started = GPTQ().quantize(problem, GPTQ.Config())
    found = [started, Beam().quantize(problem, Beam.Config()), CD().quantize(problem.after(started), CD.Config())]
    block = block_problem(FORMATS[scheme.format], scheme)
    found += AutoRound().refine(block, AutoRoundConfig(steps=8)).linears.values()
    for result in found:
        assert int(result.codes.min()) == 1
        assert result.report["loss"] > 0
