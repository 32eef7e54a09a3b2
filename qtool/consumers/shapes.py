"""The tensors of a quantized linear in each layout, and whether those of a file are what its config says.

Only the heads of files are looked at. Layouts that are not in the table are not compared, and neither are tensors of
all experts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple, TypeAlias

from qtool.artifacts.layout import TensorSlot
from qtool.consumers.case import CT, Case

Shape: TypeAlias = tuple[int, ...]

_WORD, _BYTE = 32, 8  # bits
_FLOATS = ("F64", "F32", "F16", "BF16")
_ZEROS, _WORDS = "weight_zero_point", "qweight"
_UNSAID = ("qzeros", "g_idx")
"""Tensors that some tools leave out."""


class Layout(NamedTuple):
    """How one layout stores the codes of a linear, and what it calls the tensors beside them.

    Attributes:
        codes: The tensor of codes.
        types: What safetensors calls the types that it may have.
        element: ``int`` or ``float``, as configs say; empty where they may say either.
        scale: The tensor of scales.
        multiplier: That of the scale of scales.
    """

    codes: str
    types: tuple[str, ...]
    element: str = ""
    scale: str = "weight_scale"
    multiplier: str = "weight_global_scale"


LAYOUTS: Mapping[tuple[str, str], Layout] = {
    (CT, "pack-quantized"): Layout("weight_packed", ("I32",), "int"),
    (CT, "int-quantized"): Layout("weight", ("I8",), "int"),
    (CT, "float-quantized"): Layout("weight", ("F8_E4M3",), "float"),
    (CT, "naive-quantized"): Layout("weight", ("I8", "F8_E4M3")),
    (CT, "nvfp4-pack-quantized"): Layout("weight_packed", ("U8",), "float"),
    (CT, "mxfp4-pack-quantized"): Layout("weight_packed", ("U8",), "float"),
    (CT, "mxfp6-pack-quantized"): Layout("weight_packed", ("U8",), "float"),
    (CT, "mxfp8-quantized"): Layout("weight", ("F8_E4M3",), "float"),
    **{("gptq", version): Layout(_WORDS, ("I32",), scale="scales") for version in ("gptq", "gptq_v2")},
    ("awq", "gemm"): Layout(_WORDS, ("I32",), scale="scales"),
    **{("modelopt", one): Layout("weight", ("U8",), multiplier="weight_scale_2") for one in ("NVFP4", "W4A16_NVFP4")},
    **{("modelopt", one): Layout("weight", ("F8_E4M3",)) for one in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")},
    ("fp8", "e4m3"): Layout("weight", ("F8_E4M3",), scale="weight_scale_inv"),
}
"""The layouts that are known, by ``method`` and ``layout`` of a case."""


class Misfit(NamedTuple):
    """What a config says of a linear, and what the file has in its place."""

    said: str
    found: str


def shapes_of(case: Case, n_out: int, n_in: int) -> dict[str, Shape]:
    """Return the shapes of a linear's tensors, without its bias and what is calibrated.

    Args:
        case: What its config says; the layout is one of ``LAYOUTS``.
        n_out: Its outputs.
        n_in: Its inputs.
    """
    layout = LAYOUTS[case.method, case.layout]
    groups = -(-n_in // case.group_size) if case.group_size > 0 else 1
    if layout.codes == _WORDS:
        along = -(-n_out * case.bits // _WORD)
        beside: dict[str, Shape] = {"qzeros": (groups, along), "scales": (groups, n_out)}
        if case.method == "awq":
            return {_WORDS: (n_in, along), **beside}
        return {_WORDS: (-(-n_in * case.bits // _WORD), n_out), **beside, "g_idx": (n_in,)}
    scale: Shape = (n_out,)
    if case.strategy == "tensor":
        scale = ()
    elif case.strategy == "block":
        rows, columns = map(int, case.block.split("x"))
        scale = (-(-n_out // rows), -(-n_in // columns))
    elif case.strategy in ("group", "tensor_group"):
        scale = (n_out, groups)
    shapes = {layout.codes: (n_out, -(-n_in * _code(case, layout) // _unit(layout))), layout.scale: scale}
    if not case.symmetric:
        words = layout.types == ("I32",) and case.strategy != "tensor"
        shapes[_ZEROS] = (-(-n_out * case.bits // _WORD), *scale[1:]) if words else scale
    return shapes | ({layout.multiplier: ()} if case.strategy == "tensor_group" else {})


def misfit(case: Case, slots: Mapping[str, TensorSlot], n_in: int | None) -> Misfit | None:
    """Return the first tensor of a linear that is not what its config says, None if all are or nothing is known.

    Args:
        case: What the config says of the linear.
        slots: Its tensors, by the last parts of their names.
        n_in: Its inputs; None where only its tensors tell.
    """
    layout = LAYOUTS.get((case.method, case.layout))
    if layout is None or (layout.codes not in slots and _type(slots, "weight") in _FLOATS):
        return None  # nothing is known, or weights are quantized as the model is loaded
    said = f"{_in_words(case)} as {case.layout}"
    if layout.element not in ("", case.type) or (layout.types == ("F8_E4M3",) and case.bits != _BYTE):
        return Misfit(said, f"a layout of {layout.types[0]}")
    lacking = [leaf for leaf in shapes_of(case, 1, 1) if leaf not in (*slots, *_UNSAID)]
    if lacking:
        return Misfit(f"{said}, so there is `{lacking[0]}`", f"{', '.join(slots)}")
    codes = slots[layout.codes]
    if codes.dtype not in layout.types:
        return Misfit(f"{said}, so `{layout.codes}` is {' or '.join(layout.types)}", codes.dtype)
    if len(codes.shape) != len(("out", "in")):
        return None
    n_out = slots[layout.scale].shape[-1] if layout.codes == _WORDS else codes.shape[0]
    odd = []
    for width, older in product((n_in,) if n_in else _widths(case, layout, slots), (False, True)):
        shapes = shapes_of(case, n_out, width) | (_older(case, layout, slots, width) if older else {})
        there = ((leaf, shape) for leaf, shape in shapes.items() if leaf in slots)
        odd.append(next(((leaf, shape) for leaf, shape in there if _bare(slots[leaf].shape) != _bare(shape)), None))
    if None in odd or odd[0] is None:
        return None
    leaf, shape = odd[0]
    return Misfit(f"{said}, so `{leaf}` is {_by(shape)}", _by(slots[leaf].shape))


def _older(case: Case, layout: Layout, slots: Mapping[str, TensorSlot], n_in: int) -> dict[str, Shape]:
    """Return the shapes that differ as compressed-tensors wrote them before 0.20: words that each begin with a code.

    Zero points may be no words, but bytes, one for each scale.
    """
    if case.method != CT or layout.types != ("I32",):
        return {}
    whole, n_out, groups = _WORD // case.bits, slots[layout.codes].shape[0], slots[layout.scale].shape[1:]
    words = _type(slots, _ZEROS) == "I32"
    zeros = (-(-n_out // whole), *groups) if words else slots[layout.scale].shape
    return {layout.codes: (n_out, -(-n_in // whole))} | ({} if case.symmetric else {_ZEROS: zeros})


def _widths(case: Case, layout: Layout, slots: Mapping[str, TensorSlot]) -> list[int]:
    """Return the inputs that codes speak of, and those that groups do: the last word of a row may not be full."""
    axis = 0 if layout.codes == _WORDS else -1
    length, scale = slots[layout.codes].shape[axis], slots[layout.scale].shape
    groups = scale[axis] if len(scale) > 1 else 1
    by_codes = length if case.method == "awq" else length * _unit(layout) // _code(case, layout)
    return [by_codes, *([groups * case.group_size] if case.group_size > 0 and case.strategy != "block" else [])]


def _unit(layout: Layout) -> int:
    """Return the bits of an element of the tensor of codes."""
    return _WORD if layout.types == ("I32",) else _BYTE


def _code(case: Case, layout: Layout) -> int:
    """Return the bits that a code takes there: less than a byte where elements are no codes."""
    return case.bits if layout.types in (("I32",), ("U8",)) else _BYTE


def _type(slots: Mapping[str, TensorSlot], leaf: str) -> str:
    return slots[leaf].dtype if leaf in slots else ""


def _bare(shape: Shape) -> Shape:
    """Return a shape without lengths of 1, which some tools have where others have none."""
    return tuple(length for length in shape if length != 1)


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _in_words(case: Case) -> str:
    """Return such as ``INT4 in groups of 32, asymmetric``."""
    shared = {"tensor": "with one scale", "block": f"in blocks of {case.block}"}
    groups = f"in groups of {case.group_size}" if case.group_size > 0 else "with a scale for each output"
    kind = {"int": "INT", "float": "FP"}.get(case.type, case.type)
    return f"{kind}{case.bits} {shared.get(case.strategy, groups)}{'' if case.symmetric else ', asymmetric'}"
