"""mitigate: weights become codes, block by block, while the error is compensated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.carry import CarriedStatistics
from qtool.engine.gather import Gathering, Statistic, observing
from qtool.engine.network import Network
from qtool.engine.problem import QuantizedLinear
from qtool.engine.solve import Method, Solver
from qtool.engine.stored import INPUT_GLOBAL_SCALE, linear_tensors, read_linear
from qtool.engine.stream import Stream, default_batch
from qtool.engine.subject import BlockContent, Subject
from qtool.errors import ArtifactError, NumericalError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.model.plan import Plan
from qtool.model.statistics import SiteStatistics
from qtool.numerics.token_weights import parse_token_weight
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.calibrate import WINDOWS
from qtool.steps.options import Configured, configure
from qtool.steps.subjects import Opened, compute_dtype, dtype_name, open_subject
from qtool.steps.transform import gathered_behind, statistics_of
from qtool.steps.workspace import Workspace, measured

Propagate = Literal["quantized", "none"]
PROPAGATE: tuple[Propagate, ...] = ("quantized", "none")


@dataclass(frozen=True)
class MitigateRequest:
    """Which methods, in which scheme, on what.

    Attributes:
        source: A plan, statistics (no transform), or a model for methods that need no statistics.
        method: Composition, left to right: ``gptq+lorc``.
        scheme: Weights, activations, KV cache.
        settings: Options of the methods as text.
        propagate: ``quantized``: blocks see the activations of what is quantized already, by forward passes;
            ``none``: carried statistics, no forward pass.
        true_sequential: Four passes a block, so that each linear sees the quantized ones before it in its block.
        round_activations: Whether the activations that are propagated are quantized as the scheme says.
        token_weight: Rule for the weight of a token in the Hessian; empty takes that of the statistics.
        strict: Whether anything unusual that a counter counts is an error.
        seed: Seeds what is random.
        dtype: What to compute in, ``auto`` for the model's own.
        batch: Windows that run at once; 0 for a default.
        output: Where the artifact goes; None for a name that follows from the key.
    """

    source: str
    method: str
    scheme: ModelScheme
    settings: Mapping[str, str] = field(default_factory=dict)
    propagate: Propagate = "quantized"
    true_sequential: bool = False
    round_activations: bool = False
    token_weight: str = ""
    strict: bool = False
    seed: int = 0
    dtype: str = "auto"
    batch: int = 0
    output: Path | None = None


def mitigate(request: MitigateRequest, workspace: Workspace) -> tuple[Artifact, bool]:
    """Quantize the linears of a model.

    Returns:
        The quantized artifact, and whether it was there already.

    Raises:
        UsageError: Unknown method or option, or statistics are needed and missing.
        SchemeError: The scheme does not fit a layer; raised before any work.
        NumericalError: Weights or activations are not finite, or a problem cannot be solved.
    """
    if request.propagate not in PROPAGATE:
        raise UsageError(f"unknown propagation `{request.propagate}`", facts=(("known", ", ".join(PROPAGATE)),))
    if request.token_weight:
        parse_token_weight(request.token_weight)
    methods = configure("mitigators", request.method, request.settings, workspace.plugins)
    opened = open_subject(request.source, workspace)
    if opened.subject.quantized is not None:
        raise UsageError("this artifact is quantized already", hint="give the plan or the statistics it was made from")
    if opened.artifact is not None:
        require_kind(opened.artifact.manifest, "plan", "statistics", path=request.source)
    weights = check_scheme(request.scheme, opened.subject)
    statistics = statistics_of(opened, workspace)
    work = _Work(request, workspace, opened, methods, weights, statistics)
    manifest = work.manifest()
    path = workspace.output(manifest, request.output)
    if (done := ArtifactWriter.finished(path, manifest.key)) is not None:
        _check_counters(request, done.manifest.counters)
        return done, True
    about: dict[str, object] = {}
    with measured(about, workspace.device):
        writer = ArtifactWriter(path, manifest)
        writer.begin()
        reports, counters = work.run(writer)
    _check_counters(request, counters)
    details = {**manifest.details, "layers": reports}
    return writer.finish(replace(manifest, details=details, counters=dict(counters), about=about)), False


def _check_counters(request: MitigateRequest, counters: Mapping[str, int]) -> None:
    """Refuse what was not as usual if the user wants that; of an artifact that is reused as of a new one."""
    if request.strict and counters:
        facts = tuple(sorted(counters.items()))
        raise NumericalError("something unusual happened and --strict was given", facts=facts)


def check_scheme(scheme: ModelScheme, subject: Subject) -> TensorScheme:
    """Refuse, before any work, a scheme that does not fit some layer; return that of the weights.

    Raises:
        SchemeError: A group does not divide an input (names the layer), or a KV cache would need all of its tokens
            before the first could be stored.
        UsageError: No weights are to be quantized.
    """
    if scheme.weights is None:
        raise UsageError("the scheme leaves the weights as they are", hint="--weights int4-sym-g128")
    graph = subject.model.graph
    for linear in graph.linears:
        width = graph.width(linear.spec.reads)
        scheme.weights.groups_of(width, layer=linear.name)
        if scheme.activations is not None:
            scheme.activations.groups_of(width, layer=linear.name)
    if scheme.kv is not None:
        scheme.kv.groups_of(graph.dims.head_dim, layer="the KV cache")
        # One dynamic scale for all that attention sees stands in for the static one of engines; two levels do not.
        if subject.plugins.format(scheme.kv.format).global_scale(torch.ones(()), scheme.kv) is not None:
            raise SchemeError(
                "a KV cache grows token by token, so its tokens cannot share a scale",
                facts=(("scheme", scheme.kv),),
                hint="--kv int8-asym-token",
            )
    return scheme.weights


class _Work:
    """One run of mitigate: what to solve, from which activations."""

    def __init__(
        self,
        request: MitigateRequest,
        workspace: Workspace,
        opened: Opened,
        methods: tuple[Configured, ...],
        weights: TensorScheme,
        statistics: Artifact | None,
    ) -> None:
        self.request, self.workspace, self.opened, self.statistics = request, workspace, opened, statistics
        self.configured, self.scheme = methods, weights
        self.model, self.graph = opened.model, opened.model.graph
        self.format = workspace.plugins.format(weights.format)
        bound = [Method(one.method, one.config) for one in methods]
        self.solver = Solver(self.graph, bound, weights, self.format, request.seed, workspace.device)
        self.dtype = compute_dtype(request.dtype, opened.model)
        activations = request.scheme.activations
        self.static = activations is not None and (
            workspace.plugins.format(activations.format).global_scale(torch.ones(()), activations) is not None
        )
        self.needs = tuple(dict.fromkeys((*self.solver.needs, *(("absmax",) if self.static else ()))))
        if self.needs and statistics is None:
            raise UsageError(
                f"`{request.method}` needs statistics, and `{request.source}` has none behind it",
                facts=(("needs", ", ".join(self.needs)),),
                hint="qtool calibrate MODEL, then give its path or --input statistics=PATH",
            )

    def manifest(self) -> Manifest:
        """Return the manifest without tensors."""
        request, inputs = self.request, dict(self.opened.inputs)
        if self.statistics is not None:
            inputs["statistics"] = Workspace.named(self.statistics)
        config = {
            "methods": [one.record() for one in self.configured],
            "scheme": request.scheme.to_json(),
            "propagate": request.propagate if self.needs else "none",
            "true_sequential": request.true_sequential,
            "round_activations": request.round_activations,
            "token_weight": self.token_weight if self.needs else "",
            "seed": request.seed,
            "dtype": dtype_name(self.dtype),
        }
        provider = ", ".join(dict.fromkeys(one.provider for one in self.configured))
        return Manifest(
            kind="quantized",
            step=Step("mitigate", request.method, 1, provider, config),
            inputs=inputs,
            subject=self.model.id,
            family=self.model.family.name,
            schemes=request.scheme.to_json(),
        )

    @property
    def token_weight(self) -> str:
        """The rule in force: the user's, else that of the statistics."""
        gathered = str(self.statistics.manifest.step.config["token_weight"]) if self.statistics else "uniform"
        return str(parse_token_weight(self.request.token_weight or gathered))

    def run(self, writer: ArtifactWriter) -> tuple[dict[str, Mapping[str, float]], Counter[str]]:
        """Solve every block; return reports by linear, and counters."""
        passes = self.needs and self.request.propagate == "quantized"
        solved = self._solve_with_passes(writer) if passes else self._solve_carried(writer)
        reports: dict[str, Mapping[str, float]] = {}
        counters: Counter[str] = Counter()
        for notes in solved:
            reports |= notes["reports"]
            counters.update(notes["counters"])
        return reports, counters

    def _layers(self) -> Iterable[int]:
        """Yield the blocks in order and show how far the work is."""
        layers = range(self.graph.dims.num_layers)
        return self.workspace.progress(layers, total=len(layers), label=f"mitigate {self.request.method}")

    def _solve_carried(self, writer: ArtifactWriter) -> list[dict[str, Any]]:
        """Solve from carried statistics, without a forward pass."""
        carried: Mapping[str, SiteStatistics] = {}
        if self.statistics is not None and self.needs:
            if self.request.token_weight and self.token_weight != self.statistics.manifest.step.config["token_weight"]:
                raise UsageError(
                    "carried statistics keep the token weight that they were gathered with",
                    facts=(("gathered with", self.statistics.manifest.step.config["token_weight"]),),
                    hint=f"qtool calibrate MODEL --token-weight {self.request.token_weight}",
                )
            behind = gathered_behind(self.statistics) is not None
            carried = CarriedStatistics(self.statistics, self.model, Plan() if behind else self.opened.subject.plan)
        notes, estimated = [], set[str]()
        for layer in self._layers():
            if not writer.has(f"layer-{layer}"):
                known = {}
                for site in self.graph.input_sites if carried else ():
                    known[site] = carried[f"layers.{layer}.{site}"]
                    for need in self.needs:
                        known[site].need(need, site=f"layers.{layer}.{site}")
                    estimated |= known[site].estimated & set(self.needs)
                state = self.opened.subject.folded(layer)
                linears = self.solver.solve(self.graph.linears_of(layer), state, known)
                self._write(writer, layer, linears, self._static_scales(layer, known))
            notes.append(self._notes(writer, layer))
        if estimated:
            self.workspace.warn(f"{', '.join(sorted(estimated))} behind rotations: estimated from the sample")
        return notes

    def _solve_with_passes(self, writer: ArtifactWriter) -> list[dict[str, Any]]:
        """Solve from the activations of what is quantized already."""
        if self.statistics is None:
            raise ArtifactError("no statistics")
        windows = self.statistics.tensor(WINDOWS).long()
        scheme = self.request.scheme if self.request.round_activations else ModelScheme()
        subject = replace(self.opened.subject, scheme=replace(scheme, weights=None))
        network = Network(subject, device=self.workspace.device, dtype=self.dtype)
        gathering = Gathering(
            windows.numel(),
            parse_token_weight(self.token_weight),
            self.request.seed,
            self.statistics.manifest.step.config["sample_size"],
            windows.shape[1],
        )
        statistics: dict[str, Statistic] = {n: self.workspace.plugins.load("statistics", n) for n in self.needs}
        batch = self.request.batch or default_batch(self.workspace.device, windows.shape[1])
        stream = Stream(network, windows, batch=batch, spill=writer.parts)
        notes = []
        for layer in self._layers():
            state = subject.folded(layer)
            if not writer.has(f"layer-{layer}"):
                network.load(layer, BlockContent(state))
                self._solve_block(stream, layer, state, statistics, gathering, writer)
            notes.append(self._notes(writer, layer))
            if layer + 1 < self.graph.dims.num_layers:
                self._install(network, layer, state, writer)
                stream.run(layer, keep=True)
            network.drop(layer)
        return notes

    def _solve_block(
        self,
        stream: Stream,
        layer: int,
        state: dict[str, Tensor],
        statistics: Mapping[str, Statistic],
        gathering: Gathering,
        writer: ArtifactWriter,
    ) -> None:
        """Gather and solve one block, in one stage or in four."""
        network, linears = stream.network, self.graph.linears_of(layer)
        stages = [[one for one in linears if one.stage == s] for s in range(len(self.graph.input_sites))]
        solved: dict[str, QuantizedLinear] = {}
        scales: dict[str, Tensor] = {}
        for stage in stages if self.request.true_sequential else [list(linears)]:
            wanted = dict.fromkeys((one.spec.reads for one in stage), statistics)
            with observing(network.sites[layer], layer, wanted, gathering) as observers:
                stream.run(layer, keep=False)
            known = {site: observer.result() for site, observer in observers.items()}
            found = self.solver.solve(stage, state, known)
            scales |= self._static_scales(layer, known)
            self._put(network, stage, found)
            solved |= found
        self._write(writer, layer, solved, scales)

    def _put(self, network: Network, linears: list[LinearSite], solved: Mapping[str, QuantizedLinear]) -> None:
        """Put decoded weights and adapters into a loaded block."""
        for linear in linears:
            target, found = network.linear(linear.layer, linear.spec.module), solved[linear.name]
            target.weight.data = found.weight(self.scheme, self.format).to(target.weight)
            target.adapter = found.adapter

    def _install(self, network: Network, layer: int, state: Mapping[str, Tensor], writer: ArtifactWriter) -> None:
        """Load a finished block as it is going to be executed."""
        tensors, _ = writer.part(f"layer-{layer}")
        linears = self.graph.linears_of(layer)
        found = {
            one.name: read_linear(one.name, self.graph.width(one.spec.reads), tensors, self.scheme, self.format)
            for one in linears
        }
        network.load(layer, BlockContent(state))
        self._put(network, list(linears), found)
        for site, module in network.sites[layer].items():
            name = f"layers.{layer}.{site}{INPUT_GLOBAL_SCALE}"
            if module.rounding is not None and name in tensors:
                module.rounding = replace(module.rounding, global_scale=tensors[name].to(self.workspace.device))

    def _static_scales(self, layer: int, known: Mapping[str, SiteStatistics]) -> dict[str, Tensor]:
        """Return the calibrated tensor-level multipliers of a block's activations."""
        activations = self.request.scheme.activations
        if not self.static or activations is None:
            return {}
        fmt = self.workspace.plugins.format(activations.format)
        scales = {}
        for site, statistics in known.items():
            scale = fmt.global_scale(statistics.need("absmax", site=site).amax().float(), activations)
            if scale is not None:
                scales[f"layers.{layer}.{site}{INPUT_GLOBAL_SCALE}"] = scale
        return scales

    def _write(
        self,
        writer: ArtifactWriter,
        layer: int,
        linears: Mapping[str, QuantizedLinear],
        scales: Mapping[str, Tensor],
    ) -> None:
        """Finish a block's part."""
        tensors = dict(scales)
        counters: Counter[str] = Counter()
        for name, linear in linears.items():
            tensors |= linear_tensors(name, linear, self.scheme, self.format)
            counters.update(linear.counters)
        reports = {name: dict(linear.report) for name, linear in linears.items()}
        notes = json.dumps({"reports": reports, "counters": {k: v for k, v in counters.items() if v}})
        writer.add(f"layer-{layer}", tensors, {"notes": notes})

    def _notes(self, writer: ArtifactWriter, layer: int) -> dict[str, Any]:
        notes: dict[str, Any] = json.loads(writer.part(f"layer-{layer}")[1]["notes"])
        return notes
