"""What stored bytes are of: codes, scales, zero points, and what comes beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from qtool.artifacts.layout import TensorSlot
from qtool.engine.grid import Grid
from qtool.engine.problem import QuantizedLinear
from qtool.engine.stored import COMPENSATION, INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT, NORMS, OUTLIERS, linear_tensors
from qtool.model.graph import OUTPUT, ModelGraph
from qtool.model.plan import Plan
from qtool.numerics.packing import packed_size
from qtool.numerics.scales import PACKED
from qtool.scheme import Format, TensorScheme

PARTS: Mapping[str, str] = {
    "codes": "what weights were rounded to",
    "scales": "of every level",
    "zeros": "zero points, and offsets in their place",
    "adapters": "low-rank corrections",
    "outliers": "weights in 16 bits in front of codes, with their places",
    "compensations": "what is added to the outputs of blocks",
    "operators": "what runs in the forward pass",
    "layout": "shapes and group indexes that a layout wants",
    "inputs": "calibrated scales of activations, outputs, keys and values; not counted as a linear's",
    "unquantized": "embeddings, norms, biases, heads, and linears that are stored decoded",
}
"""The parts of what is stored, in the order of tables."""
HALF = 2
"""Bytes of a value in 16 bits, which is what a checkpoint holds at most."""
_PROBE = 8  # values of a row of which a scheme's storage is tried, where it has no groups


def part_of(name: str) -> str:
    """Return the part that a tensor of a quantized artifact is of, by its full name; see ``qtool.engine.stored``."""
    if name.startswith(NORMS):
        return "unquantized"
    marks = {COMPENSATION: "compensations", ".adapter.": "adapters", f"{OUTLIERS}.": "outliers"}
    for mark, part in marks.items():
        if mark in name:
            return part
    if name.endswith((INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT)):
        return "inputs"
    if name.endswith((".zero_point", ".offset")) or ".zero_point." in name:
        return "zeros"
    if name.endswith((".scale", ".negative_scale", ".global_scale")) or ".scale." in name:
        return "scales"
    return "codes"


def stored_bytes(slots: Mapping[str, TensorSlot]) -> dict[str, int]:
    """Return the bytes of each part of a quantized artifact; together they are its file without its header."""
    found: Counter[str] = Counter()
    for name, slot in slots.items():
        found[part_of(name)] += slot.nbytes
    return in_order(found)


def operator_bytes(plan: Plan, graph: ModelGraph) -> tuple[int, int]:
    """Return the bytes of the operators that run in the forward pass: of those at linears, and of all.

    Hadamard matrices take none, their signs do; matrices and scales count as 16 bits, whatever the plan has. Those that
    are not at linears act on queries and keys.
    """
    linears = model = 0
    for site_id, site in plan.sites.items():
        kind = graph.site(site_id).kind
        running = site.operators if kind == OUTPUT else site.online
        size = sum(_executed_bytes(tensor) for operator in running for tensor in operator.state()[0].values())
        model += size
        linears += 0 if kind == "qk_post" else size
    return linears, model


def _executed_bytes(tensor: Tensor) -> int:
    return tensor.numel() * HALF if tensor.is_floating_point() else tensor.nbytes


def foreseen_bytes(scheme: TensorScheme, fmt: Format, n_out: int, n_in: int) -> dict[str, int]:
    """Return the bytes of each part of a linear that is rounded to a scheme, before any work.

    Args:
        scheme: Of its weight.
        fmt: The scheme's format.
        n_out: Its outputs.
        n_in: Its inputs, which the groups divide.
    """
    grid = Grid.of(scheme, fmt)
    (part,) = grid.parts
    row = torch.linspace(-1.0, 2.1, scheme.group_size or _PROBE).unsqueeze(0)
    fitted = part.fit(part.groups(row), global_scale=part.global_scale(row.abs().amax()))
    stored = linear_tensors("probe", QuantizedLinear(torch.zeros_like(row, dtype=torch.uint8), (fitted,)), grid)
    rows = 1 if scheme.strategy == "tensor" else ceil(n_out / part.block_rows)
    groups, zero_point = scheme.groups_of(n_in, layer="the linear"), stored.get("probe.zero_point")
    found = Counter({"codes": n_out * packed_size(n_in, fmt.bits)})
    for part_name, leaf in (("scales", "scale"), ("zeros", "zero_point")):
        if (low := stored.get(f"probe.{leaf}.low")) is not None:
            ranges = 2 * ceil(n_out / (scheme.scale_rows or 1)) * low.element_size()
            found[part_name] += groups * (packed_size(n_out, scheme.scale_bits or 0) + ranges)
    for scale in [stored[name] for name in ("probe.scale", "probe.negative_scale") if name in stored]:
        packed = scheme.scale in PACKED
        found["scales"] += packed_size(rows * groups, 4) if packed else rows * groups * scale.element_size()
    if "probe.global_scale" in stored:
        found["scales"] += stored["probe.global_scale"].nbytes
    if zero_point is not None and zero_point.dtype == torch.uint8:
        found["zeros"] = rows * packed_size(groups, fmt.bits)
    elif (each := stored.get("probe.offset", zero_point)) is not None:
        found["zeros"] = rows * groups * each.element_size()
    return in_order(found)


def in_order(found: Mapping[str, int]) -> dict[str, int]:
    """Return what there is of each part, in the order of tables."""
    return {part: found[part] for part in PARTS if found.get(part)}
