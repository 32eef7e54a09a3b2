"""Plain Hugging Face checkpoints: weights dequantized to 16 bits, for everything that loads transformers' folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from qtool.builtin.exporters.checkpoint import (
    left_alone_counts,
    refuse_compensation,
    require_held,
    write_checkpoint,
)
from qtool.builtin.exporters.mixed import groups_of, mixed_consumers
from qtool.builtin.exporters.read_back import (
    CheckpointReader,
    empty_model,
    loaded_model,
    same_bytes,
    versions,
    with_linear_experts,
)
from qtool.consumers.case import DENSE, Case
from qtool.consumers.checkpoint import artifact_facts
from qtool.engine.exporter import Exported
from qtool.engine.fold import output_operators
from qtool.engine.packed import one_thread
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError
from qtool.model.graph import LinearSite
from qtool.scheme import ModelScheme


class HuggingFace:
    """Writes each linear as one dense weight: decoded, corrections merged, online operators undone."""

    version = 1

    def check(self, subject: Subject) -> None:
        """Refuse what is not quantized, and what no checkpoint holds.

        Raises:
            UsageError: There are no codes, or something is added to the outputs of blocks.
        """
        groups_of(subject)
        refuse_compensation(subject)

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write the checkpoint into an empty folder."""
        dtype = _dtype(subject)

        def made(linear: LinearSite, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            module = linear.spec.module
            bias = state.get(f"{module}.bias")
            if linear.spec.kept or linear.name in subject.kept:
                weight, bias = offline(subject, linear, state[f"{module}.weight"], bias)
            else:
                weight, bias = dense(subject, linear, bias, dtype)
                require_held(f"{linear.name}.weight", weight)
            return {"weight": weight} if bias is None else {"weight": weight, "bias": bias.to(weight.dtype)}

        sizes = write_checkpoint(subject, directory, made, dtype=dtype)
        details: dict[str, object] = {"layout": "dense", "dtype": str(dtype).removeprefix("torch.")}
        details |= {"bytes": vars(sizes), "left_alone": left_alone_counts(subject.model)}
        each = [
            (linears, Case(DENSE, DENSE, bits=code_bits(subject, scheme), **artifact_facts(scheme, dtype=dtype)))
            for scheme, linears in groups_of(subject)
        ]
        return Exported(mixed_consumers(each), details)

    def verify(self, subject: Subject, directory: Path) -> str:
        """Read every linear back and compare it with ours, cast to the dtype of the checkpoint, bit for bit.

        transformers loads it without a byte of its weights, and says whether names, shapes and dtype fit; safetensors,
        with which it reads, gives the values. Tensors that it would leave out are found by comparison with its model.

        Raises:
            ArtifactError: Names the first weight that differs.
        """
        dtype, model = _dtype(subject), subject.model
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        reader = CheckpointReader(directory, model)
        reader.compare(with_linear_experts(empty_model(config, model), model))
        loaded = {one.dtype for one in loaded_model(directory, model).parameters()}
        if dtype not in loaded:
            facts = (("written", dtype), ("loaded", ", ".join(sorted(map(str, loaded)))))
            raise ArtifactError("transformers would load the checkpoint in another dtype", facts=facts)
        for linear in subject.coded:
            try:
                read = reader.weight(linear.name)
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"cannot read `{linear.name}` back", facts=(("reason", error),)) from error
            if read.dtype == dtype and _same_weight(read, subject, linear):
                continue
            ours, _ = dense(subject, linear, None, dtype)
            raise ArtifactError(
                f"the weight of `{linear.name}` that was written is not the one that was quantized",
                facts=(("values that differ", int((read != ours).sum())),),
                hint="pack again; if it happens again, report it",
            )
        return versions("transformers", "safetensors")


def _same_weight(read: Float[Tensor, "out in"], subject: Subject, linear: LinearSite) -> bool:
    """Say whether a weight that was read back is ours, bit for bit."""
    if not _plain(subject, linear):
        ours, _ = dense(subject, linear, None, read.dtype)
        return same_bytes(read.view(torch.uint8), ours.view(torch.uint8))
    packed, grid = subject.packed(linear), subject.weight_grid(linear)
    with one_thread():
        pieces = ((read[rows], packed.rows(rows).weight(grid).to(read.dtype)) for rows in packed.pieces())
        return all(same_bytes(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pieces)


def dense(
    subject: Subject, linear: LinearSite, bias: Float[Tensor, " out"] | None, dtype: torch.dtype
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Return the dense weight ``Ŵ + U D`` and the bias of a linear that reads its site without online operators.

    Args:
        subject: A quantized subject.
        linear: Which linear.
        bias: Its bias, already folded.
        dtype: What the weight is rounded to, once.
    """
    grid = subject.weight_grid(linear)
    if _plain(subject, linear):
        return subject.packed(linear).weight(grid, dtype), bias
    found = subject.linear(linear)
    weight = found.weight(grid)
    if found.adapter is not None:
        weight = weight.double() + found.adapter.product(torch.float64)
    weight, bias = offline(subject, linear, weight, bias)
    return weight.to(dtype), bias


def offline(
    subject: Subject, linear: LinearSite, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Return the weight and bias of a linear as it reads its site without online operators; in float64 behind some.

    With ``x̂ = x T``, ``W x̂ᵀ = W Tᵀ xᵀ``: of ``T = T1 T2 …`` the last operator is undone first.

    Args:
        subject: Its plan has the operators.
        linear: Which linear.
        weight: Its weight behind all operators.
        bias: Its bias, already folded.
    """
    if not _undone(subject, linear):
        return weight, bias
    weight, bias = weight.double(), None if bias is None else bias.double()
    for operator in reversed(output_operators(subject.plan, linear)):
        weight = operator.inverse().weight_out(weight)
        bias = None if bias is None else operator.inverse().bias_out(bias)
    for operator in reversed(subject.plan.at(linear.reads).online):
        undone = operator.inverse()
        bias = undone.bias_in(weight, bias)
        weight = undone.weight_in(weight)
    return weight, bias


def _plain(subject: Subject, linear: LinearSite) -> bool:
    """Say whether the dense weight of a linear is what its codes decode to."""
    return subject.only_codes(linear) and not _undone(subject, linear)


def _undone(subject: Subject, linear: LinearSite) -> bool:
    """Say whether a linear has operators to be undone, in front of it or behind it."""
    return bool(subject.plan.at(linear.reads).online or output_operators(subject.plan, linear))


def _dtype(subject: Subject) -> torch.dtype:
    """Return the model's own 16-bit dtype, bfloat16 for a wider one."""
    stored = subject.model.dtype
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def code_bits(subject: Subject, scheme: ModelScheme) -> int:
    """Return the bits of the codes that weights came from."""
    return 16 if scheme.weights is None else subject.plugins.format(scheme.weights.format).bits
