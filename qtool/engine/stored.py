"""How quantized linears lie in an artifact: dense codes, scales in their storage format, outliers, adapters.

Names are ``<linear>.codes``, ``.scale``, ``.negative_scale`` (where negative values have one of their own),
``.zero_point`` or ``.offset``, ``.global_scale``, ``.adapter.down``, ``.adapter.up``, ``.outliers.row_ptr``,
``.outliers.col``, ``.outliers.values``, and ``<site>.input_global_scale`` with ``.input_zero_point``; of channels that
are set apart ``<linear>.segments.<i>.codes`` and so on. An adapter's factors of 8 bits have ``.adapter.down_scale`` and
``.adapter.up_scale``; that of one which reads what is not rounded are ``.adapter.full.down`` and so on. Scales that are
codes themselves are ``.scale.codes``, ``.scale.low`` and ``.scale.step``, and zero points likewise: what the rows of a
block share comes once. What is added to a block's output is ``<block>.compensation.bias`` and, where it has them,
``.scale``, ``.down`` and ``.up``. Norms whose weights are others than the model's are ``norms.<norm>.weight``. Codes
are a dense bit stream along the input axis, those of scales along the rows, so the bytes stored are the bytes that bits
per weight counts. Scales of 4 bits are one dense stream, row by row. Zero points that are no codes are floats: in the
format of the scales if the scheme says ``real``, else of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from qtool.engine.block_problem import Compensation
from qtool.engine.grid import GlobalScales, Grid, GridPart, ZeroPoints
from qtool.engine.packed import PackedLinear
from qtool.engine.problem import Adapter, QuantizedLinear, Reads
from qtool.errors import SchemeError
from qtool.numerics.groups import repeat_rows
from qtool.numerics.outliers import Outliers
from qtool.numerics.packing import pack_codes, unpack_codes
from qtool.numerics.scales import PACKED, count_saturated, count_subnormal, decode_scale, encode_scale
from qtool.numerics.second_level import decode_second_level
from qtool.scheme import GroupParameters, SecondLevel

INPUT_GLOBAL_SCALE = ".input_global_scale"
INPUT_ZERO_POINT = ".input_zero_point"
COMPENSATION = ".compensation."
NORMS = "norms."
_COMPENSATION = ("bias", "scale", "down", "up")

_ADAPTERS: Mapping[Reads, str] = {"quantized": ".adapter", "full": ".adapter.full"}
OUTLIERS = ".outliers"
_MOST_SHORT_COLUMNS = 1 << 16


def linear_tensors(name: str, linear: QuantizedLinear, grid: Grid) -> dict[str, Tensor]:
    """Return a quantized linear as the tensors that are stored."""
    tensors: dict[str, Tensor] = {}
    places = grid.places(linear.codes.shape[1])
    for prefix, (columns, part), parameters in zip(_names(name, grid), places, linear.parameters, strict=True):
        tensors |= _part_tensors(prefix, pack_codes(linear.codes[:, columns], part.format.bits), parameters, part)
    if linear.adapter is not None:
        tensors |= _adapter_tensors(name, linear.adapter)
    if linear.outliers is not None:
        tensors |= _outlier_tensors(f"{name}{OUTLIERS}", linear.outliers, linear.codes.shape[1])
    return tensors


def odd_scales(linear: QuantizedLinear, grid: Grid) -> dict[str, int]:
    """Count the scales of a quantized linear that their format holds roughly, or not at all, by what is wrong."""
    counts = {"subnormal_scales": 0, "saturated_scales": 0}
    for part, own in zip(grid.parts, linear.parameters, strict=True):
        for scale in (own.scale[:: part.block_rows], own.negative) if own.scale_codes is None else ():
            if scale is not None:
                counts["subnormal_scales"] += count_subnormal(scale, part.scheme.scale)
                counts["saturated_scales"] += count_saturated(scale, part.scheme.scale)
    return counts


def read_linear(name: str, n_in: int, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedLinear:
    """Read what ``linear_tensors`` made.

    Args:
        name: Module name of the linear.
        n_in: Its number of inputs.
        tensors: Its stored tensors by full name.
        grid: What it was rounded to.

    Returns:
        The quantized linear, without its report.
    """
    codes, parameters = [], []
    for prefix, (columns, part) in zip(_names(name, grid), grid.places(n_in), strict=True):
        codes.append(unpack_codes(tensors[f"{prefix}.codes"], part.format.bits, columns.stop - columns.start))
        parameters.append(_read_parameters(prefix, tensors, part, codes[-1]))
    return QuantizedLinear(
        codes[0] if len(codes) == 1 else torch.cat(codes, dim=1),
        tuple(parameters),
        _read_adapter(name, tensors),
        outliers=_read_outliers(f"{name}{OUTLIERS}", tensors),
    )


def read_packed_linear(name: str, n_in: int, tensors: Mapping[str, Tensor], grid: Grid) -> PackedLinear:
    """Read what ``linear_tensors`` made of a linear without channels that are set apart, and leave its codes packed.

    Arguments are as for ``read_linear``; adapters and outliers are left out.
    """
    (part,) = grid.parts
    stream = tensors[f"{name}.codes"]
    shape = torch.empty((len(stream), n_in), dtype=torch.uint8, device="meta")
    return PackedLinear(stream, part.format.bits, n_in, _read_parameters(name, tensors, part, shape))


def packed_tensors(name: str, packed: PackedLinear, grid: Grid) -> dict[str, Tensor]:
    """Return a linear whose codes are packed as the tensors that are stored."""
    (part,) = grid.parts
    return _part_tensors(name, packed.stream, packed.parameters, part)


def compensation_tensors(block: str, compensation: Compensation) -> dict[str, Tensor]:
    """Return what is added to the output of a block as it is stored.

    Args:
        block: Name of the block.
        compensation: What is added.
    """
    found = {name: getattr(compensation, name) for name in _COMPENSATION}
    return {f"{block}{COMPENSATION}{name}": tensor for name, tensor in found.items() if tensor is not None}


def read_compensation(block: str, tensors: Mapping[str, Tensor]) -> Compensation | None:
    """Read what ``compensation_tensors`` made; None where nothing is added."""
    found = {name: tensors.get(f"{block}{COMPENSATION}{name}") for name in _COMPENSATION}
    bias = found.pop("bias")
    return None if bias is None else Compensation(bias, **found)


def input_scales(site_id: str, scales: GlobalScales, zero_points: ZeroPoints = ()) -> dict[str, Tensor]:
    """Return what was calibrated of a site's activations as it is stored: zero points are codes in bytes."""
    zeros = [None if one is None else one.to(torch.uint8) for one in zero_points]
    found = [(INPUT_GLOBAL_SCALE, one) for one in scales], [(INPUT_ZERO_POINT, one) for one in zeros]
    each = (zip(_prefixes(site_id, len(scales)), own, strict=True) for own in found if own)
    return {f"{prefix}{leaf}": one for own in each for prefix, (leaf, one) in own if one is not None}


