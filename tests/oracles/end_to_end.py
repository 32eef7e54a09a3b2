"""Scales and norms of a whole model as leaves of one graph: EfficientQAT's second phase, arXiv:2407.11062, in float64.

The model is transformers' own; what stands for a weight is made of the bytes of an artifact.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

_EXPERT = re.compile(r"(.*)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)")


def integers_oracle(tensors: Mapping[str, Tensor], name: str, n_in: int, *, bits: int) -> Tensor:
    """Code less zero point ``[out, in]``: without a stored one it is 2^(bits - 1)."""
    codes = _unpacked(tensors[f"{name}.codes"], n_in, bits)
    shape = tensors[f"{name}.scale"].shape
    groups = shape[1] if len(shape) == 2 else 1
    zeros = torch.full((len(codes), groups), 2.0 ** (bits - 1), dtype=torch.float64)
    if f"{name}.zero_point" in tensors:
        zeros = _unpacked(tensors[f"{name}.zero_point"], groups, bits)
    return codes - zeros.repeat_interleave(n_in // groups, dim=1)


def norms_oracle(model: Any, in_front: Collection[str]) -> list[str]:  # noqa: ANN401 - transformers' model
    """Names of the weights of norms: those of a block that are called so, and the one in front of the head."""
    names = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    return [f"{name}.weight" for name in names if name.rpartition(".")[2] in in_front or ".layers." not in name]


def divergence_oracle(
    model: Any,  # noqa: ANN401 - transformers' model
    windows: Iterable[Tensor],
    integers: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    *,
    offset: float,
) -> tuple[float, dict[str, Tensor]]:
    """KL(full precision ‖ quantized), the mean over tokens that predict one, and its gradients of all values.

    Args:
        model: In full precision.
        windows: Tokens.
        integers: By linear.
        values: Scales by ``<linear>.scale`` and gains by the names of norms.
        offset: What a norm of this model adds to its weight.
    """
    leaves = {name: value.double().clone().requires_grad_() for name, value in values.items()}
    weights = {}
    for name, numbers in integers.items():
        scale = leaves[f"{name}.scale"]
        scale = scale if scale.ndim == 2 else scale.reshape(1, 1)
        weights[name] = (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    changed = {name: leaf - offset for name, leaf in leaves.items() if not name.endswith(".scale")}
    changed |= _as_transformers_names_them(weights)
    kept = dict(model.named_parameters())
    assert changed.keys() <= kept.keys()
    assert all(kept[name].shape == tensor.shape for name, tensor in changed.items())
    total, count = torch.zeros((), dtype=torch.float64), 0
    for window in windows:
        given = {"input_ids": window[None], "use_cache": False}
        with torch.no_grad():
            exact = model(**given).logits[0]
        received = functional_call(model, changed, (), given).logits[0]
        for position in range(len(window) - 1):
            p = torch.softmax(exact[position].double(), -1)
            q = torch.softmax(received[position].double(), -1)
            total = total + (p * (p / q).log()).sum()
            count += 1
    loss = total / count
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = zip(leaves.items(), gradients, strict=True)
    return float(loss.detach()), {name: torch.zeros_like(leaf) if one is None else one for (name, leaf), one in found}


def _unpacked(stored: Tensor, count: int, bits: int) -> Tensor:
    """Value i of a row is in bits i·b to (i + 1)·b of its bytes, the lowest first."""
    stream = np.unpackbits(stored.numpy(), axis=1, bitorder="little")[:, : count * bits]
    digits = stream.reshape(len(stream), count, bits).astype(np.float64)
    return torch.from_numpy(digits @ (2.0 ** np.arange(bits)))


def _as_transformers_names_them(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts are one tensor: first and third matrices below each other, second ones beside it."""
    found, experts = {}, dict[str, dict[str, dict[int, Tensor]]]()
    for name, weight in weights.items():
        if (one := _EXPERT.fullmatch(name)) and ".experts" in name:
            kind = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.get(one[3], one[3])
            experts.setdefault(one[1], {}).setdefault(kind, {})[int(one[2])] = weight
        else:
            found[f"{name}.weight"] = weight
    for module, kinds in experts.items():
        order = sorted(kinds["w1"])
        found[f"{module}.gate_up_proj"] = torch.stack([torch.cat([kinds["w1"][e], kinds["w3"][e]]) for e in order])
        found[f"{module}.down_proj"] = torch.stack([kinds["w2"][e] for e in order])
    return found
