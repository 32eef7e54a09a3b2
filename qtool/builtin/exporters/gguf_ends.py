"""A quantized head and a quantized embedding in a GGUF file, where llama.cpp has one tensor for both or two.

Without a head of its own a file's embedding stands for it, in whatever type that has. So where both are the same codes,
as rounding to nearest makes of tied ones, the file holds them once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool.consumers.checkpoint import types_in_words
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.graph import LinearSite


def shares_codes(subject: Subject) -> bool:
    """Say whether head and embedding are the same codes and scales, and nothing else."""
    head, embedding = subject.model.graph.ends
    if subject.quantized is None or {head, embedding} - {*subject.coded_ends}:
        return False
    if (
        subject.plan.at(head.reads).online
        or len({subject.scheme.of(one.name).weights for one in (head, embedding)}) > 1
    ):
        return False
    ours, other = (subject.quantized.tensors(f"{one.name}.") for one in (head, embedding))
    return ours.keys() == other.keys() and all(torch.equal(tensor, other[leaf]) for leaf, tensor in ours.items())


def stored_codes(subject: Subject) -> tuple[LinearSite, ...]:
    """Return those of head and embedding whose codes a file holds: the embedding alone where it stands for both."""
    return (subject.model.graph.embedding,) if shares_codes(subject) else subject.coded_ends


def check_embedding(subject: Subject) -> None:
    """Refuse an embedding with the scale of a tensor, by which llama.cpp does not multiply what it looks up.

    Raises:
        UsageError: Names a type that has none.
    """
    embedding = subject.model.graph.embedding
    if embedding in subject.coded_ends and subject.packed(embedding).parameters.global_scale is not None:
        raise UsageError(
            "llama.cpp reads no scale of the embedding as a whole, which NVFP4 has",
            facts=((embedding.name, subject.scheme.of(embedding.name).weights),),
            hint=f"nearest that fits: {embedding.name}=mxfp4 among the exceptions of --weights",
        )


def types_of_ends(subject: Subject, types: Mapping[str, str], dtype: torch.dtype) -> str:
    """Return in words what embedding and head are stored as.

    Args:
        subject: A quantized subject.
        types: Those of quantized ones by name.
        dtype: That of others.
    """
    plain = str(dtype).removeprefix("torch.")
    head, embedding = (types.get(one.name, plain) for one in subject.model.graph.ends)
    return types_in_words(embedding, head)
