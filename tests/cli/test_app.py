"""Commands of plugins, completion, and the presets of mitigate as the command line hands them on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.artifacts.store import open_artifact

Run = Callable[..., Any]
Install = Callable[[str, str], None]

HELLO = """
from qtool import hookimpl

@hookimpl
def register_commands(app):
    @app.command()
    def {name}():
        "Say hello."
        import sys
        {body}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path as pip would."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, source: str) -> None:
        (site / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qtool]\nplugin = {name}\n")

    return install


def test_a_strangers_command_joins_the_others(qtool: Run, install: Install) -> None:
    install("greeter", HELLO.format(name="say_hello", body="sys.stdout.write('hello\\n')"))
    assert qtool("say-hello").out == "hello\n"
    assert "Say hello." in qtool("--help").out


def test_a_strangers_group_of_commands_joins_and_may_not_take_a_name(qtool: Run, install: Install) -> None:
    source = (
        "import sys, typer\nfrom qtool import hookimpl\ngroup = typer.Typer()\n"
        "@group.command()\ndef one(): sys.stdout.write('1\\n')\n@group.command()\ndef two(): pass\n"
        "@hookimpl\ndef register_commands(app): app.add_typer(group, name={name!r})\n"
    )
    install("numbers_a", source.format(name="numbers"))
    assert qtool("numbers", "one").out == "1\n"
    install("numbers_b", source.format(name="numbers"))
    assert "error: two plugins offer the command `numbers`\n" in qtool("plugins").err


def test_a_strangers_command_fails_as_ours_do(qtool: Run, install: Install) -> None:
    install(
        "failing", HELLO.format(name="fail_now", body="from qtool.errors import DataError; raise DataError('no text')")
    )
    ended = qtool("fail-now")
    assert (ended.code, ended.out, ended.err) == (3, "", "error: no text\n")


def test_a_plugin_that_cannot_add_its_commands_is_left_out(qtool: Run, install: Install) -> None:
    install("faulty", "from qtool import hookimpl\n@hookimpl\ndef register_commands(app): 1 / 0")
    ended = qtool("--version")
    assert ended.code == 0
    assert ended.err == "warning: the commands of `faulty:plugin` are left out: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("name", ["calibrate", "eval"])
def test_a_command_whose_name_is_taken_is_refused(qtool: Run, install: Install, name: str) -> None:
    install("rival", HELLO.format(name="anything", body="pass").replace("command()", f"command({name!r})"))
    ended = qtool("--help")
    assert (ended.code, ended.out) == (4, "")
    assert ended.err == (
        f"error: two plugins offer the command `{name}`\n  one  qtool\n  two  rival:plugin\nhint: pip uninstall rival\n"
    )


COMPLETED = {
    "transform --method qua": ["quarot"],
    "transform --method smoothquant+qua": ["smoothquant+quarot"],
    "mitigate --method gptq+lo": ["gptq+lorc"],
    "mitigate --scheme NVFP": ["NVFP4", "NVFP4A16"],
    "pack --to comp": ["compressed-tensors"],
    "eval --perplexity wiki": ["wikitext2"],
    "cal": ["calibrate"],
}


@pytest.mark.parametrize("words", COMPLETED)
def test_shells_complete_what_plugins_offer(qtool: Run, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"qtool {words}"
    monkeypatch.setenv("_QTOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert qtool().out.split() == COMPLETED[words]


def test_the_survey_preset_is_handed_on_and_own_options_win(qtool: Run, made: dict[str, Path]) -> None:
    words = ("mitigate", made["plan"], "--method", "gptq", "--preset", "survey")
    ended = qtool(*words)
    assert ended.code == 0, ended.err
    survey = open_artifact(Path(ended.out.strip())).manifest
    (gptq,) = survey.step.config["methods"]
    assert gptq["config"]["parameters"] == "stale"
    assert gptq["config"]["clip"] == "search"
    assert survey.schemes["weights"]["range_rule"] == "full"
    assert survey.schemes["activations"] == {**survey.schemes["activations"], "strategy": "token", "symmetric": False}
    asked = {
        name: survey.step.config[name] for name in ("true_sequential", "token_weight", "seed", "round_activations")
    }
    assert asked == {"true_sequential": True, "token_weight": "uniform", "seed": 42, "round_activations": False}

    own = ("--seed", 0, "--no-true-sequential", "--activations", "none", "--set", "clip=none")
    ended = qtool(*words, *own)
    assert ended.code == 0, ended.err
    manifest = open_artifact(Path(ended.out.strip())).manifest
    config = manifest.step.config
    assert (config["seed"], config["true_sequential"], config["token_weight"]) == (0, False, "uniform")
    assert manifest.schemes["activations"] is None
    assert (config["methods"][0]["config"]["clip"], config["methods"][0]["config"]["parameters"]) == ("none", "stale")


def test_a_scheme_of_ones_own_takes_the_place_of_the_whole_preset(qtool: Run, made: dict[str, Path]) -> None:
    ended = qtool("mitigate", made["plan"], "--method", "rtn", "--preset", "survey", "--scheme", "W4A16")
    assert ended.code == 0, ended.err
    schemes = open_artifact(Path(ended.out.strip())).manifest.schemes
    assert (schemes["name"], schemes["activations"], schemes["weights"]["group_size"]) == ("W4A16", None, 128)
