"""Which of some schemes has the least error at each linear: what LLM-FP4 calls its search over formats.

The 4-bit floats have one size and differ in what they are good at: E3M0 in range, E1M2 in even steps, E2M1 is between
them. LLM-FP4 (Liu et al. 2023, arXiv:2310.16836) takes for each layer the one at which its output has the least error,
with weights and inputs looked at one after the other. The answer is a scheme with exceptions, as it is written on the
command line, so that nothing but rules by name has to know of it.

An error is squared and relative to the output: of inputs over the sampled tokens and all linears that read them, of
weights as rounding to nearest on the whole range leaves it. More bits have less error: compare those of one size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.engine.carry import CarriedStatistics
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.problem import LayerProblem, Mitigator
from qtool.engine.static_scales import calibrated_scales, extremes_of, sum_of_squares
from qtool.errors import UsageError
from qtool.model.graph import LinearSite
from qtool.model.plan import Plan
from qtool.model.statistics import SiteStatistics
from qtool.numerics.clipping import quadratic_energy
from qtool.numerics.losses import loss_ratio
from qtool.scheme import VECTORS, TensorScheme
from qtool.scheme_parts import RuledPart, check_part
from qtool.steps.description import Cell, Facts, Table, Tables
from qtool.steps.schemes import read_part
from qtool.steps.subjects import Opened
from qtool.steps.transform import gathered_behind, statistics_of
from qtool.steps.workspace import Workspace

Candidates = Mapping[RuledPart, Sequence[TensorScheme]]


def describe_choice(
    opened: Opened, workspace: Workspace, weights: Sequence[str], activations: Sequence[str]
) -> tuple[Facts, Tables]:
    """Return the error of each linear in each scheme, and the schemes with the least as a part with exceptions.

    Args:
        opened: Statistics, or a plan behind which they are carried.
        workspace: Where formats are found, and where the mathematics runs.
        weights: Written schemes of weights.
        activations: Written schemes of activations.

    Raises:
        SchemeError: One cannot be read, or does not fit a linear.
        UsageError: There are no statistics.
        ArtifactError: They lack what is asked of them.
    """
    statistics = statistics_of(opened, workspace)
    if statistics is None:
        raise UsageError("errors are measured on statistics", hint="qtool calibrate MODEL, then inspect what it gives")
    candidates: Candidates = {
        "weights": [_read("weights", text, workspace) for text in weights],
        "activations": [_read("activations", text, workspace) for text in activations],
    }
    rows = _rows(opened, statistics, candidates, workspace)
    facts: Facts = {}
    tables: Tables = {}
    for part, schemes in candidates.items():
        if schemes:
            columns = ("linear", *(str(scheme) for scheme in schemes), "least")
            best = {name: min(range(len(errors)), key=errors.__getitem__) for name, errors in rows[part].items()}
            facts[f"least_{part}"] = _written({name: schemes[one] for name, one in best.items()})
            cells: list[tuple[Cell, ...]] = [
                (name, *errors, str(schemes[best[name]])) for name, errors in rows[part].items()
            ]
            tables[f"errors_of_{part}"] = Table(columns, cells)
    return facts, tables


def _read(part: RuledPart, text: str, workspace: Workspace) -> TensorScheme:
    scheme = read_part(part, text, workspace.plugins)
    check_part(part, scheme, VECTORS[part])
    return scheme


def _rows(
    opened: Opened, statistics: Artifact, candidates: Candidates, workspace: Workspace
) -> Mapping[RuledPart, dict[str, list[float]]]:
    """Return for each part the errors of each linear, a scheme each, by name; experts without tokens are left out."""
    graph, subject, device = opened.model.graph, opened.subject, workspace.device
    behind = gathered_behind(statistics.manifest) is not None
    carried = CarriedStatistics(statistics, opened.model, Plan() if behind else subject.plan)
    rows: dict[RuledPart, dict[str, list[float]]] = {"weights": {}, "activations": {}}
    layers = range(graph.dims.num_layers)
    for layer in workspace.progress(layers, total=len(layers), label="inspect"):
        state = subject.folded(layer)
        sites: defaultdict[str, list[LinearSite]] = defaultdict(list)
        for linear in graph.linears_of(layer):
            sites[linear.reads].append(linear)
        for site, linears in sites.items():
            known = carried[site]
            if not known.entries:
                continue
            held = {linear.name: state[f"{linear.spec.module}.weight"].to(device).float() for linear in linears}
            errors = [_input_error(scheme, known, site, held, workspace) for scheme in candidates["activations"]]
            rows["activations"] |= dict.fromkeys(held, errors) if errors else {}
            for name, weight in held.items() if candidates["weights"] else ():
                hessian = known.need("hessian", site=site).to(device).float()
                rows["weights"][name] = [
                    _weight_error(LayerProblem(name, weight, _grid_of(one, workspace), hessian), workspace)
                    for one in candidates["weights"]
                ]
    return rows


def _input_error(
    scheme: TensorScheme, known: SiteStatistics, site: str, held: Mapping[str, Tensor], workspace: Workspace
) -> float:
    """Return the error in the outputs of all that read an input, in units of the outputs."""
    sample: Float[Tensor, "tokens n"] = known.need("sample", site=site).to(workspace.device).float()
    grid, weights = _grid_of(scheme, workspace), list(held.values())
    extremes = extremes_of(grid, known, site=site).to(workspace.device)
    grid.check(sample.shape[1], layer=site)
    scales, zeros = calibrated_scales(grid, extremes, sample, weights)
    rounded = Rounding(grid, scales, zero_points=zeros)(sample)
    moments = sum_of_squares(weights).unsqueeze(0)
    error, signal = (float(quadratic_energy(values, moments).double().sum()) for values in (rounded - sample, sample))
    return loss_ratio(error, signal)


def _weight_error(problem: LayerProblem, workspace: Workspace) -> float:
    """Return the error in a linear's output that rounding its weight to nearest makes, in units of the output."""
    nearest = workspace.plugins.load("mitigators", "rtn")
    if not isinstance(nearest, Mitigator):
        raise TypeError(nearest)
    return float(nearest.quantize(problem, nearest.Config()).report["loss"])


def _grid_of(scheme: TensorScheme, workspace: Workspace) -> Grid:
    return Grid.of(scheme, workspace.plugins.format(scheme.format))


def _written(best: Mapping[str, TensorScheme]) -> str:
    """Return a scheme for each linear as it is written: that of most, and the others as exceptions."""
    most = Counter(best.values()).most_common(1)[0][0]
    return ",".join([str(most), *(f"{name}={scheme}" for name, scheme in best.items() if scheme != most)])
