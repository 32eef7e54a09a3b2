"""Bad input ends every command in one sentence with its exit code and a hint, and leaves nothing half-written.

`@kind` stands for a good artifact, `%name` for something in the folder of bad things.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.artifacts.identity import digest_json
from qtool.engine.subject import Subject
from tests.cli.conftest import Ended, run_line

Run = Callable[..., Any]
Change = Callable[[dict[str, Any]], None]
Files = dict[Path, bytes]

TEXT = ("--data", "speeches", "--num-samples", "2", "--seq-len", "32")
SHORT = ("--perplexity", "speeches", "--seq-len", "32", "--max-windows", "2")
DOWN = "model.layers.1.mlp.down_proj.weight"
AGAIN = "make it again with the step that wrote it, or download it again"
LOCAL = "give a local folder instead: qtool calibrate /path/to/model"
OTHER_DISK = "free some space, or set QTOOL_HOME to another disk"


@dataclass(frozen=True)
class Case:
    """A command line, and how it must end: exit code, first line after ``error:``, last after ``hint:``."""

    words: str
    code: int
    says: str
    hint: str


@pytest.fixture(scope="module")
def bad(made: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder of models, artifacts and texts with something wrong with each."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(cache))
        patch.setenv("QTOOL_HOME", str(folder / "none"))
        tiny = Path(run_line("fetch", "tiny").out.strip())
        _make_models(tiny, folder)
        _make_artifacts(made, folder)
        for name, words in {
            "other-statistics": ("calibrate", folder / "other-model", *TEXT, "--gather", "absmax"),
            "few": ("calibrate", "tiny", *TEXT, "--gather", "mean"),
            "rank": ("calibrate", "tiny", "--data", "speeches", "--num-samples", 1, "--seq-len", 16),
            "huge-windows": ("calibrate", folder / "huge-model", *TEXT, "--gather", "none"),
        }.items():
            ended = run_line(*words, "-o", folder / f"{name}.safetensors")
            assert ended.code == 0, ended.err
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text('{"text": " \\n"}\n')
    (folder / "short.txt").write_text("hello there")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "taken.safetensors").write_text("mine")
    (folder / "taken").mkdir()
    (folder / "taken/paper.txt").write_text("mine")
    return folder


def _make_models(tiny: Path, folder: Path) -> None:
    def model(name: str, change: Change | None = None, **config: object) -> None:
        shutil.copytree(tiny, folder / name)
        if change is not None:
            tensors = load_file(folder / name / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        described = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(described | config))

    def put(tensor: str, value: float) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[tensor][3, 5] = value

        return change

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for leaf in ("up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{leaf}.weight"] *= 1e30

    model("other-model", put(DOWN, 0.5))
    model("nan-model", put(DOWN, float("nan")))
    model("inf-model", put(DOWN, float("-inf")))
    model("nan-embedding", put("model.embed_tokens.weight", float("nan")))
    model("huge-model", enlarge)
    model("gpt-model", model_type="gpt2")
    model("odd-model", model_type="no-such-type")
    model("cut-model")
    weights = folder / "cut-model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "no-model").mkdir()


def _make_artifacts(made: Mapping[str, Path], folder: Path) -> None:
    whole = made["plan"].read_bytes()
    for name, size in {"cut": len(whole) - 1, "half": len(whole) // 2, "nothing": 0}.items():
        (folder / f"{name}.safetensors").write_bytes(whole[:size])

    def rewritten(name: str, change: Change) -> None:
        with safe_open(str(made["plan"]), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            manifest = json.loads(file.metadata()["qtool"])
        del manifest["checksum"]
        change(manifest)
        text = json.dumps(manifest | {"checksum": digest_json(manifest)})
        save_file(tensors, folder / f"{name}.safetensors", {"qtool": text})

    rewritten("newer", lambda manifest: manifest.update(schema=2))
    rewritten("unknown-kind", lambda manifest: manifest.update(kind="spell"))
    rewritten("altered", lambda manifest: manifest["step"].update(method="none"))
    save_file({"x": torch.zeros(1)}, folder / "strangers.safetensors")


CASES: Mapping[str, Case] = {
    # no such model
    "no model of this name": Case(
        f"calibrate tinny {' '.join(TEXT)}", 3, "no such model `tinny`",
        "give a folder, a .gguf file, a hub id such as org/model, or one of the names",
    ),
    "no such folder": Case(
        f"eval ./nowhere {' '.join(SHORT)}", 3, "no such model `./nowhere`",
        "give a folder, a .gguf file, a hub id such as org/model, or one of the names",
    ),
    "a folder without a model": Case(
        "inspect %no-model", 3, "`BAD/no-model` holds no model",
        "give the folder of a model, or an artifact that a qtool step printed",
    ),
    "a model that was cut off": Case(
        "transform %cut-model --method quarot", 3, "`BAD/cut-model/model.safetensors` is truncated", AGAIN
    ),
    # no network
    "no network, model": Case(
        f"calibrate org/model {' '.join(TEXT)}", 6, "cannot reach the hub for `org/model`", LOCAL
    ),
    "no network, fetch": Case("fetch org/model", 6, "cannot reach the hub for `org/model`", LOCAL),
    "no network, text": Case(
        "calibrate tiny --data wikitext2", 6,
        "`Salesforce/wikitext` is neither in the data folder nor to be had from the hub",
        "export QTOOL_DATA=/path/to/data  # a folder that holds wikitext2/train.txt",
    ),
    # unknown family
    "a family that nobody describes": Case(
        f"calibrate %gpt-model {' '.join(TEXT)}", 3, "no family covers the model type `gpt2`",
        "describe it as data: see qtool.model.family.Family and the hook register_families",
    ),
    "a type that transformers does not know": Case(
        "transform %odd-model --method quarot", 3, "transformers cannot read the config of `BAD/odd-model`",
        "get the model again, or pip install --upgrade transformers",
    ),
    # unknown method
    "unknown transform": Case(
        "transform @statistics --method quarto", 2, "no transform is called `quarto`", "did you mean `quarot`?"
    ),
    "unknown mitigator": Case(
        "mitigate @plan --method gptq+lorq --scheme W4A16", 2, "no mitigator is called `lorq`", "did you mean `lorc`?"
    ),
    "unknown exporter": Case(
        "pack @quantized --to compresed-tensors", 2, "no exporter is called `compresed-tensors`",
        "did you mean `compressed-tensors`?",
    ),
    "unknown statistic": Case(
        "calibrate tiny --gather hesian", 2, "no statistic is called `hesian`", "did you mean `hessian`?"
    ),
    "unknown text": Case(
        "eval tiny --perplexity wikitext3", 2, "no dataset is called `wikitext3`", "did you mean `wikitext2`?"
    ),
    # bad scheme string
    "a scheme's part": Case(
        "mitigate @plan --method rtn --weights int4-gg", 2, "cannot read `gg` in the scheme `int4-gg`",
        "for example int4-sym-g128, int4-asym-token, fp4-g16-se4m3",
    ),
    "a scheme's format": Case(
        "mitigate @plan --method rtn --weights intt4", 2, "no format is called `intt4`", "did you mean `int4`?"
    ),
    "a scheme of a token for weights": Case(
        "mitigate @plan --method rtn --weights fp8-token", 2, "`token` means nothing for weights",
        "nearest that works: --weights fp8-sym-channel-sfp32",
    ),
    "a scheme's zero point": Case(
        "transform @statistics --method quarot --kv fp8-asym", 2, "`fp8` has no zero point",
        "nearest that works: fp8-sym-token-head-sfp32",
    ),
    # group size that does not divide a layer
    "groups of weights": Case(
        "mitigate @plan --method gptq --weights int4-g100", 2,
        "group size 100 does not divide the input of `model.layers.0.self_attn.q_proj`", "use a group size of 128",
    ),
    "groups of activations": Case(
        "mitigate @statistics --method gptq --weights int4-g64 --activations int8-g96", 2,
        "group size 96 does not divide the input of `model.layers.0.self_attn.q_proj`", "use a group size of 128",
    ),
    # artifact truncated
    "an artifact that lacks a byte": Case(
        "mitigate %cut.safetensors --method rtn --scheme W4A16", 3, "`BAD/cut.safetensors` is truncated", AGAIN
    ),
    "half an artifact": Case(
        "transform %half.safetensors --method quarot", 3,
        "`BAD/half.safetensors` is not a safetensors file, or is truncated", AGAIN,
    ),
    "an empty artifact": Case(
        "inspect %nothing.safetensors", 3, "`BAD/nothing.safetensors` is not a safetensors file, or is truncated", AGAIN
    ),
    "an altered artifact": Case(
        "verify %altered.safetensors", 3, "the manifest of `BAD/altered.safetensors` was changed after it was written",
        "make the artifact again with the step that wrote it",
    ),
    "a stranger's file": Case(
        "report %strangers.safetensors", 3, "`BAD/strangers.safetensors` is a safetensors file, but no qtool artifact",
        "give the folder that holds the model, or an artifact that a qtool step printed",
    ),
    # of the wrong kind
    "metrics to mitigate": Case(
        "mitigate @metrics --method rtn --scheme W4A16", 3, "`@metrics` is of the wrong kind", "qtool transform --help"
    ),
    "codes to transform": Case(
        "transform @quantized --method quarot", 3, "`@quantized` is of the wrong kind", "qtool calibrate --help"
    ),
    "codes to mitigate": Case(
        "mitigate @quantized --method rtn --scheme W4A16", 3, "`@quantized` is quantized already",
        "give the plan or the statistics it was made from",
    ),
    "a plan to pack": Case(
        "pack @plan --to hf", 3, "`@plan` holds nothing to pack",
        "qtool mitigate @plan --method rtn --scheme W4A16",
    ),
    "metrics to eval": Case(
        f"eval @metrics {' '.join(SHORT)}", 3, "`@metrics` is of the wrong kind", "qtool mitigate --help"
    ),
    "a plan to report": Case("report @plan", 3, "`@plan` is of the wrong kind", "qtool eval --help"),
    "a plan for statistics": Case(
        "mitigate @plan --method gptq --scheme W4A16 --input statistics=@plan", 3, "`@plan` is of the wrong kind",
        "qtool calibrate --help",
    ),
    "an unknown kind": Case(
        "inspect %unknown-kind.safetensors", 3, "`BAD/unknown-kind.safetensors` is of an unknown kind",
        "pip install --upgrade qtool",
    ),
    # of a newer schema
    "a newer schema": Case(
        "mitigate %newer.safetensors --method rtn --scheme W4A16", 3,
        "`BAD/newer.safetensors` was written by a newer qtool", "pip install --upgrade qtool",
    ),
    # about another model
    "an artifact of another model": Case(
        f"eval @quantized {' '.join(SHORT)} --input model=%other-model", 3,
        "`quantized.safetensors` is about another model", "--input model=PATH of the model that it was made from",
    ),
    "statistics of another model": Case(
        "transform tiny --method smoothquant --input statistics=%other-statistics.safetensors", 3,
        "statistics were collected on another model", "qtool calibrate TINY",
    ),
    # statistics missing a needed entry
    "a transform's entry": Case(
        "transform %few.safetensors --method smoothquant", 3, "the statistics lack `absmax` at `layers.0.attn_in`",
        "qtool calibrate MODEL --gather absmax,mean,sample",
    ),
    "a mitigator's entry": Case(
        "mitigate %few.safetensors --method gptq --scheme W4A16 --propagate none", 3,
        "the statistics lack `hessian` at `layers.0.attn_in`", "qtool calibrate MODEL --gather hessian,mean",
    ),
    "a format's entry": Case(
        "mitigate %few.safetensors --method rtn --scheme NVFP4 --propagate none", 3,
        "the statistics lack `absmax` at `layers.0.attn_in`", "qtool calibrate MODEL --gather absmax,mean,sample",
    ),
    # NaN or Inf in weights
    "NaN in a weight, calibrate": Case(
        f"calibrate %nan-model {' '.join(TEXT)}", 5, f"the weight `{DOWN}` holds NaN or Inf", "download it again"
    ),
    "Inf in a weight, mitigate": Case(
        "mitigate %inf-model --method rtn --scheme W4A16", 5, f"the weight `{DOWN}` holds NaN or Inf",
        "download it again",
    ),
    "NaN in the embedding, eval": Case(
        f"eval %nan-embedding {' '.join(SHORT)}", 5, "the weight `model.embed_tokens.weight` holds NaN or Inf",
        "download it again",
    ),
    # NaN or Inf in activations
    "Inf in activations, calibrate": Case(
        f"calibrate %huge-model {' '.join(TEXT)}", 5,
        "`hessian` of the activations at `layers.0.up_down` holds NaN or Inf",
        "run the model in float32: --dtype float32",
    ),
    "Inf in activations, mitigate": Case(
        "mitigate %huge-windows.safetensors --method gptq --scheme W4A16", 5,
        "the loss of `model.layers.0.mlp.up_proj` is not finite",
        "look for weights and activations so large that their squares overflow",
    ),
    "NaN in activations, eval": Case(
        f"eval %huge-model {' '.join(SHORT)}", 5, "`perplexity/speeches` is not finite", "--dtype float32"
    ),
    # empty text
    "empty text": Case(
        "calibrate tiny --data %empty.txt", 3, "`empty.txt sha256:e3b0c44298fc1c14` has no text",
        "choose another split or file",
    ),
    "blank text": Case(
        "eval tiny --perplexity %blank.jsonl", 3, "`blank.jsonl sha256:e16f1596201850fd` has no text",
        "choose another split or file",
    ),
    "short text": Case(
        "calibrate tiny --data %short.txt --seq-len 32", 3, "the text is too short for one window", "--seq-len 2"
    ),
    "text in another encoding": Case(
        "calibrate tiny --data %latin.txt", 3, "cannot read text from `BAD/latin.txt`", "give a file in UTF-8"
    ),
    "no such text": Case(
        "calibrate tiny --data %nowhere.txt", 3, "no such file `BAD/nowhere.txt`",
        "check the path, or name a dataset: qtool plugins datasets",
    ),
    # sequence longer than the model's context
    "long windows, calibrate": Case(
        "calibrate tiny --data speeches --seq-len 4096", 2, "the windows are longer than the model's context",
        "--seq-len 2048",
    ),
    "long windows, eval": Case(
        "eval @quantized --perplexity speeches --seq-len 4096", 2, "the windows are longer than the model's context",
        "--seq-len 2048",
    ),
    # output path taken
    **{
        f"output taken, {line.split()[0]}": Case(
            f"{line} -o %taken.safetensors", 2, "the output path is taken: `BAD/taken.safetensors`",
            "choose another path with -o, or remove the file",
        )
        for line in (
            f"calibrate tiny {' '.join(TEXT)}",
            "transform @statistics --method quarot",
            "mitigate @plan --method rtn --scheme W4A16",
            f"eval tiny {' '.join(SHORT)}",
        )
    },
    "output taken, pack": Case(
        "pack @quantized --to hf -o %taken", 2, "the output path is taken: `BAD/taken`", "-o another folder"
    ),
    "output taken, report": Case(
        "report @metrics -o %taken.safetensors", 2,
        "`BAD/taken.safetensors` would be an artifact's name, and a report is text", "-o BAD/taken.md",
    ),
    "output below a file": Case(
        "transform @statistics --method quarot -o %empty.txt/plan.safetensors", 6,
        "cannot write `BAD/empty.txt/plan.safetensors`", "choose another path with -o",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Runs command lines with the names of things in place of the marks, and the other way round in what is said."""

    names: Mapping[str, str]
    home: Path

    def run(self, words: str) -> Ended:
        ended = run_line(*(self._filled(word) for word in words.split()))
        said = ended.err
        for mark, path in self.names.items():
            said = said.replace(path, "BAD" if mark == "%" else mark)
        return Ended(ended.code, ended.out, said)

    def _filled(self, word: str) -> str:
        for mark, path in self.names.items():
            word = word.replace(mark, f"{path}/" if mark == "%" else path)
        return word

    def left(self) -> list[str]:
        """What lies in the folder of artifacts."""
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))


