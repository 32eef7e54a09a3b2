"""Hadamard operators in the forward pass as compressed-tensors says them: ``transform_config`` and its matrices.

A group of the config is one matrix ``M`` of order ``b``, and the linears whose inputs ``x`` become ``x M / sqrt(b)`` in
blocks of ``b`` channels. Sylvester's matrix is of the type ``hadamard``, for which consumers have kernels; every other
one is ``random-hadamard``, whose entries they take from the checkpoint. The matrix of a group is stored once, beside
its first linear, as the library stores what several modules share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformArgs, TransformFactory, TransformScheme
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix
from jaxtyping import Float, Int8
from torch import Tensor, nn

from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import OUTPUT
from qtool.numerics.hadamard import hadamard_factors, hadamard_matrix
from qtool.numerics.operators import Hadamard

GROUP = "hadamard"
"""How the names of groups begin, and those of their matrices below a linear."""

_LOCATION = "input"
_FOLDED = "qtool transform STATISTICS --method quarot --set r3=off --set head_mix=false, or pack --to hf"
_ROWS, _TOLERANCE = 8, 1e-5


@dataclass(frozen=True)
class InputTransform:
    """One matrix, and the linears whose inputs it rotates.

    Attributes:
        name: Name of the group.
        operator: What it is here; of any of the linears.
        linears: Names of the linears.
    """

    name: str
    operator: Hadamard
    linears: tuple[str, ...]

    @property
    def order(self) -> int:
        """The order of the matrix: the block size."""
        return self.operator.block_size or self.operator.n

    @property
    def kind(self) -> str:
        """The type that the config names."""
        plain = self.operator.signs is None and hadamard_factors(self.order)[0] == 1
        return "hadamard" if plain else "random-hadamard"

    def matrix(self) -> Int8[Tensor, "order order"]:
        """Return ``M``: ``diag(signs) H_b``, or its transpose."""
        matrix = hadamard_matrix(self.order)
        if self.operator.signs is not None:
            matrix = self.operator.signs.cpu().to(torch.int8)[:, None] * matrix
        return (matrix.mT if self.operator.transposed else matrix).contiguous()

    def scheme(self) -> dict[str, Any]:
        """Return what the config says of the group."""
        apply = {"targets": list(self.linears), "location": _LOCATION, "inverse": False, "ignore": []}
        return {
            "type": self.kind,
            "apply": [apply],
            "randomize": False,
            "requires_grad": False,
            "head_dim": None if self.order == self.operator.n else self.order,
            "precision": "torch.float32",
        }


def input_transforms(subject: Subject) -> tuple[InputTransform, ...]:
    """Return the operators in the forward pass, those of one matrix together.

    Raises:
        UsageError: Some cannot be said; names them, and the nearest that can.
    """
    graph = subject.model.graph
    _refuse_other_operators(subject)
    found: dict[tuple[object, ...], list[str]] = {}
    operators: dict[tuple[object, ...], Hadamard] = {}
    for linear in graph.linears:
        for operator in subject.plan.at(linear.reads).online:
            if isinstance(operator, Hadamard):
                signs = None if operator.signs is None else tuple(operator.signs.cpu().to(torch.int8).tolist())
                key = (operator.n, operator.block_size, operator.transposed, signs)
                operators.setdefault(key, operator)
                found.setdefault(key, []).append(linear.name)
    transforms = tuple(
        InputTransform(f"{GROUP}_{index}", operators[key], tuple(names))
        for index, (key, names) in enumerate(found.items())
    )
    for transform in transforms:
        _check_matrix(transform)
    return transforms


def transform_config(transforms: tuple[InputTransform, ...]) -> dict[str, Any]:
    """Return the ``transform_config`` of a checkpoint."""
    return {"config_groups": {transform.name: transform.scheme() for transform in transforms}}


def matrices_of(transforms: tuple[InputTransform, ...], linear: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the matrices that are stored beside a linear, named below it.

    Args:
        transforms: All of the checkpoint.
        linear: Name of the linear.
        dtype: What they are stored in; any floating point holds 1 and -1.
    """
    own = (transform for transform in transforms if transform.linears[0] == linear)
    return {f"{transform.name}_{_LOCATION}.weight": transform.matrix().to(dtype) for transform in own}


