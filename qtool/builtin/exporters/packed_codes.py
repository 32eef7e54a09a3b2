"""Codes and scales that a checkpoint of some layout holds, under the names that an artifact has for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qtool.artifacts.layout import Header, TensorSlot
from qtool.artifacts.store import Artifact
from qtool.engine.grid import Grid
from qtool.engine.packed import PackedLinear
from qtool.engine.stored import packed_tensors
from qtool.errors import ArtifactError, NumericalError
from qtool.model.graph import LinearSite
from qtool.plugins import Plugins
from qtool.scheme import GroupParameters, ModelScheme, TensorScheme

_BYTE = 8
_UNREADABLE = (KeyError, ValueError, RuntimeError, IndexError, ArtifactError)


@dataclass(frozen=True)
class CodesArtifact(Artifact):
    """What stands for an artifact of weights alone, read a linear at a time.

    Attributes:
        scheme: What the checkpoint says, or its codes are.
        plugins: Where formats are found.
        coded: What has codes.
        codes_of: Reads those of one, given its weights' scheme and grid.
        scaled: Names of those whose scales have a multiplier.
    """

    scheme: ModelScheme
    plugins: Plugins
    coded: tuple[LinearSite, ...]
    codes_of: Callable[[LinearSite, TensorScheme, Grid], PackedLinear]
    scaled: Collection[str] = field(default=())

    @cached_property
    def header(self) -> Header:
        """The names of all tensors, without shapes or places."""
        leaves = {one.name: ("codes", "scale", *self._beside(one.name)) for one in self.coded}
        names = (f"{name}.{leaf}" for name, each in leaves.items() for leaf in each)
        return Header({}, dict.fromkeys(names, TensorSlot("U8", (), 0, 0)))

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as an artifact stores it."""
        linear, _, leaf = name.rpartition(".")
        return self.tensors(f"{linear}.")[leaf]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of a linear as an artifact stores them, keyed by the last parts of their names."""
        name = prefix.removesuffix(".")
        if name not in self._by_name:
            return {}
        stored = packed_tensors(name, self.read(name), self._grid(name))
        return {full.removeprefix(prefix): tensor for full, tensor in stored.items()}

    def read(self, name: str) -> PackedLinear:
        """Return a linear's codes and scales.

        Raises:
            ArtifactError: They do not fit what the checkpoint says of them.
            NumericalError: They hold NaN or Inf.
        """
        grid = self._grid(name)
        try:
            found = self.codes_of(self._by_name[name], weights_of(self.scheme, name), grid)
        except _UNREADABLE as error:
            raise unreadable(self, name, error) from error
        require_numbers(self, name, found, grid)
        return found

    @cached_property
    def _by_name(self) -> Mapping[str, LinearSite]:
        return {linear.name: linear for linear in self.coded}

    def _beside(self, name: str) -> tuple[str, ...]:
        """Return what a linear has beside codes and scales."""
        weights = weights_of(self.scheme, name)
        zeros = () if weights.symmetric else ("offset" if weights.offset else "zero_point",)
        return (*zeros, *(("global_scale",) if name in self.scaled else ()))

    def _grid(self, name: str) -> Grid:
        weights = weights_of(self.scheme, name)
        return Grid.of(weights, self.plugins.format(weights.format))


def unreadable(artifact: Artifact, name: str, error: Exception) -> ArtifactError:
    """Return the error that names a linear whose codes do not fit what a checkpoint says of them."""
    facts = (("checkpoint", artifact.path), ("reason", str(error).split("\n")[0]))
    return ArtifactError(f"cannot read the codes of `{name}`", facts=facts)


def require_finite(artifact: Artifact, name: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors that hold NaN or Inf.

    Args:
        artifact: What stands for the checkpoint that they were read from.
        name: What has them.
        tensors: By what they are called; integers are passed over.

    Raises:
        NumericalError: Names the first.
    """
    for leaf, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            facts = (("tensor", leaf), ("checkpoint", artifact.path))
            raise NumericalError(f"what is stored of `{name}` holds NaN or Inf", facts=facts, hint="download it again")


def require_numbers(artifact: Artifact, name: str, found: PackedLinear, grid: Grid) -> None:
    """Refuse scales, offsets and codes of a linear that stand for NaN or Inf; as ``require_finite`` does.

    Codes of floats in 8 bits that do have the largest magnitudes, so the largest that there is says whether one is.
    """
    own, (part,) = found.parameters, grid.parts
    tensors = {"scale": own.scale, "offset": own.offset, "multiplier of scales": own.global_scale}
    last = torch.full((1, 1), (1 << found.bits - 1) - 1, dtype=torch.uint8)
    at_one = GroupParameters(torch.ones(1))
    if found.bits == _BYTE and not bool(part.format.decode(last, at_one).isfinite().all()):
        largest = (found.stream & last).amax().reshape(1, 1)
        tensors["codes"] = part.format.decode(largest, at_one)
    require_finite(artifact, name, tensors)


def weights_of(scheme: ModelScheme, name: str) -> TensorScheme:
    """Return the scheme of a linear's weights.

    Raises:
        LookupError: They are not quantized.
    """
    weights = scheme.of(name).weights
    if weights is None:
        raise LookupError(name)
    return weights
