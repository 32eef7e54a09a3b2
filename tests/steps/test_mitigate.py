"""mitigate: codes that stand for the weights they should, from statistics of the right activations, found again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.mitigators.rtn import round_nearest
from qtool.engine import block
from qtool.engine.carry import CarriedStatistics
from qtool.engine.fold import fold_linear
from qtool.engine.grid import GlobalScales, Grid
from qtool.engine.static_scales import calibrated_scales
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, PluginError, SchemeError, UsageError
from qtool.model.plan import Plan
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Desk

Reports = Mapping[str, Mapping[str, float]]


def scheme(workspace: Workspace, preset: str = "", **parts: str) -> ModelScheme:
    return read_scheme(preset, parts, workspace.plugins)


def weights(desk: Desk, text: str = "int4") -> ModelScheme:
    return scheme(desk.workspace, weights=text)


def decoded(artifact: Artifact, workspace: Workspace) -> dict[str, Tensor]:
    """What stands for each linear's weight, without adapters."""
    subject = open_subject(str(artifact.path), workspace).subject
    assert subject.scheme.weights is not None
    return {
        linear.name: subject.linear(linear).weight(subject.weight_grid(linear))
        for linear in subject.model.graph.linears
    }


def reports(artifact: Artifact) -> Reports:
    found: Reports = artifact.manifest.details["layers"]
    return found


