"""The parts of a model's scheme: rules for linears by name, keys and values apart, and what means nothing somewhere.

Keys may have a scale for each channel, shared by ``group_size`` neighbouring tokens (``int2-asym-channel-g32``): their
outliers stay in few channels. The tokens of a group that is not full yet stay in 16 bits. Values, whose outliers do
not, have scales within a token: one for each head (``token-head``), or for groups of a head's channels (``-g32``).

References:
    Liu et al. 2024, KIVI, arXiv:2402.02750, section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from qtool.errors import SchemeError

if TYPE_CHECKING:
    from qtool.scheme import Strategy, TensorScheme

RuledPart = Literal["weights", "activations", "outputs"]
_NUMBERS = re.compile(r"(\d+)-(\d+)")
_TOKENS = 32
_TWO_LEVELS = "scales that are codes are of weights, whose rows share ranges"


@dataclass(frozen=True)
class Rule:
    """What linears have in place of a model's scheme, by their names.

    Attributes:
        part: Whether it is of weights, of activations or of outputs.
        pattern: Some neighbouring parts of a dotted name, as globs; ``N-M`` is every number from N to M. So
            ``down_proj``, ``layers.0-1`` and ``self_attn.[qk]_proj`` match what has them anywhere in its name.
        scheme: What the linears have; None is 16 bits.
    """

    part: RuledPart
    pattern: str
    scheme: TensorScheme | None

    def matches(self, linear: str) -> bool:
        """Say whether it is for a linear, by its full module name."""
        wanted, parts = self.pattern.split("."), linear.split(".")
        return any(all(map(_matches, wanted, parts[start:])) for start in range(len(parts) - len(wanted) + 1))


def in_block(linear: str) -> bool:
    """Say whether a linear is in a block: the names of those, and of no others, have numbers in them."""
    return any(map(str.isdecimal, linear.split(".")))


def _matches(pattern: str, part: str) -> bool:
    if (numbers := _NUMBERS.fullmatch(pattern)) and part.isdecimal():
        return int(numbers[1]) <= int(part) <= int(numbers[2])
    return fnmatchcase(part, pattern)


@dataclass(frozen=True)
class KeysAndValues:
    """Two schemes of a cache, and one of what reads it; None is 16 bits.

    Attributes:
        keys: Of keys, behind the rotary positions and what a plan does there.
        values: Of values.
        queries: Of queries, where keys are; they are rounded as they come, and in no cache.
    """

    keys: TensorScheme | None
    values: TensorScheme | None
    queries: TensorScheme | None = None

    def __str__(self) -> str:
        front = "" if self.queries is None else f"queries={self.queries},"
        return f"{front}keys={self.keys or 'none'},values={self.values or 'none'}"


def cache_of(
    keys: TensorScheme | None, values: TensorScheme | None, queries: TensorScheme | None = None
) -> TensorScheme | KeysAndValues | None:
    """Return the scheme of a cache: one where keys and values have the same, and queries are in 16 bits."""
    return keys if keys == values and queries is None else KeysAndValues(keys, values, queries)


def one_level(scheme: TensorScheme) -> TensorScheme:
    """Return a scheme whose scales are no codes."""
    return replace(scheme, scale_bits=None, scale_rows=None)


def indivisible(scheme: TensorScheme, n: int, layer: str, side: str) -> SchemeError:
    """Return the refusal of groups that do not divide an axis of ``n`` values, the ``side`` of a layer."""
    fits = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if n % g == 0]
    return SchemeError(
        f"group size {scheme.group_size} does not divide the {side} of `{layer}`",
        facts=((f"{side} size", n), ("scheme", scheme)),
        hint=f"use a group size of {fits[0]}" if fits else "use -channel",
    )


def check_part(name: str, scheme: TensorScheme | None, vector: Strategy) -> None:
    """Refuse what means nothing for weights, for activations or for outputs.

    Args:
        name: Which of them.
        scheme: Theirs, or None.
        vector: What a vector of the last axis is called there.

    Raises:
        SchemeError: Outliers of all but activations, or a scale for what there is none of; names the nearest.
    """
    if scheme is None:
        return
    reasons, nearest = list[str](), scheme
    if scheme.scale_bits is not None and name != "weights":
        reasons.append(f"{_TWO_LEVELS}, and those of {name} are made anew for each token")
        nearest = one_level(nearest)
    if scheme.outlier_threshold is not None and name != "activations":
        reasons.append(f"{name} have no outlier columns: those are of activations")
        nearest = replace(nearest, outlier_threshold=None)
    if scheme.static and name == "weights":
        reasons.append("weights have no static scales: those are of activations, of outputs and of kv")
        nearest = replace(nearest, static=False)
    if scheme.strategy == "block" and name != "weights":
        reasons.append(f"blocks are of weights: of {name} a token has groups")
        nearest = replace(nearest, strategy="group")
    elif scheme.strategy not in ("tensor", "group", "block", vector):
        reasons.append(f"`{scheme.strategy}` means nothing for {name}")
        nearest = replace(nearest, strategy=vector, group_size=None)
    elif scheme.strategy == vector and scheme.group_size is not None:
        reasons.append(f"{name} have groups along their {'vectors' if name == 'outputs' else 'inputs'}")
        nearest = replace(nearest, strategy="group")
    if reasons:
        hint = f"nearest that works: --{name} {nearest}"
        raise SchemeError(reasons[0], facts=(("scheme", scheme),), hint=hint)


def check_cache(keys: TensorScheme | None, values: TensorScheme | None, queries: TensorScheme | None = None) -> None:
    """Refuse scales that mean nothing in a cache.

    Raises:
        SchemeError: Outliers, a scale a token or an output row, or values or queries with a scale a channel; names the
            nearest.
    """
    found = [_nearest(keys, of_keys=True), *(_nearest(one, of_keys=False) for one in (values, queries))]
    reason = next((reason for _, reason in found if reason), "")
    if reason:
        given, nearest = cache_of(keys, values, queries), cache_of(*(one for one, _ in found))
        raise SchemeError(reason, facts=(("scheme", given),), hint=f"nearest that works: --kv {nearest}")


def _nearest(scheme: TensorScheme | None, *, of_keys: bool) -> tuple[TensorScheme | None, str]:
    """Return the nearest scheme that works, and what is wrong with this one."""
    if scheme is None:
        return None, ""
    reasons, nearest, size = [], replace(scheme, outlier_threshold=None), scheme.group_size
    if nearest != scheme:
        reasons.append("kv have no outlier columns: those are of activations")
    if scheme.scale_bits is not None:
        reasons.append(f"{_TWO_LEVELS}, and those of kv are made anew for each token")
        nearest = one_level(nearest)
    if scheme.strategy == "block":
        reasons.append("blocks are of weights: of kv a token has groups")
        nearest = replace(nearest, strategy="group")
    elif scheme.strategy == "token":
        reasons.append("`token` means nothing for kv, which have a scale for each head of a token")
        nearest = replace(nearest, strategy="token-head", group_size=None)
    elif scheme.strategy == "channel" and not of_keys:
        reasons.append("`channel` means nothing for values and queries, whose scales are of one token")
        nearest = replace(nearest, strategy="group" if size else "token-head")
    elif scheme.strategy == "channel" and size is None:
        reasons.append("`channel` means nothing for keys without a number of tokens: a cache grows token by token")
        nearest = replace(nearest, group_size=_TOKENS)
    return nearest, reasons[0] if reasons else ""
