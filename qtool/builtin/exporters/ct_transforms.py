"""Hadamard operators in the forward pass as compressed-tensors says them: ``transform_config`` and its matrices.

A group of the config is one matrix ``M`` of order ``b``, and the linears whose inputs ``x`` become ``x M / sqrt(b)`` in
blocks of ``b`` channels, or the attentions whose queries and keys do, behind the rotary positions (R3). Sylvester's
matrix is of the type ``hadamard``, for which consumers have kernels; every other one is ``random-hadamard``, whose
entries they take from the checkpoint. The matrix of a group is stored once, below its first module, as the library
stores what several modules share; Sylvester's of attentions is not, for engines have no place for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformFactory, TransformScheme
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix
from jaxtyping import Float, Int8
from torch import Tensor, nn

from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import OUTPUT
from qtool.numerics.hadamard import hadamard_factors, hadamard_matrix
from qtool.numerics.operators import Hadamard

GROUP = "hadamard"
"""How the names of groups begin, and those of their matrices below a module."""

_INPUT: tuple[str, ...] = ("input",)
_ATTENTION: tuple[str, ...] = ("q_attn", "k_cache")
_TURNED = "qk_post"
_FOLDED = "qtool transform STATISTICS --method quarot --set head_mix=false, or pack --to hf"
_ROWS, _TOLERANCE = 8, 1e-5


@dataclass(frozen=True)
class OnlineTransform:
    """One matrix, and what it rotates.

    Attributes:
        name: Name of the group.
        operator: What it is here; of any of the modules.
        targets: Names of linears whose inputs it rotates, or of attentions.
        locations: What of them, as the library calls it.
    """

    name: str
    operator: Hadamard
    targets: tuple[str, ...]
    locations: tuple[str, ...] = _INPUT

    @property
    def order(self) -> int:
        """The order of the matrix: the block size."""
        return self.operator.block_size or self.operator.n

    @property
    def kind(self) -> str:
        """The type that the config names."""
        plain = self.operator.signs is None and hadamard_factors(self.order)[0] == 1
        return "hadamard" if plain else "random-hadamard"

    @property
    def of_attentions(self) -> bool:
        """Whether it rotates queries and keys."""
        return self.locations == _ATTENTION

    @property
    def stored(self) -> bool:
        """Whether its matrix is stored."""
        return not self.of_attentions or self.kind == "random-hadamard"

    @property
    def module(self) -> str:
        """Name of the module that has the matrix: one below its first target."""
        return f"{self.targets[0]}.{self.name}_{self.locations[0]}"

    def matrix(self) -> Int8[Tensor, "order order"]:
        """Return ``M``: ``diag(signs) H_b``, or its transpose."""
        matrix = hadamard_matrix(self.order)
        if self.operator.signs is not None:
            matrix = self.operator.signs.cpu().to(torch.int8)[:, None] * matrix
        return (matrix.mT if self.operator.transposed else matrix).contiguous()

    def scheme(self) -> dict[str, Any]:
        """Return what the config says of the group."""
        whole = not self.of_attentions and self.order == self.operator.n
        return {
            "type": self.kind,
            "apply": [
                {"targets": list(self.targets), "location": location, "inverse": False, "ignore": []}
                for location in self.locations
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": None if whole else self.order,
            "precision": "torch.float32",
        }


def online_transforms(subject: Subject) -> tuple[OnlineTransform, ...]:
    """Return the operators in the forward pass, those of one matrix together.

    Raises:
        UsageError: Some cannot be said; names them, and the nearest that can.
    """
    graph = subject.model.graph
    _refuse_other_operators(subject)
    places = [(linear.name, linear.reads, _INPUT) for linear in graph.linears]
    places += [
        (f"{graph.block_name(layer)}.{graph.family.attention}", f"layers.{layer}.{_TURNED}", _ATTENTION)
        for layer in range(graph.dims.num_layers)
    ]
    found: dict[tuple[object, ...], list[str]] = {}
    operators: dict[tuple[object, ...], Hadamard] = {}
    for name, site, locations in places:
        for operator in subject.plan.at(site).online:
            if isinstance(operator, Hadamard):
                signs = None if operator.signs is None else tuple(operator.signs.cpu().to(torch.int8).tolist())
                key = (locations, operator.n, operator.block_size, operator.transposed, signs)
                operators.setdefault(key, operator)
                found.setdefault(key, []).append(name)
    transforms = tuple(
        OnlineTransform(f"{GROUP}_{index}", operators[key], tuple(names), _ATTENTION if _ATTENTION in key else _INPUT)
        for index, (key, names) in enumerate(found.items())
    )
    for transform in transforms:
        _check_matrix(transform)
    return transforms


def transform_config(transforms: tuple[OnlineTransform, ...]) -> dict[str, Any]:
    """Return the ``transform_config`` of a checkpoint."""
    return {"config_groups": {transform.name: transform.scheme() for transform in transforms}}


def matrices_of(transforms: tuple[OnlineTransform, ...], linear: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the matrices that are stored beside a linear, named below it.

    Args:
        transforms: All of the checkpoint.
        linear: Name of the linear.
        dtype: What they are stored in; any floating point holds 1 and -1.
    """
    own = (one for one in transforms if not one.of_attentions and one.targets[0] == linear)
    return {f"{one.module}.weight".removeprefix(f"{linear}."): one.matrix().to(dtype) for one in own}