@pytest.fixture
def bench(made: Mapping[str, Path], bad: Path) -> Bench:
    tiny = Path(run_line("fetch", "tiny").out.strip())
    kinds = {f"@{kind}": str(path) for kind, path in sorted(made.items(), reverse=True)}
    return Bench({**kinds, "%": str(bad), "TINY": str(tiny)}, Path(os.environ["QTOOL_HOME"]))


def files_of(*folders: Path) -> Files:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def untouched(bad: Path, made: Mapping[str, Path]) -> Iterator[None]:
    """Nothing of the user's is changed or joined by a file of ours."""
    folders = (bad, made["plan"].parent)
    before = files_of(*folders)
    yield
    assert files_of(*folders) == before


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(bench: Bench, case: Case) -> None:
    ended = bench.run(case.words)
    assert (ended.code, ended.out) == (case.code, ""), ended.err
    first, *_, last = ended.err.splitlines()
    assert first == f"error: {case.says}"
    assert last == f"hint: {case.hint}"
    assert "Traceback" not in ended.err
    assert bench.left() == []


class TestRankDeficientHessian:
    """Fewer tokens than channels: damping copes, and where it had to be raised, that is told."""

    LINE = "mitigate %rank.safetensors --method gptq --scheme W4A16"

    def test_damping_makes_it_definite(self, bench: Bench) -> None:
        ended = bench.run(self.LINE)
        assert (ended.code, ended.err) == (0, "")

    def test_damping_that_was_raised_is_told(self, bench: Bench) -> None:
        ended = bench.run(f"{self.LINE} --set dampening-frac=0")
        assert (ended.code, ended.err) == (0, "warning: not as usual: raised_dampening 28\n")

    def test_damping_that_was_raised_is_refused_when_strict(self, bench: Bench) -> None:
        ended = bench.run(f"{self.LINE} --set dampening-frac=0 --strict")
        assert (ended.code, ended.out) == (5, "")
        assert ended.err == (
            "error: something unusual happened and --strict was given\n  raised_dampening  28\n"
            "hint: without --strict the same command goes on from here, "
            "and qtool inspect says what each of these means\n"
        )
        assert {Path(name).parts[0][-len(".partial") :] for name in bench.left()} == {".partial"}
        assert bench.run(f"{self.LINE} --set dampening-frac=0").code == 0


