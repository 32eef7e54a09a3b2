"""transform: methods propose operators, the planner checks them, the plan is written. No weight is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.artifacts.manifest import Input, Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.carry import CarriedStatistics
from qtool.engine.fold import require_biases
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.engine.trials import Trials
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan, TransformContext
from qtool.model.statistics import SiteStatistics
from qtool.scheme import ModelScheme
from qtool.steps.calibrate import WINDOWS
from qtool.steps.options import Configured, configure
from qtool.steps.schemes import check_rules
from qtool.steps.subjects import Opened, open_subject
from qtool.steps.workspace import Workspace, measured


@dataclass(frozen=True)
class TransformRequest:
    """Which methods, on what.

    Attributes:
        source: Statistics, a plan to be extended, or a model for methods that need no statistics.
        method: Composition, left to right: ``smoothquant+quarot``.
        settings: Options of the methods as text.
        scheme: How the model is going to be quantized, where a method wants to know.
        seed: Seeds random signs and the like.
        output: Where the plan goes; None for a name that follows from the key.
    """

    source: str
    method: str
    settings: Mapping[str, str] = field(default_factory=dict)
    scheme: ModelScheme = field(default_factory=ModelScheme)
    seed: int = 0
    output: Path | None = None


def transform(request: TransformRequest, workspace: Workspace) -> tuple[Artifact, bool]:
    """Plan a transform.

    Returns:
        The plan artifact, and whether it was there already.

    Raises:
        UsageError: Unknown method or option, a method lacks statistics, or an operator is not exact on this model.
    """
    methods = configure("transforms", request.method, request.settings, workspace.plugins)
    opened = open_subject(request.source, workspace)
    if opened.artifact is not None:
        require_kind(opened.artifact.manifest, "statistics", "plan", path=request.source)
    check_rules(request.scheme, opened.model.graph)
    statistics = statistics_of(opened, workspace)
    if statistics is not None and gathered_behind(statistics.manifest) is not None:
        raise UsageError(
            "statistics of a transformed model cannot be carried through another transform",
            facts=(("statistics", statistics.path),),
            hint="calibrate the original model, and give those statistics",
        )
    for one in methods:
        if one.method.needs and statistics is None:
            raise UsageError(
                f"`{one.name}` needs statistics and was given a model",
                facts=(("needs", ", ".join(one.method.needs)),),
                hint=f"qtool calibrate {request.source} | qtool transform --method {request.method}",
            )
    manifest = _manifest(request, methods, opened, statistics)
    path = workspace.output(manifest, request.output)
    if (done := ArtifactWriter.finished(path, manifest.key)) is not None:
        return done, True
    about: dict[str, object] = {}
    with measured(about, workspace.device):
        plan = opened.subject.plan
        for one in workspace.progress(methods, total=len(methods), label="transform"):
            plan = _extended(plan, one, request, opened, statistics, workspace.device)
        require_biases(opened.model.graph, plan, opened.model.has)
        for name in {segment.format for site in plan.sites.values() for segment in site.segments}:
            workspace.plugins.format(name)
        for note in plan.notes:
            workspace.warn(note)
        tensors, described = plan.to_state()
    writer = ArtifactWriter(path, manifest)
    with writer.working():
        writer.add("plan", tensors)
        return writer.finish(replace(manifest, details=described, about=about)), False


def statistics_of(opened: Opened, workspace: Workspace) -> Artifact | None:
    """Find the statistics behind what was opened: itself, what it was made from, or what the user points at.

    Raises:
        ArtifactError: They are gone, or were gathered on another model or behind another plan than what was opened.
    """
    found, artifact = None, opened.artifact
    if "statistics" in workspace.inputs:
        found = workspace.artifact(workspace.inputs["statistics"], "statistics")
    elif artifact is not None and artifact.manifest.kind == "statistics":
        found = artifact
    elif artifact is not None and "statistics" in artifact.manifest.inputs:
        found = workspace.input_of(artifact, "statistics")
    if found is not None:
        _check_statistics(found, opened)
    return found


def gathered_behind(statistics: Manifest) -> Input | None:
    """Return the plan (or the quantized artifact) that statistics were gathered behind; None for the model itself."""
    inputs = statistics.inputs
    return next((inputs[role] for role in ("quantized", "plan") if role in inputs), None)


def _check_statistics(statistics: Artifact, opened: Opened) -> None:
    """Refuse statistics that do not speak of what was opened."""
    if statistics.manifest.subject != opened.model.id:
        raise ArtifactError(
            "statistics were collected on another model",
            facts=(
                ("statistics", f"{statistics.path}  subject {statistics.manifest.subject[:12]}"),
                ("model", f"{opened.model.path}  subject {opened.model.id[:12]}"),
            ),
            hint=f"qtool calibrate {opened.model.path}",
        )
    behind = gathered_behind(statistics.manifest)
    if behind is not None and behind.id not in {one.id for one in opened.inputs.values()}:
        raise ArtifactError(
            "statistics were collected on a transformed model",
            facts=(("statistics", statistics.path), ("transformed by", behind.path)),
            hint=f"give {behind.path} with --input statistics={statistics.path}",
        )


def context_of(
    subject: Subject,
    statistics: Artifact | None,
    *,
    scheme: ModelScheme | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> TransformContext:
    """Return what a method may look at: the model as the subject's plan transforms it, and its carried statistics.

    Args:
        subject: The model with the plan so far.
        statistics: What calibrate gathered on the model; without them there is neither that nor are there trials.
        scheme: How the model is going to be quantized, as far as is known.
        seed: Seeds what is random.
        device: Where trials run, in float32; None is the CPU.
    """
    scheme = scheme or ModelScheme()
    carried: Mapping[str, SiteStatistics] = {}
    residual: Mapping[str, SiteStatistics] = {}
    trials: Trials | None = None
    if statistics is not None:
        carried = CarriedStatistics(statistics, subject.model, subject.plan)
        alone = Plan({RESIDUAL: subject.plan.at(RESIDUAL)}, fold_norms=True)
        residual = CarriedStatistics(statistics, subject.model, alone)
        windows = statistics.tensor(WINDOWS).long()
        trials = Trials(subject, windows, scheme, device or torch.device("cpu"))
    weights = _FoldedWeights(subject)
    return TransformContext(subject.model.graph, carried, weights, scheme, seed, trials, residual)


def _extended(
    plan: Plan,
    one: Configured,
    request: TransformRequest,
    opened: Opened,
    statistics: Artifact | None,
    device: torch.device,
) -> Plan:
    """Let one method propose operators and add them to the plan."""
    subject = Subject(opened.model, opened.subject.plugins, plan)
    context = context_of(subject, statistics, scheme=request.scheme, seed=request.seed, device=device)
    return extend(plan, one.method.plan(context, one.config), opened.model.graph, method=one.name)


class _FoldedWeights:
    """Reads a linear's weight as the methods to the left have transformed it; remembers one block.

    Args:
        subject: The model with their plan.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._layer = -1
        self._state: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Return the weight ``[out, in]`` in float32."""
        linear = self.subject.model.graph.linear(name)
        if linear.layer != self._layer:
            self._layer, self._state = linear.layer, self.subject.folded(linear.layer, torch.float32)
        return self._state[f"{linear.spec.module}.weight"].float()


def _manifest(
    request: TransformRequest, methods: tuple[Configured, ...], opened: Opened, statistics: Artifact | None
) -> Manifest:
    config = {"methods": [one.record() for one in methods], "seed": request.seed, "scheme": request.scheme.to_json()}
    inputs = dict(opened.inputs)
    if statistics is not None and "statistics" not in inputs:
        inputs["statistics"] = Workspace.named(statistics)
    return Manifest(
        kind="plan",
        step=Step("transform", request.method, 1, ", ".join(dict.fromkeys(one.provider for one in methods)), config),
        inputs=inputs,
        subject=opened.model.id,
        family=opened.model.family.name,
    )