class TestKeys:
    def test_the_same_question_is_answered_once(self, desk: Desk) -> None:
        asked = MitigateRequest(str(desk.calibrate().path), "gptq", weights(desk))
        first, reused = mitigate(asked, desk.workspace)
        assert not reused
        workspace, watch = desk.watched()
        second, reused = mitigate(asked, workspace)
        assert reused
        assert watch.seen == []
        assert second.manifest == first.manifest
        assert first.path.name == f"mitigate-gptq-{first.manifest.key[:12]}.safetensors"
        first.verify()

    def test_another_question_has_another_key(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("gptq", "lorc"):  # what is solved does not matter here, and takes long
            method = desk.workspace.plugins.load("mitigators", name)
            monkeypatch.setattr(method, "quantize", lambda problem, _: round_nearest(problem), raising=False)
        statistics, plain = str(desk.calibrate().path), weights(desk)
        plan, _ = transform(TransformRequest(statistics, "quarot"), desk.workspace)
        base = MitigateRequest(statistics, "gptq", plain)
        asked = [
            base,
            replace(base, source=str(plan.path)),
            replace(base, source=str(desk.calibrate(seed=1).path)),
            replace(base, method="rtn"),
            replace(base, method="gptq+lorc", settings={"rank": "2"}),
            replace(base, method="gptq+lorc", settings={"rank": "3"}),
            replace(base, settings={"dampening_frac": "0.1"}),
            replace(base, scheme=weights(desk, "int4-g8")),
            replace(base, scheme=scheme(desk.workspace, weights="int4", activations="int8-sym-token")),
            replace(base, scheme=scheme(desk.workspace, weights="int4", kv="int8-asym-token-head")),
            replace(base, propagate="none"),
            replace(base, true_sequential=True),
            replace(base, round_activations=True),
            replace(base, token_weight="uniform"),
            replace(base, seed=1),
            replace(base, dtype="float32"),
        ]
        assert len({mitigate(one, desk.workspace)[0].manifest.key for one in asked}) == len(asked)

    @pytest.mark.parametrize("change", [{"batch": 1}, {"strict": False}, {"token_weight": "inverse-norm:0.5"}])
    def test_the_same_question_in_other_words_has_the_same(self, desk: Desk, change: Mapping[str, Any]) -> None:
        asked = MitigateRequest(str(desk.calibrate().path), "gptq", weights(desk))
        mitigate(asked, desk.workspace)
        assert mitigate(replace(asked, **change), desk.workspace)[1]

    def test_a_method_that_looks_at_nothing_does_not_care_what_is_propagated(self, desk: Desk) -> None:
        asked = MitigateRequest(str(desk.calibrate().path), "rtn", weights(desk))
        mitigate(asked, desk.workspace)
        assert mitigate(replace(asked, propagate="none"), desk.workspace)[1]
        assert mitigate(replace(asked, token_weight="uniform"), desk.workspace)[1]

    def test_it_does_not_matter_where_things_lie(self, desk: Desk, tmp_path: Path) -> None:
        statistics = desk.calibrate()
        first, _ = mitigate(MitigateRequest(str(statistics.path), "gptq", weights(desk)), desk.workspace)
        model, home = desk.copied(tmp_path / "elsewhere"), tmp_path / "home"
        home.mkdir()
        moved = Path(shutil.copy(statistics.path, home / "renamed.safetensors"))
        workspace = replace(desk.workspace, home=home, inputs={"model": model})
        second, reused = mitigate(MitigateRequest(str(moved), "gptq", weights(desk)), workspace)
        assert not reused
        assert second.manifest.id == first.manifest.id

    def test_two_runs_give_the_same_bits(self, desk: Desk) -> None:
        asked = MitigateRequest(str(desk.calibrate().path), "gptq+lorc", weights(desk, "int3"), {"rank": "3"})
        one, two = (
            mitigate(replace(asked, output=desk.workspace.home / f"{name}.safetensors"), desk.workspace)[0]
            for name in ("one", "two")
        )
        assert one.manifest.id == two.manifest.id


class TestRoundToNearest:
    @pytest.mark.parametrize(
        "text",
        ["int4", "int4-g8", "int3-asym-g8", "int8-tensor", "fp8-channel", "fp4-g8-se8m0", "fp4-asym-g4", "int2"],
    )
    @pytest.mark.parametrize("transformed", [False, True])
    def test_every_weight_by_hand(self, desk: Desk, text: str, transformed: bool) -> None:
        source = str(desk.model)
        if transformed:
            source = str(transform(TransformRequest(source, "quarot"), desk.workspace)[0].path)
        subject = open_subject(source, desk.workspace).subject
        chosen = weights(desk, text).weights
        assert chosen is not None
        fmt = desk.workspace.plugins.format(chosen.format)
        artifact, _ = mitigate(MitigateRequest(source, "rtn", weights(desk, text)), desk.workspace)
        found = decoded(artifact, desk.workspace)
        assert len(found) == 14
        for linear in subject.model.graph.linears:
            state = subject.model.tensors(f"model.layers.{linear.layer}.")
            weight = fold_linear(subject.model.graph, subject.plan, linear, state)[0].float()
            rows = weight.reshape(1, -1) if chosen.strategy == "tensor" else weight
            groups = rows.unflatten(-1, (-1, chosen.group_size or rows.shape[-1]))
            parameters = fmt.fit(groups, chosen)
            expected = fmt.decode(fmt.encode(groups, parameters), parameters).reshape(weight.shape)
            assert torch.equal(found[linear.name], expected), linear.name

    def test_what_is_executed_are_the_decoded_weights(self, desk: Desk) -> None:
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk)), desk.workspace)
        subject = open_subject(str(artifact.path), desk.workspace).subject
        for name, weight in decoded(artifact, desk.workspace).items():
            layer, _, module = name.removeprefix("model.layers.").partition(".")
            assert torch.equal(subject.block(int(layer), torch.float32).state[f"{module}.weight"], weight)

    @pytest.mark.parametrize("transformed", [False, True])
    def test_its_loss_is_that_of_the_hessians_that_calibration_gathered(self, desk: Desk, transformed: bool) -> None:
        statistics = desk.calibrate(token_weight="uniform")
        source = str(statistics.path)
        if transformed:
            source = str(transform(TransformRequest(source, "quarot"), desk.workspace)[0].path)
        artifact, _ = mitigate(MitigateRequest(source, "rtn", weights(desk)), desk.workspace)
        subject, found = open_subject(source, desk.workspace).subject, decoded(artifact, desk.workspace)
        carried = CarriedStatistics(statistics, subject.model, subject.plan)
        for linear in subject.model.graph.linears:
            weight = subject.folded(linear.layer)[f"{linear.spec.module}.weight"].double()
            hessian = carried[linear.reads].entries["hessian"].double()
            error = weight - found[linear.name].double()
            loss = float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
            report = reports(artifact)[linear.name]
            assert report["loss"] == pytest.approx(loss, rel=1e-3) == report["loss_rtn"]
        plain, _ = mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk)), desk.workspace)
        assert all("loss" not in report for report in reports(plain).values())
        if not transformed:
            assert all(torch.equal(weight, found[name]) for name, weight in decoded(plain, desk.workspace).items())

    @pytest.mark.parametrize(
        ("method", "options", "rule"),
        [
            ("rtn", {}, "inverse-norm:1"),
            ("rtn", {"token_weight": "clip:2"}, "inverse-norm:1"),  # what was gathered, whatever is asked for
            ("gptq", {"propagate": "none"}, "inverse-norm:1"),
            ("gptq", {}, "inverse-norm:0.5"),
            ("gptq", {"token_weight": "clip:2"}, "clip:2"),
        ],
    )
    def test_how_tokens_are_weighed_in_losses_is_told(
        self, desk: Desk, method: str, options: Mapping[str, Any], rule: str
    ) -> None:
        statistics = desk.calibrate(token_weight="inverse-norm")
        artifact, _ = mitigate(MitigateRequest(str(statistics.path), method, weights(desk), **options), desk.workspace)
        assert artifact.manifest.details["losses"] == {"token_weight": rule}
        assert inspect(str(artifact.path), desk.workspace).facts["losses_token_weight"] == rule
        plain, _ = mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk)), desk.workspace)
        assert "losses" not in plain.manifest.details
        assert "losses_token_weight" not in inspect(str(plain.path), desk.workspace).facts

    def test_its_loss_in_passes_is_that_of_what_is_quantized(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        both = {"weights": "int4", "activations": "fp4-g8-se4m3"}
        found = [
            reports(mitigate(MitigateRequest(statistics, method, scheme(desk.workspace, **both)), desk.workspace)[0])
            for method in ("rtn", "gptq")
        ]
        first = [name for name in found[0] if name.startswith("model.layers.0.")]
        assert len(first) == 7
        for name in first:  # the second block sees what each has made of the first
            assert found[0][name]["loss"] == pytest.approx(found[1][name]["loss_rtn"], rel=1e-4)

    def test_an_adapter_stands_beside_its_weight(self, desk: Desk) -> None:
        artifact, _ = mitigate(
            MitigateRequest(str(desk.model), "rtn+lorc", weights(desk), {"rank": "4"}), desk.workspace
        )
        subject = open_subject(str(artifact.path), desk.workspace).subject
        content = subject.block(1, torch.float32)
        assert set(content.adapters) == {linear.module for linear in subject.model.family.linears}
        adapter = content.adapters["mlp.down_proj"]
        assert adapter.down.shape == (4, 40)
        original = subject.model.tensor("model.layers.1.mlp.down_proj.weight").float()
        plain = (original - content.state["mlp.down_proj.weight"]).norm()
        corrected = original - content.state["mlp.down_proj.weight"] - adapter.up.float() @ adapter.down.float()
        assert corrected.norm() < 0.9 * plain

    def test_bits_are_those_of_the_file(self, desk: Desk) -> None:
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk, "int3-asym-g8")), desk.workspace)
        asked = EvalRequest(str(artifact.path), perplexity=(str(desk.text),), seq_len=32, max_windows=1)
        metrics, _ = evaluate(asked, desk.workspace)
        tensors = load_file(artifact.path)
        count = sum(w.numel() for w in decoded(artifact, desk.workspace).values())
        stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert metrics.manifest.details["bits"]["linears"] == pytest.approx(stored / count, abs=1e-12)
        # Per row: codes of 3 bits, scales of 16 and zero points of 3 bits a group of 8, each padded to bytes.
        rows = {24: 9 + 3 * 2 + 2, 40: 15 + 5 * 2 + 2}
        expected = sum(8 * rows[w.shape[1]] * w.shape[0] for w in decoded(artifact, desk.workspace).values())
        assert stored == expected
        others = {n: t for n, t in load_file(desk.model / "model.safetensors").items() if "_proj" not in n}
        rest = 16 * sum(tensor.numel() for tensor in others.values())
        total = count + rest / 16
        assert metrics.manifest.details["bits"]["model"] == pytest.approx((stored + rest) / total, abs=1e-12)

    @pytest.mark.parametrize(("dtype", "bits"), [("bf16", 16), ("int8", 8)])
    def test_bits_of_adapters_are_those_of_the_file(self, desk: Desk, dtype: str, bits: int) -> None:
        settings = {"lorc.rank": "4", "lorc.dtype": dtype, "lorc.reads": "full"}
        scheme = read_scheme("", {"weights": "int4", "activations": "int4-token"}, desk.workspace.plugins)
        with_one, without = (
            mitigate(MitigateRequest(str(desk.model), method, scheme, own), desk.workspace)[0]
            for method, own in (("rtn+lorc", settings), ("rtn", {}))
        )
        asked = EvalRequest(str(with_one.path), perplexity=(str(desk.text),), seq_len=32, max_windows=1)
        plain = replace(asked, source=str(without.path))
        found, bare = (evaluate(one, desk.workspace)[0].manifest.details["bits"]["linears"] for one in (asked, plain))
        shapes = [w.shape for w in decoded(without, desk.workspace).values()]
        scales = 2 * 16 * 4 * len(shapes) * (dtype == "int8")
        added = bits * 4 * sum(sum(shape) for shape in shapes) + scales
        assert found - bare == pytest.approx(added / sum(shape.numel() for shape in shapes), abs=1e-12)
        content = open_subject(str(with_one.path), desk.workspace).subject.block(1, torch.float32)
        assert {one.reads for one in content.adapters.values()} == {"full"}


