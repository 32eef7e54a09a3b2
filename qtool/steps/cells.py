"""The cells of a recipe's matrix: every combination, less what is excluded, plus what is included."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from qtool.errors import UsageError
from qtool.steps.recipe import Choice, Match, Recipe, SchemeChoice

IDENTITY = Choice("identity")


@dataclass(frozen=True)
class CellChoice:
    """One cell of the matrix; an empty rule for the weight of a token leaves it to ``mitigate``."""

    transform: Choice
    mitigate: Choice
    scheme: SchemeChoice
    token_weight: str
    seed: int


def cells_of(recipe: Recipe, only: Sequence[str] = ()) -> list[CellChoice]:
    """Return the cells, each once: the matrix in its order, then those that are included.

    Args:
        recipe: The recipe.
        only: Conditions ``axis=choice``; those of one axis are alternatives.

    Raises:
        UsageError: A condition cannot be read, an included cell is not whole, or nothing is left to do.
    """
    cells = [cell for cell in _cells(recipe) if _wanted(cell, only)]
    if not cells and (only or not recipe.full_precision):
        raise _nothing_left(recipe, only)
    return cells


def _nothing_left(recipe: Recipe, only: Sequence[str]) -> UsageError:
    """Return the error that lists the choices of the axes that conditions speak of, and mends the first wrong one."""
    facts, hint = [("only", ", ".join(only) or "none")], ""
    for axis in dict.fromkeys(condition.partition("=")[0] for condition in only):
        known = dict.fromkeys(_bare(getattr(cell, axis)) for cell in _cells(recipe))
        asked = [condition.partition("=")[2] for condition in only if condition.startswith(f"{axis}=")]
        facts.append((axis, ", ".join(known)))
        if known and not hint and known.keys().isdisjoint(choice.partition("(")[0] for choice in asked):
            hint = f"--only {axis}={(difflib.get_close_matches(asked[0], known, 1, 0.3) or list(known))[0]}"
    if only and not hint:  # each is there, and they are not together
        hint = f"--only {only[0].partition('(')[0]}"
    return UsageError(f"no cell of the recipe `{recipe.name}` is left", facts=tuple(facts), hint=hint)


def _cells(recipe: Recipe) -> Iterator[CellChoice]:
    """Yield every cell once, in order: the matrix without what is excluded, then what is included."""
    matrix = recipe.matrix
    if matrix.token_weight and recipe.mitigate.token_weight is not None:
        raise UsageError(
            f"the recipe `{recipe.name}` gives token weights twice",
            facts=(("matrix", ", ".join(matrix.token_weight)), ("mitigate", recipe.mitigate.token_weight)),
            hint="leave out `mitigate: {token_weight: ...}`",
        )
    weights = matrix.token_weight or (recipe.mitigate.token_weight or "",)
    combined = [
        CellChoice(*axes) for axes in product(matrix.transform, matrix.mitigate, matrix.scheme, weights, matrix.seed)
    ]
    cells = [cell for cell in combined if not any(_matches(cell, match) for match in recipe.exclude)]
    for match in recipe.include:
        if match.mitigate is None or match.scheme is None:
            raise UsageError(
                f"an entry of `include` in the recipe `{recipe.name}` is no whole cell",
                hint="include: [{transform: identity, mitigate: gptq, scheme: W4A4}]",
            )
        rest = product(
            weights if match.token_weight is None else (match.token_weight,),
            matrix.seed if match.seed is None else (match.seed,),
        )
        cells += [CellChoice(match.transform or IDENTITY, match.mitigate, match.scheme, *one) for one in rest]
    for index, cell in enumerate(cells):
        if cell not in cells[:index]:
            yield cell


def _matches(cell: CellChoice, match: Match) -> bool:
    """Say whether a cell is one of those that an entry of ``exclude`` means; a bare method means all of its options."""
    return (
        all(
            wanted is None or (wanted.method == found.method and (not wanted.set or wanted == found))
            for wanted, found in ((match.transform, cell.transform), (match.mitigate, cell.mitigate))
        )
        and (match.scheme is None or match.scheme == cell.scheme or match.scheme.scheme == cell.scheme.name != "")
        and match.token_weight in (None, cell.token_weight)
        and match.seed in (None, cell.seed)
    )


def _wanted(cell: CellChoice, only: Sequence[str]) -> bool:
    """Say whether a cell meets the conditions of ``only``."""
    axes: dict[str, list[str]] = {}
    for condition in only:
        axis, sign, choice = condition.partition("=")
        if axis not in vars(cell) or not sign:
            raise UsageError(
                f"cannot read the condition `{condition}`",
                facts=(("axes", ", ".join(vars(cell))),),
                hint="--only mitigate=gptq",
            )
        axes.setdefault(axis, []).append(choice)
    return all(not {str(getattr(cell, axis)), _bare(getattr(cell, axis))}.isdisjoint(axes[axis]) for axis in axes)


def _bare(choice: object) -> str:
    """Return a method's name without its options."""
    return choice.method if isinstance(choice, Choice) else str(choice)
