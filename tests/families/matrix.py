"""What is exact on which family, as a table: ``python -m tests.families.matrix`` writes ``recipes/families.md``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import ModelError, UsageError
from qtool.model.family import Family
from qtool.model.graph import RESIDUAL, ModelGraph, Site
from qtool.model.plan import Plan, Proposal
from qtool.model.source import read_dimensions
from qtool.numerics.operators import Diag, Hadamard, Operator, Perm
from qtool.plugins import Plugins
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing import family_configs, save_tiny_model

PATH = Path(__file__).parents[2] / "recipes" / "families.md"
SCHEMES = (("", "int4-sfp16"), ("FP8_DYNAMIC", ""))
HEADER = ("family", "model types", "norm fold", "R1", "R2", "R3", "R4", "scales", "orders", "MoE", "export")
INTRODUCTION = """# Families

What qtool's planner and exporters say of every family that comes with it. Written by
`python -m tests.families.matrix`, and compared with what they say whenever the tests run.

- *norm fold*: the weights of norms move into the linears behind them.
- *R1* rotates the residual, *R2* value heads; both are folded. *R3* rotates queries and keys behind the rotary
  positions, *R4* the inputs of down projections; both run in the forward pass.
- *scales*: sites where a diagonal is folded into what lies in front; at `qk_pre`, in front of the rotary positions,
  one that treats the channels alike that turn together.
- *orders*: sites where a permutation of channels is folded.
- *MoE*: routers and gates stay in full precision and are transformed with what they read.
- *export*: exporters that hold the family's weights, in INT4 or FP8 by row, without operators in the forward pass.
  `gguf` and `gguf-f16`, which want the tokenizer as well, hold Llama, Mistral, Qwen2, Qwen3 and Gemma 1 to 3 (text).

"""


def text() -> str:
    """Return the whole page."""
    plugins = Plugins.discover()
    ours = {name for name, offer in plugins.offers["families"].items() if offer.entry.target.startswith("qtool.")}
    families: list[Family] = [plugins.load("families", name) for name in sorted(ours)]
    rows = [HEADER, tuple("---" for _ in HEADER), *(row(family, plugins) for family in families)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    notes = "".join(f"- `{family.name}`: {family.note}\n" for family in families if family.note)
    return f"{INTRODUCTION}{table}\n## Notes\n\n{notes}"


def row(family: Family, plugins: Plugins) -> tuple[str, ...]:
    """Return the cells of one family."""
    config = next(family_configs(family))
    graph = ModelGraph(family, read_dimensions(config, family))
    norms = [site for site in _sites(graph) if site.name in family.norms and family.norms[site.name] is not None]
    return (
        family.name,
        ", ".join(family.model_types),
        "yes" if norms else "final norm only",
        _said(graph, [graph.site(RESIDUAL)], _rotation),
        _said(graph, _of_kind(graph, "vo"), _rotation),
        _said(graph, _of_kind(graph, "qk_post"), _rotation),
        _said(graph, _of_kind(graph, "up_down"), _rotation),
        *(_folded(graph, make) for make in (_scale, _order)),
        _experts(family),
        ", ".join(_exporters(family, config, plugins)),
    )


def _rotation(site: Site) -> Operator:
    return Hadamard(site.dim)


def _scale(site: Site) -> Operator:
    return Diag(torch.ones(site.dim))


def _order(site: Site) -> Operator:
    return Perm(torch.arange(site.dim))


def _folded(graph: ModelGraph, make: Callable[[Site], Operator]) -> str:
    """Return the kinds of sites where an operator is folded."""
    return ", ".join(dict.fromkeys(site.kind for site in _sites(graph) if _said(graph, [site], make) == "folded"))


def _said(graph: ModelGraph, sites: list[Site], make: Callable[[Site], Operator]) -> str:
    """Return what the planner does with an operator at these sites."""
    if not sites:
        return "no site"
    try:
        plan = extend(Plan(), Proposal({site.id: [make(site)] for site in sites}), graph, method="matrix")
    except UsageError:
        return "refused"
    folded = {plan.at(site.id).folded for site in sites}
    return {frozenset({0}): "online", frozenset({1}): "folded"}.get(frozenset(folded), "partly folded")


def _sites(graph: ModelGraph) -> list[Site]:
    return list(graph.sites.values())


def _of_kind(graph: ModelGraph, kind: str) -> list[Site]:
    return [site for site in _sites(graph) if site.kind == kind]


def _experts(family: Family) -> str:
    if family.experts is None:
        return "–"
    shared = any(linear.reads.startswith("shared.") for linear in family.linears)
    layout = "stored as one tensor" if family.experts.stacked else "stored one by one"
    return f"routed{' and shared' if shared else ''}, {layout}"


def _exporters(family: Family, config: PreTrainedConfig, plugins: Plugins) -> list[str]:
    """Return the exporters that do not refuse a quantized model of the family."""
    with tempfile.TemporaryDirectory() as root:
        save_tiny_model(Path(root) / "model", config, loader=family.loader)
        workspace = Workspace(plugins, Path(root) / "home", Path(root) / "cache")
        workspace.home.mkdir()
        found: set[str] = set()
        for preset, weights in SCHEMES:
            scheme = read_scheme(preset, {"weights": weights}, plugins)
            made, _ = mitigate(MitigateRequest(str(Path(root) / "model"), "rtn", scheme), workspace)
            subject = open_subject(str(made.path), workspace).subject
            found |= {name for name in plugins.offers["exporters"] if _holds(plugins, name, subject)}
        return sorted(found)


def _holds(plugins: Plugins, exporter: str, subject: Subject) -> bool:
    try:
        plugins.load("exporters", exporter).check(subject)
    except (UsageError, ModelError):
        return False
    return True


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
