"""Verify passes what is intact and exact, and finds a changed bit, a missing file, an operator that is not exact."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, SitePlan
from qtool.numerics.operators import Diag
from qtool.plugins import Plugins
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import read_plan
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.verify import VerifyRequest, verify
from qtool.steps.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("verified")
    return Workspace(Plugins.discover(), home=folder / "home", cache=folder / "cache")


@pytest.fixture(scope="module")
def plan(workspace: Workspace) -> Artifact:
    return transform(TransformRequest("tiny", "quarot", {"r3": "on"}), workspace)[0]


def written(plan: Plan, manifest: Manifest, path: Path) -> Path:
    """Write a plan that no planner checked."""
    tensors, details = plan.to_state()
    writer = ArtifactWriter(path, manifest)
    writer.begin()
    writer.add("plan", tensors)
    return writer.finish(replace(manifest, details=details, tensors={})).path


def request(path: Path, **options: float) -> VerifyRequest:
    return replace(VerifyRequest(str(path), windows=2, seq_len=16), **options)


def test_an_exact_plan_changes_no_logit(workspace: Workspace, plan: Artifact) -> None:
    artifact, measured = verify(request(plan.path), workspace)
    assert artifact.manifest.id == plan.manifest.id
    assert 0 < measured["mean_logit_difference"] < measured["max_logit_difference"] < 1e-4 < 1 < measured["max_logit"]


def test_differences_are_below_a_tolerance_or_refused(workspace: Workspace, plan: Artifact) -> None:
    with pytest.raises(NumericalError, match="the plan changes what the model computes") as error:
        verify(request(plan.path, tolerance=1e-9), workspace)
    assert error.value.facts[0] == ("largest difference allowed", 1e-9)


def test_logits_that_are_no_numbers_are_no_small_difference(
    workspace: Workspace, plan: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """Gives NaN for the first window of a transformed model."""

        def __init__(self, subject: Subject, **options: object) -> None:
            self.logits = torch.zeros(2, 1, 3, 5)
            if not subject.plan.empty:
                self.logits[0, 0, 1, 2] = float("nan")

        def forward_windows(self, windows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
            return ((slice(i, i + 1), self.logits[i]) for i in range(2))

    monkeypatch.setattr("qtool.steps.verify.BlockExecutable", Broken)
    with pytest.raises(NumericalError) as error:
        verify(request(plan.path), workspace)
    assert dict(error.value.facts)["max_logit"] == 0
    assert str(dict(error.value.facts)["max_logit_difference"]) == "nan"


def test_an_operator_that_is_not_exact_is_found(workspace: Workspace, plan: Artifact, tmp_path: Path) -> None:
    exact = read_plan(plan)
    scales = torch.ones(128)
    scales[3] = 1.01
    odd = SitePlan((*exact.at(RESIDUAL).operators, Diag(scales)), 2)
    path = written(replace(exact, sites={**exact.sites, RESIDUAL: odd}), plan.manifest, tmp_path / "odd.safetensors")
    with pytest.raises(NumericalError):
        verify(request(path), workspace)


def test_a_changed_tensor_is_named(workspace: Workspace, plan: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "changed.safetensors"
    content = bytearray(plan.path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tensor `sites/.*` of .* was changed after it was written"):
        verify(request(path), workspace)


def test_files_of_a_checkpoint_are_compared_with_their_digests(
    workspace: Workspace, plan: Artifact, tmp_path: Path
) -> None:
    scheme = read_scheme("W4A16", {}, workspace.plugins)
    quantized, _ = mitigate(MitigateRequest("tiny", "rtn", scheme), workspace)
    assert verify(request(quantized.path), workspace)[1] == {}
    checkpoint, _ = pack(PackRequest(str(quantized.path), "hf", tmp_path / "whole"), workspace)
    (checkpoint.path / "NOTES").write_text("added by a user")
    assert verify(request(checkpoint.path), workspace)[0].manifest.kind == "checkpoint"
    damaged = tmp_path / "damaged"
    for name, says in (("config.json", "was changed"), ("model.safetensors", "is missing")):
        shutil.copytree(checkpoint.path, damaged)
        if says == "is missing":
            (damaged / name).unlink()
        else:
            (damaged / name).write_text("{}")
        with pytest.raises(ArtifactError, match=f"`{name}` of .* {says}"):
            verify(request(damaged), workspace)
        shutil.rmtree(damaged)


def test_a_model_has_nothing_to_verify(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="is no artifact"):
        verify(VerifyRequest("tiny"), workspace)
