"""Scales and norms learned from the whole model, through the whole pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.engine.stored import NORMS
from qtool.errors import UsageError
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.foresee import foresee
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import stored_bits
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing import save_tiny_model, tiny_config
from tests.steps.conftest import Desk

FEW = {"e2e-qp.epochs": "3", "e2e-qp.batch": "1", "e2e-qp.rate": "1e-2", "e2e-qp.norm_rate": "1e-2"}
LONG = "gptq+autoround"
SETTINGS = {LONG: {"autoround.steps": "3"}, "gptq+lorc": {"lorc.rank": "2"}}
IN_FRONT = ("input_layernorm", "post_attention_layernorm")


def asked(desk: Desk, method: str = "rtn+e2e-qp", settings: Mapping[str, str] = FEW, **parts: str) -> MitigateRequest:
    scheme = read_scheme("", {"weights": "int2-g8", **parts}, desk.workspace.plugins)
    left = SETTINGS.get(method.removesuffix("+e2e-qp"), {})
    own = settings if method.endswith("e2e-qp") else {}
    return MitigateRequest(str(desk.calibrate(num_samples=12).path), method, scheme, {**left, **own})


def tensors(artifact: Artifact) -> dict[str, Tensor]:
    return {name: artifact.tensor(name) for name in artifact.names()}


def model_report(artifact: Artifact) -> Mapping[str, float]:
    found: Mapping[str, float] = artifact.manifest.details["model"]
    return found


def kl(source: Artifact, windows: Tensor, workspace: Workspace, **options: Any) -> float:  # noqa: ANN401 - of the request
    """Measure the divergence on some windows as eval does."""
    text = workspace.home / "windows.txt"
    text.write_text(
        workspace.model(str(Path(source.manifest.inputs["model"].path))).tokenizer().decode(windows.flatten())
    )
    request = EvalRequest(str(source.path), (str(text),), seq_len=windows.shape[1], kl=True, **options)
    return float(evaluate(request, workspace)[0].tensor("kl/windows.txt").double().mean())


@pytest.mark.parametrize("left", ["rtn", LONG])
def test_codes_stay_and_what_is_told_is_what_is_stored(desk: Desk, left: str) -> None:
    statistics = desk.calibrate(num_samples=12)
    request = asked(desk, f"{left}+e2e-qp")
    before, _ = mitigate(replace(request, method=left, settings=SETTINGS.get(left, {})), desk.workspace)
    after, _ = mitigate(request, desk.workspace)
    was, now = tensors(before), tensors(after)
    norms = {name: tensor for name, tensor in now.items() if name.startswith(NORMS)}
    expected = {f"{NORMS}model.layers.{i}.{norm}.weight" for i in range(2) for norm in IN_FRONT}
    assert norms.keys() == expected | {f"{NORMS}model.norm.weight"}
    assert now.keys() - norms.keys() == was.keys()
    for name, tensor in was.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor) != name.endswith(".scale"), name
    subject = open_subject(str(after.path), desk.workspace).subject
    for name, tensor in norms.items():
        own = subject.model.tensor(name.removeprefix(NORMS))
        assert (tensor.shape, tensor.dtype) == (own.shape, own.dtype)
        assert 1e-3 < float((tensor / own - 1).abs().max()) < 0.5
    bits, same = (stored_bits(open_subject(str(one.path), desk.workspace)) for one in (before, after))
    assert bits == same
    held = statistics.tensor("windows").long()[:1]
    report = model_report(after)
    assert report["kl_before"] == pytest.approx(kl(before, held, desk.workspace), rel=1e-5)
    assert report["kl"] == pytest.approx(kl(after, held, desk.workspace), rel=1e-5)
    assert report["kl"] < 0.95 * report["kl_before"]


@pytest.mark.parametrize("left", ["rtn", "gptq+lorc"])
def test_losses_are_of_what_was_learned_on_the_inputs_that_it_has(desk: Desk, left: str) -> None:
    """What is stored against the model's weights, on inputs that transformers' model with what is stored has."""
    request = replace(asked(desk, f"{left}+e2e-qp"), token_weight="uniform")
    made, _ = mitigate(request, desk.workspace)
    was, _ = mitigate(replace(request, method=left, settings=SETTINGS.get(left, {})), desk.workspace)
    plain, changed = (AutoModelForCausalLM.from_pretrained(desk.model).double() for _ in range(2))
    subject = open_subject(str(made.path), desk.workspace).subject
    for linear in subject.linears:
        solved = subject.linear(linear)
        decoded = solved.weight(subject.weight_grid(linear))
        changed.get_submodule(linear.name).weight.data = (
            decoded if solved.adapter is None else decoded + solved.adapter.product()
        ).double()
    for name in (name for name in made.names() if name.startswith(NORMS)):
        changed.get_parameter(name.removeprefix(NORMS)).data = made.tensor(name).double()
    seen: dict[str, Tensor] = {}
    names = [linear.name for linear in subject.linears]
    for name in names:
        changed.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(name, given[0].flatten(0, -2))
        )
    with torch.no_grad():
        changed(desk.calibrate(num_samples=12).tensor("windows").long())
    reports, earlier = (one.manifest.details["layers"] for one in (made, was))
    assert sorted(reports) == sorted(names)
    for name in names:
        before, after = (one.get_submodule(name).weight.detach() for one in (plain, changed))
        squares = [float((seen[name] @ weight.T).square().sum()) for weight in (before - after, before)]
        assert reports[name]["loss"] == pytest.approx(squares[0] / squares[1], rel=2e-3), name
        assert reports[name]["loss_before"] != reports[name]["loss"]
        if left != "rtn":  # which makes no passes by itself, and goes by the inputs of the original model
            assert reports[name]["loss_before"] == earlier[name]["loss"]


def test_what_runs_reads_changed_norms(desk: Desk) -> None:
    after, _ = mitigate(asked(desk), desk.workspace)
    subject = open_subject(str(after.path), desk.workspace).subject
    for layer in range(2):
        for state in (subject.folded(layer), subject.beside(layer), subject.block(layer, torch.float64).state):
            for norm in IN_FRONT:
                stored = after.tensor(f"{NORMS}model.layers.{layer}.{norm}.weight")
                assert torch.equal(state[f"{norm}.weight"], stored)
    assert torch.equal(subject.ends()["model.norm.weight"], after.tensor(f"{NORMS}model.norm.weight"))


def test_without_epochs_nothing_is_changed(desk: Desk) -> None:
    request = asked(desk, settings={"epochs": "0"})
    before, _ = mitigate(replace(request, method="rtn", settings={}), desk.workspace)
    after, _ = mitigate(request, desk.workspace)
    was, now = tensors(before), tensors(after)
    assert was.keys() == now.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    assert model_report(after)["kl"] == model_report(after)["kl_before"] > 0


@pytest.mark.parametrize("left", ["rtn", LONG])
def test_interrupted_in_the_last_stage_and_run_again(desk: Desk, left: str) -> None:
    request = asked(desk, f"{left}+e2e-qp")
    undisturbed, watch = desk.watched()
    whole, _ = mitigate(replace(request, output=desk.workspace.home / "whole.safetensors"), undisturbed)
    blocks, windows = 2, 2 * 1 + 4 * 3 * 12
    assert len(watch.seen) == blocks + windows + blocks
    assert watch.labels[-blocks:] == ["losses of the whole model"] * blocks
    workspace, _ = desk.watched(stop_after=blocks + 60)
    with pytest.raises(KeyboardInterrupt):
        mitigate(request, workspace)
    (parts,) = desk.workspace.home.glob("*.partial")
    assert {path.name for path in parts.glob("*.safetensors")} == {"layer-0.safetensors", "layer-1.safetensors"}
    resumed, reused = mitigate(request, desk.workspace)
    assert not reused
    assert resumed.manifest.id == whole.manifest.id
    assert model_report(resumed) == model_report(whole)
    assert not parts.exists()


def test_a_dry_run_counts_its_windows(desk: Desk) -> None:
    request = asked(desk)
    workspace, watch = desk.watched()
    found = foresee(mitigate, request, workspace).to_json()
    seconds = {row["part"]: row["seconds"] for row in found["estimate"]}
    passes = found["passes_over_the_data"]
    assert passes == 4  # to solve, to go on, in full precision, and through what was made
    assert watch.seen == []
    mitigate(request, workspace)
    windows = watch.labels.count("mitigate the whole model")
    assert seconds["learning"] / seconds["passes"] == pytest.approx(windows / (12 * passes))


def test_inspect_tells_of_the_model(desk: Desk) -> None:
    after, _ = mitigate(asked(desk), desk.workspace)
    (row,) = inspect(str(after.path), desk.workspace).to_json()["model"]
    assert row == model_report(after)
    plain, _ = mitigate(asked(desk, "rtn"), desk.workspace)
    assert "model" not in inspect(str(plain.path), desk.workspace).to_json()


@pytest.mark.parametrize(
    ("method", "reason", "hint"),
    [
        ("e2e-qp", "learns beside codes, and rounds nothing", "--method rtn+e2e-qp"),
        ("target+e2e-qp", "learns beside codes, and rounds nothing", "--method target+gptq+e2e-qp"),
        ("e2e-qp+gptq", "comes last and once", "--method gptq+e2e-qp"),
        ("gptq+e2e-qp+lorc", "comes last and once", "--method gptq+lorc+e2e-qp"),
    ],
)
def test_orders_that_mean_nothing_are_refused(desk: Desk, method: str, reason: str, hint: str) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        mitigate(replace(asked(desk, "rtn"), method=method), desk.workspace)
    assert refused.value.hint == hint


def test_the_passes_that_it_needs(desk: Desk) -> None:
    request = asked(desk)
    with pytest.raises(UsageError, match="compares with full precision, which takes passes over the text") as refused:
        mitigate(replace(request, propagate="none"), desk.workspace)
    assert refused.value.hint == "--propagate quantized"
    with pytest.raises(UsageError, match="needs statistics") as refused:
        mitigate(replace(request, source=str(desk.model)), desk.workspace)
    assert ("needs", "the text") in refused.value.facts


def test_experts_that_see_routed_tokens_are_refused(desk: Desk, tmp_path: Path) -> None:
    family = desk.workspace.plugins.load("families", "mixtral")
    save_tiny_model(tmp_path / "sparse", tiny_config("mixtral", **family.tiny[0]))
    routed = desk.calibrate(source=str(tmp_path / "sparse"), experts="routed")
    with pytest.raises(UsageError, match="routed experts see other tokens there") as refused:
        mitigate(replace(asked(desk), source=str(routed.path)), desk.workspace)
    assert refused.value.hint == "--experts all"


class TestOfTheShippedModel:
    @pytest.fixture
    def made(self, library: Workspace) -> tuple[Artifact, Artifact, Artifact]:
        """Statistics, and the model in 3 bits without and with it."""
        request = CalibrateRequest("tiny", data="speeches", num_samples=16, seq_len=128, gather=("hessian",))
        statistics, _ = calibrate(request, library)
        scheme = read_scheme("", {"weights": "int3"}, library.plugins)
        plain = MitigateRequest(str(statistics.path), "rtn", scheme)
        learned = replace(plain, method="rtn+e2e-qp", settings={"epochs": "2", "batch": "2"})
        return statistics, mitigate(plain, library)[0], mitigate(learned, library)[0]

    def test_other_text_is_predicted_better(
        self, library: Workspace, made: tuple[Artifact, Artifact, Artifact]
    ) -> None:
        found = []
        for one in made[1:]:
            asked = EvalRequest(str(one.path), perplexity=("speeches",), seq_len=128, max_windows=16, kl=True)
            found.append(evaluate(asked, library)[0].manifest.details["values"])
        for name in ("perplexity/speeches", "kl/speeches"):
            assert found[1][name] < found[0][name]
        assert found[1]["kl/speeches"] < 0.97 * found[0]["kl/speeches"]

    def test_what_is_told_is_near_what_is_stored_in_bfloat16(
        self, library: Workspace, made: tuple[Artifact, Artifact, Artifact]
    ) -> None:
        held = made[0].tensor("windows").long()[:1]
        report = model_report(made[2])
        assert report["kl_before"] == pytest.approx(kl(made[1], held, library), rel=1e-6)
        assert report["kl"] == pytest.approx(kl(made[2], held, library), rel=0.03)