def read_input_scales(
    site_id: str, grid: Grid, find: Callable[[str], Tensor | None], device: torch.device
) -> tuple[GlobalScales, ZeroPoints]:
    """Read what ``input_scales`` made.

    Args:
        site_id: The site.
        grid: What its activations are rounded to.
        find: Finds a stored tensor by name.
        device: Where the multipliers are to be.

    Returns:
        The multiplier of each part, and its zero point; None for one that has no calibrated one.
    """
    scales = [find(f"{prefix}{INPUT_GLOBAL_SCALE}") for prefix in _names(site_id, grid)]
    zeros = [find(f"{prefix}{INPUT_ZERO_POINT}") for prefix in _names(site_id, grid)]
    return (
        tuple(None if one is None else one.to(device) for one in scales),
        tuple(None if one is None else one.to(device).float() for one in zeros),
    )


def scale_names(name: str, grid: Grid) -> Iterator[str]:
    """Yield how the scales of each part of a linear are called."""
    yield from (f"{prefix}.scale" for prefix in _names(name, grid))


def _names(name: str, grid: Grid) -> Iterator[str]:
    """Yield how the names of a part's tensors begin."""
    return _prefixes(name, len(grid.parts))


def _prefixes(name: str, parts: int) -> Iterator[str]:
    yield name
    yield from (f"{name}.segments.{index}" for index in range(parts - 1))


