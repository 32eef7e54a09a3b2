"""The card of a checkpoint tells what was done, measured and typed, and is no part of the checkpoint's identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qtool
from qtool.artifacts.store import Artifact
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from tests.steps.conftest import Desk


def quantized(desk: Desk, monkeypatch: pytest.MonkeyPatch, weights: str = "int4-g8") -> Artifact:
    monkeypatch.setattr("sys.argv", ["/bin/qtool", "calibrate", "a model", "--data", "a text"])
    statistics = desk.calibrate()
    monkeypatch.setattr("sys.argv", ["/bin/qtool", "mitigate", "--method", "gptq"])
    scheme = read_scheme("", {"weights": weights}, desk.workspace.plugins)
    return mitigate(MitigateRequest(str(statistics.path), "gptq", scheme, {"clip": "none"}), desk.workspace)[0]


def test_it_tells_what_was_done_measured_and_typed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, other = quantized(desk, monkeypatch), quantized(desk, monkeypatch, "int8-g8")
    values = []
    for one in (artifact, other):
        request = EvalRequest(str(one.path), perplexity=(str(desk.text),), seq_len=16, max_windows=3)
        measured, _ = evaluate(request, desk.workspace)
        values.append(measured.manifest.details["values"])
    monkeypatch.setattr("sys.argv", ["/bin/qtool", "pack", "q.safetensors", "--to", "hf"])
    checkpoint, _ = pack(PackRequest(str(artifact.path), "hf"), desk.workspace)
    card = (checkpoint.path / "README.md").read_text()
    assert (
        "qtool calibrate 'a model' --data 'a text'\nqtool mitigate --method gptq\nqtool pack q.safetensors --to hf\n"
        in card
    )
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in card.splitlines() if line.startswith("| ")}
    assert {("mitigator", "gptq"), ("weights", "int4-sym-g8-sbf16"), ("settings", "gptq.clip=none")} <= rows
    assert ("transformers", checkpoint.manifest.details["consumers"]["transformers"]) in rows
    (metric,) = values[0]
    ((_, found),) = [row for row in rows if row[0] == metric]  # of this artifact, and not of the other
    assert found.startswith(f"{values[0][metric]:.4g} ± ")
    bits = checkpoint.manifest.details["bits"]
    assert f"{bits['linears']:.3f} bits a weight in the linears of its blocks, {bits['model']:.3f} in the whole" in card


def test_where_nothing_was_measured_it_says_so_and_identity_stays(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = quantized(desk, monkeypatch)
    monkeypatch.setattr("sys.argv", ["/bin/python", "a script"])
    first, _ = pack(PackRequest(str(artifact.path), "hf", desk.workspace.home / "one"), desk.workspace)
    text = (first.path / "README.md").read_text()
    assert "no evaluation of it was found beside it" in text
    assert "# pack hf, from Python" in text
    evaluate(EvalRequest(str(artifact.path), perplexity=(str(desk.text),), seq_len=16, max_windows=3), desk.workspace)
    second, _ = pack(PackRequest(str(artifact.path), "hf", desk.workspace.home / "two"), desk.workspace)
    assert (second.path / "README.md").read_text() != text
    assert second.manifest.id == first.manifest.id
    assert "README.md" not in second.manifest.tensors


def test_packed_again_it_tells_what_was_measured_since(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = quantized(desk, monkeypatch)
    asked = PackRequest(str(artifact.path), "compressed-tensors")
    checkpoint, _ = pack(asked, desk.workspace)
    card = checkpoint.path / "README.md"
    before = card.read_text().replace("# How it was made", "# By hand\n\nKept.\n\n## How it was made")
    card.write_text(before)
    request = EvalRequest(str(artifact.path), perplexity=(str(desk.text),), seq_len=16, max_windows=3)
    measured = [evaluate(replace(request, source=str(one.path)), desk.workspace)[0] for one in (artifact, checkpoint)]
    assert pack(asked, desk.workspace) == (checkpoint, True)
    rows = [
        [cell.strip() for cell in line.split("|")[2:4]] for line in card.read_text().splitlines() if "windows" in line
    ]
    (metric,) = measured[0].manifest.details["values"]
    assert [of for _, of in rows] == ["what was packed", "the checkpoint"]
    for (value, _), one in zip(rows, measured, strict=True):
        assert value.startswith(f"{one.manifest.details['values'][metric]:.4g} ± ")
    head, tail = before.split("Nothing: no evaluation of it was found beside it.")
    assert card.read_text().startswith(head)
    assert card.read_text().endswith(tail)
    card.write_text("# Mine\n")
    pack(asked, desk.workspace)
    assert card.read_text() == "# Mine\n"
    card.unlink()
    assert pack(asked, desk.workspace) == (checkpoint, True)


def test_paths_are_told_by_their_names(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = quantized(desk, monkeypatch)
    words = ["/bin/qtool", "pack", "/home/somebody/q.safetensors", "--input", "model=/data/secret/m", "--to=hf", "a/b"]
    monkeypatch.setattr("sys.argv", words)
    checkpoint, _ = pack(PackRequest(str(artifact.path), "hf"), desk.workspace)
    card = (checkpoint.path / "README.md").read_text()
    assert "\nqtool pack q.safetensors --input model=m --to=hf a/b\n" in card


def test_a_recipe_is_named_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/qtool", "run", "a recipe.yaml"])
    scheme = read_scheme("", {"weights": "int4-g8"}, desk.workspace.plugins)
    made, _ = mitigate(MitigateRequest(str(desk.calibrate().path), "gptq", scheme), desk.workspace)
    monkeypatch.setattr("sys.argv", [str(Path(qtool.__file__).with_name("__main__.py")), "pack", "q.safetensors"])
    checkpoint, _ = pack(PackRequest(str(made.path), "hf"), desk.workspace)
    assert "\nqtool run 'a recipe.yaml'\nqtool pack q.safetensors\n" in (checkpoint.path / "README.md").read_text()
