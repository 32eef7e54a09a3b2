"""Grids of several parts: what each is, what does not fit, and that they are stored and rounded apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from qtool.engine.grid import Grid, scheme_in
from qtool.engine.linear import Rounding
from qtool.engine.problem import Adapter, LayerProblem, QuantizedLinear
from qtool.engine.stored import input_scales, linear_tensors, read_input_scales, read_linear
from qtool.errors import SchemeError
from qtool.model.plan import Segment
from qtool.numerics.minifloats import E2M1
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme

PLUGINS = Plugins.discover()
CPU = torch.device("cpu")


def grid_of(text: str, *segments: tuple[int, str]) -> Grid:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    return Grid.segmented(scheme, [Segment(*segment) for segment in segments], PLUGINS.format)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor, grid: Grid) -> QuantizedLinear:
    from qtool.builtin.mitigators.rtn import round_nearest

    return round_nearest(LayerProblem("layer", weight, grid))


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("int4-asym-g128-sfp16-c0.9", "int8", "int8-asym-g128-sfp16"),  # what is set apart is not clipped
        ("int4-sym-channel-full", "int8", "int8-sym-channel-sbf16-full"),
        ("nvfp4", "int8", "int8-sym-g16-sbf16"),  # integers have no E4M3 scales
        ("mxfp4", "int8", "int8-sym-g32-se8m0"),
        ("int4-asym-g128", "fp8", "fp8-sym-g128-sbf16"),  # FP8 has no zero points
        ("int4-asym-g128", "nvfp4", "nvfp4-sym-g16-se4m3"),
        ("int8-asym-token-sfp32", "int4", "int4-asym-token-sfp32"),
    ],
)
def test_a_scheme_in_another_format_keeps_what_that_carries(text: str, name: str, expected: str) -> None:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    assert str(scheme_in(scheme, PLUGINS.format(name))) == expected


@pytest.mark.parametrize("text", ["fp4-g16-se2m1", "fp4-g32-sint4"])
@pytest.mark.parametrize("rows", [1, 5, 6])
def test_scales_of_four_bits_take_four_bits(text: str, rows: int) -> None:
    grid, n = grid_of(text), 96
    part = grid.parts[0]
    assert part.scheme.group_size is not None
    solved = nearest(drawn(rows, n), grid)
    stored = linear_tensors("layer", solved, grid)
    groups = rows * n // part.scheme.group_size
    assert {name: tensor.nbytes for name, tensor in stored.items()} == {
        "layer.codes": rows * n // 2,
        "layer.scale": (groups + 1) // 2,
        "layer.global_scale": 4,
    }
    values = solved.parameters[0].scale.flatten()
    codes = [(E2M1.values.index(value) if "e2m1" in text else int(value)) for value in values.tolist()]
    padded = [*codes, 0][: groups + groups % 2]
    assert stored["layer.scale"].flatten().tolist() == [
        low | high << 4 for low, high in zip(padded[::2], padded[1::2], strict=True)
    ]
    again = read_linear("layer", n, stored, grid)
    assert torch.equal(again.weight(grid), solved.weight(grid))
    assert torch.equal(again.parameters[0].scale, solved.parameters[0].scale)


def test_places_are_neighbours_and_the_first_part_takes_what_is_left() -> None:
    grid = grid_of("int4", (8, "int8"), (4, "fp8"))
    assert [(place.start, place.stop, part.scheme.format) for place, part in grid.places(40)] == [
        (0, 28, "int4"),
        (28, 36, "int8"),
        (36, 40, "fp8"),
    ]
    assert [place.stop for place, _ in grid_of("int4").places(40)] == [40]


@pytest.mark.parametrize(("channels", "size"), [(16, "64 = 48 + 16"), (64, "64 = 0 + 64")])
def test_groups_that_do_not_divide_a_part_are_refused(channels: int, size: str) -> None:
    with pytest.raises(SchemeError) as raised:
        grid_of("int4-g32", (channels, "int8")).check(64, layer="layers.0.q_proj")
    assert "groups of 32" in str(raised.value)
    assert f"input size  {size}" in str(raised.value)
    assert "hint: plan with the scheme" in str(raised.value)


def test_groups_that_divide_all_parts_are_not_refused() -> None:
    grid_of("int4-g16", (16, "int8")).check(64, layer="layers.0.q_proj")
    grid_of("int4-tensor", (16, "int8")).check(64, layer="layers.0.q_proj")
    with pytest.raises(SchemeError, match=r"group size 48 does not divide the input of `layers\.0\.q_proj`"):
        grid_of("int4-g48").check(64, layer="layers.0.q_proj")


@pytest.mark.parametrize("text", ["int4-g16", "int3-asym-channel", "nvfp4", "fp4-asym-g16-sfp16", "int4-tensor"])
@pytest.mark.parametrize("apart", ["int8", "nvfp4", "int5"])
def test_parts_are_rounded_as_if_they_were_alone(text: str, apart: str) -> None:
    weight, grid = drawn(6, 64) + 0.1, grid_of(text, (16, apart))
    result = nearest(weight, grid)
    decoded = result.weight(grid)
    for columns, part in grid.places(64):
        alone = Grid.of(part.scheme, part.format)
        assert torch.equal(decoded[:, columns], nearest(weight[:, columns], alone).weight(alone))
    error = (decoded - weight).square()
    if apart == "int8":
        assert float(error[:, 48:].mean()) < float(error[:, :48].mean()) / 50


@pytest.mark.parametrize("text", ["int4-g16", "int3-asym-g16", "nvfp4", "fp4-asym-g16-sfp16", "int5-asym-tensor"])
@pytest.mark.parametrize("segments", [(), ((16, "int8"),), ((16, "int7"), (16, "nvfp4"))])
def test_storage_gives_back_every_bit(text: str, segments: tuple[tuple[int, str], ...]) -> None:
    grid = grid_of(text, *segments)
    made = replace(nearest(drawn(6, 64) + 0.2, grid), adapter=Adapter(drawn(2, 64), drawn(6, 2)))
    tensors = linear_tensors("layer", made, grid)
    read = read_linear("layer", 64, tensors, grid)
    assert torch.equal(read.codes, made.codes)
    assert torch.equal(read.weight(grid), made.weight(grid))
    for ours, theirs in zip(read.parameters, made.parameters, strict=True):
        assert torch.equal(ours.scale, theirs.scale)
        assert (ours.zero_point is None) == (theirs.zero_point is None)
        assert ours.zero_point is None or torch.equal(ours.zero_point, theirs.zero_point)
        assert ours.global_scale == theirs.global_scale
    assert read.adapter is not None
    assert set(tensors) >= {"layer.codes", "layer.scale", "layer.adapter.up"}
    assert any(name.startswith("layer.segments.") for name in tensors) == bool(segments)


@pytest.mark.parametrize("reads", ["quantized", "full"])
@pytest.mark.parametrize("is_coded", [False, True])
def test_an_adapter_is_stored_as_it_is(reads: Literal["quantized", "full"], *, is_coded: bool) -> None:
    grid, coded = (
        grid_of("int4-g16"),
        Adapter(
            torch.randint(-127, 128, (2, 64), dtype=torch.int8),
            torch.randint(-127, 128, (6, 2), dtype=torch.int8),
            drawn(1, 2)[0].abs().half(),
            drawn(1, 2)[0].abs().half() + 1,
            reads,
        ),
    )
    adapter = coded if is_coded else Adapter(drawn(2, 64).bfloat16(), drawn(6, 2).bfloat16(), reads=reads)
    bare = nearest(drawn(6, 64), grid)
    tensors = linear_tensors("layer", replace(bare, adapter=adapter), grid)
    prefix = {"quantized": "layer.adapter.", "full": "layer.adapter.full."}[reads]
    own = {name: one for name, one in tensors.items() if ".adapter." in name}
    assert set(own) == {f"{prefix}{part}" for part in ("down", "up", *(("down_scale", "up_scale") * is_coded))}
    assert sum(one.nbytes for one in own.values()) == ((64 + 6) * 2 + 2 * 2 * 2 if is_coded else (64 + 6) * 2 * 2)
    read = read_linear("layer", 64, tensors, grid).adapter
    assert read is not None
    assert read.reads == reads
    for name in ("down", "up", "down_scale", "up_scale"):
        ours, theirs = getattr(read, name), getattr(adapter, name)
        assert (ours is None and theirs is None) or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    assert read_linear("layer", 64, linear_tensors("layer", bare, grid), grid).adapter is None


def test_the_bytes_that_are_stored_are_the_bits_of_the_parts() -> None:
    grid = grid_of("int3-asym-g16-sfp16", (32, "int8"))
    tensors = linear_tensors("layer", nearest(drawn(6, 96) + 0.2, grid), grid)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert sizes == {
        "layer.codes": 6 * 64 * 3 // 8,
        "layer.scale": 6 * 4 * 2,
        "layer.zero_point": 6 * 2,  # four of 3 bits, in whole bytes
        "layer.segments.0.codes": 6 * 32,
        "layer.segments.0.scale": 6 * 2 * 2,
        "layer.segments.0.zero_point": 6 * 2,
    }


class TestActivations:
    def test_each_part_has_its_own_range(self) -> None:
        scheme = parse_tensor_scheme("int4-asym-token-sfp32", PLUGINS.format, vector="token")
        grid = Grid.segmented(scheme, [Segment(8, "int8")], PLUGINS.format)
        x = drawn(2, 5, 32)
        x[..., 24:] *= 100
        rounded = Rounding(grid)(x)
        for columns, part in grid.places(32):
            alone = Rounding(Grid.of(part.scheme, part.format))(x[..., columns])
            assert torch.equal(rounded[..., columns], alone)
        error = (rounded - x).abs().amax(-1)
        assert float((Rounding(grid_of("int4-asym-channel"))(x) - x)[..., :24].abs().max()) > 1
        assert float((rounded - x)[..., :24].abs().max()) < 0.3
        assert error.shape == (2, 5)

    def test_a_calibrated_multiplier_belongs_to_its_part(self) -> None:
        grid = grid_of("int4", (16, "nvfp4"))
        assert not Rounding(grid, (None, torch.tensor(0.01))).shared
        assert Rounding(grid).shared  # what was not calibrated is fitted to a window
        x = drawn(3, 48)
        scales = grid.global_scales(x.abs().amax(0))
        assert scales[0] is None
        assert scales[1] == x[:, 32:].abs().max() / (6 * 448)
        stored = input_scales("layers.0.attn_in", scales)
        assert list(stored) == ["layers.0.attn_in.segments.0.input_global_scale"]
        assert read_input_scales("layers.0.attn_in", grid, stored.get, CPU) == (scales, (None, None))
        assert torch.equal(Rounding(grid, scales)(x), Rounding(grid)(x))

    @pytest.mark.parametrize("text", ["int8-sym-token", "int4-asym-token-sfp32", "fp4-g16-se4m3", "fp8-tensor"])
    def test_a_clip_narrows_the_range(self, text: str) -> None:
        whole, kept = (parse_tensor_scheme(f"{text}{clip}", PLUGINS.format, vector="token") for clip in ("", "-c0.5"))
        x = drawn(4, 32)
        widest, narrow = (Rounding(Grid.of(one, PLUGINS.format(one.format)))(x) for one in (whole, kept))
        reach = float(x.abs().max())
        assert float(widest.abs().max()) > 0.9 * reach
        assert float(narrow.abs().max()) < 0.65 * reach
        small = x.abs() < 0.3 * reach
        if "8-" not in text:
            assert float((narrow - x)[small].square().mean()) < float((widest - x)[small].square().mean())
