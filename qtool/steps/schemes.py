"""The scheme of a whole model as users write it: a preset's name, parts, or a preset with some parts of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import get_args

from qtool.artifacts.store import Artifact
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.model.graph import ModelGraph
from qtool.plugins import Plugins
from qtool.scheme import VECTORS, Format, ModelScheme, Preset, TensorScheme, parse_tensor_scheme
from qtool.scheme_parts import KeysAndValues, Rule, RuledPart, cache_of
from qtool.steps.workspace import Workspace

NONE = "none"
_GROUP = re.compile(r"g\d+")
_NOT_STATIC = ("weights",)


def read_scheme(preset: str, parts: Mapping[str, str | None], plugins: Plugins) -> ModelScheme:
    """Read a model scheme.

    Args:
        preset: Name such as ``W4A4-g128``; empty for none.
        parts: ``weights``, ``activations``, ``kv`` and ``outputs`` as written tensor schemes. One that is given takes
            the place of the preset's; ``none`` means 16 bits, and None or empty that it is not given. Behind those of
            linears come exceptions, ``int4-sym-g64,down_proj=int8,layers.0-1=none``, of which the last that
            matches a linear holds; exceptions alone leave what the preset says of all other linears. Of a cache keys
            and values may be given apart, ``keys=SCHEME,values=SCHEME``, and ``queries=SCHEME`` with them.
        plugins: Where formats and presets are found.

    Raises:
        SchemeError: A part or the preset's name cannot be read, or a part's strategy means nothing there.
    """
    scheme = parse_model_scheme(preset, plugins.format, plugins.presets) if preset else ModelScheme()
    rules: list[Rule] = []
    if cache := parts.get("kv"):
        scheme = replace(scheme, name="", kv=_read_cache(cache, plugins))
    for name in get_args(RuledPart):
        text = parts.get(name)
        if not text:
            continue
        first, *others = text.split(",")
        if "=" in first:
            others = [first, *others]
        else:
            scheme = replace(scheme, name="", **{name: _read_one(name, first.strip(), plugins)})  # type: ignore[arg-type]
        found = [_read_rule(name, one, text, plugins) for one in others]
        rules += _effective(getattr(scheme, name), found, plugins)
    scheme = replace(scheme, rules=tuple(rules))
    if scheme.name and rules:
        scheme = replace(scheme, name=f"{scheme.name} ({_named(rules, plugins)})")
    scheme.check()
    return scheme


def with_default(text: str, default: str) -> str:
    """Return a written part that has exceptions only with a scheme for all other linears in front."""
    return f"{default},{text}" if default and "=" in text.partition(",")[0] else text


def read_part(name: str, text: str, plugins: Plugins) -> TensorScheme:
    """Read the scheme of one part; whether it means something there is not checked.

    Where nothing is ``static`` the word is not shown to the format, so that no hint of it has it.

    Raises:
        SchemeError: A word is unknown, or the format cannot carry the combination.
    """
    words = text.split("-")
    hidden = name in _NOT_STATIC and "static" in words
    kept = "-".join(word for word in words if word != "static") if hidden else text
    scheme = parse_tensor_scheme(kept, plugins.format, vector=VECTORS[name])
    return replace(scheme, static=True) if hidden else scheme


def _read_one(name: str, text: str, plugins: Plugins) -> TensorScheme | None:
    return None if text == NONE else read_part(name, text, plugins)


def _read_rule(name: RuledPart, text: str, whole: str, plugins: Plugins) -> Rule:
    pattern, equals, written = (one.strip() for one in text.partition("="))
    if not equals or not all(pattern.split(".")) or not written:
        raise SchemeError(
            f"cannot read the exception `{text}`",
            facts=((name, whole),),
            hint=f"--{name} SCHEME,down_proj=int8, or layers.0-1=none",
        )
    return Rule(name, pattern, _read_one(name, written, plugins))


def _effective(default: TensorScheme | None, rules: Sequence[Rule], plugins: Plugins) -> list[Rule]:
    """Return rules without those that say nothing: the same pattern comes again, or it is as without any rule.

    Without one head and embedding are in 16 bits, and linears of blocks are as the default says.
    """
    found: list[Rule] = []
    for place, rule in enumerate(rules):
        again = any(later.pattern == rule.pattern for later in rules[place + 1 :])
        if not again and (found or _changes(rule, default, plugins)):
            found.append(rule)
    return found


def _changes(rule: Rule, default: TensorScheme | None, plugins: Plugins) -> bool:
    """Say whether a first rule says anything; `model.*` is for the embedding of some family and for its blocks."""
    families = plugins.every("families").values()
    if not any(rule.matches(name) for family in families for name in (family.head, family.embedding)):
        return rule.scheme != default
    blocks = (f"{family.layers}.0.{linear.module}" for family in families for linear in family.linears)
    return rule.scheme is not None or (default is not None and any(map(rule.matches, blocks)))


def _named(rules: Sequence[Rule], plugins: Plugins) -> str:
    """Return how tables write exceptions: ``down_proj W8A8, layers.0 W16``."""
    found: dict[str, str] = {}
    for rule in rules:
        bits = 16 if rule.scheme is None else plugins.format(rule.scheme.format).bits
        found[rule.pattern] = f"{found.get(rule.pattern, '')}{rule.part[0].upper()}{bits}"
    return ", ".join(f"{pattern} {bits}" for pattern, bits in found.items())


def parse_model_scheme(text: str, lookup: Callable[[str], Format], presets: Mapping[str, Preset]) -> ModelScheme:
    """Read a preset name, with an optional group suffix: ``W4A16``, ``W4A4-g128``, ``NVFP4``.

    Args:
        text: Preset name; ``-gN`` replaces the group size of the weights (and makes per-channel weights grouped).
        lookup: Finds a format by name.
        presets: Known presets by upper-case name.

    Returns:
        The scheme of weights, activations and KV cache.

    Raises:
        SchemeError: No such preset; the facts list them. Or a strategy of its parts means nothing there.
    """
    head, _, suffix = text.partition("-")
    preset = presets.get(text.upper())
    if preset is None and _GROUP.fullmatch(suffix):
        preset = presets.get(head.upper())
    else:
        suffix = ""
    if preset is None:
        raise SchemeError(
            f"unknown scheme `{text}`", facts=(("known", ", ".join(sorted(presets))),), hint="--scheme W4A16"
        )

    def read(name: str, part: str | None, *, grouped: bool = False) -> TensorScheme | None:
        if part is None:
            return None
        return parse_tensor_scheme(f"{part}-{suffix}" if grouped and suffix else part, lookup, vector=VECTORS[name])

    scheme = ModelScheme(
        weights=read("weights", preset.weights, grouped=True),
        activations=read("activations", preset.activations, grouped=preset.group_activations),
        kv=read("kv", preset.kv),
        name=text,
    )
    scheme.check()
    return scheme


def _read_cache(text: str, plugins: Plugins) -> TensorScheme | KeysAndValues | None:
    """Read the scheme of a cache, or ``queries=SCHEME,keys=SCHEME,values=SCHEME``; what is not given is in 16 bits.

    Raises:
        SchemeError: Something else is given, or one of them twice.
    """
    if not set(text) & set("=,"):
        return _read_one("kv", text, plugins)
    parts = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    if not set(names) <= {"queries", "keys", "values"} or len(set(names)) < len(names):
        raise SchemeError(
            f"cannot read the scheme of a cache `{text}`",
            facts=(("grammar", "SCHEME, or keys=SCHEME,values=SCHEME, perhaps with queries=SCHEME"),),
            hint="--kv keys=int4-asym-channel-g32,values=int4-asym-token-head",
        )
    found = {name: _read_one("kv", one, plugins) for name, _, one in parts}
    return cache_of(*(found.get(name) for name in ("keys", "values", "queries")))


def warn_of_another_scheme(plan: Artifact, scheme: ModelScheme, workspace: Workspace) -> None:
    """Say so if a plan was made for a scheme and another one is used: many methods fit their operators to it."""
    planned = ModelScheme.from_json(plan.manifest.step.config["scheme"])
    unnamed = replace(planned, name="", scale_per_head=False)
    if unnamed != ModelScheme() and unnamed != replace(scheme, name="", scale_per_head=False):
        workspace.warn(f"the plan was made for {planned}, not for {scheme}")


def check_scheme(scheme: ModelScheme, subject: Subject) -> None:
    """Refuse, before any work, a scheme that does not fit some layer, or channels that its plan sets apart.

    Raises:
        SchemeError: A group does not divide an input (names the layer), a strategy means nothing where it stands, an
            exception is for no linear, or linears with one input round it in different ways.
        UsageError: No weights are to be quantized.
    """
    scheme.check()
    graph, subject = subject.model.graph, replace(subject, scheme=scheme)
    check_rules(scheme, graph)
    _check_ends(scheme, graph)
    if not subject.coded:
        raise UsageError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    for linear in subject.coded:
        width, inputs = graph.width(linear.spec.reads), subject.input_grid(linear)
        subject.weight_grid(linear).check(width, layer=linear.name)
        if inputs is not None:
            inputs.check(width, layer=linear.name)
        if (outputs := scheme.of(linear.name).outputs) is not None:
            outputs.groups_of(subject.shape(linear)[0], layer=linear.name, side="output")
    _check_inputs(scheme, graph)
    dims = graph.dims
    parts = ((scheme.keys, dims.head_dim), (scheme.values, dims.value_dim), (scheme.queries, dims.head_dim))
    for part, width in parts:
        if part is not None:
            part.groups_of(width, layer="the KV cache")


def _check_ends(scheme: ModelScheme, graph: ModelGraph) -> None:
    """Refuse exceptions of activations for the embedding, and for a head whose weights stay in 16 bits; of outputs all.

    Of outputs an exception for everything, blocks among it, is none for head and embedding where it says 16 bits.
    """
    of_ends = [rule for rule in scheme.rules if not any(rule.matches(linear.name) for linear in graph.linears)]
    for end in graph.ends:
        named = (rule.scheme for rule in reversed(of_ends) if rule.part == "outputs" and rule.matches(end.name))
        if (outputs := scheme.of(end.name).outputs or next(named, None)) is not None:
            raise SchemeError(
                f"what `{end.name}` puts out is not rounded: outputs are of the linears of blocks",
                facts=(("outputs", outputs),),
                hint=f"--outputs SCHEME,{end.name}=none",
            )
    own = [rule for rule in of_ends if rule.part == "activations" and rule.scheme is not None]
    embedding, head = graph.embedding.name, graph.head.name
    if scheme.of(embedding).activations is not None or any(rule.matches(embedding) for rule in own):
        raise SchemeError(
            f"`{embedding}` reads tokens, which are not rounded", hint=f"--activations without {embedding}=SCHEME"
        )
    if any(rule.matches(head) for rule in own) and scheme.of(head).activations is None:
        raise SchemeError(
            f"the input of `{head}` is not rounded where its weights stay in 16 bits",
            facts=(("activations", own[-1].scheme),),
            hint=f"--weights SCHEME,{head}=int8-sym-channel",
        )


def check_rules(scheme: ModelScheme, graph: ModelGraph) -> None:
    """Refuse exceptions that are for no linear.

    Raises:
        SchemeError: Names the nearest that is for some.
    """
    for rule in scheme.rules:
        if any(rule.matches(linear.name) for linear in (*graph.linears, *graph.ends)):
            continue
        kinds = list(dict.fromkeys(linear.name.rpartition(".")[2] for linear in graph.linears))
        layers, experts = range(graph.dims.num_layers), range(graph.dims.experts)
        known = [*kinds, *(f"layers.{one}" for one in layers), *(f"experts.{one}" for one in experts)]
        known += [end.name for end in graph.ends]
        known += dict.fromkeys(linear.spec.module for linear in graph.linears if linear.expert is None)
        nearest = (get_close_matches(rule.pattern, known, n=1, cutoff=0) or kinds)[0]
        raise SchemeError(
            f"no linear that is quantized has a name with `{rule.pattern}`",
            facts=(("linears", ", ".join(kinds)), ("blocks", f"layers.0-{graph.dims.num_layers - 1}")),
            hint=f"--{rule.part} SCHEME,{nearest}={rule.scheme or NONE}",
        )


def _check_inputs(scheme: ModelScheme, graph: ModelGraph) -> None:
    """Refuse linears that read one input and round it in different ways: it is rounded once for all of them."""
    known: dict[str, tuple[str, TensorScheme]] = {}
    for linear in graph.linears if scheme.rules else ():
        activations = scheme.of(linear.name).activations
        if activations is None:
            continue
        first, other = known.setdefault(linear.reads, (linear.name, activations))
        if other != activations:
            raise SchemeError(
                f"`{linear.name}` and `{first}` read one input, which cannot be rounded in two ways",
                facts=((first, other), (linear.name, activations)),
                hint="name all linears that read it, as in --activations int4,self_attn.[qkv]_proj=int8",
            )
