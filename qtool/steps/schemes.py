"""The scheme of a whole model as users write it: a preset's name, parts, or a preset with some parts of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qtool.artifacts.store import Artifact
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import VECTORS, ModelScheme, TensorScheme, parse_model_scheme, parse_tensor_scheme
from qtool.scheme_parts import KeysAndValues, cache_of
from qtool.steps.workspace import Workspace

NONE = "none"


def read_scheme(preset: str, parts: Mapping[str, str | None], plugins: Plugins) -> ModelScheme:
    """Read a model scheme.

    Args:
        preset: Name such as ``W4A4-g128``; empty for none.
        parts: ``weights``, ``activations`` and ``kv`` as written tensor schemes. One that is given takes the place
            of the preset's; ``none`` means 16 bits, and None or empty that it is not given.
        plugins: Where formats and presets are found.

    Raises:
        SchemeError: A part or the preset's name cannot be read, or a part's strategy means nothing there.
    """
    scheme = parse_model_scheme(preset, plugins.format, plugins.presets) if preset else ModelScheme()
    given: dict[str, Any] = {name: _read_part(name, text, plugins) for name, text in parts.items() if text}
    if given:
        scheme = replace(scheme, **given, name="")
        scheme.check()
    return scheme


def _read_part(name: str, text: str, plugins: Plugins) -> TensorScheme | KeysAndValues | None:
    if name == "kv" and "=" in text:
        return _read_cache(text, plugins)
    return None if text == NONE else parse_tensor_scheme(text, plugins.format, vector=VECTORS[name])


def _read_cache(text: str, plugins: Plugins) -> TensorScheme | KeysAndValues | None:
    """Read ``keys=SCHEME,values=SCHEME``; one that is not given is in 16 bits.

    Raises:
        SchemeError: Something else is given, or one of them twice.
    """
    parts = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    if not set(names) <= {"keys", "values"} or len(set(names)) < len(names):
        raise SchemeError(
            f"cannot read the scheme of a cache `{text}`",
            facts=(("grammar", "SCHEME, or keys=SCHEME,values=SCHEME"),),
            hint="--kv keys=int4-asym-channel-g32,values=int4-asym-token-head",
        )
    found = {
        name: None if one == NONE else parse_tensor_scheme(one, plugins.format, vector=VECTORS["kv"])
        for name, _, one in parts
    }
    return cache_of(found.get("keys"), found.get("values"))


def warn_of_another_scheme(plan: Artifact, scheme: ModelScheme, workspace: Workspace) -> None:
    """Say so if a plan was made for a scheme and another one is used: many methods fit their operators to it."""
    planned = ModelScheme.from_json(plan.manifest.step.config["scheme"])
    parts = (planned.weights, planned.activations, planned.kv)
    if any(parts) and parts != (scheme.weights, scheme.activations, scheme.kv):
        workspace.warn(f"the plan was made for {planned}, not for {scheme}")


def check_scheme(scheme: ModelScheme, subject: Subject) -> None:
    """Refuse, before any work, a scheme that does not fit some layer, or channels that its plan sets apart.

    Raises:
        SchemeError: A group does not divide an input (names the layer), a strategy means nothing where it stands, or
            a KV cache would need all of its tokens before the first could be stored.
        UsageError: No weights are to be quantized.
    """
    if scheme.weights is None:
        raise UsageError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    scheme.check()
    graph, subject = subject.model.graph, replace(subject, scheme=scheme)
    for linear in graph.linears:
        width, inputs = graph.width(linear.spec.reads), subject.input_grid(linear)
        subject.weight_grid(linear).check(width, layer=linear.name)
        if inputs is not None:
            inputs.check(width, layer=linear.name)
    for part, width in ((scheme.keys, graph.dims.head_dim), (scheme.values, graph.dims.value_dim)):
        if part is None:
            continue
        part.groups_of(width, layer="the KV cache")
        # One dynamic scale for all that attention sees stands in for the static one of engines; two levels do not.
        if subject.plugins.format(part.format).global_scale(torch.ones(()), part) is not None:
            raise SchemeError(
                "a KV cache grows token by token, so its tokens cannot share a scale",
                facts=(("scheme", part),),
                hint="--kv int8-asym-token-head",
            )
