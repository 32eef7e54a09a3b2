"""Perplexity over disjoint windows, and on request the divergence from the full-precision model on the same text.

The protocol of the field (Frantar et al. 2023, arXiv:2210.17323): the test text is tokenized once and cut into windows
that do not overlap; the loss of every token but a window's first counts; the result is exp of the mean. Divergence is
KL(full precision ‖ model) per token and the share of tokens that both rank first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.engine.metric import Evaluation, Measured
from qtool.numerics.likelihood import divergence, perplexity, token_losses


class Perplexity:
    """Measures ``perplexity/<data>``, and ``kl/<data>`` and ``top1/<data>`` with the option ``kl``."""

    version = 1

    def measure(self, evaluation: Evaluation) -> Measured:
        """Run the subject (and the reference for divergence) once over each text."""
        values: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for data in evaluation.options["data"]:
            windows = evaluation.windows(data)
            found = _one_text(evaluation, windows)
            tensors |= {f"{name}/{data}": tensor for name, tensor in found.items()}
            values[f"perplexity/{data}"] = perplexity(found["nll"])
            if "kl" in found:
                values[f"kl/{data}"] = float(found["kl"].double().mean())
                values[f"top1/{data}"] = float(found["top1"].double().mean())
                values[f"reference_perplexity/{data}"] = perplexity(found["reference_nll"])
        return Measured(values, tensors, {})


def _one_text(evaluation: Evaluation, windows: Tensor) -> dict[str, Tensor]:
    """Return the per-token values of one text."""
    runs = evaluation.subject.forward_windows(windows)
    kept: dict[str, list[Tensor]] = {"nll": []}
    if not evaluation.options.get("kl"):
        for rows, logits in runs:
            kept["nll"].append(token_losses(logits, windows[rows]).cpu())
    else:
        kept |= {"reference_nll": [], "kl": [], "top1": []}
        for (rows, logits), (_, expected) in zip(runs, evaluation.reference().forward_windows(windows), strict=True):
            kl, same = divergence(expected, logits)
            kept["nll"].append(token_losses(logits, windows[rows]).cpu())
            kept["reference_nll"].append(token_losses(expected, windows[rows]).cpu())
            kept["kl"].append(kl.cpu())
            kept["top1"].append(same.to(torch.uint8).cpu())
    return {name: torch.cat(rows) for name, rows in kept.items()}