def expect_matrices(module: nn.Module, transforms: tuple[InputTransform, ...]) -> None:
    """Put what stands for a stored matrix into the linears beside which there is one.

    Args:
        module: A model without weights. Modified.
        transforms: All of the checkpoint.
    """
    for transform in transforms:
        child = nn.Module()
        child.register_buffer("weight", torch.empty(transform.order, transform.order, device="meta"))
        module.get_submodule(transform.linears[0]).add_module(f"{transform.name}_{_LOCATION}", child)


def verify_transforms(
    transforms: tuple[InputTransform, ...], config: Mapping[str, Any] | None, stored: Mapping[str, Tensor]
) -> None:
    """Build what the library builds of a written config, and compare what it does with random inputs with ours.

    Args:
        transforms: What was to be written.
        config: The ``transform_config`` that was.
        stored: The matrix of each group that was.

    Raises:
        ArtifactError: Another group was written, or it computes something else.
    """
    groups = dict((config or {}).get("config_groups", {}))
    wanted = {transform.name: list(transform.linears) for transform in transforms}
    said = {name: [target for one in group["apply"] for target in one["targets"]] for name, group in groups.items()}
    if said != wanted:
        raise ArtifactError(
            "the transforms that were written are not those of the plan", facts=(("groups", list(said)),)
        )
    for transform in transforms:
        x = torch.randn(_ROWS, transform.operator.n, generator=torch.Generator().manual_seed(0))
        theirs = _run(groups[transform.name], stored[transform.name], x)
        ours = transform.operator.act(x)
        if not torch.allclose(theirs, ours, rtol=0, atol=_TOLERANCE * float(ours.abs().max())):
            far = float((theirs - ours).abs().max())
            facts = (("first linear", transform.linears[0]), ("by up to", f"{far:.3g}"))
            raise ArtifactError("a transform that was written computes something else", facts=facts)


def _run(group: Mapping[str, Any], matrix: Tensor, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Return what the library computes from the input of a linear."""
    scheme = TransformScheme.model_validate(group)
    factory = TransformFactory.from_scheme(scheme, name=GROUP)
    args: TransformArgs = scheme.apply[0]
    module = factory.create_transform(nn.Linear(x.shape[1], 1, bias=False), args)
    with torch.no_grad():
        module.load_state_dict({"weight": matrix})
        rotated: Tensor = module(x)
    return rotated


def _refuse_other_operators(subject: Subject) -> None:
    """Refuse all operators in the forward pass but one Hadamard rotation of what linears read."""
    graph = subject.model.graph
    sites = ((graph.site(site_id), plan) for site_id, plan in subject.plan.sites.items())
    inputs = {linear.reads for linear in graph.linears}
    kept = {
        linear.reads for layer in range(graph.dims.num_layers) for linear in graph.readers_of(layer) if linear.spec.kept
    }
    for site, plan in sites:
        online = plan.operators if site.kind == OUTPUT else plan.online
        kinds = ", ".join(operator.kind for operator in online)
        if not online:
            continue
        if site.id not in inputs or len(online) > 1 or not isinstance(online[0], Hadamard):
            raise UsageError(
                "compressed-tensors has one Hadamard rotation of a linear's input, and no other operator online",
                facts=(("site", site.id), ("operators", kinds)),
                hint=_FOLDED,
            )
        operator = online[0]
        if operator.signs is not None and operator.block_size != operator.n:
            raise UsageError(
                "compressed-tensors has one matrix for all blocks of an input, and these have signs of their own",
                facts=(("site", site.id), ("blocks", operator.n // (operator.block_size or operator.n))),
                hint="rotate the whole input, or the blocks without signs; or qtool pack SOURCE --to hf",
            )
        if graph.dims.experts > 0 or site.id in kept:
            raise UsageError(
                "consumers run no operators in front of experts and routers",
                facts=(("site", site.id), ("family", subject.model.family.name)),
                hint="qtool transform STATISTICS --method quarot --set r4=false --set r3=off, or pack --to hf",
            )


def _check_matrix(transform: InputTransform) -> None:
    """Refuse an order that the library cannot make, since it makes a matrix before it reads the stored one."""
    try:
        if transform.kind == "random-hadamard":
            random_hadamard_matrix(transform.order, torch.float32, torch.device("meta"))
    except ValueError as error:
        core, _ = hadamard_factors(transform.order)
        block = transform.operator.n & -transform.operator.n
        raise UsageError(
            "compressed-tensors has no Hadamard matrix of this order",
            facts=(("order", transform.order), ("factors", f"{core} x {transform.order // core}"), ("reason", error)),
            hint=f"rotate in blocks: --method block-hadamard --set block={block}, or qtool pack SOURCE --to hf",
        ) from error
