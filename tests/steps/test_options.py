"""Options of methods: what words mean, where they go in a composition, and what is not understood."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal
from unittest.mock import patch

import pytest

from qtool.engine.composition import Composition
from qtool.errors import PluginError, UsageError
from qtool.plugins import Plugins
from qtool.steps.method_options import METHODS, describe_options
from qtool.steps.options import Configured, configure, read_settings

PLUGINS = Plugins.discover()


@dataclass(frozen=True)
class Options:
    """One of each type."""

    count: int = 3
    share: float = 0.5
    name: str = "a"
    wanted: bool = False
    mode: Literal["slow", "fast"] = "slow"
    limit: int | None = 7
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Listing:
    """A type that no word can say."""

    names: list[str] = field(default_factory=list)


class Method:
    """A method with these options."""

    version = 4
    Config: Any = Options


def configured(settings: dict[str, str], config: Any = Options) -> Any:  # noqa: ANN401 - whichever class
    """Configure `rtn`, with these options in place of its own."""
    method = Method()
    method.Config = config
    with patch.dict(PLUGINS._instances, {("mitigators", "rtn"): method}):
        (one,) = configure("mitigators", "rtn", settings, PLUGINS)
    return one.config


class TestTypes:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("count=12", 12),
            ("count=-1", -1),
            ("share=1e-3", 0.001),
            ("share=2", 2.0),
            ("name=12", "12"),
            ("name=", ""),
            ("name=a=b", "a=b"),
            ("mode=fast", "fast"),
            ("limit=3", 3),
            ("limit=none", None),
            ("wanted=true", True),
            ("wanted=YES", True),
            ("wanted=1", True),
            ("wanted=False", False),
            ("wanted=no", False),
            ("wanted=0", False),
        ],
    )
    def test_words_become_values(self, text: str, value: object) -> None:
        settings = read_settings([text])
        found = getattr(configured(settings), next(iter(settings)))
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("text", "message", "fact"),
        [
            ("count=2.5", "`2.5` is no value of `rtn.count`", ("expected", "int")),
            ("count=", "`` is no value of `rtn.count`", ("expected", "int")),
            ("share=much", "`much` is no value of `rtn.share`", ("expected", "float")),
            ("wanted=maybe", "`maybe` is no value of `rtn.wanted`", ("expected", "bool")),
            ("mode=medium", "`medium` is no value of `rtn.mode`", ("values", "slow, fast")),
            ("limit=few", "`few` is no value of `rtn.limit`", ("expected", "int")),
        ],
    )
    def test_words_that_mean_nothing(self, text: str, message: str, fact: tuple[str, str]) -> None:
        with pytest.raises(UsageError) as refused:
            configured(read_settings([text]))
        assert refused.value.message == message
        assert refused.value.facts == (fact,)

    def test_a_type_that_no_word_can_say(self) -> None:
        with pytest.raises(PluginError, match=r"`rtn\.names` has a type that cannot be set"):
            configured({"names": "a"}, Listing)
        assert configured({}, Listing).names == []

    @pytest.mark.parametrize("config", [None, dict, "Options", Options()])
    def test_a_method_without_a_dataclass(self, config: object) -> None:
        with pytest.raises(PluginError, match=r"`rtn` of qtool .* has no dataclass `Config`"):
            configured({}, config)


class TestNames:
    @pytest.mark.parametrize(
        "key", ["label_smoothing", "label-smoothing", "rtn.label_smoothing", "rtn.label-smoothing"]
    )
    def test_dashes_and_underscores(self, key: str) -> None:
        assert configured({key: "0.25"}).label_smoothing == 0.25

    def test_what_is_not_set_keeps_its_default(self) -> None:
        assert configured({"count": "9"}) == Options(count=9)

    def test_the_narrower_word_wins_whatever_the_order(self) -> None:
        for settings in ({"count": "1", "rtn.count": "2"}, {"rtn.count": "2", "count": "1"}):
            assert configured(settings).count == 2

    def test_an_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(UsageError, match="`rtn` has no option `label-smothing`") as refused:
            configured({"label-smothing": "1"})
        known = ", ".join(one.name.replace("_", "-") for one in fields(Options))
        assert refused.value.facts == (("options", known),)
        assert refused.value.hint == "--set label-smoothing=VALUE"
        with pytest.raises(UsageError) as refused:
            configured({"zzz": "1"})
        assert refused.value.hint == "qtool plugins mitigators rtn"

    def test_an_option_of_a_method_that_is_not_there(self) -> None:
        with pytest.raises(UsageError, match=r"`rtn` has no option `gptq\.count`"):
            configured({"gptq.count": "1"})

    @pytest.mark.parametrize("pair", ["count", "=3", "", "="])
    def test_pairs_that_are_none(self, pair: str) -> None:
        with pytest.raises(UsageError, match="cannot read the option") as refused:
            read_settings([pair])
        assert refused.value.hint == "--set key=value"

    def test_the_last_of_two_pairs_holds(self) -> None:
        assert read_settings(["a=1", "b=2", "a=3"]) == {"a": "3", "b": "2"}


class TestCompositions:
    def test_left_to_right_each_with_its_own(self) -> None:
        settings = {"rank": "4", "dampening-frac": "0.1"}
        gptq, lorc = configure("mitigators", "gptq + lorc", settings, PLUGINS)
        assert (gptq.name, lorc.name) == ("gptq", "lorc")
        assert gptq.config.dampening_frac == 0.1
        assert lorc.config.rank == 4

    def test_an_option_that_several_have(self) -> None:
        left, right = configure("transforms", "smoothquant+smoothquant", {"alpha": "0.7"}, PLUGINS)
        assert left.config.alpha == right.config.alpha == 0.7

    def test_what_goes_into_a_key(self) -> None:
        (one,) = configure("transforms", "smoothquant", {"alpha": "0.25"}, PLUGINS)
        assert one.record() == {"name": "smoothquant", "version": one.method.version, "config": {"alpha": 0.25}}
        assert "qtool" in one.provider
        assert isinstance(one, Configured)

    @pytest.mark.parametrize("composition", ["", "+", "rtn+", "+rtn", "rtn++gptq"])
    def test_a_name_that_is_empty(self, composition: str) -> None:
        with pytest.raises(UsageError, match="no mitigator is called ``"):
            configure("mitigators", composition, {}, PLUGINS)

    def test_a_value_that_the_method_refuses(self) -> None:
        with pytest.raises(UsageError, match="`alpha` must lie between 0 and 1"):
            configure("transforms", "smoothquant", {"alpha": "nan"}, PLUGINS)


class TestCompositionsByName:
    INNER = Composition("rtn+cd", {"rtn.clip": "search", "sweeps": "7"})
    OUTER = Composition("inner+lorc", {"rank": "4", "cd.sweeps": "9"})

    def of(self, text: str, settings: dict[str, str]) -> dict[str, Any]:
        offered = {("mitigators", "inner"): self.INNER, ("mitigators", "outer"): self.OUTER}
        load = Plugins.load
        with patch.object(Plugins, "load", lambda own, kind, name: offered.get((kind, name)) or load(own, kind, name)):
            return {one.name: one.config for one in configure("mitigators", text, settings, PLUGINS)}

    def test_they_are_their_methods_with_their_options(self) -> None:
        found = self.of("inner", {})
        assert list(found) == ["rtn", "cd"]
        assert (found["rtn"].clip, found["cd"].sweeps) == ("search", 7)

    def test_what_the_user_sets_comes_first(self) -> None:
        found = self.of("inner", {"rtn.clip": "none", "sweeps": "2"})
        assert (found["rtn"].clip, found["cd"].sweeps) == ("none", 2)

    def test_one_may_hold_another_and_then_has_the_last_word_of_the_two(self) -> None:
        found = self.of("outer", {})
        assert list(found) == ["rtn", "cd", "lorc"]
        assert (found["rtn"].clip, found["cd"].sweeps, found["lorc"].rank) == ("search", 9, 4)

    def test_they_may_stand_in_a_composition(self) -> None:
        found = self.of("inner+lorc", {"rank": "3"})
        assert list(found) == ["rtn", "cd", "lorc"]
        assert found["lorc"].rank == 3

    def test_an_option_that_no_method_of_theirs_has_is_refused(self) -> None:
        with pytest.raises(UsageError, match="has no option `steps`"):
            self.of("inner", {"steps": "3"})

    @pytest.mark.parametrize("name", ["qtool-best-int4", "qtool-best-fp4"])
    def test_our_own_have_options_that_their_methods_know(self, name: str) -> None:
        composition = PLUGINS.load("mitigators", name)
        found = configure("mitigators", composition.methods, composition.settings, PLUGINS)
        assert [one.record() for one in configure("mitigators", name, {}, PLUGINS)] == [one.record() for one in found]


class TestDescriptions:
    @pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in METHODS for name in PLUGINS.offers[kind]])
    def test_every_option_has_a_meaning_and_its_default_can_be_typed(self, kind: str, name: str) -> None:
        described = describe_options(PLUGINS, kind, name)
        rows = described.tables["options"].to_json()
        methods = configure(kind, name, {}, PLUGINS)
        assert described.facts["method"] == "+".join(one.name for one in methods)
        assert len(rows) == sum(len(fields(one.config)) for one in methods)
        assert all(row["meaning"] and row["values"] for row in rows)
        typed = {str(row["option"]): str(row["default"]) for row in rows}
        assert [one.record() for one in configure(kind, name, typed, PLUGINS)] == [one.record() for one in methods]

    def test_words_of_a_class_come_before_those_of_what_it_extends(self) -> None:
        @dataclass(frozen=True)
        class Wide(Options):
            """Wide.

            Attributes:
                count: How many: of
                    all.
                name: A ``name``.
            """

        @dataclass(frozen=True)
        class Narrow(Wide):
            """Narrow.

            Attributes:
                name: Another.
            """

        method = Method()
        method.Config = Narrow
        with patch.dict(PLUGINS._instances, {("mitigators", "rtn"): method}):
            narrow = describe_options(PLUGINS, "mitigators", "rtn").tables["options"].to_json()
        meanings = {row["option"]: row["meaning"] for row in narrow if row["meaning"]}
        assert meanings == {"count": "How many: of all.", "name": "Another."}
        rows = {
            row["option"]: row for row in describe_options(PLUGINS, "mitigators", "obq").tables["options"].to_json()
        }
        assert str(rows["order"]["meaning"]).startswith("Which weight of a row is next")
        assert rows["order"]["values"] == "greedy, natural, activation"
        assert str(rows["clip-norm"]["meaning"]).startswith("Exponent of the errors")
        target = describe_options(PLUGINS, "mitigators", "target").tables["options"].to_json()
        assert {row["option"]: (row["default"], row["values"]) for row in target} == {
            "alpha": ("none", "a number, none"),
            "ridge": ("0.01", "a number"),
        }

    def test_a_composition_tells_methods_apart_and_has_its_own_defaults(self) -> None:
        rows = describe_options(PLUGINS, "mitigators", "qtool-best-fp4").tables["options"].to_json()
        defaults = {row["option"]: row["default"] for row in rows}
        assert defaults["gptq.clip-ceiling"] == "1.75"
        assert defaults["autoround.learn-ranges"] == "true"

    def test_what_is_far_from_all_options_is_sent_to_the_list(self) -> None:
        with pytest.raises(UsageError, match="has no option `xyz`") as refused:
            configure("mitigators", "gptq+lorc", {"xyz": "1"}, PLUGINS)
        assert refused.value.hint == "qtool plugins mitigators gptq+lorc"
        with pytest.raises(UsageError, match="formats have no options"):
            describe_options(PLUGINS, "formats", "int4")