def test_weights_are_folded_in_float32_whatever_passes_are_computed_in(desk: Desk) -> None:
    plan, _ = transform(TransformRequest(str(desk.calibrate().path), "quarot"), desk.workspace)
    asked = MitigateRequest(str(plan.path), "rtn", weights(desk, "int8"))
    short, wide = (mitigate(replace(asked, dtype=dtype), desk.workspace)[0] for dtype in ("bfloat16", "float32"))
    assert short.manifest.key != wide.manifest.key
    for name in wide.names():
        assert torch.equal(short.tensor(name), wide.tensor(name)), name


class TestPropagation:
    def test_the_first_block_sees_the_same_and_the_second_what_is_quantized(self, desk: Desk) -> None:
        statistics = str(desk.calibrate(token_weight="uniform").path)
        asked = MitigateRequest(statistics, "gptq", weights(desk, "int3"), token_weight="uniform")
        quantized, none = (
            decoded(mitigate(replace(asked, propagate=p), desk.workspace)[0], desk.workspace)  # type: ignore[arg-type]
            for p in ("quantized", "none")
        )
        same = {name for name in quantized if torch.equal(quantized[name], none[name])}
        assert {name for name in same if ".0." in name} == {name for name in quantized if ".0." in name}
        assert not {name for name in same if ".1." in name}

    def test_the_second_block_sees_what_the_artifact_executes(self, desk: Desk) -> None:
        """Adapters and online operators included: calibrating on the artifact gives the same Hessian."""
        statistics = str(desk.calibrate(token_weight="uniform").path)
        plan, _ = transform(TransformRequest(statistics, "quarot"), desk.workspace)
        asked = MitigateRequest(
            str(plan.path), "gptq+lorc", weights(desk, "int2"), {"rank": "3"}, token_weight="uniform"
        )
        artifact, _ = mitigate(asked, desk.workspace)
        behind = desk.calibrate(source=str(artifact.path), token_weight="uniform")
        hessian = behind.tensor("layers.1.attn_in.hessian")
        subject = open_subject(str(artifact.path), desk.workspace).subject
        assert subject.scheme.weights is not None
        for member in ("q_proj", "k_proj", "v_proj"):
            linear = next(one for one in subject.model.graph.linears if one.name.endswith(f"1.self_attn.{member}"))
            found = subject.linear(linear)
            assert found.adapter is not None
            stands = found.weight(subject.weight_grid(linear))
            stands = stands + found.adapter.up.float() @ found.adapter.down.float()
            weight = subject.folded(1)[f"{linear.spec.module}.weight"].float()
            error = weight - stands
            loss = float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
            assert reports(artifact)[linear.name]["loss"] == pytest.approx(loss, rel=1e-3)

    def test_carried_statistics_are_those_of_the_original_model(self, desk: Desk) -> None:
        statistics = desk.calibrate(token_weight="uniform")
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
        workspace, watch = desk.watched()
        asked = MitigateRequest(str(plan.path), "gptq", weights(desk), propagate="none")
        artifact, _ = mitigate(asked, workspace)
        assert watch.seen == [0, 1]
        subject = open_subject(str(plan.path), desk.workspace).subject
        carried = CarriedStatistics(statistics, subject.model, subject.plan)
        found = decoded(artifact, desk.workspace)
        for name, report in reports(artifact).items():
            linear = next(one for one in subject.model.graph.linears if one.name == name)
            weight = subject.folded(linear.layer)[f"{linear.spec.module}.weight"].float()
            hessian = carried[linear.reads].entries["hessian"]
            error = weight - found[name]
            loss = float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
            assert report["loss"] == pytest.approx(loss, rel=1e-3)

    def test_statistics_gathered_behind_the_plan_need_no_carrying(self, desk: Desk) -> None:
        """They are the same, up to float32, as those that are carried."""
        statistics = desk.calibrate(token_weight="uniform")
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
        behind = desk.calibrate(source=str(plan.path), token_weight="uniform")
        asked = MitigateRequest(str(plan.path), "gptq", weights(desk), propagate="none")
        carried, _ = mitigate(asked, desk.workspace)
        gathered, _ = mitigate(asked, replace(desk.workspace, inputs={"statistics": behind.path}))
        assert carried.manifest.key != gathered.manifest.key
        for name, report in reports(carried).items():
            assert reports(gathered)[name]["loss_rtn"] == pytest.approx(report["loss_rtn"], rel=1e-3)
        same = [
            float((left == right).float().mean())
            for left, right in zip(
                decoded(carried, desk.workspace).values(), decoded(gathered, desk.workspace).values(), strict=True
            )
        ]
        assert min(same) > 0.95

    def test_one_stage_after_the_other_sees_what_is_quantized_in_the_block(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        base = MitigateRequest(statistics, "gptq", weights(desk, "int2"))
        once, stages = (
            decoded(mitigate(replace(base, true_sequential=sequential), desk.workspace)[0], desk.workspace)
            for sequential in (False, True)
        )
        for name in once:
            first = any(name.endswith(f"0.self_attn.{member}") for member in ("q_proj", "k_proj", "v_proj"))
            assert torch.equal(once[name], stages[name]) == first, name

    def test_rounded_activations_are_seen_where_asked_for(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        chosen = scheme(desk.workspace, weights="int4", activations="int3-asym-token")
        base = MitigateRequest(statistics, "gptq", chosen)
        plain, rounded = (
            decoded(mitigate(replace(base, round_activations=r), desk.workspace)[0], desk.workspace)
            for r in (False, True)
        )
        # Moments are of what linears multiply, so the first one sees a difference as well.
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
            assert not torch.equal(plain[name], rounded[name])

    def test_the_batch_does_not_matter(self, desk: Desk) -> None:
        statistics = str(desk.calibrate().path)
        base = MitigateRequest(statistics, "gptq", weights(desk))
        found = [
            reports(
                mitigate(replace(base, batch=b, output=desk.workspace.home / f"{b}.safetensors"), desk.workspace)[0]
            )
            for b in (1, 4)
        ]
        for name, report in found[0].items():
            assert found[1][name]["loss_rtn"] == pytest.approx(report["loss_rtn"], rel=1e-3)

    def test_another_token_weight_is_gathered_anew_or_refused(self, desk: Desk) -> None:
        statistics = str(desk.calibrate(token_weight="uniform").path)
        base = MitigateRequest(statistics, "gptq", weights(desk))
        plain, _ = mitigate(replace(base, token_weight="uniform"), desk.workspace)
        other, _ = mitigate(base, desk.workspace)
        assert plain.manifest.step.config["token_weight"] == "uniform"
        assert other.manifest.step.config["token_weight"] == "inverse-norm:0.5"
        carried, _ = mitigate(replace(base, propagate="none"), desk.workspace)
        assert carried.manifest.step.config["token_weight"] == "uniform"
        name = "model.layers.0.mlp.down_proj.codes"
        assert not torch.equal(plain.tensor(name), other.tensor(name))
        with pytest.raises(UsageError, match="keep the token weight that they were gathered with") as refused:
            mitigate(replace(base, token_weight="inverse-norm", propagate="none"), desk.workspace)
        assert refused.value.hint == "qtool calibrate MODEL --token-weight inverse-norm"

    @pytest.mark.parametrize(
        ("method", "settings", "rounds"),
        [
            ("gptq", {}, False),
            ("target+gptq", {}, False),
            ("qronos", {}, False),
            ("gptaq", {}, True),
            ("lrc", {"rank": "2", "iterations": "1"}, True),
            ("rtn+autoround", {"autoround.steps": "1"}, True),
        ],
    )
    def test_what_is_propagated_is_rounded_where_a_method_does_better_so(
        self, desk: Desk, method: str, settings: Mapping[str, str], rounds: bool
    ) -> None:
        rounded = scheme(desk.workspace, weights="int4", activations="int8-sym-token")
        artifact, _ = mitigate(
            MitigateRequest(str(desk.calibrate().path), method, rounded, settings=settings), desk.workspace
        )
        assert artifact.manifest.step.config["round_activations"] is rounds


class TestSharedScales:
    @pytest.mark.parametrize("true_sequential", [False, True])
    def test_siblings_share_the_multiplier_of_the_largest(
        self, library: Workspace, speeches: Artifact, true_sequential: bool
    ) -> None:
        asked = MitigateRequest(
            str(speeches.path), "rtn", scheme(library, "NVFP4"), true_sequential=true_sequential, propagate="none"
        )
        artifact, _ = mitigate(asked, library)
        subject = open_subject("tiny", library).subject
        for layer in range(4):
            sites: dict[str, list[tuple[Tensor, float]]] = {}
            for linear in subject.model.graph.linears_of(layer):
                amax = float(subject.model.tensor(f"{linear.name}.weight").abs().max())
                sites.setdefault(linear.reads, []).append((artifact.tensor(f"{linear.name}.global_scale"), amax))
            assert [len(one) for one in sites.values()] == [3, 1, 2, 1]
            for members in sites.values():
                largest = max(amax for _, amax in members)
                for found, _ in members:
                    assert float(found) == pytest.approx(largest / (6 * 448), rel=1e-6)

    @pytest.mark.parametrize("propagate", ["none", "quantized"])
    def test_the_multiplier_of_an_input_is_its_calibrated_extreme(
        self,
        library: Workspace,
        speeches: Artifact,
        propagate: Any,  # noqa: ANN401 - a Literal
    ) -> None:
        asked = MitigateRequest(str(speeches.path), "rtn", scheme(library, "NVFP4"), propagate=propagate)
        artifact, _ = mitigate(asked, library)
        names = artifact.names("layers.")
        assert len(names) == 16
        for site in ("attn_in", "o_in", "mlp_in", "up_down"):
            found = float(artifact.tensor(f"layers.0.{site}.input_global_scale"))
            absmax = float(speeches.tensor(f"layers.0.{site}.absmax").max())
            assert found == pytest.approx(absmax / (6 * 448), rel=1e-6)
        subject = open_subject(str(artifact.path), library).subject
        rounding = subject.rounding(0, "o_in", torch.device("cpu"))
        assert rounding is not None
        assert rounding.global_scales[0] is not None
        assert float(rounding.global_scales[0]) == float(artifact.tensor("layers.0.o_in.input_global_scale"))

    @pytest.mark.parametrize("propagate", ["none", "quantized"])
    def test_static_scales_are_searched_for_each_input(
        self,
        monkeypatch: pytest.MonkeyPatch,
        library: Workspace,
        speeches: Artifact,
        propagate: Any,  # noqa: ANN401 - a Literal
    ) -> None:
        read: list[list[Tensor]] = []
        few = slice(64)  # tokens: a search over all of them takes half a minute

        def search(grid: Grid, absmax: Tensor, sample: Tensor, weights: list[Tensor]) -> GlobalScales:
            read.append(weights)
            return calibrated_scales(grid, absmax, sample[few], weights)

        monkeypatch.setattr(block, "calibrated_scales", search)
        chosen = scheme(library, weights="fp4", activations="fp4-tensor-static,down_proj=fp4_e1m2-tensor-static")
        asked = MitigateRequest(str(speeches.path), "rtn", chosen, propagate=propagate)
        artifact, _ = mitigate(asked, library)
        assert len(artifact.names("layers.")) == 16
        subject = open_subject(str(artifact.path), library).subject
        for layer, name in product(range(4), ("attn_in", "o_in", "mlp_in", "up_down")):
            site = f"layers.{layer}.{name}"
            linears = [one for one in subject.model.graph.linears_of(layer) if one.reads == site]
            weights = [subject.model.tensor(f"{linear.name}.weight").float() for linear in linears]
            for mine, theirs in zip(read.pop(0), weights, strict=True):
                assert torch.equal(mine.float(), theirs)
            absmax, sample = (speeches.tensor(f"{site}.{what}") for what in ("absmax", "sample"))
            grid = subject.input_grid(linears[0])
            assert grid is not None
            found = artifact.tensor(f"{site}.input_global_scale")
            if propagate == "none" or site == "layers.0.attn_in":
                (expected,), _ = calibrated_scales(grid, absmax.float(), sample[few], weights)
                assert torch.equal(found, expected)
            rounding = subject.rounding(layer, name, torch.device("cpu"))
            assert rounding is not None
            assert torch.equal(rounding.global_scales[0], found)
            assert not rounding.shared
        assert read == []

    def test_dynamic_activations_store_nothing(self, desk: Desk) -> None:
        chosen = scheme(desk.workspace, "W4A4")
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", chosen), desk.workspace)
        assert artifact.names("layers.") == ()

    def test_estimated_extremes_are_told(self, library: Workspace, speeches: Artifact) -> None:
        plan, _ = transform(TransformRequest(str(speeches.path), "quarot"), library)
        told: list[str] = []
        asked = MitigateRequest(str(plan.path), "rtn", scheme(library, "NVFP4"), propagate="none")
        mitigate(asked, replace(library, warn=told.append))
        assert told == ["absmax behind rotations: estimated from the sample"]

    @pytest.mark.parametrize(("planned", "told_of"), [("W4A4", False), ("", False), ("NVFP4", True)])
    def test_a_plan_for_another_scheme_is_told_of(
        self, library: Workspace, speeches: Artifact, planned: str, *, told_of: bool
    ) -> None:
        made_for = scheme(library, planned) if planned else ModelScheme()
        plan, _ = transform(TransformRequest(str(speeches.path), "block-hadamard", scheme=made_for), library)
        told: list[str] = []
        mitigate(MitigateRequest(str(plan.path), "rtn", scheme(library, "W4A4")), replace(library, warn=told.append))
        assert [line.startswith("the plan was made for weights nvfp4") for line in told] == ([True] if told_of else [])


class TestOrderings:
    """On the shipped model: more bits, finer groups and better solvers do not get worse."""

    TEXT = "speeches"

    def measured(self, source: object, library: Workspace) -> float:
        asked = EvalRequest(str(source), perplexity=(self.TEXT,), seq_len=256, max_windows=8)
        return float(evaluate(asked, library)[0].manifest.details["values"][f"perplexity/{self.TEXT}"])

    @pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
    def test_bits_and_groups(self, library: Workspace, speeches: Artifact, method: str) -> None:
        losses, perplexities = [], [self.measured("tiny", library)]
        for text in ("int8", "int4-g32", "int4", "int3"):
            asked = MitigateRequest(str(speeches.path), method, scheme(library, weights=text))
            artifact, _ = mitigate(asked, library)
            losses.append(sum(report["loss"] for report in reports(artifact).values()))
            perplexities.append(self.measured(artifact.path, library))
        assert losses == sorted(losses)
        assert losses[1] > 10 * losses[0]
        # Eight bits are within what eight windows tell apart from the original.
        assert perplexities[0] * 0.999 < perplexities[1] < perplexities[2] < perplexities[3] < perplexities[4]
        assert perplexities[1] < perplexities[0] * 1.005
        assert perplexities[4] < perplexities[0] * 2

    @pytest.mark.parametrize("text", ["int4", pytest.param("int3-g32", marks=pytest.mark.slow)])
    def test_gptq_beats_rounding_to_nearest(self, library: Workspace, speeches: Artifact, text: str) -> None:
        found = {
            method: mitigate(MitigateRequest(str(speeches.path), method, scheme(library, weights=text)), library)[0]
            for method in ("rtn", "gptq")
        }
        for name, report in reports(found["gptq"]).items():
            assert report["loss"] <= report["loss_rtn"], name
        total = sum(report["loss"] for report in reports(found["gptq"]).values())
        assert total < 0.9 * sum(report["loss_rtn"] for report in reports(found["gptq"]).values())
        assert self.measured(found["gptq"].path, library) < self.measured(found["rtn"].path, library)

    def test_rotations_save_four_bit_activations(self, library: Workspace, speeches: Artifact) -> None:
        plan, _ = transform(TransformRequest(str(speeches.path), "quarot"), library)
        chosen = scheme(library, "W4A4")
        perplexities = {
            source.path: self.measured(
                mitigate(MitigateRequest(str(source.path), "rtn", chosen), library)[0].path, library
            )
            for source in (speeches, plan)
        }
        original = self.measured("tiny", library)
        assert perplexities[plan.path] < 1.5 * original
        assert perplexities[speeches.path] > 3 * perplexities[plan.path]

    def test_a_correction_of_low_rank_helps(self, library: Workspace, speeches: Artifact) -> None:
        chosen = scheme(library, weights="int2")
        plain, _ = mitigate(MitigateRequest(str(speeches.path), "rtn", chosen), library)
        corrected, _ = mitigate(MitigateRequest(str(speeches.path), "rtn+lorc", chosen, {"rank": "32"}), library)
        assert self.measured(corrected.path, library) < self.measured(plain.path, library)


class TestAfterACrash:
    @pytest.mark.parametrize(("method", "propagate"), [("gptq+lorc", "quantized"), ("gptq", "none")])
    def test_interrupted_and_run_again(self, desk: Desk, method: str, propagate: Any) -> None:  # noqa: ANN401
        settings = {"rank": "2"} if "lorc" in method else {}
        statistics = str(desk.calibrate().path)
        asked = MitigateRequest(statistics, method, weights(desk, "int3"), settings, propagate=propagate)
        whole, _ = mitigate(replace(asked, output=desk.workspace.home / "whole.safetensors"), desk.workspace)
        workspace, _ = desk.watched(stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            mitigate(asked, workspace)
        (parts,) = desk.workspace.home.glob("*.partial")
        assert (parts / "layer-0.safetensors").is_file()
        assert not (parts / "layer-1.safetensors").exists()
        resumed, reused = mitigate(asked, desk.workspace)
        assert not reused
        assert resumed.manifest.id == whole.manifest.id
        assert reports(resumed) == reports(whole)
        assert resumed.manifest.counters == whole.manifest.counters
        assert not parts.exists()

    def test_parts_of_another_question_are_not_taken(self, desk: Desk) -> None:
        statistics, output = str(desk.calibrate().path), desk.workspace.home / "o.safetensors"
        workspace, _ = desk.watched(stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            mitigate(MitigateRequest(statistics, "rtn", weights(desk, "int3"), output=output), workspace)
        asked = MitigateRequest(statistics, "rtn", weights(desk, "int4"), output=output)
        found, _ = mitigate(asked, desk.workspace)
        other = desk.workspace.home / "other.safetensors"
        assert found.manifest.id == mitigate(replace(asked, output=other), desk.workspace)[0].manifest.id


class TestRefusals:
    def refused(self, desk: Desk, error: type[Exception], match: str, request: MitigateRequest) -> Any:  # noqa: ANN401
        """Ask, be refused before any work, and leave nothing behind."""
        before = sorted(desk.workspace.home.iterdir())
        workspace, watch = desk.watched()
        with pytest.raises(error, match=match) as caught:
            mitigate(request, workspace)
        assert watch.seen == []
        assert sorted(desk.workspace.home.iterdir()) == before
        return caught.value

    @pytest.mark.parametrize(
        ("parts", "layer", "hint"),
        [
            ({"weights": "int4-g16"}, r"model\.layers\.0\.self_attn\.q_proj", "use a group size of 8"),
            ({"weights": "int4-g24"}, r"model\.layers\.0\.mlp\.down_proj", "use a group size of 8"),
            (
                {"weights": "int4", "activations": "int4-sym-g12"},
                r"model\.layers\.0\.mlp\.down_proj",
                "use a group size of 8",
            ),
            ({"weights": "int4", "kv": "int4-asym-g3"}, "the KV cache", "use a group size of 8"),
            ({"weights": "nvfp4"}, r"model\.layers\.0\.self_attn\.q_proj", "use a group size of 8"),
        ],
    )
    def test_groups_that_do_not_divide_an_input(self, desk: Desk, parts: Any, layer: str, hint: str) -> None:  # noqa: ANN401
        request = MitigateRequest(str(desk.model), "rtn", scheme(desk.workspace, **parts))
        error = self.refused(desk, SchemeError, f"does not divide the input of `{layer}`", request)
        assert error.hint == hint

    @pytest.mark.parametrize(
        ("wrong", "hint"),
        [
            ({"weights": "token"}, "--weights int4-sym-channel-sfp32"),
            ({"activations": "channel"}, "--activations int4-sym-token-sfp32"),
            ({"kv": "channel"}, "--kv keys=int4-sym-channel-g32-sfp32,values=int4-sym-token-head-sfp32"),
            ({"kv": "token"}, "--kv int4-sym-token-head-sfp32"),
        ],
    )
    def test_a_strategy_that_means_nothing_there(self, desk: Desk, wrong: Any, hint: str) -> None:  # noqa: ANN401
        parts = {"weights": "channel", **wrong}
        asked = ModelScheme(**{name: TensorScheme("int4", strategy=strategy) for name, strategy in parts.items()})
        error = self.refused(desk, SchemeError, "means nothing for", MitigateRequest(str(desk.model), "rtn", asked))
        assert error.hint == f"nearest that works: {hint}"

    def test_a_cache_whose_scales_have_a_multiplier_that_nothing_was_seen_of(self, desk: Desk) -> None:
        request = MitigateRequest(str(desk.model), "rtn", scheme(desk.workspace, weights="int4", kv="fp4-g8-se4m3"))
        error = self.refused(desk, UsageError, "needs statistics", request)
        assert error.hint.startswith("qtool calibrate MODEL")

    def test_weights_that_stay_as_they_are(self, desk: Desk) -> None:
        request = MitigateRequest(str(desk.model), "rtn", scheme(desk.workspace, activations="int8-token"))
        error = self.refused(desk, UsageError, "the scheme leaves the weights as they are", request)
        assert error.hint == "--weights int4-sym-g128"

    def test_unknown_names(self, desk: Desk) -> None:
        base = MitigateRequest(str(desk.model), "rtn", weights(desk))
        error = self.refused(desk, UsageError, "no mitigator is called `gpqt`", replace(base, method="gpqt"))
        assert error.hint == "did you mean `gptq`?"
        error = self.refused(desk, UsageError, "`rtn` has no option `clp`", replace(base, settings={"clp": "search"}))
        assert error.hint == "--set clip=VALUE"
        object.__setattr__(unknown := replace(base), "propagate", "full")  # past the check of types while tests run
        self.refused(desk, UsageError, "unknown propagation `full`", unknown)
        self.refused(desk, UsageError, "unknown dtype `int4`", replace(base, dtype="int4"))
        self.refused(desk, UsageError, "cannot read the token weight `x`", replace(base, token_weight="x"))

    def test_a_method_that_needs_statistics(self, desk: Desk) -> None:
        request = MitigateRequest(str(desk.model), "gptq", weights(desk))
        error = self.refused(desk, UsageError, "`gptq` needs statistics, and .* has none behind it", request)
        assert error.facts == (("needs", "hessian"),)
        static = MitigateRequest(
            str(desk.model), "rtn", scheme(desk.workspace, weights="int4", activations="fp4-g8-se4m3")
        )
        error = self.refused(desk, UsageError, "`rtn` needs statistics", static)
        assert error.facts == (("needs", "absmax"),)
        searched = scheme(desk.workspace, weights="int4", activations="fp4-tensor-static")
        error = self.refused(desk, UsageError, "`rtn` needs statistics", replace(static, scheme=searched))
        assert error.facts == (("needs", "absmax, sample"),)

    def test_statistics_without_what_a_method_needs(self, desk: Desk) -> None:
        bare = str(desk.calibrate(gather=("mean",)).path)
        request = MitigateRequest(bare, "gptq", weights(desk), propagate="none")
        with pytest.raises(ArtifactError, match=r"the statistics lack `hessian` at `layers\.0\.attn_in`") as refused:
            mitigate(request, desk.workspace)
        assert refused.value.hint == "qtool calibrate MODEL --gather hessian,mean"
        # With passes of its own only the text is needed.
        assert not mitigate(replace(request, propagate="quantized"), desk.workspace)[1]

    def test_what_is_quantized_already(self, desk: Desk) -> None:
        done, _ = mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk)), desk.workspace)
        request = MitigateRequest(str(done.path), "rtn", weights(desk))
        self.refused(desk, ArtifactError, "is quantized already", request)

    def test_statistics_of_another_model(self, desk: Desk, tmp_path: Path) -> None:
        def nudge(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"][0] += 1e-3

        statistics = desk.calibrate(source=str(desk.copied(tmp_path / "other", nudge)))
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        workspace = replace(desk.workspace, inputs={"statistics": statistics.path})
        for source in (desk.model, plan.path):
            with pytest.raises(ArtifactError, match="statistics were collected on another model"):
                mitigate(MitigateRequest(str(source), "gptq", weights(desk)), workspace)

    def test_statistics_of_a_transformed_model(self, desk: Desk) -> None:
        plan, _ = transform(TransformRequest(str(desk.model), "quarot"), desk.workspace)
        behind = desk.calibrate(source=str(plan.path))
        workspace = replace(desk.workspace, inputs={"statistics": behind.path})
        for source, where in ((desk.model, workspace), (behind.path, desk.workspace)):
            with pytest.raises(ArtifactError, match="statistics were collected on a transformed model") as refused:
                mitigate(MitigateRequest(str(source), "gptq", weights(desk)), where)
            assert refused.value.hint == f"give {plan.path} with --input statistics={behind.path}"

    def test_the_same_method_twice(self, desk: Desk) -> None:
        request = MitigateRequest(str(desk.calibrate().path), "rtn+gptq", weights(desk))
        with pytest.raises(UsageError, match="`gptq` starts from the weight, so it has to come first") as refused:
            mitigate(request, desk.workspace)
        assert refused.value.hint == "--method gptq+…, gptq once"


class TestHardProblems:
    def test_a_weight_that_is_not_finite_is_named(self, desk: Desk, tmp_path: Path) -> None:
        name = "model.layers.1.self_attn.k_proj.weight"

        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[name][0, 5] = math.nan

        model = desk.copied(tmp_path / "spoiled", spoil)
        with pytest.raises(NumericalError, match=f"the weight `{name}` holds NaN or Inf"):
            mitigate(MitigateRequest(str(model), "rtn", weights(desk)), desk.workspace)
        assert not list(desk.workspace.home.glob("*.safetensors"))

    def test_fewer_tokens_than_channels(self, desk: Desk) -> None:
        statistics = desk.calibrate(num_samples=1, seq_len=10)
        hessian = statistics.tensor("layers.0.attn_in.hessian")
        assert int(torch.linalg.matrix_rank(hessian, hermitian=True)) <= 10 < len(hessian)
        for propagate in ("quantized", "none"):
            asked = MitigateRequest(str(statistics.path), "gptq", weights(desk), propagate=propagate)  # type: ignore[arg-type]
            artifact, _ = mitigate(asked, desk.workspace)
            for report in reports(artifact).values():
                assert math.isfinite(report["loss"])
                assert report["loss"] <= report["loss_rtn"] * 1.0001

    def test_a_channel_that_is_never_active_is_counted(self, desk: Desk, tmp_path: Path) -> None:
        def silence(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.mlp.up_proj.weight"][7] = 0.0

        model = desk.copied(tmp_path / "silent", silence)
        asked = MitigateRequest(str(desk.calibrate(source=str(model)).path), "gptq", weights(desk))
        artifact, _ = mitigate(asked, desk.workspace)
        assert artifact.manifest.counters == {"dead_columns": 1}

    def test_strict_makes_an_error_of_what_is_counted(self, desk: Desk, tmp_path: Path) -> None:
        def silence(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.mlp.up_proj.weight"][7] = 0.0

        model = desk.copied(tmp_path / "silent", silence)
        asked = MitigateRequest(str(desk.calibrate(source=str(model)).path), "gptq", weights(desk))
        for _ in ("a new one", "one that is there"):
            with pytest.raises(NumericalError, match="something unusual happened and --strict was given") as refused:
                mitigate(replace(asked, strict=True), desk.workspace)
            assert refused.value.facts == (("dead_columns", 1),)
            mitigate(asked, desk.workspace)
        fine = MitigateRequest(str(desk.calibrate().path), "gptq", weights(desk), strict=True)
        assert mitigate(fine, desk.workspace)[0].manifest.counters == {}

    def test_a_method_that_raises_is_not_hidden(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise PluginError("the method is broken")

        monkeypatch.setattr(desk.workspace.plugins.load("mitigators", "rtn"), "quantize", broken, raising=False)
        with pytest.raises(PluginError, match="the method is broken"):
            mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk)), desk.workspace)


class TestInputs:
    def test_moved_together_and_found_beside(self, desk: Desk, tmp_path: Path) -> None:
        statistics = desk.calibrate()
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
        expected, _ = mitigate(MitigateRequest(str(plan.path), "gptq", weights(desk)), desk.workspace)
        (tmp_path / "there").mkdir()
        moved = Path(shutil.move(plan.path, tmp_path / "there" / "plan.safetensors"))
        shutil.move(statistics.path, tmp_path / "there" / "renamed.safetensors")
        found, reused = mitigate(MitigateRequest(str(moved), "gptq", weights(desk)), desk.workspace)
        assert reused
        assert found.manifest.id == expected.manifest.id

    def test_one_that_is_gone_is_named(self, desk: Desk) -> None:
        statistics = desk.calibrate()
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
        statistics.path.unlink()
        with pytest.raises(ArtifactError, match=f"the statistics behind `{plan.path.name}` cannot be found") as refused:
            mitigate(MitigateRequest(str(plan.path), "gptq", weights(desk)), desk.workspace)
        assert refused.value.facts == (("id", statistics.manifest.id[:12]), ("last seen", str(statistics.path)))
        assert refused.value.hint == "--input statistics=PATH"

    def test_manifests_name_what_went_in(self, desk: Desk) -> None:
        statistics = desk.calibrate()
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), desk.workspace)
        artifact, _ = mitigate(MitigateRequest(str(plan.path), "gptq", weights(desk)), desk.workspace)
        assert {role: one.id for role, one in artifact.manifest.inputs.items()} == {
            "model": statistics.manifest.subject,
            "statistics": statistics.manifest.id,
            "plan": plan.manifest.id,
        }
        subject = open_subject(str(artifact.path), desk.workspace).subject
        assert isinstance(subject, Subject)
        assert subject.plan.fold_norms
        assert subject.scheme == weights(desk)
        assert open_subject(str(statistics.path), desk.workspace).subject.plan == Plan()


def test_seeds_reach_the_method(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    method = desk.workspace.plugins.load("mitigators", "rtn")
    quantize = method.quantize

    def watched(problem: Any, config: Any) -> Any:  # noqa: ANN401 - passed through
        seeds.append(problem.seed)
        return quantize(problem, config)

    monkeypatch.setattr(method, "quantize", watched, raising=False)
    mitigate(MitigateRequest(str(desk.model), "rtn", weights(desk), seed=100), desk.workspace)
    assert seeds == list(range(100, 114)), "each linear has one of its own"


def test_the_shipped_model_is_calibrated_on_its_own_text(library: Workspace, speeches: Artifact) -> None:
    assert calibrate(CalibrateRequest("tiny", data="speeches", num_samples=16, seq_len=256), library)[1]
    assert speeches.manifest.details["tokens"] == 4096
