"""What a quantized number is: the scheme of one tensor, of a whole model, and the contract of a format.

A *format* (``int4``, ``fp4``, ``nvfp4``, …) is a plugin that turns values into codes and back. A *tensor scheme* is a
format plus the choices that go with it: symmetric or not, how many values share a scale, how the scale is stored.
A *model scheme* has one each for weights, activations, the KV cache and outputs of linears, and rules for others.

Written forms: ``int4-sym-g128``, ``int8-asym-token``, ``fp4-g16-se4m3``, ``nvfp4``; grammar::

    <format>[-sym|-asym][-tensor|-channel|-token|-token-head|-head|-g<N>|-b<N>|-b<rows>x<N>][-real|-offset][-s<scales>]
        [-<range rule>][-<exponent rule>][-c<fraction of the range>][-o<least outlier>][-scales<bits>g<rows>][-static]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from qtool.errors import SchemeError
from qtool.scheme_parts import KeysAndValues, Rule, RuledPart, check_cache, check_part, in_block, indivisible

if TYPE_CHECKING:
    from jaxtyping import Float, Integer, UInt8
    from torch import Tensor

Strategy = Literal["tensor", "channel", "token", "token-head", "head", "group", "block"]
ScaleFormat = Literal["fp32", "fp16", "bf16", "e4m3", "ue5m3", "e5m2", "e2m1", "int4", "e8m0"]
RangeRule = Literal["tight", "full", "half", "signed_full", "narrow", "four_over_six"]
ExponentRule = Literal["even", "floor", "rceil", "search"]

VECTORS: Mapping[str, Strategy] = {"weights": "channel", "activations": "token", "kv": "token-head", "outputs": "token"}
"""What a vector of the last axis is in each part of a model: an output row, what one token has, or a head of it."""
_RARE = ("scale_bits", "scale_rows", "block_rows", "queries", "outputs", "static", "offset")


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: Name of the format plugin, e.g. ``int4``.
        symmetric: Zero is at the middle of the grid; no zero point is stored.
        strategy: Which values share a scale: all (``tensor``), an output row (``channel``), a token's vector
            (``token``), a head's vector of it (``token-head``), a head of all (``head``), ``group_size`` neighbours
            along the input axis (``group``), or those of ``block_rows`` output rows (``block`` of a weight; smaller at
            the ends of the axes). Of keys ``channel`` is each channel of a head, over ``group_size`` tokens.
        group_size: Values to a scale, for the strategy ``group``, and for ``channel`` of keys; columns of a ``block``.
        scale: Storage format of the scale; codes are chosen against the rounded scale. The short ones (``e4m3``,
            ``ue5m3``, ``e2m1``, and ``int4`` from 1 to 15) are multiples of a float32 that the whole tensor shares.
        range_rule: Symmetric integers, here INT4: ``tight`` is the least scale that clips nothing, the larger of
            max/7 and -min/8; ``full`` is amax/7, which leaves the code -8 unused; ``half`` is amax/7.5, which clips
            the largest value by half a step where it is positive. ``signed_full`` is v/-8 for the value v of the
            largest magnitude, so the scale has a sign, and what the other end has beyond 7/8 of it is clipped.
            ``narrow`` is ``full`` without the code -8, whatever clipping and error feedback ask for. FP4 with E4M3
            scales: ``four_over_six`` puts the largest value of each group at 6 or 4, whichever has the lesser squared
            error. Other formats have ``tight`` only.
        exponent_rule: How a power-of-two scale is rounded: ``even`` (mantissas from 1.75 up round up), ``floor`` (OCP
            MX), ``rceil`` (never saturates), ``search`` (``even`` or its neighbour with the lesser squared error).
        clip: Fraction of each group's range that is kept, from 0.01 to 1, from which searches of the range start.
        outlier_threshold: Of activations only: columns that hold a value of this magnitude or more anywhere in a window
            stay in 16 bits, the others are quantized as if those were 0; None, which ``o0`` means too, quantizes all.
        real: Zero points of integers are real numbers in the format of scales; 0 need not have a code.
        scale_bits: Scales and (real) zero points of integer weights are codes of so many bits, ``low + step * code``,
            with ``low`` and ``step`` in the format ``scale``, which ``scale_rows`` neighbouring rows share.
        scale_rows: See ``scale_bits``.
        static: The scale of a tensor, or of a head of keys, values or queries, is found once, and the zero point of
            asymmetric integers as well (``qtool.engine.static_scales``).
        offset: Asymmetric integers are ``scale * code + offset``, with an offset in the format of scales in place of a
            zero point; codes are chosen against the rounded offset, and 0 need not have one.
        block_rows: Rows of a ``block``; None is as many as it has columns, a square.
    """

    format: str
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    scale: ScaleFormat = "fp32"
    range_rule: RangeRule = "tight"
    exponent_rule: ExponentRule = "even"
    clip: float = 1.0
    outlier_threshold: float | None = None
    real: bool = False
    scale_bits: int | None = None
    scale_rows: int | None = None
    static: bool = False
    offset: bool = False
    block_rows: int | None = None

    def __str__(self) -> str:
        where = () if self.strategy in ("group", "block") else (self.strategy,)
        rows = "" if self.block_rows is None else f"{self.block_rows}x"
        size = f"{f'b{rows}' if self.strategy == 'block' else 'g'}{self.group_size}"
        parts = [self.format, "sym" if self.symmetric else "asym", *where, *((size,) if self.group_size else ())]
        parts += [*(word for word in ("real", "offset") if getattr(self, word)), f"s{self.scale}"]
        parts += [self.range_rule] if self.range_rule != "tight" else []
        parts += [self.exponent_rule] if self.scale == "e8m0" and self.exponent_rule != "even" else []
        parts += [f"c{self.clip!r}"] if self.clip != 1 else []
        parts += [] if self.outlier_threshold is None else [f"o{self.outlier_threshold!r}".removesuffix(".0")]
        if self.scale_bits is not None:
            parts.append(f"scales{self.scale_bits}g{self.scale_rows}")
        parts += ["static"] if self.static else []
        return "-".join(parts)

    def groups_of(self, n: int, *, layer: str, side: str = "input") -> int:
        """Return how many scales a vector of ``n`` values has: 1, or ``n / group_size``, rounded up for blocks.

        Args:
            n: Length of the axis, which the group, not a block, must divide.
            layer: Name of the layer, for the message.
            side: Whether the axis is of its ``input`` or of its ``output``, likewise.

        Raises:
            SchemeError: ``group_size`` does not divide ``n``.
        """
        if self.strategy == "block" and self.group_size:
            return -(-n // self.group_size)
        if self.strategy != "group":
            return 1
        if self.group_size is None or n % self.group_size:
            raise indivisible(self, n, layer, side)
        return n // self.group_size


@dataclass(frozen=True)
class ModelScheme:
    """Schemes of a model's linear weights, of what its linears read and put out, and of its KV cache; None is 16 bits.

    Attributes:
        weights: Linear weights, where no rule says otherwise.
        activations: Inputs of the linears, likewise.
        kv: Keys and values, which may have a scheme each, and with them queries.
        name: What tables call it.
        scale_per_head: The input of the attention's output projection has a scale for each head, whatever the
            strategy of the other activations: what the code of arXiv:2507.17417 does.
        rules: Exceptions; of several that match a linear the last holds. What a linear has is what ``of`` says.
        outputs: Outputs of the linears of blocks, behind their biases, where no rule says otherwise.
    """

    weights: TensorScheme | None = None
    activations: TensorScheme | None = None
    kv: TensorScheme | KeysAndValues | None = None
    name: str = ""
    scale_per_head: bool = False
    rules: tuple[Rule, ...] = ()
    outputs: TensorScheme | None = None

    def __str__(self) -> str:
        parts = [f"{part} {text}" for part, text in self.parts().items()]
        return ", ".join([*parts, "a scale per head at o_proj"] if self.scale_per_head else parts)

    def parts(self) -> dict[str, str]:
        """Return how each part is written; outputs only where any are quantized."""
        return {part: self.written(part) for part in VECTORS if part != "outputs" or self.every(part)}

    def written(self, part: str) -> str:
        """Return how a part is written, with its exceptions."""
        rules = "; ".join(f"{one.pattern} {one.scheme or '16 bits'}" for one in self.rules if one.part == part)
        return f"{getattr(self, part) or '16 bits'}" + (f" ({rules})" if rules else "")

    @property
    def keys(self) -> TensorScheme | None:
        """The scheme of keys."""
        return self.kv.keys if isinstance(self.kv, KeysAndValues) else self.kv

    @property
    def values(self) -> TensorScheme | None:
        """The scheme of values."""
        return self.kv.values if isinstance(self.kv, KeysAndValues) else self.kv

    @property
    def queries(self) -> TensorScheme | None:
        """The scheme of queries, behind the rotary positions."""
        return self.kv.queries if isinstance(self.kv, KeysAndValues) else None

    def of(self, linear: str) -> ModelScheme:
        """Return the scheme, without rules, of a linear by its full module name.

        A linear whose weights stay in 16 bits, where those of others do not, rounds neither input nor output. Outside
        of the blocks one stays in 16 bits unless a rule names it.
        """
        if not self.rules and in_block(linear):
            return self
        found = {part: getattr(self, part) if in_block(linear) else None for part in get_args(RuledPart)}
        found |= {rule.part: rule.scheme for rule in self.rules if rule.matches(linear)}
        if found["weights"] is None and self.every("weights"):
            found = dict.fromkeys(found)
        return replace(self, **found, name="", rules=())  # type: ignore[arg-type]

    def every(self, part: str) -> tuple[TensorScheme, ...]:
        """Return the schemes of a part that some linear may have: the first for those without a rule, if any."""
        first = (self.keys, self.values, self.queries) if part == "kv" else (getattr(self, part),)
        found = (*first, *(rule.scheme for rule in self.rules if rule.part == part))
        return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))

    def check(self) -> None:
        """Refuse a part of a scheme that means nothing where it stands.

        Raises:
            SchemeError: Scales of what there is none of, such as tokens of weights; outliers of all but activations.
        """
        for name in get_args(RuledPart):
            for scheme in self.every(name):
                check_part(name, scheme, VECTORS[name])
        check_cache(self.keys, self.values, self.queries)

    def to_json(self) -> dict[str, Any]:
        """Return the scheme as plain JSON values; of rules, and of what few schemes have, nothing where it is not."""
        data = asdict(self, dict_factory=lambda own: {key: of for key, of in own if of or key not in _RARE})
        rules = list(data.pop("rules"))
        return {**data, "rules": rules} if rules else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelScheme:
        """Read what ``to_json`` wrote."""
        parts = {part: _read(data.get(part)) for part in VECTORS}
        rules = tuple(Rule(one["part"], one["pattern"], _read(one["scheme"])) for one in data.get("rules", ()))
        return cls(name=data.get("name", ""), scale_per_head=data.get("scale_per_head", False), rules=rules, **parts)


