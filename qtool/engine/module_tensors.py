"""The tensors of a module that files hold: where they are, and how they are let go of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds something, and what it calls it."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what files hold of a module, by name: parameters, and buffers that are not computed."""
    yield from module.state_dict(keep_vars=True).items()


def release(module: nn.Module) -> None:
    """Let go of what files hold of a module; what it computed itself stays."""
    for name, value in list(tensors_of(module)):
        (owner, leaf), empty = place(module, name), value.detach().to("meta")
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False) if leaf in owner._parameters else empty)
