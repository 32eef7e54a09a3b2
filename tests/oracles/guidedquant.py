"""GuidedQuant, Kim et al. 2025, arXiv:2505.07004, token by token, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradients_oracle(model: Any, windows: Tensor, names: list[str]) -> dict[str, Tensor]:  # noqa: ANN401 - transformers' model
    """∂ℓ/∂z of linears by full name, ``[tokens, out]``: one autograd pass of the whole model, one window at a time."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for window in windows:
        outputs: dict[str, Tensor] = {}
        handles = [model.get_submodule(name).register_forward_hook(_keeping(name, outputs)) for name in names]
        logits = model(window[None], use_cache=False).logits[0]
        loss = torch.zeros((), dtype=torch.float64)
        for position in range(len(window) - 1):
            loss = loss - torch.log_softmax(logits[position].double(), -1)[window[position + 1]]
        loss.backward()
        for handle in handles:
            handle.remove()
        for name, output in outputs.items():
            assert output.grad is not None
            found[name].append(output.grad[0].clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _keeping(name: str, outputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - a hook
    def keep(_: Any, __: Any, output: Tensor) -> None:  # noqa: ANN401 - a hook
        output.retain_grad()
        outputs[name] = output

    return keep


def saliency_oracle(gradient: Tensor, groups: int) -> Tensor:
    """s_tk: the mean of the squared gradient over the k-th run of channels."""
    tokens, n_out = gradient.shape
    count = min(groups, n_out)
    result = torch.zeros(tokens, count, dtype=torch.float64)
    for token in range(tokens):
        for group in range(count):
            channels = range(n_out * group // count, n_out * (group + 1) // count)
            result[token, group] = sum(float(gradient[token, c]) ** 2 for c in channels) / len(channels)
    return result


def guided_hessians_oracle(x: Tensor, saliency: Tensor) -> Tensor:
    """H_k = Σ_t s_tk x_t x_tᵀ / Σ_t s_tk."""
    hessians = torch.zeros(saliency.shape[1], x.shape[1], x.shape[1], dtype=torch.float64)
    for group in range(saliency.shape[1]):
        for token in range(len(x)):
            hessians[group] += float(saliency[token, group]) * torch.outer(x[token].double(), x[token].double())
        hessians[group] /= float(saliency[:, group].double().sum())
    return hessians