def _read(data: Mapping[str, Any] | None) -> Any:  # noqa: ANN401 - a scheme, two of a cache, or None
    if data and "keys" in data:
        return KeysAndValues(*(_read(data.get(name)) for name in ("keys", "values", "queries")))
    return TensorScheme(**data) if data else None


@dataclass(frozen=True)
class SecondLevel:
    """Scales or zero points as codes: ``low + step * code``. Each tensor has one entry a group, as scales have.

    Attributes:
        codes: In ``[0, 2**bits)``, for the ``scale_bits`` of the scheme.
        low: The least value of its block of rows, as stored, in float32; equal in all rows of a block.
        step: The value of one code, likewise.
    """

    codes: UInt8[Tensor, "*rows"]
    low: Float[Tensor, "*rows"]
    step: Float[Tensor, "*rows"]


@dataclass(frozen=True)
class GroupParameters:
    """What decodes a group's codes besides the codes: all values already as stored, held in float32.

    ``scale`` and ``zero_point``, in units of codes, have one entry a group; ``global_scale`` is one that multiplies
    every scale. Scales and zero points that are codes themselves come with ``scale_codes`` and ``zero_point_codes``,
    which are then what is stored. ``negative`` is the scale of the negative values where those have one of their own,
    and ``offset`` what is added to ``scale * code``, for integers without a zero point whose code 0 is not 0.
    """

    scale: Float[Tensor, "*rows"]
    zero_point: Float[Tensor, "*rows"] | None = None
    global_scale: Float[Tensor, ""] | None = None
    scale_codes: SecondLevel | None = None
    zero_point_codes: SecondLevel | None = None
    negative: Float[Tensor, "*rows"] | None = None
    offset: Float[Tensor, "*rows"] | None = None

    def step(self) -> Float[Tensor, "*rows"]:
        """Return the value of one code step: ``scale`` times ``global_scale``."""
        return self.scale if self.global_scale is None else self.scale * self.global_scale


