"""Which scheme that an exporter carries is nearest to one that it does not.

The rule is the same for all: no fewer bits where there is a choice, the same kind of numbers (integers or floats), the
nearest bits, then the nearest group. Weights count before inputs, and what is in 16 bits stays so where it can. What an
exporter carries is asked of its own check, so no hint names what it would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from math import log2
from typing import TypeAlias, get_args

from qtool.builtin.exporters.ct_layout import checkpoint_dtype, choose_layout
from qtool.builtin.exporters.mixed import groups_of
from qtool.engine.subject import Subject
from qtool.errors import SchemeError
from qtool.plugins import Plugins
from qtool.scheme import VECTORS, ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.scheme_parts import Rule, RuledPart, in_block

Apart: TypeAlias = tuple[float, ...]
"""How far two schemes are apart in several ways, of which the first that differs decides."""
Check: TypeAlias = Callable[[ModelScheme], object]
"""What raises a ``SchemeError`` for a scheme that an exporter does not carry."""

_CARRIED: Mapping[str, tuple[str, ...]] = {
    "weights": (
        *(
            f"int{bits}-{form.format(size)}-s{scale}"
            for bits in range(2, 9)
            for form in ("sym-{}", "asym-{}", "asym-{}-offset")
            for size in ("channel", "g*", "g32")
            for scale in ("fp16", "bf16")
        ),
        *("nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8", "fp8-channel-sbf16", "fp8-tensor-sbf16", "fp8-b*-sbf16"),
    ),
    "activations": (
        *("int4-sym-token-sfp32-half", "int8-sym-token-sfp32-half", "nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8-rceil"),
        *("fp8-token", "fp8-tensor", "fp8-g*"),
        *("int8-tensor-static", "int8-asym-tensor-static", "fp8-tensor-static"),
    ),
    "outputs": (),  # as they are asked for, or none
}
"""What checkpoints carry, as users write it; a star is the group size of the weights that are asked for."""
_VALUES: Mapping[str, int] = {"channel": 2**20, "token": 2**20, "token-head": 2**10, "head": 2**30, "tensor": 2**40}
"""Values to a scale for strategies without a size: any number that keeps them in order."""


def check_schemes(subject: Subject, check: Check, *, decoded: str = "hf") -> None:
    """Check the scheme of every linear, and give a refusal that names nothing to do the nearest that is carried.

    Args:
        subject: A quantized subject.
        check: The exporter's own.
        decoded: The exporter that writes decoded weights for the same consumers.

    Raises:
        SchemeError: As ``check`` does.
    """
    for scheme, _ in groups_of(subject):
        try:
            check(scheme)
        except SchemeError as error:
            if error.hint:
                raise
            hint = _hint(subject, partial(_holds, check), decoded)
            raise SchemeError(error.message, facts=error.facts, hint=hint) from None


def _hint(subject: Subject, held: Callable[[ModelScheme], bool], decoded: str) -> str:
    """Return the nearest scheme as options, with its exceptions, and the exporter that keeps the numbers."""
    same = all(_compressed_tensors_holds(subject, scheme) for scheme, _ in groups_of(subject))
    other = "compressed-tensors, which keeps these numbers" if same else f"{decoded}, which decodes them"
    kept = f"qtool pack SOURCE --to {other}"
    scheme, plugins = subject.scheme, subject.plugins
    main = _nearest(replace(scheme, rules=()), plugins, held)
    if main is None:
        return kept
    parts = {part: _written(main, part, plugins) for part in get_args(RuledPart)}
    for pattern in dict.fromkeys(rule.pattern for rule in scheme.rules):
        names = (linear.name for linear in (*subject.model.graph.linears, *subject.model.graph.ends))
        first = next((name for name in names if Rule("weights", pattern, None).matches(name)), None)
        own = None if first is None else _nearest(scheme.of(first), plugins, held)
        if first is None or own is None:
            continue
        usual = main if in_block(first) else ModelScheme()
        for part in parts:
            follows = part != "weights" and own.weights is None  # what is read by what is in 16 bits is, too
            if getattr(own, part) != getattr(usual, part) and not follows:
                parts[part] += f",{pattern}={_written(own, part, plugins)}"
    options = [f"--{part} {text}" for part, text in parts.items() if text != "none"]
    options += [f"--kv {main.kv}"] if main.kv is not None else []
    return f"nearest that fits: {' '.join(options)}; or {kept}"


def _nearest(own: ModelScheme, plugins: Plugins, held: Callable[[ModelScheme], bool]) -> ModelScheme | None:
    """Return the nearest scheme that is carried, itself if it is, None if none is."""
    if own.weights is None or held(own):
        return own
    static = parse_tensor_scheme("fp8-tensor-static", plugins.format, vector=VECTORS["kv"])
    caches = (None,) if own.kv is None else (own.kv, static, None)
    rest = list(enumerate(product((None,) if own.outputs is None else (own.outputs, None), caches)))
    options = product(_apart_each(own, "weights", plugins), _apart_each(own, "activations", plugins), rest)
    nearest = sorted(options, key=lambda one: (one[2][0], one[0][0], one[1][0], one[0][1], one[1][1]))
    schemes = (
        replace(own, weights=one[2], activations=other[2], outputs=outputs, kv=kv)
        for one, other, (_, (outputs, kv)) in nearest
    )
    return next(filter(held, schemes), None)


def _apart_each(own: ModelScheme, part: str, plugins: Plugins) -> list[tuple[Apart, Apart, TensorScheme | None]]:
    """Return what a part may be: as it is, in 16 bits if it is of inputs, or as checkpoints have it; how far apart."""
    wanted = getattr(own, part)
    others = [None] if part == "activations" else []
    return [(*_apart(wanted, one, plugins), one) for one in (wanted, *others, *_read(own, part, plugins))]


def _read(own: ModelScheme, part: str, plugins: Plugins) -> dict[TensorScheme, str]:
    """Return what checkpoints carry of weights or of inputs, with how it is written, for the groups of a scheme."""
    size = None if own.weights is None else own.weights.group_size
    rows = f"{own.weights.block_rows}x" if own.weights is not None and own.weights.block_rows else ""
    texts = [
        text.replace("b*", f"b{rows}*").replace("*", str(size)) for text in _CARRIED[part] if size or "*" not in text
    ]
    return {parse_tensor_scheme(text, plugins.format, vector=VECTORS[part]): text for text in texts}


def _written(own: ModelScheme, part: str, plugins: Plugins) -> str:
    scheme = getattr(own, part)
    return "none" if scheme is None else _read(own, part, plugins).get(scheme, str(scheme))


def _apart(wanted: TensorScheme | None, held: TensorScheme | None, plugins: Plugins) -> tuple[Apart, Apart]:
    """Return how far numbers are apart: whether bits are lost, kind, bits; and groups: scales, values, zero points."""
    if wanted is None or held is None:
        return (0.0 if wanted is held else 2.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
    more = plugins.format(held.format).bits - plugins.format(wanted.format).bits
    kind = wanted.format.startswith("int") != held.format.startswith("int")
    ratio = abs(log2(_values(held) / _values(wanted)))
    numbers = (float(more < 0), float(kind), float(abs(more)))
    four = plugins.format(wanted.format).bits == 4  # where powers of two cost more than groups of another size
    coarser = four and held.scale == "e8m0" != wanted.scale
    return numbers, (
        float(coarser),
        ratio,
        float(held.static != wanted.static),
        float(held.symmetric != wanted.symmetric),
    )


def _values(scheme: TensorScheme) -> int:
    """Return how many values share a scale."""
    size = scheme.group_size
    if size is None:
        return _VALUES[scheme.strategy]
    return size * (scheme.block_rows or size) if scheme.strategy == "block" else size


def _holds(check: Check, scheme: ModelScheme) -> bool:
    try:
        check(scheme)
    except SchemeError:
        return False
    return True


def _compressed_tensors_holds(subject: Subject, scheme: ModelScheme) -> bool:
    """Say whether compressed-tensors, which has the most layouts, carries these very numbers."""
    weights = scheme.weights
    if weights is None:
        return True
    plain = weights.scale_bits is None and not (weights.real or weights.offset)
    return plain and _holds(lambda one: (choose_layout(one), checkpoint_dtype(weights, subject.model.dtype)), scheme)
