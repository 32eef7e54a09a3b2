"""transform: plans of operators, found by their key, and from nothing but what belongs to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Proposal
from qtool.numerics.operators import Shift
from qtool.scheme import ModelScheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject, read_plan
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from qtool.testing import double_precision, exact_logits
from tests.steps.conftest import Desk


def scheme(desk: Desk, preset: str = "", **parts: str) -> ModelScheme:
    return read_scheme(preset, parts, desk.workspace.plugins)


class TestKeys:
    def test_the_same_question_is_answered_once(self, desk: Desk) -> None:
        asked = TransformRequest(str(desk.calibrate().path), "smoothquant")
        first, reused = transform(asked, desk.workspace)
        assert not reused
        workspace, watch = desk.watched()
        second, reused = transform(asked, workspace)
        assert reused
        assert watch.seen == []
        assert second.manifest == first.manifest
        assert first.path.name == f"transform-smoothquant-{first.manifest.key[:12]}.safetensors"

    def test_another_question_has_another_key(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        kv = scheme(desk, kv="int8-asym-token-head")
        asked = [
            TransformRequest(statistics, "quarot"),
            TransformRequest(statistics, "quarot", seed=1),
            TransformRequest(statistics, "quarot", {"r4": "false"}),
            TransformRequest(statistics, "quarot", scheme=kv),
            TransformRequest(statistics, "smoothquant"),
            TransformRequest(statistics, "smoothquant", {"alpha": "0.7"}),
            TransformRequest(statistics, "smoothquant+quarot"),
            TransformRequest(statistics, "quarot+smoothquant"),
            TransformRequest(str(desk.model), "quarot"),
        ]
        assert len({transform(one, desk.workspace)[0].manifest.key for one in asked}) == len(asked)

    @pytest.mark.parametrize("settings", [{}, {"alpha": "0.5"}, {"smoothquant.alpha": "0.50"}, {"alpha": "5e-1"}])
    def test_the_same_question_in_other_words_has_the_same(self, desk: Desk, settings: Mapping[str, str]) -> None:
        statistics = str(desk.calibrate().path)
        plain, _ = transform(TransformRequest(statistics, "smoothquant"), desk.workspace)
        assert transform(TransformRequest(statistics, "smoothquant", settings), desk.workspace)[1]
        assert plain.manifest.step.config["methods"][0]["config"] == {"alpha": 0.5}

    def test_a_new_version_of_a_method_is_another_question(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        monkeypatch.setattr(desk.workspace.plugins.load("transforms", "quarot"), "version", 99, raising=False)
        other, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        assert other.manifest.key != plain.manifest.key


def test_a_shift_that_the_model_has_no_place_for_is_refused_and_leaves_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = desk.workspace.plugins.load("families", "llama")
    norms = {site: replace(norm, kind="layer") for site, norm in families.norms.items()}
    layered = replace(desk.workspace.model(str(desk.model)), family=replace(families, norms=norms))
    monkeypatch.setattr(Workspace, "model", lambda *_: layered)
    method = desk.workspace.plugins.load("transforms", "identity")
    shifts = {"layers.1.attn_in": [Shift(torch.ones(24))]}
    monkeypatch.setattr(method, "plan", lambda *_: Proposal(shifts), raising=False)
    with pytest.raises(UsageError, match=r"`model\.layers\.1\.input_layernorm`, which has no bias to hold it"):
        transform(TransformRequest(str(desk.model), "identity"), desk.workspace)
    assert list(desk.workspace.home.iterdir()) == []


class TestPlans:
    def test_a_plan_holds_operators_and_no_weights(self, desk: Desk) -> None:
        plan, _ = transform(TransformRequest(str(desk.calibrate().path), "quarot"), desk.workspace)
        assert all(name.startswith("sites/") for name in plan.names())
        assert plan.path.stat().st_size < (desk.model / "model.safetensors").stat().st_size / 4
        assert set(plan.manifest.inputs) == {"model", "statistics"}

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("identity", {}),
            ("quarot", {"r1": "no"}),
            ("quarot", {"r3": "on"}),
            ("smoothquant", {}),
            ("smoothquant+quarot", {}),
        ],
    )
    def test_what_is_read_back_is_the_model(self, desk: Desk, method: str, settings: Mapping[str, str]) -> None:
        """Also plans without a single tensor, of unsigned Hadamards or of nothing at all."""
        plan, _ = transform(TransformRequest(str(desk.calibrate().path), method, settings), desk.workspace)
        with double_precision():
            before = exact_logits(open_subject(str(desk.model), desk.workspace).subject)
            after = exact_logits(open_subject(str(plan.path), desk.workspace).subject)
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        plan.verify()

    def test_a_plan_is_extended(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        rotated, _ = transform(TransformRequest(statistics, "quarot"), desk.workspace)
        extended, _ = transform(TransformRequest(str(rotated.path), "smoothquant"), desk.workspace)
        whole, _ = transform(TransformRequest(statistics, "quarot+smoothquant"), desk.workspace)
        left, right = read_plan(extended).to_state(), read_plan(whole).to_state()
        assert left[1] == right[1]
        assert all(torch.equal(left[0][name], tensor) for name, tensor in right[0].items())
        assert extended.manifest.inputs["plan"].id == rotated.manifest.id
        assert extended.manifest.inputs["statistics"].id == rotated.manifest.inputs["statistics"].id

    def test_the_seed_draws_the_signs(self, desk: Desk) -> None:
        one, two = (transform(TransformRequest(str(desk.model), "quarot", seed=s), desk.workspace)[0] for s in (0, 1))
        name = "sites/residual/0.hadamard/signs"
        assert not torch.equal(one.tensor(name), two.tensor(name))

    def test_r3_where_the_cache_is_quantized(self, desk: Desk) -> None:
        with_cache, _ = transform(
            TransformRequest(str(desk.model), "quarot", scheme=scheme(desk, "W4A4", kv="int4-asym-token-head")),
            desk.workspace,
        )
        without, _ = transform(TransformRequest(str(desk.model), "quarot", scheme=scheme(desk, "W4A4")), desk.workspace)
        assert "layers.0.qk_post" in read_plan(with_cache).sites
        assert "layers.0.qk_post" not in read_plan(without).sites


class TestRefusals:
    def refused(self, desk: Desk, error: type[Exception], match: str, *asked: Any, **options: Any) -> Any:  # noqa: ANN401
        before = sorted(desk.workspace.home.iterdir())
        with pytest.raises(error, match=match) as caught:
            transform(TransformRequest(*asked, **options), desk.workspace)
        assert sorted(desk.workspace.home.iterdir()) == before
        return caught.value

    def test_a_method_that_needs_statistics(self, desk: Desk) -> None:
        error = self.refused(desk, UsageError, "`smoothquant` needs statistics", str(desk.model), "quarot+smoothquant")
        assert error.facts == (("needs", "absmax"),)
        assert error.hint == f"qtool calibrate {desk.model} | qtool transform --method quarot+smoothquant"

    def test_statistics_without_what_a_method_needs(self, desk: Desk) -> None:
        bare = str(desk.calibrate(gather=("hessian",)).path)
        error = self.refused(
            desk, ArtifactError, r"the statistics lack `absmax` at `layers\.0\.attn_in`", bare, "smoothquant"
        )
        assert error.hint == "qtool calibrate MODEL --gather absmax,hessian,sample"

    def test_unknown_names(self, desk: Desk) -> None:
        error = self.refused(desk, UsageError, "no transform is called `quorot`", str(desk.model), "quorot")
        assert error.hint == "did you mean `quarot`?"
        error = self.refused(desk, UsageError, "`quarot` has no option `r5`", str(desk.model), "quarot", {"r5": "on"})
        assert "r1, r2, r3, r4" in str(error.facts)
        self.refused(desk, UsageError, "`maybe` is no value of `quarot.r3`", str(desk.model), "quarot", {"r3": "maybe"})
        self.refused(desk, UsageError, "no transform is called ``", str(desk.model), "quarot+")

    def test_statistics_of_another_model(self, desk: Desk, tmp_path: Path) -> None:
        def nudge(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"][0] += 1e-3

        other = desk.copied(tmp_path / "other", nudge)
        statistics = desk.calibrate(source=str(other))
        workspace = replace(desk.workspace, inputs={"statistics": statistics.path})
        with pytest.raises(ArtifactError, match="statistics were collected on another model") as refused:
            transform(TransformRequest(str(desk.model), "smoothquant"), workspace)
        (_, gathered), (_, asked) = refused.value.facts
        assert statistics.manifest.subject[:12] in str(gathered)
        assert desk.workspace.model(str(desk.model)).id[:12] in str(asked)
        assert refused.value.hint == f"qtool calibrate {desk.model}"

    def test_statistics_of_a_transformed_model(self, desk: Desk) -> None:
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        behind = desk.calibrate(source=str(plan.path))
        for source in (plan.path, desk.model, behind.path):
            workspace = replace(desk.workspace, inputs={"statistics": behind.path})
            with pytest.raises((ArtifactError, UsageError), match="transformed model"):
                transform(TransformRequest(str(source), "smoothquant"), workspace)

    def test_what_is_quantized_or_measured(self, desk: Desk) -> None:
        quantized, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme(desk, weights="int4")), desk.workspace)
        error = self.refused(desk, ArtifactError, "is of the wrong kind", str(quantized.path), "quarot")
        assert ("received", "quantized") in error.facts
        asked = EvalRequest(str(desk.model), perplexity=(str(desk.text),), seq_len=32, max_windows=1)
        metrics, _ = evaluate(asked, desk.workspace)
        self.refused(desk, ArtifactError, "is of the wrong kind", str(metrics.path), "quarot")

    def test_something_else_where_statistics_should_be(self, desk: Desk) -> None:
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        workspace = replace(desk.workspace, inputs={"statistics": plan.path})
        with pytest.raises(ArtifactError, match="is of the wrong kind") as refused:
            transform(TransformRequest(str(desk.model), "smoothquant"), workspace)
        assert refused.value.facts == (("expected", "statistics"), ("received", "plan"))
