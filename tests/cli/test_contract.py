"""What every command promises to the shell: one line on standard output or none, an exit code, a hint."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qtool import __version__
from qtool.cli.app import COMMANDS
from qtool.cli.session import Common
from qtool.steps.calibrate import CalibrateRequest
from qtool.steps.eval import EvalRequest
from qtool.steps.mitigate import MitigateRequest
from qtool.steps.pack import PackRequest
from qtool.steps.presets import MitigateSettings
from qtool.steps.transform import TransformRequest
from qtool.steps.verify import VerifyRequest

Run = Callable[..., Any]
Made = dict[str, Path]
SMALL = ("--data", "speeches", "--num-samples", "2", "--seq-len", "32")
KEYS = ["path", "kind", "key", "id", "reused", "metrics"]

# Command line after the command, given the kind of artifact that is put in place of `@`; and what it makes.
STEPS = {
    "calibrate": ("tiny", *SMALL, "statistics"),
    "transform": ("@statistics", "--method", "smoothquant", "plan"),
    "mitigate": ("@plan", "--method", "rtn", "--weights", "int4-g32", "quantized"),
    "pack": ("@quantized", "--to", "hf", "checkpoint"),
    "eval": ("@plan", "--perplexity", "speeches", "--seq-len", "32", "--max-windows", "2", "metrics"),
    "verify": ("@plan", "--windows", "1", "--seq-len", "16", "plan"),
}


def filled(words: tuple[str, ...], made: Made) -> list[str]:
    return [str(made[word[1:]]) if word.startswith("@") else word for word in words]


@pytest.mark.parametrize("command", STEPS)
def test_success_is_one_absolute_path_on_standard_output(qtool: Run, made: Made, command: str) -> None:
    *words, kind = STEPS[command]
    ended = qtool(command, *filled(tuple(words), made))
    assert ended.code == 0, ended.err
    assert ended.out.endswith("\n")
    (line,) = ended.out.splitlines()
    assert Path(line).is_absolute()
    assert Path(line).exists()
    assert qtool("inspect", line, "--json").code == 0
    assert json.loads(qtool("inspect", line, "--json").out)["kind"] == kind


@pytest.mark.parametrize("command", STEPS)
def test_json_is_one_object_and_a_second_run_gives_the_same(qtool: Run, made: Made, command: str) -> None:
    *words, kind = STEPS[command]
    first, second = (qtool(command, *filled(tuple(words), made), "--json") for _ in range(2))
    assert first.err == "" or command == "verify"
    described, again = json.loads(first.out), json.loads(second.out)
    assert list(described) == KEYS
    assert described["kind"] == kind
    assert not described["reused"]
    assert again == {**described, "reused": command != "verify", "metrics": again["metrics"]}
    assert bool(described["metrics"]) == (command in ("eval", "verify"))


def test_the_names_of_outputs_follow_from_the_key_and_lie_in_the_home_folder(qtool: Run, made: Made) -> None:
    described = json.loads(qtool("transform", made["statistics"], "--method", "smoothquant", "--json").out)
    assert Path(described["path"]).parent == Path(os.environ["QTOOL_HOME"]).resolve()
    assert Path(described["path"]).name == f"transform-smoothquant-{described['key'][:12]}.safetensors"


def test_fetch_prints_the_folder_of_a_model(qtool: Run) -> None:
    ended = qtool("fetch", "tiny")
    assert ended.code == 0
    assert (Path(ended.out.rstrip("\n")) / "config.json").is_file()
    assert json.loads(qtool("fetch", "tiny", "--json").out)["path"] == ended.out.rstrip("\n")


def test_eval_shows_people_the_values_on_standard_error_unless_quiet(qtool: Run, made: Made) -> None:
    words = ("eval", made["plan"], "--perplexity", "speeches", "--seq-len", 32, "--max-windows", 2)
    value = json.loads(qtool(*words, "--json").out)["metrics"]["perplexity/speeches"]
    assert qtool(*words).err == f"perplexity/speeches  {value:.6g}\n"
    assert qtool(*words, "--quiet").err == ""


FAILURES = {
    "unknown command": (2, ("calibrte",), "no such command `calibrte`", "did you mean `calibrate`?"),
    "no command": (2, (), "missing command", "qtool --help"),
    "unknown option": (2, ("transform", "--metod", "x"), "no such option: `--metod`", "did you mean `--method`?"),
    "option missing": (2, ("transform", "@plan"), "missing option `--method`", "qtool transform --help"),
    "option's value": (2, ("calibrate", "tiny", "--num-samples", "0"), "`--num-samples`", "qtool calibrate --help"),
    "unknown method": (2, ("transform", "@statistics", "--method", "quarto"), "`quarto`", "did you mean `quarot`?"),
    "unknown setting": (2, ("mitigate", "@plan", "--method", "rtn", "--scheme", "W4A16", "--set", "clpi=search"),
                        "`rtn` has no option `clpi`", "--set clip=VALUE"),
    "setting's form": (2, ("mitigate", "@plan", "--method", "rtn", "--set", "clip"), "`clip`", "--set key=value"),
    "bad scheme": (2, ("mitigate", "@plan", "--method", "rtn", "--weights", "int4-bad"), "`bad`", "int4-sym-g128"),
    "unknown scheme": (2, ("mitigate", "@plan", "--method", "rtn", "--scheme", "W9A9"), "`W9A9`", "--scheme W4A16"),
    "unknown preset": (2, ("mitigate", "@plan", "--method", "rtn", "--preset", "servey"), "`servey`", "`survey`"),
    "no scheme": (2, ("mitigate", "@plan", "--method", "rtn"), "leaves the weights as they are", "--weights"),
    "no statistics": (2, ("transform", "tiny", "--method", "smoothquant"), "needs statistics", "qtool calibrate tiny"),
    "empty path": (2, ("transform", "", "--method", "quarot"), "the command before this one failed", "message"),
    "output taken": (2, ("transform", "@statistics", "--method", "smoothquant", "-o", "@plan"), "taken", "-o"),
    "output's name": (2, ("transform", "@statistics", "--method", "quarot", "-o", "plan"), ".safetensors", "-o plan.s"),
    "unknown device": (2, ("calibrate", "tiny", "--device", "tpu"), "`tpu`", "--device auto"),
    "unknown role": (2, ("transform", "@statistics", "--method", "quarot", "--input", "modl=x"), "`modl=x`", "--input"),
    "nothing to measure": (2, ("eval", "tiny"), "nothing to measure", "--perplexity wikitext2"),
    "gate's form": (2, ("eval", "tiny", "--perplexity", "speeches", "--require", "ppl"), "`ppl`", "--require"),
    "unknown kind": (2, ("plugins", "mitigator"), "`mitigator`", "did you mean `mitigators`?"),
    "no options": (2, ("plugins", "formats", "int4"), "formats have no options", "qtool plugins formats"),
    "options of none": (2, ("plugins", "mitigators", "gtpq"), "`gtpq`", "did you mean `gptq`?"),
    "window too long": (2, ("calibrate", "tiny", *SMALL, "--seq-len", "4096"), "context", "--seq-len 2048"),
    "plan without picture": (2, ("inspect", "@statistics", "--plan", "@plan"), "`--plan` belongs", "--plot"),
    "site without picture": (2, ("inspect", "@statistics", "--site", "x"), "`--site` belongs", "--plot"),
    "strict picture": (2, ("inspect", "@statistics", "--strict", "--plot", "a.png"), "`--strict` belongs", "leave one"),
    "picture of a plan": (2, ("inspect", "@plan", "--plot", "a.png"), "of the kind `plan`", "--plot a.png --plan"),
    "several in a picture": (2, ("inspect", "@plan", "@plan", "--plot", "a.png"), "is of one artifact", "inspect"),
    "kind of picture": (2, ("inspect", "@statistics", "--plot", "a.gif"), "`a.gif`", "--plot a.png"),
    "unknown site": (2, ("inspect", "@statistics", "--plot", "a.png", "--site", "layers.0.mlp"), "`layers.0.mlp`",
                     "did you mean `layers.0.mlp_in`?"),
    "verify a model": (2, ("verify", "tiny"), "`tiny` is no artifact", "qtool inspect --strict tiny"),
    "no such file": (3, ("verify", "nothing.safetensors"), "`nothing.safetensors`", "check the path"),
    "no such model": (3, ("calibrate", "tinny"), "no such model `tinny`", "hub id"),
    "wrong kind": (3, ("pack", "@plan", "--to", "hf"), "nothing to pack", "qtool mitigate"),
    "moved model": (3, ("transform", "@statistics", "--method", "quarot", "--input", "model=no"), "model", "--input"),
    "no such device": (6, ("calibrate", "tiny", "--device", "cuda:99"), "cuda:99", "--device auto"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "words", "says", "hint"), FAILURES.values(), ids=FAILURES)
def test_failure_leaves_standard_output_empty_and_ends_with_a_hint(
    qtool: Run, made: Made, code: int, words: tuple[str, ...], says: str, hint: str
) -> None:
    ended = qtool(*filled(words, made))
    assert (ended.code, ended.out) == (code, ""), ended.err
    first, *_, last = ended.err.splitlines()
    assert first.startswith("error: ")
    assert not first.endswith(".")
    assert says in ended.err
    assert last.startswith("hint: ")
    assert hint in last


def test_a_missed_gate_is_7_but_what_was_measured_is_kept(qtool: Run, made: Made, tmp_path: Path) -> None:
    output = tmp_path / "measured.safetensors"
    words = ("eval", made["plan"], "--perplexity", "speeches", "--seq-len", 32, "--max-windows", 2, "-o", output)
    assert qtool(*words, "--require", "perplexity/speeches>1").code == 0
    missed = qtool(*words, "--require", "perplexity/speeches<1")
    assert (missed.code, missed.out) == (7, "")
    assert str(output) in missed.err
    assert "perplexity/speeches<1" in missed.err


@pytest.mark.parametrize("words", [(), ("-",)], ids=["missing", "dash"])
def test_a_path_is_read_from_standard_input(qtool: Run, made: Made, words: tuple[str, ...]) -> None:
    ended = qtool("verify", *words, "--windows", 1, "--seq-len", 8, stdin=f"{made['plan']}\n")
    assert (ended.code, ended.out) == (0, f"{made['plan']}\n")


def test_inspect_takes_several_paths_from_arguments_and_standard_input(qtool: Run, made: Made) -> None:
    ended = qtool("inspect", made["plan"], "-", "--json", stdin=f"{made['metrics']}\n{made['statistics']}\n")
    assert ended.code == 0, ended.err
    assert [json.loads(line)["kind"] for line in ended.out.splitlines()] == ["plan", "metrics", "statistics"]


def test_a_picture_is_one_path_or_one_object_with_its_numbers(qtool: Run, made: Made, tmp_path: Path) -> None:
    words = ("inspect", made["statistics"], "--plot", tmp_path / "a.svg", "--plan", made["plan"])
    site = ("--site", "layers.2.mlp_in")
    ended = qtool(*words, *site)
    assert (ended.code, ended.out, ended.err) == (0, f"{tmp_path / 'a.svg'}\n", "")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    described = json.loads(qtool(*words, *site, "--json").out)
    assert described["path"] == str(tmp_path / "a.svg")
    before, after = ([one for one in described["sites"] if one["stage"] == name] for name in ("before", "after quarot"))
    assert [one["site"] for one in before] == [f"layers.{i}.mlp_in" for i in range(4)]
    assert all(one["kurtosis"] > 10 > 4 > other["kurtosis"] for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("stdin", ["", "\n", "  \n"], ids=["nothing", "an empty line", "blanks"])
@pytest.mark.parametrize("command", ["calibrate", "transform --method quarot", "verify", "inspect", "report"])
def test_an_empty_pipe_says_that_the_command_before_it_failed(qtool: Run, command: str, stdin: str) -> None:
    ended = qtool(*command.split(), stdin=stdin)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: an empty path was given; the command before this one failed\n")


def test_several_lines_where_one_is_wanted_are_refused(qtool: Run, made: Made) -> None:
    ended = qtool("verify", stdin=f"{made['plan']}\n{made['plan']}\n")
    assert (ended.code, ended.out) == (2, "")
    assert "lines received  2" in ended.err


def test_a_terminal_is_not_waited_for(qtool: Run, terminal: Callable[[], io.StringIO]) -> None:
    ended = qtool("verify", stdin=terminal())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: nothing was given to work on\nhint: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(qtool: Run, command: str) -> None:
    ended = qtool(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: qtool {command} ")
    assert "--debug" in ended.out
    assert "--json" in ended.out


def test_help_lists_every_command_with_a_whole_sentence(qtool: Run) -> None:
    ended = qtool("--help")
    rows = dict(line.split(None, 1) for line in ended.out.partition("Commands:\n")[2].split("\n\n")[0].splitlines())
    assert list(rows) == list(COMMANDS)
    assert all(summary.endswith(".") and not summary.endswith("...") for summary in rows.values())


def test_version_is_printed(qtool: Run) -> None:
    ended = qtool("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"qtool {__version__}\n", "")


CONVERTED = {"gather", "settings", "scheme", "inputs"}


@pytest.mark.parametrize(
    ("command", "request_type"),
    [
        ("calibrate", CalibrateRequest),
        ("transform", TransformRequest),
        ("mitigate", MitigateSettings),
        ("pack", PackRequest),
        ("eval", EvalRequest),
        ("verify", VerifyRequest),
    ],
)
def test_defaults_of_the_command_line_are_those_of_the_library(command: str, request_type: type) -> None:
    options = inspect.signature(COMMANDS[command]).parameters
    shared = [one for one in fields(request_type) if one.name in options and one.name not in CONVERTED]
    assert len(shared) > 1
    for one in shared:
        given = options[one.name].default
        if given not in (None, "", inspect.Parameter.empty):
            assert given == one.default, one.name


def test_defaults_of_mitigate_are_those_of_its_request() -> None:
    settings = MitigateSettings()
    for one in fields(MitigateRequest):
        if one.name in {other.name for other in fields(MitigateSettings)}:
            assert getattr(settings, one.name) == one.default


def test_statistics_gathered_by_default_are_all_of_them() -> None:
    default = inspect.signature(COMMANDS["calibrate"]).parameters["gather"].default
    assert tuple(default.split(",")) == CalibrateRequest("").gather


def test_common_options_are_the_same_everywhere() -> None:
    for name in ("calibrate", "transform", "mitigate", "pack", "eval", "report", "run", "inspect", "verify", "fetch"):
        assert {one.name for one in fields(Common)} <= set(inspect.signature(COMMANDS[name]).parameters)


@pytest.mark.parametrize("line", ["plugins --json", "--help", "--version"])
def test_a_reader_that_leaves_ends_a_command_quietly_with_141(line: str) -> None:
    script = f'"{sys.executable}" -m qtool {line} | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.slow
def test_bars_of_libraries_are_shown_on_a_terminal_only(made: Made, tmp_path: Path) -> None:
    words = ("eval", str(made["checkpoint"]), "--perplexity", "speeches", "--seq-len", "32", "--max-windows", "1")
    line = [sys.executable, "-m", "qtool", *words, "-o", str(tmp_path / "metrics.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)
    assert [row.split()[0] for row in done.stderr.splitlines()] == ["perplexity/speeches"]


@pytest.mark.slow
def test_steps_chain_through_pipes(tmp_path: Path) -> None:
    qtool = f'"{sys.executable}" -m qtool'
    script = (
        f"set -euo pipefail; {qtool} calibrate tiny {' '.join(SMALL)} | {qtool} transform --method quarot "
        f"| {qtool} mitigate --method gptq --scheme W4A4 "
        f"| {qtool} eval --perplexity speeches --seq-len 32 --max-windows 2"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "QTOOL_HOME": "home"},
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.rstrip("\n")).parent == tmp_path / "home"


@pytest.mark.slow
def test_a_failure_at_the_head_of_a_pipe_is_told_at_every_place(tmp_path: Path) -> None:
    qtool = f'"{sys.executable}" -m qtool'
    script = f"{qtool} calibrate nothing | {qtool} transform --method quarot | {qtool} verify; echo ${{PIPESTATUS[*]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path
    )
    assert done.stdout == "3 2 2\n"
    assert done.stderr.count("the command before this one failed") == 2


def test_packing_says_who_read_the_checkpoint_back(qtool: Run, made: Made, tmp_path: Path) -> None:
    from importlib.metadata import version

    ended = qtool("pack", made["quantized"], "--to", "hf", "-o", tmp_path / "packed")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'packed'}\n")
    said = ", ".join(f"{name} {version(name)}" for name in ("transformers", "safetensors"))
    assert ended.err.count("read back with") == 1
    assert f"note: read back with {said}\n" in ended.err
    again = qtool("inspect", tmp_path / "packed", "--json")
    assert json.loads(again.out)["read_back_with"] == said
