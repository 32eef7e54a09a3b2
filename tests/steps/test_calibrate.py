"""calibrate: the same question has the same key and is answered once; what cannot be answered is refused at once."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import open_artifact
from qtool.errors import ArtifactError, DataError, ModelError, NumericalError, UsageError
from qtool.model.text import calibration_windows, read_text_file, token_digest
from qtool.steps.calibrate import EVERYTHING, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Desk


class TestKeys:
    def test_the_same_question_is_answered_once(self, desk: Desk) -> None:
        first, reused = calibrate(desk.request(), desk.workspace)
        assert not reused
        workspace, watch = desk.watched()
        second, reused = calibrate(desk.request(), workspace)
        assert reused
        assert watch.seen == []
        assert second.manifest == first.manifest
        assert first.path.name == f"calibrate-statistics-{first.manifest.key[:12]}.safetensors"
        assert first.path.parent == desk.workspace.home

    @pytest.mark.parametrize(
        "change",
        [
            {"num_samples": 4},
            {"seq_len": 16},
            {"seed": 1},
            {"gather": ("hessian",)},
            {"gather": EVERYTHING[:-1]},
            {"token_weight": "inverse-norm"},
            {"token_weight": "inverse-norm:0.5"},
            {"sample_size": 9},
            {"dtype": "float32"},
        ],
    )
    def test_another_question_has_another_key(self, desk: Desk, change: dict[str, Any]) -> None:
        plain = desk.calibrate(gather=("absmax", "mean"))
        other = desk.calibrate(**{"gather": ("absmax", "mean"), **change})
        assert other.manifest.key != plain.manifest.key
        assert other.manifest.id != plain.manifest.id

    @pytest.mark.parametrize(
        "change", [{"batch": 1}, {"batch": 3}, {"gather": ("mean", "absmax")}, {"dtype": "float64"}]
    )
    def test_the_same_question_in_other_words_has_the_same(self, desk: Desk, change: dict[str, Any]) -> None:
        plain = desk.calibrate(gather=("absmax", "mean"))
        asked = desk.request(**{"gather": ("absmax", "mean"), **change}, output=desk.workspace.home / "o.safetensors")
        assert calibrate(asked, desk.workspace)[0].manifest.key == plain.manifest.key

    def test_it_does_not_matter_where_things_lie(self, desk: Desk, tmp_path: Path) -> None:
        first = desk.calibrate()
        model, text = desk.copied(tmp_path / "elsewhere"), tmp_path / "t" / "text.txt"
        text.parent.mkdir()
        shutil.copy(desk.text, text)
        home = tmp_path / "home"
        home.mkdir()
        asked = desk.request(source=str(model), data=str(text))
        second, reused = calibrate(asked, replace(desk.workspace, home=home, cache=tmp_path / "c"))
        assert not reused
        assert second.manifest.key == first.manifest.key
        assert second.manifest.id == first.manifest.id
        assert str(tmp_path) not in second.manifest.to_text().replace(str(model), "").replace(str(text), "")

    def test_the_name_of_a_text_is_shown_but_does_not_matter(self, desk: Desk, tmp_path: Path) -> None:
        first = desk.calibrate()
        shutil.copy(desk.text, tmp_path / "other.name.txt")
        second, reused = calibrate(desk.request(data=str(tmp_path / "other.name.txt")), desk.workspace)
        assert reused
        assert second.path == first.path
        first.path.unlink()
        made, reused = calibrate(desk.request(data=str(tmp_path / "other.name.txt")), desk.workspace)
        assert not reused
        assert (made.path, made.manifest.key, made.manifest.id) == (first.path, first.manifest.key, first.manifest.id)
        assert (first.manifest.details["data"], made.manifest.details["data"]) == ("text.txt", "other.name.txt")

    def test_another_model_or_text_has_another_key(self, desk: Desk, tmp_path: Path) -> None:
        plain = desk.calibrate(gather=())

        def nudge(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"][0, 0] += 1e-6

        nudged = desk.calibrate(gather=(), source=str(desk.copied(tmp_path / "nudged", nudge)))
        (tmp_path / "text.txt").write_text(desk.text.read_text()[1:])
        other = desk.calibrate(gather=(), data=str(tmp_path / "text.txt"))
        assert len({one.manifest.key for one in (plain, nudged, other)}) == 3

    def test_a_new_version_of_a_statistic_is_another_question(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = desk.calibrate(gather=("mean",))
        monkeypatch.setattr(desk.workspace.plugins.load("statistics", "mean"), "version", 2, raising=False)
        assert desk.calibrate(gather=("mean",)).manifest.key != plain.manifest.key

    def test_a_plan_is_another_subject_of_the_same_model(self, desk: Desk) -> None:
        plain = desk.calibrate()
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        behind = desk.calibrate(source=str(plan.path))
        assert behind.manifest.key != plain.manifest.key
        assert behind.manifest.subject == plain.manifest.subject
        assert behind.manifest.inputs["plan"].id == plan.manifest.id


class TestWhatIsWritten:
    def test_the_text_is_that_of_the_protocol(self, desk: Desk) -> None:
        artifact = desk.calibrate(seed=3, gather=())
        tokenizer = desk.workspace.model(str(desk.model)).tokenizer()
        windows = calibration_windows(tokenizer, read_text_file(desk.text), 3, 32, 3)
        assert torch.equal(artifact.tensor("windows").long(), windows)
        details = artifact.manifest.details
        assert details["tokens"] == 3 * 32
        assert details["data"] == "text.txt"
        assert details["tokens_digest"] == token_digest(windows)
        assert str(desk.text.parent) not in str(details)

    def test_the_file_is_whole_and_says_how_it_was_made(self, desk: Desk) -> None:
        artifact = desk.calibrate()
        artifact.verify()
        again = open_artifact(artifact.path)
        assert again.manifest == artifact.manifest
        assert again.manifest.about["seconds"] > 0
        assert again.manifest.family == "llama"
        assert not list(desk.workspace.home.glob("*.partial"))

    def test_interrupted_and_run_again(self, desk: Desk) -> None:
        whole = desk.calibrate(output=desk.workspace.home / "whole.safetensors")
        workspace, _ = desk.watched(stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            calibrate(desk.request(), workspace)
        resumed = desk.calibrate()
        assert resumed.manifest.id == whole.manifest.id
        assert resumed.manifest.tensors == whole.manifest.tensors


class TestRefusals:
    def refused(self, desk: Desk, error: type[Exception], match: str, **changes: object) -> Any:  # noqa: ANN401
        """Ask, be refused before any work, and leave nothing behind."""
        workspace, watch = desk.watched()
        with pytest.raises(error, match=match) as caught:
            calibrate(desk.request(**changes), workspace)
        assert watch.seen == []
        assert list(desk.workspace.home.iterdir()) == []
        return caught.value

    def test_a_text_that_is_too_short(self, desk: Desk, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("only a few letters")
        error = self.refused(desk, DataError, "too short for one window", data=str(tmp_path / "short.txt"))
        assert ("tokens needed", 33) in error.facts
        assert error.hint == "--seq-len 16"

    def test_windows_beyond_the_context(self, desk: Desk) -> None:
        error = self.refused(desk, UsageError, "windows are longer than the model's context", seq_len=65)
        assert error.facts == (("context", 64), ("seq-len", 65))
        assert error.hint == "--seq-len 64"

    @pytest.mark.parametrize("number", ["num_samples", "seq_len"])
    def test_nothing_to_show(self, desk: Desk, number: str) -> None:
        self.refused(desk, UsageError, f"`{number.replace('_', '-')}` must be positive", **{number: 0})

    def test_unknown_names(self, desk: Desk) -> None:
        error = self.refused(desk, UsageError, "no statistic is called `hesian`", gather=("hesian",))
        assert error.hint == "did you mean `hessian`?"
        error = self.refused(desk, UsageError, "no dataset is called `wikitxt2`", data="wikitxt2")
        assert error.hint == "did you mean `wikitext2`?"
        error = self.refused(desk, UsageError, "unknown dtype `int8`", dtype="int8")
        assert "float32" in str(error.facts)
        self.refused(desk, UsageError, "cannot read the token weight `norm`", token_weight="norm")
        self.refused(desk, ModelError, "no such model `nowhere`", source="nowhere")
        self.refused(desk, UsageError, "an empty path was given", source="")

    def test_a_file_that_is_no_artifact(self, desk: Desk) -> None:
        weights = str(desk.model / "model.safetensors")
        self.refused(desk, ArtifactError, "is a safetensors file, but no qtool artifact", source=weights)

    def test_an_output_of_another_kind(self, desk: Desk) -> None:
        error = self.refused(desk, UsageError, r"does not end in \.safetensors", output=Path("statistics.pt"))
        assert error.hint == "-o statistics.safetensors"

    def test_an_output_that_is_something_else(self, desk: Desk) -> None:
        first = desk.calibrate(gather=("mean",))
        with pytest.raises(UsageError, match="the output path is taken"):
            desk.calibrate(gather=("absmax",), output=first.path)
        assert open_artifact(first.path).manifest == first.manifest

    def test_what_was_measured_is_nothing_to_calibrate(self, desk: Desk) -> None:
        asked = EvalRequest(str(desk.model), perplexity=(str(desk.text),), seq_len=32, max_windows=1)
        metrics, _ = evaluate(asked, desk.workspace)
        with pytest.raises(ArtifactError, match="is of the wrong kind") as refused:
            desk.calibrate(source=str(metrics.path))
        assert ("received", "metrics") in refused.value.facts


class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"])
    def test_a_weight_is_named(self, desk: Desk, tmp_path: Path, bad: float, name: str) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[name][2, 3] = bad

        model = desk.copied(tmp_path / "spoiled", spoil)
        with pytest.raises(NumericalError, match=f"the weight `{name}` holds NaN or Inf"):
            desk.calibrate(source=str(model))

    def test_a_site_is_named(self, desk: Desk, tmp_path: Path) -> None:
        def overflow(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.mlp.up_proj.weight"] *= 1e200

        model = desk.copied(tmp_path / "loud", overflow)
        with pytest.raises(
            NumericalError, match=r"of the activations at `layers\.0\.up_down` holds NaN or Inf"
        ) as refused:
            desk.calibrate(source=str(model))
        assert refused.value.hint == "run the model in float32: --dtype float32"
        assert not list(desk.workspace.home.glob("*.safetensors"))


def test_a_model_without_its_weights(desk: Desk, tmp_path: Path, library: Workspace) -> None:
    model = desk.copied(tmp_path / "bare")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        desk.calibrate(source=str(model))


def test_decoded_float8_is_told_once(desk: Desk, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.ones(-(-rows // 8), -(-columns // 8))
            tensors |= {name: codes, f"{name}_scale_inv": scale}

    folder = desk.copied(tmp_path / "float8", edit)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    statistics = desk.calibrate(source=str(folder))
    assert desk.told == ["float8 weights with a scale for each 8 by 8 are decoded: no step keeps their codes"]
    desk.calibrate(source=str(statistics.path), seed=1)
    assert len(desk.told) == 1
