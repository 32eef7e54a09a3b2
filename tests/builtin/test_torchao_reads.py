"""torchao reads and writes the same codes and scales.

It is installed into a folder of its own: where transformers finds it, every command imports it.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from qtool.engine.grid import Grid
from qtool.numerics.groups import from_groups
from qtool.numerics.minifloats import E2M1, E2M3, E3M2, Minifloat
from qtool.numerics.packing import pack_codes
from qtool.numerics.scales import encode_scale
from qtool.scheme import GroupParameters
from tests.builtin.format_cases import fit, read, values_of

pytestmark = [pytest.mark.slow, pytest.mark.network]
Module = Callable[[str], Any]
KINDS = [("f4", E2M1), ("f6_e2m3", E2M3), ("f6_e3m2", E3M2)]
MX = [("mxfp4", "float4_e2m1fn_x2"), ("mxfp8", "float8_e4m3fn"), ("mxfp6_e2m3", "fp6_e2m3"), ("mxfp6_e3m2", "fp6_e3m2")]


@pytest.fixture(scope="module")
def torchao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Module]:
    """Return a function that imports a module of torchao by its name inside it."""
    folder = tmp_path_factory.mktemp("torchao")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "torchao==0.18.0")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr

    def imported(name: str) -> Any:  # noqa: ANN401 - it has no types
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(f"torchao.{name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield imported


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_code_decodes_to_the_same_value(torchao: Module, name: str, kind: Minifloat) -> None:
    codes = torch.arange(2 ** (1 + kind.exponent_bits + kind.mantissa_bits)).to(torch.uint8)
    assert torch.equal(
        getattr(torchao("prototype.mx_formats.kernels"), f"{name}_unpacked_to_f32")(codes), kind.decode(codes)
    )


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_values_encode_to_the_same_codes(torchao: Module, name: str, kind: Minifloat) -> None:
    table = kind.decode(torch.arange(2 ** (1 + kind.exponent_bits + kind.mantissa_bits)).to(torch.uint8)).unique()
    ties = (table[1:] + table[:-1]) / 2
    spread = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * kind.max_value
    x = torch.cat([table, ties, ties.nextafter(table[1:]), ties.nextafter(table[:-1]), spread, spread / 50])
    theirs = getattr(torchao("prototype.mx_formats.kernels"), f"f32_to_{name}_unpacked")(x)
    assert torch.equal(kind.encode(x), theirs)


@pytest.mark.parametrize(("text", "dtype"), MX)
@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_mx_blocks_have_the_same_bytes(torchao: Module, text: str, dtype: str, rule: str) -> None:
    if (text, rule) == ("mxfp8", "even"):
        pytest.skip("448 has no mantissa of ones, so the rule has two readings, and torchao has the other")
    mx = torchao("prototype.mx_formats.mx_tensor")
    modes = torchao("prototype.mx_formats.config").ScaleCalculationMode
    x = values_of(16, 128)
    form, groups, parameters = fit(f"{text}-{rule}", x)
    scale, data = mx.to_mx(x, getattr(torch, dtype, dtype), 32, modes(rule))
    assert torch.equal(encode_scale(parameters.scale, "e8m0"), scale.view(torch.uint8).reshape(parameters.scale.shape))
    codes = from_groups(form.encode(groups, parameters), x.shape)
    theirs = data.view(torch.uint8)
    assert torch.equal(pack_codes(codes, 4) if text == "mxfp4" else codes, theirs.reshape(len(x), -1))
    whole = mx.MXTensor.to_mx(x, getattr(torch, dtype, dtype), 32, modes(rule))
    assert torch.equal(whole.dequantize(torch.float32), from_groups(form.round(groups, parameters), x.shape))


def test_nvfp4_blocks_have_the_same_bytes(torchao: Module) -> None:
    nvfp4 = torchao("prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, 16).unsqueeze(-1)
    form, groups, parameters = fit("nvfp4", x)
    assert parameters.global_scale is not None
    scale, data = nvfp4.nvfp4_quantize(x, 16, parameters.global_scale)
    assert torch.equal(encode_scale(parameters.scale, "e4m3").float(), scale.float())
    codes = pack_codes(from_groups(form.encode(groups, parameters), x.shape), 4)
    assert float((codes != data.view(torch.uint8)).float().mean()) < 1e-3  # they multiply by a reciprocal
    whole = nvfp4.NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=parameters.global_scale)
    ours = from_groups(form.round(groups, parameters), x.shape)
    differ = (whole.dequantize(torch.float32) - ours).abs() > 1e-6 * ours.abs()
    assert float(differ.float().mean()) < 1e-3


def test_every_code_of_nvfp4_decodes_to_the_same_value_under_every_scale(torchao: Module) -> None:
    form, _ = read("nvfp4")
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(-1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1)
    stored = (pack_codes(codes, 4), scales, 16, torch.float32, torch.tensor(2.0**-11))
    theirs = torchao("prototype.mx_formats.nvfp4_tensor").NVFP4Tensor(*stored).dequantize(torch.float32)
    parameters = GroupParameters(scales.squeeze(-1).float(), None, torch.tensor(2.0**-11))
    assert torch.equal(theirs, form.decode(codes, parameters))


@pytest.mark.parametrize("rows", [128, 300, 16])
@pytest.mark.parametrize("n", [64, 240])
def test_stored_scales_are_those_that_tensor_cores_read_in_tiles(torchao: Module, rows: int, n: int) -> None:
    """qtool stores a scale a row and group, and readers lay them out in tiles of 128 rows and 4 groups."""
    nvfp4, utils = (torchao(f"prototype.mx_formats.{name}") for name in ("nvfp4_tensor", "utils"))
    x = values_of(rows, n)
    form, groups, parameters = fit("nvfp4", x)
    stored = encode_scale(parameters.scale, "e4m3").view(torch.float8_e4m3fn)
    tiled, across = utils.to_blocked(stored), -(-(n // 16) // 4)
    expected = torch.zeros(-(-rows // 128) * across * 512, dtype=torch.uint8)
    for row in range(rows):
        for group in range(n // 16):
            tile, inside = row // 128 * across + group // 4, row % 128
            expected[tile * 512 + inside % 32 * 16 + inside // 32 * 4 + group % 4] = stored.view(torch.uint8)[
                row, group
            ]
    assert torch.equal(tiled.view(torch.uint8), expected)
    assert torch.equal(utils.from_blocked(tiled, rows, n // 16).float(), stored.float())
    codes = pack_codes(from_groups(form.encode(groups, parameters), x.shape), 4)
    shape = utils.hp_data_dims_to_swizzled_scale_dims_nvfp4(rows, n)
    read_by_them = nvfp4.NVFP4Tensor(
        codes, tiled.view(shape), 16, torch.float32, parameters.global_scale, is_swizzled_scales=True
    )
    ours = from_groups(form.round(groups, parameters), x.shape)
    torch.testing.assert_close(read_by_them.dequantize(torch.float32), ours, rtol=1e-6, atol=0)


def test_fp8_in_blocks_has_the_same_scales_and_values(torchao: Module) -> None:
    quant = torchao("quantization.quant_primitives")
    x = values_of(8, 48)
    form, scheme = read("fp8-b4")
    grid = Grid.of(scheme, form)
    part = grid.parts[0]
    parameters = part.fit(part.groups(x), global_scale=None)
    codes = from_groups(form.encode(part.groups(x), parameters), x.shape)
    scale = quant._choose_scale_float8(x, (4, 4), torch.float8_e4m3fn)
    assert torch.allclose(parameters.scale[::4], scale.float(), rtol=1e-6, atol=0)
    data = quant._quantize_affine_float8(x, scale, torch.float8_e4m3fn)
    assert float((codes != data.view(torch.uint8)).float().mean()) < 1e-2
    theirs = quant._dequantize_affine_float8(codes.view(torch.float8_e4m3fn), scale)
    assert torch.allclose(grid.decode(codes, (parameters,)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_decode_to_the_same_values(torchao: Module, bits: int, symmetric: bool) -> None:
    """Every code, with every zero point; and random values take the same codes."""
    quant = torchao("quantization.quant_primitives")
    form, _ = read(f"int{bits}-{'sym' if symmetric else 'asym'}-g32")
    count, size = 1 << bits, 32
    codes = torch.arange(max(count, size)).remainder(count).to(torch.uint8).expand(count, -1).reshape(count, -1, size)
    scale = torch.rand(codes.shape[:2], generator=torch.Generator().manual_seed(bits)) + 0.01
    zeros = torch.full_like(scale, count // 2) if symmetric else torch.arange(count).unsqueeze(-1).expand_as(scale)
    ours = form.decode(codes, GroupParameters(scale, None if symmetric else zeros.float()))
    whole = (codes.flatten(1), (1, size), scale, zeros.int())
    assert torch.equal(quant.dequantize_affine(*whole, torch.uint8, 0, count - 1), ours.flatten(1))
    x = values_of(32, 128)
    form, groups, parameters = fit(f"int{bits}-{'sym-g32-full' if symmetric else 'asym-g32'}", x)
    zero = parameters.zero_point
    fitted = torch.full_like(parameters.scale, count // 2) if zero is None else zero
    theirs = quant.quantize_affine(x, (1, size), parameters.scale, fitted.int(), torch.uint8, 0, count - 1)
    assert float((form.encode(groups, parameters).flatten(1) != theirs).float().mean()) < 1e-3  # it takes reciprocals


def test_nf4_has_the_same_codes_and_the_values_that_it_has_four_digits_of(torchao: Module) -> None:
    """Its scales, which it quantizes a second time, are no concern of the elements."""
    theirs = torchao("quantization.quantize_.workflows.nf4.nf4_tensor").NF4Tensor
    x = values_of(32, 256)
    form, groups, parameters = fit("nf4", x)
    tensor = theirs.from_tensor(x, 64, 1)
    table, every = tensor.nf4, torch.arange(16)
    ours = form.decode(every.to(torch.uint8).unsqueeze(0), GroupParameters(torch.ones(1)))[0]
    assert torch.equal(theirs.dequantize(every, table), torch.tensor([round(value, 4) for value in ours.tolist()]))
    codes = torch.stack([tensor.quantized_data >> 4, tensor.quantized_data & 15], dim=-1).reshape(groups.shape)
    middles = (ours[1:] + ours[:-1]) / 2
    scaled = (groups / parameters.scale.unsqueeze(-1)).unsqueeze(-1)
    near = ((scaled - middles).abs() < 1e-4).any(-1)
    assert float(near.float().mean()) < 0.01
    assert torch.equal(form.encode(groups, parameters)[~near], codes[~near])
