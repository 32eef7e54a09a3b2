"""eval: the perplexity of the field's protocol, window by window, and what is refused before any work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import ArtifactError, DataError, GateError, NumericalError, ResourceError, UsageError
from qtool.model.text import read_text_file, tokenize
from qtool.numerics.likelihood import divergence, perplexity, token_losses
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import parameter_counts
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.oracles.protocol import kl_divergence_oracle, perplexity_oracle, top1_agreement_oracle, window_losses_oracle
from tests.steps.conftest import Desk

SEQ = 24


def request(desk: Desk, source: object = None, **changes: Any) -> EvalRequest:  # noqa: ANN401 - fields of the request
    plain = EvalRequest(str(source or desk.model), perplexity=(str(desk.text),), seq_len=SEQ, max_windows=5)
    return replace(plain, **changes)


def values(artifact: Artifact) -> Mapping[str, float]:
    found: Mapping[str, float] = artifact.manifest.details["values"]
    return {name.partition("/")[0]: value for name, value in found.items()}


def tokens_of(desk: Desk) -> Tensor:
    return tokenize(desk.workspace.model(str(desk.model)).tokenizer(), read_text_file(desk.text))


class TestPerplexity:
    @pytest.mark.parametrize("batch", [0, 1, 2])
    def test_by_the_oracle_on_plain_transformers(self, desk: Desk, batch: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(desk.model).eval()
        tokens = tokens_of(desk)[: 5 * SEQ + 7]
        artifact, _ = evaluate(request(desk, batch=batch), desk.workspace)
        assert values(artifact)["perplexity"] == pytest.approx(perplexity_oracle(model, tokens, SEQ), rel=1e-6)
        losses = artifact.tensor("nll/text.txt")
        assert losses.shape == (5, SEQ - 1)
        expected = torch.tensor(window_losses_oracle(model, tokens, SEQ))
        torch.testing.assert_close(losses.mean(1), expected, rtol=1e-5, atol=1e-6)

    def test_of_the_shipped_model(self, library: Workspace) -> None:
        asked = EvalRequest("tiny", perplexity=("speeches",), seq_len=256, max_windows=3)
        artifact, _ = evaluate(asked, library)
        model = library.model("tiny")
        documents = library.plugins.load("datasets", "speeches").documents("test", None)
        tokens = tokenize(model.tokenizer(), documents)[: 3 * 256]
        oracle = perplexity_oracle(AutoModelForCausalLM.from_pretrained(model.path).eval(), tokens, 256)
        assert values(artifact)["perplexity"] == pytest.approx(oracle, rel=1e-5)
        assert oracle < 20, "it was trained on this kind of text"

    def test_the_whole_text_unless_windows_are_limited(self, desk: Desk) -> None:
        artifact, _ = evaluate(request(desk, max_windows=None, seq_len=64), desk.workspace)
        assert artifact.tensor("nll/text.txt").shape == (len(tokens_of(desk)) // 64, 63)

    def test_windows_count_alike(self) -> None:
        losses = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
        assert perplexity(losses) == pytest.approx(math.exp(2.5))

    def test_the_first_token_of_a_window_is_given(self) -> None:
        logits = torch.zeros(1, 3, 4)
        logits[0, 0, 2] = 100.0
        logits[0, 1, 1] = 100.0
        ids = torch.tensor([[0, 2, 1]])
        assert token_losses(logits, ids).tolist() == [[0.0, 0.0]]
        assert token_losses(logits, torch.tensor([[3, 2, 0]]))[0, 1] == 100.0

    def test_what_was_kept_gives_the_headline_again(self, desk: Desk) -> None:
        artifact, _ = evaluate(request(desk, kl=True), desk.workspace)
        assert perplexity(artifact.tensor("nll/text.txt")) == values(artifact)["perplexity"]
        assert float(artifact.tensor("kl/text.txt").double().mean()) == values(artifact)["kl"]
        artifact.verify()


class TestDivergence:
    def test_from_itself_it_is_nothing(self, desk: Desk) -> None:
        artifact, _ = evaluate(request(desk, kl=True), desk.workspace)
        found = values(artifact)
        assert found["kl"] == 0.0
        assert found["top1"] == 1.0
        assert found["reference_perplexity"] == found["perplexity"]

    def test_of_an_exact_transform_it_is_next_to_nothing(self, desk: Desk) -> None:
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        found = values(evaluate(request(desk, plan.path, kl=True), desk.workspace)[0])
        assert abs(found["kl"]) < 1e-6
        assert found["top1"] == 1.0

    def test_by_the_oracle(self) -> None:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(2, 4, 7, generator=generator) for _ in range(2))
        kl, same = divergence(left, right)
        assert kl.shape == (2, 3)
        assert float(kl.double().mean()) == pytest.approx(kl_divergence_oracle(left[:, :-1], right[:, :-1]), rel=1e-5)
        assert float(same.double().mean()) == pytest.approx(top1_agreement_oracle(left[:, :-1], right[:, :-1]))
        assert not torch.equal(divergence(right, left)[0], kl), "it is not symmetric"

    def test_of_a_quantized_model_from_the_original(self, desk: Desk) -> None:
        scheme = read_scheme("", {"weights": "int3"}, desk.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
        found = values(evaluate(request(desk, artifact.path, kl=True), desk.workspace)[0])
        plain = values(evaluate(request(desk), desk.workspace)[0])
        assert found["reference_perplexity"] == plain["perplexity"]
        assert found["kl"] > 1e-3
        assert found["top1"] < 1.0


class TestBatches:
    @pytest.mark.parametrize("scheme", ["fp8-tensor", "int8-tensor"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_no_window_sees_which_others_run_beside_it(self, desk: Desk, scheme: str, packed: bool) -> None:
        asked = read_scheme("", {"weights": scheme, "activations": scheme}, desk.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", asked), desk.workspace)
        if packed:
            artifact, _ = pack(PackRequest(str(artifact.path), "compressed-tensors"), desk.workspace)
        losses = []
        for batch in (1, 3):
            found, reused = evaluate(
                request(
                    desk, artifact.path, batch=batch, dtype="float64", output=desk.workspace.home / "one.safetensors"
                ),
                desk.workspace,
            )
            assert not reused
            losses.append(found.tensor("nll/text.txt"))
            found.path.unlink()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


class TestSubjects:
    def test_a_file_in_a_folder_is_measured_by_its_name(self, desk: Desk) -> None:
        scheme = read_scheme("", {"weights": "int4-sym-g8"}, desk.workspace.plugins)
        quantized, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
        checkpoint, _ = pack(PackRequest(str(quantized.path), "compressed-tensors"), desk.workspace)
        about = checkpoint.manifest
        unread = {name: words for name, words in about.details["consumers"].items() if name != "transformers"}
        text = replace(about, details={**about.details, "consumers": unread}).to_text()
        (checkpoint.path / "qtool.json").write_text(text)
        (checkpoint.path / "model.gguf").touch()
        with pytest.raises(UsageError, match="transformers does not read it") as refused:
            evaluate(request(desk, checkpoint.path), desk.workspace)
        assert str(refused.value.hint).endswith(f"or {checkpoint.path / 'model.gguf'}")

    def test_a_package_that_transformers_misses(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: object, **__: object) -> None:
            raise ImportError("Loading a GPTQ quantized model requires gptqmodel\nand so on")

        scheme = read_scheme("", {"weights": "int4-sym-g8"}, desk.workspace.plugins)
        quantized, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
        checkpoint, _ = pack(PackRequest(str(quantized.path), "hf"), desk.workspace)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
        with pytest.raises(ResourceError, match="another package") as refused:
            evaluate(request(desk, checkpoint.path), desk.workspace)
        assert refused.value.facts == (("reason", "Loading a GPTQ quantized model requires gptqmodel"),)

    def test_a_checkpoint_is_measured_as_its_loader_runs_it(self, desk: Desk) -> None:
        scheme = read_scheme("", {"weights": "int8"}, desk.workspace.plugins)
        quantized, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
        checkpoint, _ = pack(PackRequest(str(quantized.path), "hf"), desk.workspace)
        found = values(evaluate(request(desk, checkpoint.path), desk.workspace)[0])
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto").eval()
        oracle = perplexity_oracle(model, tokens_of(desk)[: 5 * SEQ], SEQ)
        assert found["perplexity"] == pytest.approx(oracle, rel=1e-3)
        emulated = values(evaluate(request(desk, quantized.path), desk.workspace)[0])
        assert found["perplexity"] == pytest.approx(emulated["perplexity"], rel=0.02)

    def test_bits(self, desk: Desk) -> None:
        plain, _ = evaluate(request(desk), desk.workspace)
        assert plain.manifest.details["bits"] == {"linears": 16.0, "model": 16.0}

    def test_a_tied_head_that_needs_weights_of_its_own_counts(self, library: Workspace) -> None:
        """A rotated model stores embedding and head, and its bits are those of the checkpoint made of it."""
        model = library.model("tiny")
        scheme = read_scheme("", {"weights": "int4"}, library.plugins)
        plan, _ = transform(TransformRequest("tiny", "quarot", {"r4": "no"}), library)
        bits = []
        for source in ("tiny", str(plan.path)):
            artifact, _ = mitigate(MitigateRequest(source, "rtn", scheme), library)
            asked = EvalRequest(str(artifact.path), perplexity=("speeches",), seq_len=32, max_windows=1)
            bits.append(evaluate(asked, library)[0].manifest.details["bits"])
        dims, count = model.graph.dims, sum(parameter_counts(model).values())
        assert dims.tied
        assert bits[1]["linears"] == bits[0]["linears"]
        assert bits[1]["model"] - bits[0]["model"] == pytest.approx(16 * dims.vocab * dims.hidden / count)

    def test_what_was_measured_is_nothing_to_measure(self, desk: Desk) -> None:
        metrics, _ = evaluate(request(desk), desk.workspace)
        with pytest.raises(ArtifactError, match="is of the wrong kind"):
            evaluate(request(desk, metrics.path), desk.workspace)


class TestKeys:
    def test_the_same_question_is_answered_once(self, desk: Desk) -> None:
        first, reused = evaluate(request(desk), desk.workspace)
        assert not reused
        workspace, watch = desk.watched()
        second, reused = evaluate(request(desk, batch=2, require=("perplexity/text.txt>1",)), workspace)
        assert reused
        assert watch.seen == []
        assert second.manifest == first.manifest

    def test_another_question_has_another_key(self, desk: Desk, tmp_path: Path) -> None:
        for name in ("other.txt", "text.txt"):
            (tmp_path / name).write_text(desk.text.read_text()[5:])
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        asked = [
            request(desk),
            request(desk, seq_len=16),
            request(desk, max_windows=4),
            request(desk, kl=True),
            request(desk, dtype="float32"),
            request(desk, perplexity=(str(tmp_path / "other.txt"),)),
            request(desk, perplexity=(str(tmp_path / "text.txt"),)),
            request(desk, perplexity=(str(desk.text), str(tmp_path / "other.txt"))),
            request(desk, plan.path),
        ]
        assert len({evaluate(one, desk.workspace)[0].manifest.key for one in asked}) == len(asked)

    def test_it_does_not_matter_where_things_lie(self, desk: Desk, tmp_path: Path) -> None:
        first, _ = evaluate(request(desk, kl=True), desk.workspace)
        model, text, home = desk.copied(tmp_path / "m"), tmp_path / "t" / "text.txt", tmp_path / "home"
        for folder in (text.parent, home):
            folder.mkdir()
        shutil.copy(desk.text, text)
        asked = request(desk, model, perplexity=(str(text),), kl=True)
        second, reused = evaluate(asked, replace(desk.workspace, home=home))
        assert not reused
        assert second.manifest.key == first.manifest.key
        assert second.manifest.id == first.manifest.id
        assert second.manifest.details["values"] == first.manifest.details["values"]

    def test_two_texts_of_one_name_are_not_mixed_up(self, desk: Desk, tmp_path: Path) -> None:
        other = Path(shutil.copy(desk.text, tmp_path / "text.txt"))
        with pytest.raises(UsageError, match=r"two texts are called `text\.txt`") as refused:
            evaluate(request(desk, perplexity=(str(desk.text), str(other))), desk.workspace)
        assert refused.value.facts == (("one", str(desk.text)), ("two", str(other)))
        twice = request(desk, perplexity=(str(desk.text), str(desk.text)))
        assert (
            evaluate(twice, desk.workspace)[0].manifest.key == evaluate(request(desk), desk.workspace)[0].manifest.key
        )


class TestGates:
    def test_met_and_not_met(self, desk: Desk) -> None:
        name = "perplexity/text.txt"
        plain, _ = evaluate(request(desk), desk.workspace)
        value = plain.manifest.details["values"][name]
        assert evaluate(request(desk, require=(f"{name}<={value + 1}", f"{name}>1")), desk.workspace)[1]
        with pytest.raises(GateError, match="1 of 2 gates are not met") as missed:
            evaluate(request(desk, require=(f"{name}<{value - 1}", f"{name}>1")), desk.workspace)
        assert missed.value.facts[0] == (f"required {name}<{value - 1:g}", f"measured {value:.6g}")
        assert missed.value.facts[-1] == ("metrics", plain.path)

    def test_what_was_measured_is_kept(self, desk: Desk) -> None:
        with pytest.raises(GateError):
            evaluate(request(desk, require=("perplexity/text.txt<1",)), desk.workspace)
        (path,) = desk.workspace.home.glob("eval-*.safetensors")
        assert values(open_artifact(path))["perplexity"] > 1


class TestRefusals:
    def refused(self, desk: Desk, error: type[Exception], match: str, **changes: Any) -> Any:  # noqa: ANN401
        workspace, watch = desk.watched()
        with pytest.raises(error, match=match) as caught:
            evaluate(request(desk, **changes), workspace)
        assert watch.seen == []
        assert list(desk.workspace.home.iterdir()) == []
        return caught.value

    def test_nothing_to_measure(self, desk: Desk) -> None:
        self.refused(desk, UsageError, "there is nothing to measure", perplexity=())

    def test_texts(self, desk: Desk, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("short")
        self.refused(desk, DataError, "too short for one window", perplexity=(str(tmp_path / "short.txt"),))
        error = self.refused(desk, UsageError, "windows are longer than the model's context", seq_len=100)
        assert error.hint == "--seq-len 64"
        error = self.refused(desk, UsageError, "no dataset is called `wikitext`", perplexity=("wikitext",))
        assert error.hint == "did you mean `wikitext2`?"
        self.refused(desk, UsageError, "`max-windows` must be positive", max_windows=0)

    def test_words_that_cannot_be_read(self, desk: Desk) -> None:
        self.refused(desk, UsageError, "cannot read the gate `perplexity`", require=("perplexity",))
        self.refused(desk, UsageError, "unknown dtype `half`", dtype="half")

    def test_a_gate_on_what_is_not_measured(self, desk: Desk) -> None:
        error = self.refused(
            desk, UsageError, "`--require kl/other<1` names a metric that is not measured", require=("kl/other<1",)
        )
        assert error.facts == (("texts", "text.txt"),)
        with pytest.raises(UsageError, match="names a metric that was not measured"):
            evaluate(request(desk, require=("kl/text.txt<1",)), desk.workspace)


def test_a_value_that_is_not_finite(desk: Desk, tmp_path: Path) -> None:
    def overflow(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e300
        tensors["lm_head.weight"] *= 1e300

    model = desk.copied(tmp_path / "loud", overflow)
    with pytest.raises(NumericalError, match="is not finite"):
        evaluate(request(desk, model), desk.workspace)
    assert not list(desk.workspace.home.glob("*.safetensors"))