STEPS = {
    "calibrate": f"calibrate tiny {' '.join(TEXT)}",
    "transform": "transform @statistics --method quarot",
    "mitigate": "mitigate @plan --method rtn --scheme W4A16",
    "eval": f"eval tiny {' '.join(SHORT)}",
    "pack": "pack @quantized --to hf",
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stopped(*_: object) -> NoReturn:
        os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("the signal was ignored")

    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(Subject, "packed", stopped)
    try:
        ended = bench.run("pack @quantized --to hf")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.startswith("error: interrupted")
    assert bench.left() == []


class TestFullDisk:
    """A disk that fills up leaves no half of anything; finished blocks stay for the next run of the same command."""

    @staticmethod
    def fill(monkeypatch: pytest.MonkeyPatch, target: str, *, after: int = 0) -> None:
        """Let a function of a module work a few times, then find the disk full."""
        module, _, name = target.rpartition(".")
        real = getattr(__import__(module, fromlist=[name]), name)
        calls = iter(range(after))

        def full(*arguments: object, **options: object) -> object:
            if next(calls, None) is not None:
                return real(*arguments, **options)
            return no_room(name)

        monkeypatch.setattr(target, full)

    def check(self, ended: Ended) -> None:
        assert (ended.code, ended.out) == (6, ""), ended.err
        first, *_, last = ended.err.splitlines()
        assert first.startswith("error: no space left on the disk of `")
        assert last == f"hint: {OTHER_DISK}"

    @pytest.mark.parametrize("step", ["calibrate", "transform", "mitigate", "eval"])
    def test_before_anything_is_done(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.fill(monkeypatch, "qtool.artifacts.store.save_file")
        self.check(bench.run(STEPS[step]))
        assert bench.left() == []

    @pytest.mark.parametrize("step", ["calibrate", "mitigate"])
    def test_after_a_block(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        with monkeypatch.context() as patch:
            self.fill(patch, "qtool.artifacts.store.save_file", after=1)
            self.check(bench.run(STEPS[step]))
        (folder, *files) = bench.left()
        assert folder.endswith(".safetensors.partial")
        assert [Path(file).name for file in files] == ["key", "layer-0.safetensors"]
        ended = bench.run(STEPS[step])
        assert ended.code == 0
        assert bench.left() == [Path(ended.out.strip()).name]

    @pytest.mark.parametrize("step", STEPS)
    def test_while_the_parts_are_put_together(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        shards, store = "qtool.builtin.exporters.shards.save_file", "qtool.artifacts.store.write_assembled"
        self.fill(monkeypatch, shards if step == "pack" else store)
        self.check(bench.run(STEPS[step]))
        assert not [name for name in bench.left() if ".partial" not in name]

    def test_where_digests_are_remembered(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
        self.fill(monkeypatch, "os.fsync")
        self.check(bench.run(f"calibrate %other-model {' '.join(TEXT)}"))
        assert bench.left() == []
        assert list((tmp_path / "cache").iterdir()) == []

    def test_where_activations_are_spilled(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qtool.engine.stream.free_memory", lambda: 0)
        self.fill(monkeypatch, "os.posix_fallocate")
        self.check(bench.run(STEPS["calibrate"]))
        assert bench.left() == []

    def test_a_report(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "table.md").write_text("the old one")
        self.fill(monkeypatch, "os.fsync")
        self.check(bench.run(f"report @metrics -o {tmp_path / 'table.md'}"))
        assert (tmp_path / "table.md").read_text() == "the old one"
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["table.md"]


def no_room(name: str) -> NoReturn:
    """Fail as the system does, or as safetensors says that it did."""
    if name == "save_file":
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, "No space left on device")