def matrices_of_attentions(transforms: tuple[OnlineTransform, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the matrices that are stored below attentions, by their full names; see ``matrices_of``."""
    own = (one for one in transforms if one.of_attentions and one.stored)
    return {f"{one.module}.weight": one.matrix().to(dtype) for one in own}


def expect_matrices(module: nn.Module, transforms: tuple[OnlineTransform, ...]) -> None:
    """Put what stands for a stored matrix below the modules where there is one.

    Args:
        module: A model without weights. Modified.
        transforms: All of the checkpoint.
    """
    for transform in (one for one in transforms if one.stored):
        child = nn.Module()
        child.register_buffer("weight", torch.empty(transform.order, transform.order, device="meta"))
        owner, _, leaf = transform.module.rpartition(".")
        module.get_submodule(owner).add_module(leaf, child)


def verify_transforms(
    transforms: tuple[OnlineTransform, ...], config: Mapping[str, Any] | None, stored: Mapping[str, Tensor]
) -> None:
    """Build what the library builds of a written config, and compare what it does with random inputs with ours.

    Args:
        transforms: What was to be written.
        config: The ``transform_config`` that was.
        stored: The matrix of each group that was stored.

    Raises:
        ArtifactError: Another group was written, or it computes something else.
    """
    groups = dict((config or {}).get("config_groups", {}))
    wanted = {one.name: [(place, list(one.targets)) for place in one.locations] for one in transforms}
    said = {name: [(one["location"], one["targets"]) for one in group["apply"]] for name, group in groups.items()}
    if said != wanted:
        raise ArtifactError(
            "the transforms that were written are not those of the plan", facts=(("groups", list(said)),)
        )
    for transform in transforms:
        x = torch.randn(_ROWS, transform.operator.n, generator=torch.Generator().manual_seed(0))
        for theirs in _run(groups[transform.name], stored.get(transform.name), x):
            ours = transform.operator.act(x)  # of queries too: it is orthogonal
            if not torch.allclose(theirs, ours, rtol=0, atol=_TOLERANCE * float(ours.abs().max())):
                far = float((theirs - ours).abs().max())
                facts = (("first module", transform.targets[0]), ("by up to", f"{far:.3g}"))
                raise ArtifactError("a transform that was written computes something else", facts=facts)


def _run(
    group: Mapping[str, Any], matrix: Tensor | None, x: Float[Tensor, "rows n"]
) -> Iterator[Float[Tensor, "rows n"]]:
    """Yield what the library computes at each location, with a stored matrix or its own."""
    scheme = TransformScheme.model_validate(group)
    factory = TransformFactory.from_scheme(scheme, name=GROUP)
    for args in scheme.apply:
        sizes = (x.shape[1], 1) if args.location in _INPUT else (1, x.shape[1])
        module = factory.create_transform(nn.Linear(*sizes, bias=False), args)
        with torch.no_grad():
            if matrix is not None:
                module.load_state_dict({"weight": matrix})
            yield module(x)


def _refuse_other_operators(subject: Subject) -> None:
    """Refuse all operators in the forward pass but one Hadamard rotation of what linears read, or of R3."""
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
        known = site.id in inputs or site.kind == _TURNED
        if not known or len(online) > 1 or not isinstance(online[0], Hadamard):
            raise UsageError(
                "compressed-tensors has one Hadamard rotation of a linear's input, or of queries and keys, and no other"
                " operator online",
                facts=(("site", site.id), ("operators", kinds)),
                hint=_FOLDED,
            )
        if site.kind == _TURNED and subject.scheme.kv is not None and subject.scheme.queries is None:
            kv = subject.scheme.keys or subject.scheme.values
            raise UsageError(
                "compressed-tensors rounds queries as it rounds keys where it rotates both, and these are in 16 bits",
                facts=(("site", site.id), ("kv", subject.scheme.kv)),
                hint=f"--kv queries={kv},keys={kv},values={kv}, or qtool transform with --method quarot --set r3=off",
            )
        operator = online[0]
        if operator.signs is not None and operator.block_size != operator.n:
            raise UsageError(
                "compressed-tensors has one matrix for all blocks of what it rotates; these have signs of their own",
                facts=(("site", site.id), ("blocks", operator.n // (operator.block_size or operator.n))),
                hint="rotate the whole input, or the blocks without signs; or qtool pack SOURCE --to hf",
            )
        if site.kind != _TURNED and (graph.dims.experts > 0 or site.id in kept):
            raise UsageError(
                "consumers run no operators in front of experts and routers",
                facts=(("site", site.id), ("family", subject.model.family.name)),
                hint="qtool transform STATISTICS --method quarot --set r4=false, or pack --to hf",
            )


def _check_matrix(transform: OnlineTransform) -> None:
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
