"""mitigate: weights become codes, block by block, while the error is compensated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qtool.artifacts.manifest import Manifest, Step, require_kind
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.engine.block import BlockSolver, SolvedBlock, needs_of, static_inputs
from qtool.engine.carry import CarriedStatistics
from qtool.engine.embedding import install_embedding, solve_embedding
from qtool.engine.gather import AnyStatistic, Gathering, sites_to_observe
from qtool.engine.network import Network
from qtool.engine.propagate import Propagation, compares_inputs
from qtool.engine.saliency import SALIENCY
from qtool.engine.solve import Method, Solver
from qtool.engine.stream import Stream, default_batch
from qtool.engine.whole_model import WHOLE, WholeModel
from qtool.errors import ArtifactError, UsageError
from qtool.model.graph import LinearSite
from qtool.model.plan import Plan
from qtool.model.statistics import HESSIAN, SiteStatistics
from qtool.numerics.token_weights import parse_token_weight
from qtool.scheme import ModelScheme
from qtool.steps.calibrate import EXPERT_TOKENS, WINDOWS, experts_mode
from qtool.steps.demand import known_of, told_in
from qtool.steps.options import Configured, configure
from qtool.steps.saliency import default_token_weight, saliencies_of
from qtool.steps.schemes import check_scheme, warn_of_another_scheme
from qtool.steps.solved import Found, check_counters, check_head, check_order, check_passes, checked_share
from qtool.steps.subjects import Opened, compute_dtype, dtype_name, open_subject
from qtool.steps.token_weights import GRADIENT, token_weight_of
from qtool.steps.transform import gathered_behind, statistics_of
from qtool.steps.workspace import Workspace, measured

Solve = Callable[[LinearSite, Mapping[str, Tensor]], SolvedBlock]
"""Solves a linear from its float weight by full name."""
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
        true_sequential: Four passes a block, so that each linear sees the quantized ones before it in its block; None
            for where a method compares the inputs of linears with those in full precision.
        round_activations: Whether the activations that are propagated are quantized as the scheme says, and moments are
            of them; None for where a method does better so (measured in ``recipes/README.md``).
        token_weight: Rule for the weight of a token in the Hessian; empty is the best that there are statistics for
            (``default_token_weight``).
        experts: Which tokens an expert's statistics are of: ``all``, or those ``routed`` to it; empty takes the choice
            of the statistics.
        expert_share: With ``routed``, the part of the tokens of even routing below which an expert's statistics are
            shrunk toward shared ones; None for a default.
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
    true_sequential: bool | None = None
    round_activations: bool | None = None
    token_weight: str = ""
    experts: str = ""
    expert_share: float | None = None
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
        UsageError: Unknown method or option, no method that rounds, or statistics are needed and missing.
        SchemeError: The scheme does not fit a layer; raised before any work.
        NumericalError: Weights or activations are not finite, or a problem cannot be solved.
    """
    if request.propagate not in PROPAGATE:
        raise UsageError(f"unknown propagation `{request.propagate}`", facts=(("known", ", ".join(PROPAGATE)),))
    if request.token_weight:
        parse_token_weight(request.token_weight)
    methods = configure("mitigators", request.method, request.settings, workspace.plugins)
    check_order(methods, request.method, workspace.plugins)
    opened = open_subject(request.source, workspace)
    if opened.subject.quantized is not None:
        raise ArtifactError(
            f"`{request.source}` is quantized already",
            facts=(("expected", "plan or statistics"), ("received", "quantized")),
            hint="give the plan or the statistics it was made from",
        )
    if opened.artifact is not None:
        require_kind(opened.artifact.manifest, "plan", "statistics", path=request.source)
    check_scheme(request.scheme, opened.subject)
    statistics = statistics_of(opened, workspace)
    if opened.artifact is not None and opened.artifact.manifest.kind == "plan":
        warn_of_another_scheme(opened.artifact, request.scheme, workspace)
    work = _Work(request, workspace, opened, methods, statistics)
    manifest = work.manifest()
    path = workspace.output(manifest, request.output)
    if (done := ArtifactWriter.finished(path, manifest.key)) is not None:
        check_counters(done.manifest.counters, strict=request.strict)
        return done, True
    about: dict[str, object] = {}
    writer = ArtifactWriter(path, manifest)
    with writer.working():
        with measured(about, workspace.device):
            found = work.run(writer)
        if not (request.strict and found.counters):
            details = {**manifest.details, **found.details}
            artifact = writer.finish(replace(manifest, details=details, counters=dict(found.counters), about=about))
    check_counters(found.counters, strict=request.strict)
    if found.counters:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(found.counters.items()))
        workspace.warn(f"not as usual: {counted}")
    return artifact, False


