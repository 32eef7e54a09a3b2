"""Every family keeps the whole contract, and the page that says what is exact where says what the planner says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from qtool.model.family import Family
from qtool.plugins import Plugins
from qtool.testing import check_family, family_configs
from tests.families import matrix

PLUGINS = Plugins.discover()
FAMILIES: dict[str, Family] = {name: PLUGINS.load("families", name) for name in sorted(PLUGINS.offers["families"])}
DATA = Path(sys.modules["qtool"].__path__[0]) / "builtin" / "families"


def cases() -> Iterator[Any]:
    """Every config of every family; one a family is tested by default, with an untied and a tied head in turn."""
    for position, (name, family) in enumerate(FAMILIES.items()):
        for index, config in enumerate(family_configs(family)):
            head = "tied" if config.tie_word_embeddings else "untied"
            marks = [] if index == position % 2 else [pytest.mark.slow]
            yield pytest.param(family, config, id=f"{name}-{index}-{config.model_type}-{head}", marks=marks)


@pytest.mark.parametrize(("family", "config"), list(cases()))
def test_the_contract(family: Family, config: PreTrainedConfig) -> None:
    check_family(family, config)


def test_each_is_found_by_its_own_name() -> None:
    assert {family.name for family in FAMILIES.values()} == set(FAMILIES)


def test_a_config_is_covered_by_one_family() -> None:
    for name, family in FAMILIES.items():
        for config in family_configs(family):
            text = config.get_text_config()
            covering = [
                other.name
                for other in FAMILIES.values()
                if config.model_type in other.model_types and (other.covers is None or other.covers(text))
            ]
            assert covering == [name]


def test_grouped_queries_and_odd_sizes_are_among_the_configs() -> None:
    """What is tested only where numbers coincide is not tested."""
    configs = [config.get_text_config() for family in FAMILIES.values() for config in family_configs(family)]
    assert any((getattr(c, "num_key_value_heads", 0) or 99) < c.num_attention_heads for c in configs)
    assert any((getattr(c, "head_dim", 0) or 0) * c.num_attention_heads > c.hidden_size for c in configs)


@pytest.mark.parametrize("file", sorted(DATA.glob("*.py")), ids=lambda file: file.stem)
def test_a_family_is_a_page_of_data(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 75


def test_what_is_exact_where_is_written_down() -> None:
    assert matrix.PATH.read_text(encoding="utf-8") == matrix.text(), "python -m tests.families.matrix"