@runtime_checkable
class Format(Protocol):
    """Element type and scales of a quantized tensor. Stateless; every method is a pure function of its tensors.

    Values come as groups: the last axis holds the values that share one scale.
    """

    name: str
    bits: int
    defaults: TensorScheme
    version: int

    def check(self, scheme: TensorScheme) -> None:
        """Refuse a scheme that this format cannot carry.

        Raises:
            SchemeError: The combination means nothing; the hint names the nearest that works.
        """

    def global_scale(self, amax: Float[Tensor, ""], scheme: TensorScheme) -> Float[Tensor, ""] | None:
        """Return the tensor-level multiplier for a tensor of largest magnitude ``amax``, or None without one."""

    def fit(
        self,
        groups: Float[Tensor, "*rows group"],
        scheme: TensorScheme,
        *,
        global_scale: Float[Tensor, ""] | None = None,
        clip: float = 1.0,
    ) -> GroupParameters:
        """Fit scales (and zero points) to groups, rounded to their storage format.

        Args:
            groups: Values; the last axis shares a scale.
            scheme: Symmetry, scale format and rules.
            global_scale: Tensor-level multiplier; required where ``global_scale()`` gives one.
            clip: Fraction of the range that is kept, above 0; beyond 1 steps are wider than the range asks for.

        Returns:
            Parameters with one entry a group.
        """

    def encode(
        self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters
    ) -> Integer[Tensor, "*rows group"]:
        """Round values to codes in ``[0, 2**bits)`` (uint8), ties to even."""

    def decode(
        self, codes: Integer[Tensor, "*rows group"], parameters: GroupParameters
    ) -> Float[Tensor, "*rows group"]:
        """Return the float32 values that codes stand for."""

    def round(self, groups: Float[Tensor, "*rows group"], parameters: GroupParameters) -> Float[Tensor, "*rows group"]:
        """Return ``decode(encode(groups))`` in the dtype of ``groups``, without forming the codes."""


