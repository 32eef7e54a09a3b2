"""Every hook is typed and documented, built-ins use exactly these hooks, and what they offer can be imported."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from qtool import hookspecs
from qtool.builtin import plugin as builtin
from qtool.hookspecs import Entry
from qtool.plugins import KINDS
from qtool.scheme import Preset

HOOKS = {
    name: function
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
    if hasattr(function, f"{hookspecs.GROUP}_spec")
}
SIGNATURES = {
    **{f"register_{kind}": "() -> 'Sequence[Entry]'" for kind in KINDS},
    "register_presets": "() -> 'Sequence[Preset]'",
    "register_commands": "(app: 'typer.Typer') -> 'None'",
}
TUTORIAL = Path(__file__).parent.parent / "plugins" / "qtool-template" / "README.md"
OFFERED = [
    pytest.param(kind, entry, id=f"{kind}-{entry.name}")
    for kind in KINDS
    for entry in getattr(builtin, f"register_{kind}")()
]


def test_the_hooks_are_these_with_these_signatures() -> None:
    assert {name: str(inspect.signature(hook)) for name, hook in HOOKS.items()} == SIGNATURES


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_what_it_is_for_and_which_contract_its_objects_keep(name: str) -> None:
    documentation = inspect.getdoc(HOOKS[name]) or ""
    assert documentation.splitlines()[0].endswith(".")
    assert contracts(name) or name in ("register_presets", "register_commands")
    for module, protocol in contracts(name):
        assert getattr(importlib.import_module(module), protocol).__doc__


def contracts(name: str) -> list[tuple[str, str]]:
    """Return the modules and names of the types that a hook's documentation points at."""
    return re.findall(r"``(qtool\.[\w.]+)\.(\w+)``", inspect.getdoc(HOOKS[name]) or "")


@pytest.mark.parametrize("name", HOOKS)
def test_the_tutorial_shows_every_hook_with_its_exact_signature_and_contract(name: str) -> None:
    line = next((line for line in TUTORIAL.read_text().splitlines() if line.startswith(f"{name}(")), "missing")
    signature, _, contract = line.partition("#")
    assert signature.strip() == (name + SIGNATURES[name]).replace("'", "")
    for module, protocol in contracts(name):
        assert contract.strip() == f"{module}.{protocol}"


def test_built_ins_come_through_every_hook_but_that_of_strangers_commands() -> None:
    marked = {
        name: function
        for name, function in inspect.getmembers(builtin, inspect.isfunction)
        if hasattr(function, f"{hookspecs.GROUP}_impl")
    }
    assert set(marked) == set(HOOKS) - {"register_commands"}
    assert {str(inspect.signature(f)) for f in marked.values()} == {
        "() -> 'Sequence[Entry]'",
        "() -> 'Sequence[Preset]'",
    }


@pytest.mark.parametrize(("kind", "entry"), OFFERED)
def test_a_built_in_is_spelled_with_dashes_and_its_target_is_there(kind: str, entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", entry.name)
    assert entry.summary == entry.summary.strip()
    assert "\n" not in entry.summary
    module, _, attribute = entry.target.partition(":")
    assert hasattr(importlib.import_module(module), attribute), f"{kind} `{entry.name}`"


def test_built_in_presets_have_names_of_their_own() -> None:
    presets = builtin.register_presets()
    assert all(isinstance(preset, Preset) for preset in presets)
    assert len({preset.name.upper() for preset in presets}) == len(presets)
