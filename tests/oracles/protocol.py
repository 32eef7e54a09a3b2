"""How good a model is: perplexity over disjoint windows, and its distance from a reference model.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, section 4: the windowed perplexity that papers compare.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_softmax(logits: Float[Tensor, " vocab"]) -> list[float]:
    """Return natural log probabilities as Python floats."""
    values = [float(v) for v in logits.tolist()]
    top = max(values)
    log_sum = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - log_sum for v in values]


def window_losses_oracle(model: PreTrainedModel, token_ids: Int[Tensor, " tokens"], seq_len: int) -> list[float]:
    """Return for each window the mean cross entropy, in nats, of its ``seq_len - 1`` next tokens.

    Args:
        model: Causal language model in evaluation mode. Not modified.
        token_ids: The whole text. Windows are disjoint, and a tail shorter than a window is dropped.
        seq_len: Tokens per window.

    Returns:
        One value per window.
    """
    losses = []
    for start in range(0, len(token_ids) - seq_len + 1, seq_len):
        window = token_ids[start : start + seq_len]
        with torch.no_grad():
            logits = model(input_ids=window.unsqueeze(0).to(model.device)).logits[0]
        total = 0.0
        for position in range(seq_len - 1):
            row = logits[position].double()
            total += float(torch.logsumexp(row, dim=0) - row[window[position + 1]])
        losses.append(total / (seq_len - 1))
    return losses


def perplexity_oracle(model: PreTrainedModel, token_ids: Int[Tensor, " tokens"], seq_len: int = 2048) -> float:
    """Return ``exp`` of the mean over windows of the mean cross entropy of a window.

    Args:
        model: Causal language model in evaluation mode. Not modified.
        token_ids: The whole text, at least one window long.
        seq_len: Tokens per window.

    Returns:
        The perplexity.
    """
    losses = window_losses_oracle(model, token_ids, seq_len)
    return math.exp(math.fsum(losses) / len(losses))


def kl_divergence_oracle(reference: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]) -> float:
    """Return the mean over positions of ``KL(reference || model)``, in nats."""
    vocab = reference.shape[-1]
    divergences = []
    for left, right in zip(reference.reshape(-1, vocab), logits.reshape(-1, vocab), strict=True):
        log_p, log_q = log_softmax(left), log_softmax(right)
        divergences.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return math.fsum(divergences) / len(divergences)


def top1_agreement_oracle(reference: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]) -> float:
    """Return the share of positions whose largest logit, the first of equal ones, is the same in both."""
    vocab = reference.shape[-1]
    hits = 0
    positions = reference.reshape(-1, vocab).tolist()
    for left, right in zip(positions, logits.reshape(-1, vocab).tolist(), strict=True):
        hits += left.index(max(left)) == right.index(max(right))
    return hits / len(positions)