def _adapter_tensors(name: str, adapter: Adapter) -> dict[str, Tensor]:
    """Return the stored tensors of an adapter."""
    prefix = f"{name}{_ADAPTERS[adapter.reads]}"
    scales = {"down_scale": adapter.down_scale, "up_scale": adapter.up_scale}
    tensors = {"down": adapter.down, "up": adapter.up, **scales}
    return {f"{prefix}.{part}": tensor for part, tensor in tensors.items() if tensor is not None}


def _read_adapter(name: str, tensors: Mapping[str, Tensor]) -> Adapter | None:
    """Read the adapter of a linear, if it has one."""
    for reads, place in _ADAPTERS.items():
        prefix = f"{name}{place}"
        if f"{prefix}.down" in tensors:
            down_scale, up_scale = (tensors.get(f"{prefix}.{factor}_scale") for factor in ("down", "up"))
            return Adapter(tensors[f"{prefix}.down"], tensors[f"{prefix}.up"], down_scale, up_scale, reads)
    return None


def _part_tensors(name: str, stream: Tensor, parameters: GroupParameters, part: GridPart) -> dict[str, Tensor]:
    """Return the stored tensors of one part."""
    bits = part.format.bits
    tensors = {f"{name}.codes": stream}
    if parameters.scale_codes is not None:
        tensors |= _second_level_tensors(name, "scale", parameters.scale_codes, part)
    else:
        stored = encode_scale(_one_a_block(name, parameters.scale, part.block_rows, part), part.scheme.scale)
        packed = part.scheme.scale in PACKED
        tensors[f"{name}.scale"] = pack_codes(stored.reshape(1, -1), 4) if packed else stored
    if parameters.negative is not None:
        tensors[f"{name}.negative_scale"] = encode_scale(parameters.negative, part.scheme.scale)
    if parameters.offset is not None:
        tensors[f"{name}.offset"] = encode_scale(parameters.offset, part.scheme.scale)
    zero_point = parameters.zero_point
    if parameters.zero_point_codes is not None:
        tensors |= _second_level_tensors(name, "zero_point", parameters.zero_point_codes, part)
    elif zero_point is not None:
        are_codes = bool(((zero_point >= 0) & (zero_point < 2**bits) & (zero_point.frac() == 0)).all())
        rows = zero_point.reshape(-1, zero_point.shape[-1])  # that of a whole tensor has one axis
        if are_codes and not part.scheme.real:
            tensors[f"{name}.zero_point"] = pack_codes(rows.to(torch.uint8), bits)
        else:
            tensors[f"{name}.zero_point"] = _real_zero_point(zero_point, part)
    if parameters.global_scale is not None:
        tensors[f"{name}.global_scale"] = parameters.global_scale.float()
    return tensors


def _one_a_block(name: str, scale: Tensor, rows: int, part: GridPart) -> Tensor:
    """Return what is stored of what each row has, where blocks of rows have the same.

    Raises:
        SchemeError: Rows of a block have scales of their own: the method does not know that they share one.
    """
    stored = scale[::rows] if rows > 1 else scale
    if rows > 1 and not torch.equal(repeat_rows(stored, rows, len(scale)), scale):
        raise SchemeError(
            f"the method gave rows of `{name}` scales of their own, and blocks of {rows} rows share theirs",
            facts=(("scheme", part.scheme),),
            hint="--method rtn or --method gptq",
        )
    return stored


def _real_zero_point(zero_point: Tensor, part: GridPart) -> Tensor:
    """Return real zero points in the format of the scheme's scales where the scheme has some and that holds them."""
    if part.scheme.real:
        short = encode_scale(zero_point, part.scheme.scale)
        if torch.equal(decode_scale(short, part.scheme.scale), zero_point.float()):
            return short
    return zero_point.float()


