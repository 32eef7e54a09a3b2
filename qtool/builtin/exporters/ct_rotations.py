"""The rotations in the forward pass that a compressed-tensors checkpoint speaks of, read as a plan.

Its ``transform_config`` has groups, each with one kind of matrix, and says whose inputs ``x`` become ``x M / sqrt(b)``
(``x M.T / sqrt(b)`` where it says ``inverse``), or whose queries and keys. What it says of weights is in the codes
already. A matrix of a group is stored once for all modules of a size; Sylvester's need not be. One that is
``diag(signs) H_b`` is read as such, any other Hadamard matrix as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.utils import is_match
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor, nn

from qtool.builtin.exporters.packed_model import PackedModel
from qtool.builtin.exporters.packed_schemes import unread
from qtool.builtin.exporters.read_back import empty_model
from qtool.builtin.exporters.stored_names import stored_tensor_name
from qtool.errors import ShapeError
from qtool.model.plan import Plan, SitePlan
from qtool.model.reading import read_place
from qtool.numerics.hadamard import hadamard_matrix
from qtool.numerics.operators import Hadamard, Operator, Orthogonal

_WHAT = "a `transform_config`"
_KINDS = ("hadamard", "random-hadamard")
_INPUT, _TURNED = "input", frozenset({"q_attn", "k_cache"})


class _Rotated(NamedTuple):
    """What one entry of the config rotates: a site, on behalf of a module, at a location."""

    site: str
    module: str
    location: str
    operator: Operator


def matrix_modules(said: Mapping[str, Any] | None) -> frozenset[str]:
    """Return what the modules that hold matrices are called, below those whose inputs they rotate.

    Args:
        said: A ``transform_config``.
    """
    groups = ((said or {}).get("config_groups") or {}).items()
    return frozenset(f"{name}_{one.get('location')}" for name, group in groups for one in group.get("apply", ()))


def read_rotations(model: PackedModel, said: Mapping[str, Any] | None) -> Plan:
    """Return the plan of a checkpoint's rotations: nothing of it is folded, and its codes are those behind it.

    Args:
        model: The checkpoint.
        said: Its ``transform_config``.

    Raises:
        SchemeError: It has something else than Hadamard rotations of what linears of blocks read, or of queries and
            keys; names it.
    """
    if not said:
        return Plan()
    try:
        groups = TransformConfig.model_validate(said).config_groups
    except ValidationError as error:
        raise unread(f"{_WHAT} that compressed-tensors does not read", str(error).split("\n")[0]) from error
    modules: dict[str, nn.Module] = dict(empty_model(deepcopy(model.config), model).named_modules())
    modules |= dict.fromkeys((linear.name for linear in model.graph.linears), nn.Linear(1, 1, device="meta"))
    found: dict[str, list[_Rotated]] = {}
    for name, group in groups.items():
        for one in _rotated(model, modules, name, group):
            found.setdefault(one.site, []).append(one)
    plan = Plan({site: SitePlan((_agreed(model, site, ones),), 0) for site, ones in found.items()})
    _refuse_plain(model, plan)
    return plan


def _rotated(
    model: PackedModel, modules: Mapping[str, nn.Module], name: str, group: TransformScheme
) -> Iterator[_Rotated]:
    """Yield what a group rotates in the forward pass."""
    online = [args for args in group.apply if args.is_online()]
    if online and (group.type not in _KINDS or group.randomize):
        raise unread(f"{_WHAT} with matrices that are not read", {"group": name, "type": group.type})
    graph = model.graph
    linears = {linear.name: linear for linear in graph.linears}
    attentions = [f"{graph.block_name(layer)}.{graph.family.attention}" for layer in range(graph.dims.num_layers)]

    @cache
    def operator(n: int, *, inverse: bool) -> Operator:
        order = group.head_dim or n
        return _operator(n, order, _matrix(model, name, order), kind=group.type, inverse=inverse)

    for args in online:
        for module in _targeted(model, modules, args):
            linear = linears.get(module)
            if args.location == _INPUT and linear is not None:
                width = graph.width(linear.spec.reads)
                yield _Rotated(linear.reads, module, _INPUT, operator(width, inverse=args.inverse))
            elif args.location in _TURNED and module in attentions:
                site = f"layers.{attentions.index(module)}.qk_post"
                yield _Rotated(site, module, str(args.location), operator(graph.dims.head_dim, inverse=args.inverse))
            else:
                raise unread(f"{_WHAT} for the {args.location} of `{module}`", {"group": name})


def _targeted(model: PackedModel, modules: Mapping[str, nn.Module], args: TransformArgs) -> list[str]:
    """Return the modules that an entry names, by name, pattern or class."""

    def matches(name: str, module: nn.Module) -> bool:
        stored = stored_tensor_name(model, f"{name}.weight").removesuffix(".weight")
        return any(is_match(one, module, args.targets, args.ignore) for one in {name, stored})

    return [name for name, module in modules.items() if name and matches(name, module)]


def _matrix(model: PackedModel, group: str, order: int) -> Float[Tensor, "n n"] | None:
    """Return the matrix of an order that is stored for a group, or None."""
    names = {f"{group}_{location}" for location in (_INPUT, *_TURNED)}
    places = (place for name, place in model.matrices.items() if name.split(".")[-2] in names)
    return next((read_place(place).float() for place in places if place.shape == (order, order)), None)


def _operator(n: int, order: int, matrix: Float[Tensor, "b b"] | None, *, kind: str, inverse: bool) -> Operator:
    """Return what a matrix does to blocks of channels."""
    if order < 1 or n % order:
        raise unread(f"{_WHAT} with blocks that do not fill what they rotate", {"channels": n, "block": order})
    if matrix is None and (kind != _KINDS[0] or order & (order - 1)):
        raise unread(f"{_WHAT} whose matrix is not stored", {"type": kind, "order": order})
    matrix = hadamard_matrix(order).float() if matrix is None else matrix
    matrix = matrix.mT.contiguous() if inverse else matrix
    if not torch.equal(matrix @ matrix.mT, order * torch.eye(order)) or bool((matrix.abs() != 1).any()):
        raise unread(f"{_WHAT} with a matrix that is not Hadamard's", {"type": kind, "order": order})
    block = None if order == n else order
    for transposed in (False, True):
        signs = _signs(matrix.mT if transposed else matrix)
        if signs is not None:
            every = None if bool((signs == 1).all()) else signs.to(torch.int8).repeat(n // order)
            return Hadamard(n, every, block, transposed)
    if block is not None:
        raise unread(f"{_WHAT} with blocks of a matrix of its own", {"channels": n, "block": block})
    return Orthogonal(matrix / order**0.5)


def _signs(matrix: Float[Tensor, "n n"]) -> Float[Tensor, " n"] | None:
    """Return the signs with which ``diag(signs) H`` is a matrix, None where it is none of these."""
    try:
        plain = hadamard_matrix(len(matrix)).float()
    except ShapeError:
        return None
    signs = matrix[:, 0] * plain[:, 0]
    return signs if torch.equal(signs[:, None] * plain, matrix) else None


def _agreed(model: PackedModel, site: str, found: Iterable[_Rotated]) -> Operator:
    """Return the one rotation of a site: all that reads it must have the same, queries and keys both have theirs."""
    found = list(found)
    first = found[0].operator
    if site.endswith(".qk_post"):
        wanted = {(found[0].module, location) for location in _TURNED}
    else:
        wanted = {(one.name, _INPUT) for one in model.graph.linears if one.reads == site}
    seen = [(one.module, one.location) for one in found]
    if set(seen) != wanted or len(seen) != len(wanted) or any(not _same(one.operator, first) for one in found):
        raise unread(f"{_WHAT} in which what reads `{site}` is not rotated alike", sorted(set(seen) ^ wanted) or seen)
    return first


def _same(one: Operator, other: Operator) -> bool:
    (mine, about), (theirs, said) = one.state(), other.state()
    alike = type(one) is type(other) and about == said and mine.keys() == theirs.keys()
    return one is other or (alike and all(torch.equal(mine[name], theirs[name]) for name in mine))


def _refuse_plain(model: PackedModel, plan: Plan) -> None:
    """Refuse weights in 16 bits behind a rotation: they are stored behind it, and would be turned again."""
    coded = {linear.name for linear in model.coded}
    for layer in range(model.graph.dims.num_layers):
        for linear in model.graph.readers_of(layer):
            if linear.name not in coded and plan.at(linear.reads).operators:
                raise unread(f"{_WHAT} for `{linear.name}`, which is in 16 bits", {"site": linear.reads})
