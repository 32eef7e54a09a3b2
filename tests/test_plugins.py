"""Plugins are found through entry points alone; a broken one harms nobody, and two of one name are refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qtool import __version__
from qtool.errors import PluginError, UsageError
from qtool.plugins import KINDS, Plugins, Provider

Install = Callable[..., None]

OFFER = """
from qtool import Entry, hookimpl

@hookimpl
def register_{kind}():
    return [Entry({name!r}, {target!r}, "for a test")]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path as pip would: a module, its metadata and its entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(distribution: str, source: str, *, version: str = "1.0", point: str = "plugin") -> None:
        module = distribution.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[qtool]\n{point} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_built_ins_are_found_through_their_entry_point_with_their_provider() -> None:
    plugins = Plugins.discover()
    assert set(plugins.offers) == set(KINDS)
    assert not plugins.broken
    assert plugins.offer("mitigators", "gptq").provider == Provider("qtool", __version__)
    assert str(plugins.offer("families", "llama").provider) == f"qtool {__version__}"


def test_a_strangers_plugin_joins_the_built_ins(install: Install) -> None:
    source = OFFER.format(kind="transforms", name="shuffle", target="stranger:Shuffle") + "class Shuffle: answer = 42\n"
    install("stranger", source, version="2.1")
    plugins = Plugins.discover()
    assert plugins.offer("transforms", "shuffle").provider == Provider("stranger", "2.1")
    shuffle = plugins.load("transforms", "shuffle")
    assert shuffle.answer == 42
    assert plugins.load("transforms", "shuffle") is shuffle
    assert "identity" in plugins.offers["transforms"]


def test_a_target_is_imported_when_it_is_used_and_not_before(install: Install) -> None:
    install("eager", OFFER.format(kind="metrics", name="far", target="no_such_package.metric:Far"))
    plugins = Plugins.discover()
    assert not plugins.broken
    with pytest.raises(PluginError) as error:
        plugins.load("metrics", "far")
    assert str(error.value) == (
        "`far` of eager 1.0 cannot be imported\n"
        "  target  no_such_package.metric:Far\n"
        "  reason  ModuleNotFoundError: No module named 'no_such_package'\n"
        "hint: pip install --upgrade eager"
    )


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('no device')", "def Odd(: pass", "class Odd:\n def __init__(self, x): ..."]
)
def test_a_target_that_fails_in_any_way_is_the_plugins_error(install: Install, tmp_path: Path, body: str) -> None:
    (tmp_path / "site" / "odd_target.py").write_text(body)
    install("odd", OFFER.format(kind="formats", name="odd", target="odd_target:Odd"))
    with pytest.raises(PluginError, match=r"`odd` of odd 1\.0 cannot be imported"):
        Plugins.discover().load("formats", "odd")
    sys.modules.pop("odd_target", None)


def test_an_object_that_is_no_class_is_used_as_it_is(install: Install) -> None:
    install("data", OFFER.format(kind="families", name="toy", target="data:TOY") + "TOY = {'layers': 3}\n")
    assert Plugins.discover().load("families", "toy") == {"layers": 3}


@pytest.mark.parametrize("point", ["aaa", "zzz"])
def test_two_providers_of_one_name_are_refused_by_both_names(install: Install, point: str) -> None:
    install("rival", OFFER.format(kind="mitigators", name="gptq", target="rival:GPTQ"), point=point)
    with pytest.raises(PluginError) as error:
        Plugins.discover()
    text = str(error.value)
    assert text.startswith("two plugins offer the mitigator `gptq`\n")
    assert f"qtool {__version__} (qtool.builtin.mitigators.gptq:GPTQ)" in text
    assert "rival 1.0 (rival:GPTQ)" in text
    assert text.endswith("hint: pip uninstall rival")


def test_a_preset_that_a_stranger_offers_again_is_refused_by_both_names(install: Install) -> None:
    source = (
        "from qtool import hookimpl\nfrom qtool.scheme import Preset\n"
        "@hookimpl\ndef register_presets(): return [Preset('w4a16', 'int4', None, None, 'mine')]\n"
    )
    install("rival", source)
    with pytest.raises(PluginError) as error:
        Plugins.discover()
    assert str(error.value).startswith("two plugins offer the preset `W4A16`\n")
    assert re.search(r"one +qtool .*\n +two +rival 1\.0", str(error.value))


