"""FP8 weights whose scales are of squares, also of those that the ends of the axes cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.builtin.mitigators.beam import Beam, BeamConfig
from qtool.builtin.mitigators.cd import CD, CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.guidedquant import GUIDED, GuidedQuant
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.learned_block import LearnedBlock
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import SchemeError, UsageError
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.demand import _code_bytes
from tests.builtin.format_cases import FORMATS, values_of

SHAPES = [(8, 8), (6, 10), (3, 4), (9, 2), (13, 21)]


def grid(text: str) -> Grid:
    scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
    return Grid.of(scheme, FORMATS[scheme.format])


def layer(text: str, weight: Tensor) -> LayerProblem:
    """Return a problem whose inputs are correlated."""
    n = weight.shape[1]
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(1))
    x = x @ (torch.eye(n) + torch.randn(n, n, generator=torch.Generator().manual_seed(2)) / n**0.5)
    return LayerProblem("layer", weight, grid(text), hessian=x.T @ x / len(x))


@pytest.mark.parametrize(
    ("text", "largest", "dtype"), [("fp8-b4", 448.0, torch.float8_e4m3fn), ("fp8_e5m2-b4", 57344.0, torch.float8_e5m2)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_square_is_scaled_by_its_largest_value(
    text: str, largest: float, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = values_of(*shape)
    of = layer(text, weight)
    found = RTN().quantize(of, ClipOptions()).weight(of.grid)
    for top in range(0, shape[0], 4):
        for left in range(0, shape[1], 4):
            square = (slice(top, top + 4), slice(left, left + 4))
            scale = weight[square].abs().max() / largest
            assert torch.equal(
                found[square], (weight[square] / scale).clamp(-largest, largest).to(dtype).float() * scale
            )


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (5, 3), (1, 4), (64, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_need_not_be_squares(rows: int, columns: int, shape: tuple[int, int]) -> None:
    weight = values_of(*shape)
    of = layer(f"fp8-b{rows}x{columns}", weight)
    for method in (lambda: RTN().quantize(of, ClipOptions()), lambda: GPTQ().quantize(of, GPTQConfig())):
        found = method()
        (parameters,) = found.parameters
        tensors = linear_tensors("layer", found, of.grid)
        assert tensors["layer.scale"].shape == (-(-shape[0] // rows), -(-shape[1] // columns))
        assert _code_bytes(*shape, of.grid) == sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(read_linear("layer", shape[1], tensors, of.grid).weight(of.grid), found.weight(of.grid))
        for row, column in ((row, column) for row in range(shape[0]) for column in range(shape[1])):
            stored = tensors["layer.scale"][row // rows, column // columns]
            assert parameters.scale[row, column // columns] == stored
    nearest = RTN().quantize(of, ClipOptions()).weight(of.grid)
    for top in range(0, shape[0], rows):
        for left in range(0, shape[1], columns):
            block = (slice(top, top + rows), slice(left, left + columns))
            scale = weight[block].abs().max() / 448
            assert torch.equal(
                nearest[block], (weight[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            )


def test_sides_of_blocks_are_written_and_read() -> None:
    for text, sides in (("fp8-b4", (None, 4)), ("fp8-b4x4", (None, 4)), ("fp8-b2x4", (2, 4)), ("fp8-b8x4", (8, 4))):
        scheme = parse_tensor_scheme(text, FORMATS.__getitem__)
        assert (scheme.block_rows, scheme.group_size) == sides
        assert parse_tensor_scheme(str(scheme), FORMATS.__getitem__) == scheme
        assert ModelScheme.from_json(ModelScheme(weights=scheme).to_json()).weights == scheme
    assert str(parse_tensor_scheme("fp8-b2x4", FORMATS.__getitem__)) == "fp8-sym-b2x4-sfp32"
    assert "block_rows" not in str(ModelScheme(weights=parse_tensor_scheme("fp8-b4", FORMATS.__getitem__)).to_json())
    assert parse_tensor_scheme("fp8-b2x4-g8", FORMATS.__getitem__).block_rows is None
    for text in ("fp8-g2x4", "fp8-b0x4", "fp8-b2x", "fp8-bx4"):
        with pytest.raises(SchemeError, match="cannot read"):
            parse_tensor_scheme(text, FORMATS.__getitem__)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["fp32", "bf16", "e8m0"])
def test_one_scale_a_square_is_stored_and_read_back(shape: tuple[int, int], scale: str) -> None:
    of = layer(f"fp8-b4-s{scale}", values_of(*shape))
    found = RTN().quantize(of, ClipOptions())
    tensors = linear_tensors("layer", found, of.grid)
    squares = (-(-shape[0] // 4), -(-shape[1] // 4))
    assert tensors["layer.scale"].shape == squares
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total == shape[0] * shape[1] + squares[0] * squares[1] * {"fp32": 4, "bf16": 2, "e8m0": 1}[scale]
    assert _code_bytes(*shape, of.grid) == total
    read = read_linear("layer", shape[1], tensors, of.grid)
    assert torch.equal(read.weight(of.grid), found.weight(of.grid))


def test_a_row_that_does_not_share_its_scale_is_not_stored() -> None:
    of = layer("fp8-b4", values_of(8, 8))
    (parameters,) = RTN().quantize(of, ClipOptions()).parameters
    scale = parameters.scale.clone()
    scale[5, 1] *= 2
    odd = QuantizedLinear(torch.zeros(8, 8, dtype=torch.uint8), (replace(parameters, scale=scale),))
    with pytest.raises(SchemeError, match="rows of `layer` scales of their own"):
        linear_tensors("layer", odd, of.grid)


@pytest.mark.parametrize("metric", ["mse", "hessian"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_a_clip_is_searched_for_a_square_as_for_a_group_of_its_values(metric: str, shape: tuple[int, int]) -> None:
    """A square laid out as one row is a group of the plain format."""
    of = layer("fp8-b4-c0.8", values_of(*shape))
    options = ClipOptions(clip="search", clip_metric=metric, clip_ceiling=1.5)  # type: ignore[arg-type]
    (found,) = RTN().quantize(of, options).parameters
    padded = torch.nn.functional.pad(of.weight, (0, -shape[1] % 4, 0, -shape[0] % 4))
    diagonal = torch.nn.functional.pad(of.need_hessian().diagonal(), (0, -shape[1] % 4))
    for top in range(0, shape[0], 4):
        for left in range(0, shape[1], 4):
            row = padded[top : top + 4, left : left + 4].reshape(1, 16)
            alone = layer("fp8-g16-c0.8", row)
            alone = replace(alone, hessian=torch.diag(diagonal[left : left + 4].repeat(4)))
            (own,) = RTN().quantize(alone, options).parameters
            rows = found.scale[top : top + 4, left // 4]
            assert torch.equal(rows, own.scale[0].expand_as(rows))


@pytest.mark.parametrize(
    "config",
    [
        GPTQConfig(),
        GPTQConfig(parameters="fresh", order="groups"),
        GPTQConfig(parameters="fresh", order="natural", clip="none"),
    ],
)
def test_gptq_makes_up_for_errors_and_keeps_squares_together(config: GPTQConfig) -> None:
    of = layer("fp8-b4", torch.randn(26, 42, generator=torch.Generator().manual_seed(0)))
    found = GPTQ().quantize(of, config)
    assert found.counters["fallback_rtn"] == 0
    assert found.report["loss"] < 0.9 * found.report["loss_rtn"]
    linear_tensors("layer", found, of.grid)


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (13, 21)])
class TestSolvers:
    def test_without_correlations_gptq_rounds_to_nearest(self, shape: tuple[int, int]) -> None:
        of = replace(layer("fp8-b4", values_of(*shape)), hessian=torch.eye(shape[1]))
        nearest = RTN().quantize(of, ClipOptions())
        for order in ("natural", "activation"):
            found = GPTQ().quantize(of, GPTQConfig(clip="none", order=order))  # type: ignore[arg-type]
            assert torch.equal(found.weight(of.grid), nearest.weight(of.grid))

    def test_siblings_keep_squares_of_their_own(self, shape: tuple[int, int]) -> None:
        of = layer("fp8-b4", values_of(*shape))
        other = replace(of, weight=of.weight.flip(0) * 3)
        together = GPTQ().quantize_siblings([of, other], GPTQConfig())
        for one, problem in zip(together, (of, other), strict=True):
            assert torch.equal(one.codes, GPTQ().quantize(problem, GPTQConfig()).codes)

    def test_codes_are_searched_on_squares_that_stay(self, shape: tuple[int, int]) -> None:
        of = layer("fp8-b4", values_of(*shape))
        start = GPTQ().quantize(of, GPTQConfig())
        for found in (CD().quantize(of.after(start), CDConfig()), Beam().quantize(of, BeamConfig())):
            assert found.report["loss"] <= start.report["loss"] * (1 + 1e-6)
            assert torch.equal(found.parameters[0].scale, start.parameters[0].scale)
            read = read_linear("layer", shape[1], linear_tensors("layer", found, of.grid), of.grid)
            assert torch.equal(read.weight(of.grid), found.weight(of.grid))


def test_what_does_not_know_squares_is_refused() -> None:
    of = layer("fp8-b4", values_of(8, 8))
    with pytest.raises(UsageError, match="groups of single rows"):
        RTN().quantize(of, ClipOptions(clip="search", clip_metric="output"))
    with pytest.raises(SchemeError, match="rows of `layer` share theirs"):
        LearnedBlock({"layer": of}, {"layer": RTN().quantize(of, ClipOptions())})
    guided = replace(of, entries={GUIDED: torch.eye(8).expand(2, 8, 8)})
    with pytest.raises(SchemeError, match="rows share a scale"):
        GuidedQuant().quantize(guided, GPTQConfig())
    scheme = grid("fp8-b4").parts[0].scheme
    with pytest.raises(SchemeError, match="blocks are of weights") as refused:
        ModelScheme(activations=scheme).check()
    assert refused.value.hint == "nearest that works: --activations fp8-sym-g4-sfp32"
