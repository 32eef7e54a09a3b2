"""Plain Hugging Face checkpoints: weights dequantized to 16 bits, for everything that loads transformers' folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from qtool.builtin.exporters.checkpoint import write_checkpoint
from qtool.builtin.exporters.consumers import dequantized_consumers
from qtool.builtin.exporters.read_back import CheckpointReader, empty_model
from qtool.engine.exporter import Exported
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import LinearSite


class HuggingFace:
    """Writes each linear as one dense weight: decoded, corrections merged, online operators undone."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse what is not quantized.

        Raises:
            UsageError: There are no codes.
        """
        if subject.quantized is None or subject.scheme.weights is None:
            raise UsageError("there are no codes to export", hint="qtool mitigate makes a quantized artifact")

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        dtype = _dtype(subject)

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            weight, bias = dense(subject, linear, state.get(f"{linear.spec.module}.bias"))
            tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        sizes = write_checkpoint(subject, directory, made, dtype=dtype)
        details = {"layout": "dense", "dtype": str(dtype).removeprefix("torch."), "bytes": vars(sizes)}
        bits = subject.plugins.format(subject.scheme.weights.format).bits if subject.scheme.weights is not None else 16
        return Exported(dequantized_consumers(bits, subject.scheme, dtype), details)

    def verify(self, subject: Subject, directory: Path) -> None:
        """Read every linear back and compare it with ours, cast to the dtype of the checkpoint, bit for bit.

        Names and shapes are compared with the model that transformers builds from the config.

        Raises:
            ArtifactError: Names the first weight that differs.
        """
        dtype, trusted = _dtype(subject), subject.model.trust_remote_code
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted)
        reader = CheckpointReader(directory)
        reader.compare(empty_model(config, trust_remote_code=trusted))
        for linear in subject.model.graph.linears:
            ours, _ = dense(subject, linear, None)
            try:
                read = reader.module(linear.name)["weight"]
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"cannot read `{linear.name}` back", facts=(("reason", error),)) from error
            if not torch.equal(read, ours.to(dtype)):
                raise ArtifactError(
                    f"the weight of `{linear.name}` that was written is not the one that was quantized",
                    facts=(("values that differ", int((read != ours.to(dtype)).sum())),),
                    hint="pack again; if it happens again, report it",
                )


def dense(
    subject: Subject, linear: LinearSite, bias: Float[Tensor, " out"] | None
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Return the dense weight and bias of a linear that reads its site as it is without online operators.

    With ``x̂ = x T``, ``(Ŵ + U D) x̂ᵀ = (Ŵ + U D) Tᵀ xᵀ``: of ``T = T1 T2 …`` the last operator is undone first.
    Everything in float64.

    Args:
        subject: A quantized subject.
        linear: Which linear.
        bias: Its bias, already folded.
    """
    found, scheme = subject.linear(linear), subject.scheme.weights
    if scheme is None:
        raise LookupError(linear.name)
    weight = found.weight(scheme, subject.plugins.format(scheme.format)).double()
    if found.adapter is not None:
        weight = weight + found.adapter.up.double() @ found.adapter.down.double()
    bias = None if bias is None else bias.double()
    for operator in reversed(subject.plan.at(linear.reads).online):
        undone = operator.inverse()
        bias = undone.bias_in(weight, bias)
        weight = undone.weight_in(weight)
    return weight, bias


def _dtype(subject: Subject) -> torch.dtype:
    """Return the model's own 16-bit dtype, bfloat16 for a wider one."""
    stored = subject.model.dtype
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
