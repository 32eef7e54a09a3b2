"""Likelihood of text under a model, and how far two models' predictions are apart; a value for every token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def token_losses(
    logits: Float[Tensor, "batch tokens vocab"], ids: Int64[Tensor, "batch tokens"]
) -> Float[Tensor, "batch targets"]:
    """Return the negative log-likelihood in nats of every token but the first of each window.

    Args:
        logits: Predictions at every position; computed with in float32.
        ids: The tokens of the windows.
    """
    flat = logits[:, :-1].flatten(0, 1).float()
    losses = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten().to(flat.device), reduction="none")
    return losses.view(ids.shape[0], -1)


def perplexity(losses: Float[Tensor, "windows targets"]) -> float:
    """Return ``exp`` of the mean loss: windows count alike, since they have equally many tokens."""
    return float(losses.double().mean().exp())


def divergence(
    reference: Float[Tensor, "batch tokens vocab"], logits: Float[Tensor, "batch tokens vocab"]
) -> tuple[Float[Tensor, "batch targets"], Bool[Tensor, "batch targets"]]:
    """Return KL(reference ‖ model) in nats and whether both rank the same token first, where a target follows.

    Args:
        reference: Logits of the full-precision model.
        logits: Logits of the model that is compared with it.
    """
    kl, same = [], []
    for expected, received in zip(reference[:, :-1], logits[:, :-1], strict=True):
        log_p = torch.log_softmax(expected.float(), -1)
        log_q = torch.log_softmax(received.to(expected.device).float(), -1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(expected.argmax(-1) == received.to(expected.device).argmax(-1))
    return torch.stack(kl), torch.stack(same)
