"""Every error has an exit code of its own kind, a place in the documented tree, and a text that can be acted on."""

from __future__ import annotations

import inspect
import re

import pytest

from qtool import errors
from qtool.errors import ExitCode, QtoolError

CODES = {
    "QtoolError": 1,
    "UsageError": 2,
    "SchemeError": 2,
    "ArtifactError": 3,
    "ModelError": 3,
    "DataError": 3,
    "PluginError": 4,
    "NumericalError": 5,
    "ShapeError": 5,
    "ResourceError": 6,
    "GateError": 7,
    "ConsumerError": 8,
}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, QtoolError)]
LINE = re.compile(r"^ {4}(?P<depth>[│├└─ ]*)(?P<name>\w+) +(?P<code>\d+)  \S")


def documented_tree() -> dict[str, tuple[str, int]]:
    """Read the drawing at the top of the module: class to parent and exit code."""
    tree: dict[str, tuple[str, int]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if row := LINE.match(line):
            depth = len(row["depth"]) // 4
            path[depth:] = [row["name"]]
            tree[row["name"]] = (path[depth - 1] if depth else "Exception", int(row["code"]))
    return tree


def test_the_documented_tree_is_the_tree() -> None:
    assert documented_tree() == {c.__name__: (c.__base__.__name__, int(c.exit_code)) for c in CLASSES}


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_has_its_code_and_says_what_happened_with_facts_and_a_hint(error: type[QtoolError]) -> None:
    raised = error("group size 96 does not divide", facts=(("expected", 128), ("got", 96)), hint="--weights int4-g128")
    assert raised.exit_code == ExitCode(CODES[error.__name__])
    assert str(raised) == ("group size 96 does not divide\n  expected  128\n  got       96\nhint: --weights int4-g128")


def test_an_error_without_facts_and_hint_is_one_line() -> None:
    assert str(QtoolError("it broke")) == "it broke"


def test_exit_codes_are_those_that_the_shell_expects() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "ARTIFACT": 3,
        "PLUGIN": 4,
        "NUMERICAL": 5,
        "RESOURCE": 6,
        "GATE": 7,
        "CONSUMER": 8,
        "INTERRUPTED": 130,
        "CLOSED_PIPE": 141,
    }


def test_every_class_says_in_one_line_when_it_is_raised() -> None:
    for error in CLASSES:
        first = (error.__doc__ or "").splitlines()[0]
        assert first.endswith("."), error