BROKEN = {
    "import": ("import no_such_package", "No module named 'no_such_package'"),
    "syntax": ("def register_transforms(:", "SyntaxError"),
    "anything": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "unknown-hook": ("from qtool import hookimpl\n@hookimpl\ndef register_nonsense(): return []", "register_nonsense"),
    "argument": ("from qtool import hookimpl\n@hookimpl\ndef register_metrics(app): return []", "app"),
    "hook-raises": ("from qtool import hookimpl\n@hookimpl\ndef register_metrics(): return 1 / 0", "ZeroDivisionError"),
    "hook-returns-nothing": ("from qtool import hookimpl\n@hookimpl\ndef register_metrics(): return None", "NoneType"),
    "hook-returns-text": ("from qtool import hookimpl\n@hookimpl\ndef register_metrics(): return ['ppl']", "a str"),
    "hook-returns-presets": (
        "from qtool import hookimpl\nfrom qtool.scheme import Preset\n"
        "@hookimpl\ndef register_metrics(): return [Preset('X', None, None, None, '')]",
        "a Preset",
    ),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_work(
    install: Install, source: str, reason: str
) -> None:
    install("faulty", source, point="aaa")
    install("sound", OFFER.format(kind="metrics", name="mine", target="sound:Mine"), point="zzz")
    plugins = Plugins.discover()
    assert list(plugins.broken) == ["faulty:aaa"]
    assert reason in plugins.broken["faulty:aaa"]
    assert "\n" not in plugins.broken["faulty:aaa"]
    assert {"mine", "perplexity"} <= set(plugins.offers["metrics"])
    assert "identity" in plugins.offers["transforms"]


@dataclass
class Asked:
    """A name that nobody offers, and how the refusal begins and ends."""

    kind: str
    name: str
    says: str
    hint: str


@pytest.mark.parametrize(
    "asked",
    [
        Asked("transforms", "quarto", "no transform is called `quarto`", "did you mean `quarot`?"),
        Asked("families", "lama", "no family is called `lama`", "did you mean `llama`?"),
        Asked("statistics", "hesian", "no statistic is called `hesian`", "did you mean `hessian`?"),
        Asked("mitigators", "babai", "no mitigator is called `babai`", "--method beam --set beams=1, which is GPTQ"),
        Asked("mitigators", "llm-int8", "no mitigator is called `llm-int8`", "--method rtn --scheme LLM-INT8"),
        Asked("mitigators", "atom", "no mitigator is called `atom`", "qtool transform --method atom"),
        Asked(
            "mitigators",
            "omniquant",
            "no mitigator is called `omniquant`",
            "--method lwc, which is its learned clipping",
        ),
        Asked(
            "mitigators", "quip", "no mitigator is called `quip`", "--method ldlq, behind qtool transform --method quip"
        ),
        Asked("transforms", "gptq", "no transform is called `gptq`", "qtool mitigate --method gptq"),
        Asked("mitigators", "xyz", "no mitigator is called `xyz`", "qtool plugins mitigators"),
        Asked("mitigators", "", "no mitigator is called ``", "qtool plugins mitigators"),
    ],
    ids=lambda asked: asked.name or "empty",
)
def test_an_unknown_name_is_met_with_the_nearest_and_all_known(asked: Asked) -> None:
    with pytest.raises(UsageError) as error:
        Plugins.discover().offer(asked.kind, asked.name)
    message, known, hint = str(error.value).splitlines()
    assert message == asked.says
    assert known.split() == ["known", *", ".join(sorted(Plugins.discover().offers[asked.kind])).split()]
    assert hint == f"hint: {asked.hint}"


def test_an_unknown_name_mentions_plugins_that_are_broken(install: Install) -> None:
    install("faulty", "import no_such_package")
    with pytest.raises(UsageError, match=r"broken plugin faulty:plugin +ModuleNotFoundError"):
        Plugins.discover().offer("transforms", "of-faulty")


def test_the_distribution_found_twice_on_the_path_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("twice", OFFER.format(kind="metrics", name="mine", target="twice:Mine"))
    copy = tmp_path / "copy"
    (tmp_path / "site").rename(copy)
    (tmp_path / "site").symlink_to(copy)
    monkeypatch.syspath_prepend(str(copy))
    assert Plugins.discover().offer("metrics", "mine").provider == Provider("twice", "1.0")
