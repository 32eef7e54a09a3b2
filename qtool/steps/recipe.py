"""Recipes: one model, one protocol, a matrix of methods, the measurements and the table, as YAML.

A recipe is read into frozen dataclasses whose fields are its keys; whatever is not a field is refused. Of the
``matrix`` every combination is a cell, unless an entry of ``exclude`` matches it; ``include`` adds single cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from qtool.errors import UsageError
from qtool.scheme import VECTORS
from qtool.steps.calibrate import EVERYTHING
from qtool.steps.schema import Place, read_fields


@dataclass(frozen=True)
class Choice:
    """A method, or a composition, with its options; written as its name alone where it has none.

    Attributes:
        method: Names joined by ``+``.
        set: Options as text, as ``--set`` takes them.
    """

    method: str
    set: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.set.items())
        return f"{self.method}({options})" if options else self.method

    @classmethod
    def of_text(cls, text: str) -> Choice:
        """Return a method without options."""
        return cls(text)


@dataclass(frozen=True)
class SchemeChoice:
    """A scheme: the name of a preset alone, or its parts as the command line takes them.

    Attributes:
        scheme: Name of a preset.
        weights: Written tensor scheme in place of the preset's, with exceptions behind it, or exceptions alone.
        activations: The same, of the inputs of linears.
        kv: The same, of the KV cache.
        outputs: The same, of the outputs of linears.
        name: What tables call it.
    """

    scheme: str = ""
    weights: str = ""
    activations: str = ""
    kv: str = ""
    outputs: str = ""
    name: str = ""

    def __str__(self) -> str:
        written = (f"{part} {text}" for part, text in self.parts().items() if text)
        return self.name or ", ".join(filter(None, (self.scheme, *written)))

    def parts(self) -> dict[str, str]:
        """Return the parts as they are written; those that are not given are empty."""
        return {part: getattr(self, part) for part in VECTORS}

    @classmethod
    def of_text(cls, text: str) -> SchemeChoice:
        """Return a preset."""
        return cls(text)


@dataclass(frozen=True)
class Matrix:
    """The axes of the matrix; ``mitigate`` and ``scheme`` must not be empty, ``token_weight`` is then the recipe's."""

    mitigate: tuple[Choice, ...]
    scheme: tuple[SchemeChoice, ...]
    transform: tuple[Choice, ...] = (Choice("identity"),)
    token_weight: tuple[str, ...] = ()
    seed: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Match:
    """A single cell for ``include``, or some cells for ``exclude``: what is not given matches anything."""

    transform: Choice | None = None
    mitigate: Choice | None = None
    scheme: SchemeChoice | None = None
    token_weight: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class CalibrateOptions:
    """See ``CalibrateRequest``; without ``seed`` the text is drawn anew for each seed of the matrix."""

    data: str
    num_samples: int = 128
    seq_len: int = 2048
    seed: int | None = None
    gather: tuple[str, ...] = EVERYTHING
    token_weight: str = "uniform"
    sample_size: int = 2048
    experts: str = ""


@dataclass(frozen=True)
class MitigateOptions:
    """See ``MitigateRequest``; ``preset`` names the protocol of a paper for whatever is not given here."""

    preset: str = ""
    propagate: str | None = None
    true_sequential: bool | None = None
    round_activations: bool | None = None
    token_weight: str | None = None
    experts: str | None = None
    expert_share: float | None = None


@dataclass(frozen=True)
class EvalOptions:
    """See ``EvalRequest``."""

    perplexity: tuple[str, ...] = ()
    seq_len: int = 2048
    max_windows: int | None = None
    kl: bool = False
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class ReportOptions:
    """See ``ReportRequest``; ``footnotes`` are printed below the table as they are."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("scheme",)
    values: tuple[str, ...] = ()
    error: str = "auto"
    bits: tuple[str, ...] = ("linears",)
    to: str = "markdown"
    footnotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        name: Names the folder of its table; the file's name where it is not given.
        model: What ``qtool calibrate`` takes.
        matrix: What is combined with what.
        eval: What is measured.
        calibrate: The text and its statistics; None for methods that need neither.
        exclude: Cells to leave out.
        include: Cells to add.
        full_precision: Whether the model itself is measured too.
        mitigate: Options that all mitigations share.
        report: The layout of the table.
        dtype: What everything is computed in.
    """

    model: str
    matrix: Matrix
    eval: EvalOptions
    name: str = ""
    calibrate: CalibrateOptions | None = None
    exclude: tuple[Match, ...] = ()
    include: tuple[Match, ...] = ()
    full_precision: bool = True
    mitigate: MitigateOptions = field(default_factory=MitigateOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    dtype: str = "auto"


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: There is no such file, it is no YAML, or a key or value does not fit; names the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the recipe `{path}`", facts=(("reason", reason),)) from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the recipe `{path}` is no valid YAML", facts=(("reason", reason),)) from error
    recipe = read_fields(Recipe, content, Place(str(path)))
    name = recipe.name or path.stem
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise Place(str(path), ("name",)).refusal("is no name for a folder", name, hint="name: my-recipe")
    return Recipe(**{**vars(recipe), "name": name})


class _StrictLoader(yaml.SafeLoader):
    """Reads plain values only, and refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Return a mapping."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