def _read_parameters(name: str, tensors: Mapping[str, Tensor], part: GridPart, codes: Tensor) -> GroupParameters:
    """Read the parameters of one part; of its codes the shape counts."""
    rows, shape = len(codes), part.groups(codes).shape[:-1]
    scale_codes = _read_second_level(f"{name}.scale", tensors, rows, part)
    zero_point_codes = _read_second_level(f"{name}.zero_point", tensors, rows, part)
    if scale_codes is None:
        stored = tensors[f"{name}.scale"]
        if part.scheme.scale in PACKED:
            stored = unpack_codes(stored, 4, shape.numel()).reshape(shape)
        scale = part.repeated(decode_scale(stored, part.scheme.scale), rows)
    else:
        scale = decode_second_level(scale_codes)
    negative, offset = (tensors.get(f"{name}.{leaf}") for leaf in ("negative_scale", "offset"))
    zero_point = tensors.get(f"{name}.zero_point")
    if zero_point_codes is not None:
        zero_point = decode_second_level(zero_point_codes)
    elif zero_point is not None and zero_point.dtype == torch.uint8:
        zero_point = unpack_codes(zero_point, part.format.bits, scale.shape[-1]).reshape(scale.shape)
    return GroupParameters(
        scale=scale,
        zero_point=None if zero_point is None else zero_point.float(),
        global_scale=tensors.get(f"{name}.global_scale"),
        scale_codes=scale_codes,
        zero_point_codes=zero_point_codes,
        negative=None if negative is None else decode_scale(negative, part.scheme.scale),
        offset=None if offset is None else decode_scale(offset, part.scheme.scale),
    )


def _second_level_tensors(name: str, leaf: str, found: SecondLevel, part: GridPart) -> dict[str, Tensor]:
    bits, block = _second_form(part)
    tensors = {f"{name}.{leaf}.codes": pack_codes(found.codes.T.contiguous(), bits)}
    for what, of_rows in (("low", found.low), ("step", found.step)):
        tensors[f"{name}.{leaf}.{what}"] = encode_scale(_one_a_block(name, of_rows, block, part), part.scheme.scale)
    return tensors


def _read_second_level(name: str, tensors: Mapping[str, Tensor], rows: int, part: GridPart) -> SecondLevel | None:
    packed = tensors.get(f"{name}.codes")
    if packed is None:
        return None
    bits, block = _second_form(part)
    low, step = (decode_scale(tensors[f"{name}.{what}"], part.scheme.scale) for what in ("low", "step"))
    codes = unpack_codes(packed, bits, rows).T.contiguous()
    return SecondLevel(codes, repeat_rows(low, block, rows), repeat_rows(step, block, rows))


def _second_form(part: GridPart) -> tuple[int, int]:
    """Return the bits of a scale's code, and how many rows share a range.

    Raises:
        SchemeError: The scheme does not say that scales are codes.
    """
    bits, rows = part.scheme.scale_bits, part.scheme.scale_rows
    if bits is None or rows is None:
        raise SchemeError(
            "scales are codes, and the scheme does not say so",
            facts=(("scheme", part.scheme),),
            hint=f"--weights {part.scheme}-scales3g16",
        )
    return bits, rows


def _outlier_tensors(name: str, outliers: Outliers, n_in: int) -> dict[str, Tensor]:
    short = n_in <= _MOST_SHORT_COLUMNS
    return {
        f"{name}.row_ptr": outliers.row_ptr,
        f"{name}.col": outliers.col.to(torch.uint16) if short else outliers.col,
        f"{name}.values": outliers.values,
    }


def _read_outliers(name: str, tensors: Mapping[str, Tensor]) -> Outliers | None:
    row_ptr = tensors.get(f"{name}.row_ptr")
    if row_ptr is None:
        return None
    return Outliers(row_ptr, tensors[f"{name}.col"].to(torch.int32), tensors[f"{name}.values"])