class _Work:
    """One run of mitigate: what to solve, from which activations."""

    def __init__(
        self,
        request: MitigateRequest,
        workspace: Workspace,
        opened: Opened,
        methods: tuple[Configured, ...],
        statistics: Artifact | None,
    ) -> None:
        self.request, self.workspace, self.opened, self.statistics = request, workspace, opened, statistics
        self.configured = methods
        self.model, self.graph = opened.model, opened.model.graph
        bound = [Method(one.method, one.config) for one in methods]
        subject = replace(opened.subject, scheme=request.scheme)
        self.head = subject.head
        self.embedding = next((one for one in subject.coded_ends if one is not self.head), None)
        solver = Solver(self.graph, bound, subject.weight_grid, request.seed, workspace.device, subject.kept)
        self.dtype = compute_dtype(request.dtype, opened.model)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        gathered = str(statistics.manifest.step.config.get("experts", "")) if statistics else ""
        weight = token_weight_of(self.token_weight, self.graph)
        mode = experts_mode(request.experts or gathered, self.graph, weight)
        inputs = static_inputs(subject)
        self.needs = needs_of(bound, inputs)
        if self.head is not None:
            check_head(self.head, methods, request.propagate, self.needs)
        load = partial(workspace.plugins.load, "statistics")
        self.compares_inputs = compares_inputs({name: load(name) for name in self.needs})
        self.whole = bound[-1] if bound[-1].of_model else None
        self.compares = self.compares_inputs or self.whole is not None or any(method.of_block for method in bound)
        self.looks = bool(self.needs) or self.compares
        self.propagates = request.propagate if self.looks else "none"
        of_text = None if statistics is None else statistics.manifest
        self.known = known_of(self.needs, self.propagates, of_text, subject)
        self.saliencies = saliencies_of(statistics, opened, self.known, weight, self.propagates)
        self.gathered: dict[str, AnyStatistic] = {name: load(name) for name in self.known}
        self.experts = mode if self.looks else ""
        self.block = BlockSolver(solver, inputs, self.experts or "all", checked_share(request.expert_share, mode))
        if self.looks and statistics is None:
            raise UsageError(
                f"`{request.method}` needs statistics, and `{request.source}` has none behind it",
                facts=(("needs", ", ".join(self.needs) or "the text"),),
                hint="qtool calibrate MODEL, then give its path or --input statistics=PATH",
            )
        if self.compares:
            self._check_comparison()
        check_passes(subject, request.propagate, self.experts)

    def _check_comparison(self) -> None:
        """Refuse what excludes a second stream in full precision.

        Raises:
            UsageError: Without passes there is no such stream, and routed experts see other tokens in it.
        """
        request = self.request
        reason = {
            request.propagate == "none": ("which takes passes over the text", "--propagate quantized"),
            self.experts == "routed": ("and routed experts see other tokens there", "--experts all"),
            self.whole is not None and not self.rounds: ("as the model is executed", "--round-activations"),
        }.get(True)
        if reason is not None:
            raise UsageError(f"`{request.method}` compares with full precision, {reason[0]}", hint=reason[1])

    @property
    def true_sequential(self) -> bool:
        """Whether linears see the quantized ones before them in their block."""
        given = self.request.true_sequential
        return self.compares_inputs if given is None else given

    @property
    def rounds(self) -> bool:
        """Whether the activations that are propagated are rounded."""
        given = self.request.round_activations
        return any(method.rounded_inputs for method in self.block.solver.methods) if given is None else given

    def manifest(self) -> Manifest:
        """Return the manifest without tensors."""
        request, inputs = self.request, dict(self.opened.inputs)
        if self.statistics is not None:
            inputs["statistics"] = Workspace.named(self.statistics)
        config = {
            "methods": [one.record() for one in self.configured],
            "scheme": request.scheme.to_json(),
            "propagate": self.propagates,
            "true_sequential": self.true_sequential,
            "round_activations": self.rounds,
            "token_weight": self.token_weight if self.looks else "",
            "seed": request.seed,
            "dtype": dtype_name(self.dtype),
            **({"experts": self.experts} if self.experts else {}),
            **({"expert_share": self.block.share} if self.experts == "routed" else {}),
        }
        provider = ", ".join(dict.fromkeys(one.provider for one in self.configured))
        return Manifest(
            kind="quantized",
            step=Step("mitigate", request.method, 2, provider, config),
            inputs=inputs,
            subject=self.model.id,
            family=self.model.family.name,
            schemes=request.scheme.to_json(),
        )

    @property
    def token_weight(self) -> str:
        """The rule in force: the user's, else the best for solvers, or that of carried statistics."""
        usual = default_token_weight(self.statistics, self.opened, self.request.propagate)
        chosen = self.request.token_weight or usual
        return str(parse_token_weight(chosen))

    def run(self, writer: ArtifactWriter) -> Found:
        """Solve every block; return what there is to say of them."""
        rounded = self._solve_end(writer, self.embedding, self._round_embedding)
        solved = self._solve_carried(writer) if self.propagates == "none" else self._solve_with_passes(writer)
        found = Found.of([*solved, *rounded], self._notes(writer, WHOLE) if self.whole is not None else {})
        of_text = None if self.statistics is None else self.statistics.manifest
        return replace(found, losses=told_in(self.known, self.propagates, of_text, self.token_weight))

    def _layers(self) -> Iterable[int]:
        """Yield the blocks in order and show how far the work is."""
        layers = range(self.graph.dims.num_layers)
        return self.workspace.progress(layers, total=len(layers), label=f"mitigate {self.request.method}")

    def _solve_carried(self, writer: ArtifactWriter) -> list[dict[str, Any]]:
        """Solve from carried statistics, without a forward pass."""
        carried: Mapping[str, SiteStatistics] = {}
        if self.statistics is not None and self.known:
            if self.needs:
                self._check_carried(self.statistics.manifest.step.config)
            plan = self.opened.subject.plan if gathered_behind(self.statistics.manifest) is None else Plan()
            carried = CarriedStatistics(self.statistics, self.model, plan, moments=self.known)
        notes, estimated = [], set[str]()
        for layer in self._layers():
            if not writer.has(f"layer-{layer}"):
                linears = self.block.solver.linears_of(layer)
                known: dict[str, SiteStatistics] = {}
                for site in sites_to_observe(linears, self.block.experts) if carried else ():
                    known[site] = carried[f"layers.{layer}.{site}"]
                    estimated |= known[site].estimated & set(self.needs)
                folded, solved = self.opened.subject.folded(layer, self.wide), SolvedBlock()
                self.block.solve(linears, folded, known, solved, self._carried_tokens(layer))
                self._write(writer, layer, solved)
            notes.append(self._notes(writer, f"layer-{layer}"))
        notes += self._solve_end(writer, self.head, lambda head, state: self.block.solve_head(head, state, {}))
        if estimated:
            self.workspace.warn(f"{', '.join(sorted(estimated))} behind rotations: estimated from the sample")
        return notes

    def _check_carried(self, config: Mapping[str, Any]) -> None:
        """Refuse to carry statistics that were gathered otherwise than the user asks."""
        for name, inside, given, used in (
            ("token-weight", "token weight", self.request.token_weight, self.token_weight),
            ("experts", "choice of tokens for experts", self.request.experts, self.experts),
        ):
            gathered = config.get(name.replace("-", "_"), "")
            if given and used != gathered:
                more = f" --gather {','.join(sorted({*config['gather'], SALIENCY}))}" if GRADIENT in given else ""
                raise UsageError(
                    f"carried statistics keep the {inside} that they were gathered with",
                    facts=(("gathered with", gathered),),
                    hint=f"qtool calibrate MODEL --{name} {given}{more}",
                )

    def _carried_tokens(self, layer: int) -> Tensor | None:
        """Return how many tokens each expert of a block was sent when the statistics were gathered."""
        name = f"layers.{layer}.{EXPERT_TOKENS}"
        known = self.needs and self.statistics is not None and name in self.statistics.header.slots
        return self.statistics.tensor(name) if known and self.statistics is not None else None

    def _solve_with_passes(self, writer: ArtifactWriter) -> list[dict[str, Any]]:
        """Solve from the activations of what is quantized already."""
        work, subject = self._propagation(writer), self.opened.subject
        notes = []
        for layer in self._layers():
            state = subject.folded(layer, self.wide)
            if writer.has(f"layer-{layer}"):
                work.skip(layer, state)
            else:
                self._write(writer, layer, work.solve(layer, state))
            notes.append(self._notes(writer, f"layer-{layer}"))
            if layer + 1 < self.graph.dims.num_layers or self.head is not None:
                work.advance(layer, state, writer.part(f"layer-{layer}")[0])
            work.network.drop(layer)
        notes += self._solve_end(writer, self.head, work.solve_head)
        if self.whole is not None and not writer.has(WHOLE):
            layers = range(self.graph.dims.num_layers)
            model = WholeModel(work, lambda i: (subject.folded(i, self.wide), writer.part(f"layer-{i}")[0]), layers)
            tensors, report = model.tune(self.whole, self.request.seed, self.workspace.progress)
            hessian = self.workspace.plugins.load("statistics", HESSIAN)
            losses = model.losses(tensors, hessian, self.workspace.progress)
            writer.add(WHOLE, tensors, {"notes": json.dumps({"model": report, "reports": losses})})
        return notes

    def _solve_end(self, writer: ArtifactWriter, end: LinearSite | None, solve: Solve) -> list[dict[str, Any]]:
        """Solve what is quantized outside of the blocks, if it is; return what there is to say of it."""
        if end is None:
            return []
        if not writer.has(f"layer-{end.layer}"):
            name = f"{end.name}.weight"
            state = {name: self.opened.subject.ends(self.wide)[name]}
            self._write(writer, end.layer, solve(end, state))
        return [self._notes(writer, f"layer-{end.layer}")]

    def _round_embedding(self, embedding: LinearSite, state: Mapping[str, Tensor]) -> SolvedBlock:
        weight = state[f"{embedding.name}.weight"].to(self.workspace.device, torch.float32)
        return solve_embedding(embedding, weight, self.block.solver.grid_of(embedding))

    def _propagation(self, writer: ArtifactWriter) -> Propagation:
        """Return the streams in front of the first block, and what solves the blocks."""
        if self.statistics is None:
            raise ArtifactError("no statistics")
        windows = self.statistics.tensor(WINDOWS).long()
        executed = replace(self.opened.subject, scheme=self.request.scheme)
        propagated = executed if self.rounds else replace(executed, scheme=ModelScheme())
        network = Network(propagated, device=self.workspace.device, dtype=self.dtype, observed=self.block.experts)
        gathering = Gathering(
            windows.numel(),
            parse_token_weight(self.token_weight),
            self.request.seed,
            self.statistics.manifest.step.config["sample_size"],
            windows.shape[1],
            self.saliencies,
        )
        batch = self.request.batch or default_batch(self.workspace.device, windows.shape[1])
        exact = Stream(network, windows, batch=batch, spill=writer.parts) if self.compares else None
        if self.embedding is not None:
            tensors = writer.part(f"layer-{self.embedding.layer}")[0]
            install_embedding(network, self.embedding, tensors, self.block.solver.grid_of(self.embedding))
        return Propagation(
            self.block,
            executed,
            Stream(network, windows, batch=batch, spill=writer.parts),
            exact,
            self.gathered,
            gathering,
            self.true_sequential,
        )

    def _write(self, writer: ArtifactWriter, layer: int, block: SolvedBlock) -> None:
        """Finish a block's part."""
        tensors, notes = self.block.stored(block)
        writer.add(f"layer-{layer}", tensors, {"notes": json.dumps(notes)})

    def _notes(self, writer: ArtifactWriter, part: str) -> dict[str, Any]:
        notes: dict[str, Any] = json.loads(writer.part(part)[1]["notes"])
        return notes