_SIZE = re.compile(r"([gb])(?:(?<=b)([1-9]\d*)x)?([1-9]\d*)")
_CLIP = re.compile(r"c(\d*\.?\d+)")
_OUTLIERS = re.compile(r"o(\d*\.?\d+)")
_SCALES = re.compile(r"scales(\d+)g(\d+)")


def parse_tensor_scheme(text: str, lookup: Callable[[str], Format], *, vector: Strategy = "channel") -> TensorScheme:
    """Read a written tensor scheme, e.g. ``int4-asym-g128-sfp16``.

    Args:
        text: The written form; parts that it leaves out keep the format's defaults.
        lookup: Finds a format by name.
        vector: What a format's default of one scale a vector is called here; with ``token-head``, which is a cache,
            ``channel`` and a group are read as channels over a group of tokens.

    Returns:
        The scheme, checked by its format.

    Raises:
        SchemeError: A part is unknown, or the format cannot carry the combination.
        PluginError: No format has this name.
    """
    name, *parts = text.split("-")
    chosen = lookup(name)
    scheme = replace(chosen.defaults, format=name)
    if scheme.strategy in ("channel", "token"):
        scheme = replace(scheme, strategy=vector)
    for part in parts:
        along_tokens = vector == "token-head" and scheme.strategy == "channel"
        scheme = _apply(scheme, part, text, of_cache=vector == "token-head")
        if along_tokens and scheme.strategy == "group":
            scheme = replace(scheme, strategy="channel")
    chosen.check(scheme)
    return scheme


def _apply(scheme: TensorScheme, part: str, text: str, *, of_cache: bool) -> TensorScheme:
    """Return ``scheme`` changed by one written part."""
    if part in ("sym", "asym"):
        return replace(scheme, symmetric=part == "sym")
    if part in ("tensor", "channel", "token", "head"):
        strategy = "token-head" if part == "head" and (scheme.strategy == "token" or not of_cache) else part
        return replace(scheme, strategy=strategy, group_size=None, block_rows=None)  # type: ignore[arg-type]
    if part in ("real", "offset", "static"):
        return replace(scheme, **{part: True})  # type: ignore[arg-type]
    if size := _SIZE.fullmatch(part):
        rows, columns = int(size[2] or size[3]), int(size[3])
        sides: dict[str, Any] = {"group_size": columns, "block_rows": None if rows == columns else rows}
        return replace(scheme, strategy="block" if size[1] == "b" else "group", **sides)
    if part.startswith("s") and part[1:] in get_args(ScaleFormat):
        return replace(scheme, scale=part[1:])  # type: ignore[arg-type]
    for rule, words in (("range_rule", RangeRule), ("exponent_rule", ExponentRule)):
        if part in get_args(words):
            return replace(scheme, **{rule: part})  # type: ignore[arg-type]
    if kept := _CLIP.fullmatch(part):
        return replace(scheme, clip=float(kept[1]))
    if outliers := _OUTLIERS.fullmatch(part):
        return replace(scheme, outlier_threshold=float(outliers[1]) or None)
    if codes := _SCALES.fullmatch(part):
        return replace(scheme, scale_bits=int(codes[1]), scale_rows=int(codes[2]))
    raise SchemeError(
        f"cannot read `{part}` in the scheme `{text}`",
        facts=(("grammar", "".join(map(str.strip, str(__doc__).partition("::")[2].splitlines()))),),
        hint="for example int4-sym-g128, int4-asym-token, fp4-g16-se4m3",
    )


@dataclass(frozen=True)
class Preset:
    """A name for a model scheme, spelled as the ecosystem spells it; parts are written tensor schemes or None.

    A ``-gN`` suffix changes the group of the weights, and with ``group_activations`` that of the activations too.
    """

    name: str
    weights: str | None
    activations: str | None
    kv: str | None
    summary: str
    group_activations: bool = False
