"""The check of families: the whole contract, from the description's names to greedy generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.errors import QtoolError
from qtool.hookspecs import Entry
from qtool.model.family import Family
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Plan
from qtool.plugins import Offer, Plugins, Provider
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.parameters import parameters_of, require_known
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.testing.promise import EXACT, CheckError
from qtool.testing.random_operators import apart, check_refusals, everything
from qtool.testing.tiny_models import (
    TinyModel,
    double_precision,
    exact_logits,
    random_windows,
    tiny_config,
    tiny_model_of,
)

PACKED = 0.03
"""Largest change of all logits together, relative to them, that weights rounded to bfloat16 may make."""
GENERATED = 32
"""Tokens that a transformed model must continue like the original."""


def check_family(family: Family, config: Any = None) -> None:  # noqa: ANN401 - each family has its own config class
    """Check the description of a family on tiny random models of its own config class.

    Every parameter is described; linears and norms have the sizes of their sites; blocks compute what transformers
    computes; norms fold; each kind of operator that a site claims, folded or online, leaves the logits as they are, to
    1e-9 in float64, and the planner refuses the others. Then a model is transformed, quantized, packed and loaded
    again; and transformed in float32, it continues a text as the original does.

    Args:
        family: The description.
        config: A small config to make the model of; None for those of ``family_configs``.

    Raises:
        CheckError: A promise is broken; names the config and the first thing that is wrong.
    """
    for one in family_configs(family) if config is None else (config,):
        label = f"{family.name}, {one.model_type}, {'tied' if one.tie_word_embeddings else 'untied'} head"
        try:
            with tiny_model_of(one, _plugins_with(family), loader=family.loader, gather=("hessian",)) as tiny:
                _check(tiny, label)
        except QtoolError as error:
            facts = "; ".join(f"{name}: {value}" for name, value in error.facts)
            raise CheckError(f"{error.message} ({label}; {facts})") from error


def family_configs(family: Family) -> Iterator[Any]:
    """Yield the small configs that a family is checked on: its model types and variants, the first with both heads."""
    for index, (model_type, changes) in enumerate(product(family.model_types, family.tiny)):
        for tied in (False, True) if index == 0 else (False,):
            yield tiny_config(model_type, **{"tie_word_embeddings": tied, **changes})


def _check(tiny: TinyModel, label: str) -> None:
    subject = tiny.subject
    graph = subject.model.graph
    require_known(parameters_of(subject.model), subject.model)
    check_refusals(graph, label)
    with double_precision():
        expected = _logits(_loaded(tiny.path, graph.family, torch.float64))
        logits = exact_logits(subject)
        difference = _difference(expected, logits)
        _require_exact(difference, f"a block does not compute what transformers computes ({label})")
        _check_operators(subject, logits, label)
    _check_writers(subject, label)
    rotated = "orthogonal" in graph.site(RESIDUAL).foldable
    request = TransformRequest(str(tiny.statistics.path), "quarot", {} if rotated else {"r1": "false"})
    plan = str(transform(request, tiny.workspace)[0].path)
    scheme = ModelScheme(weights=parse_tensor_scheme("int4", tiny.workspace.plugins.format))
    made = [mitigate(MitigateRequest(plan, method, scheme), tiny.workspace)[0] for method in ("rtn", "gptq")]
    _check_packing(tiny, str(made[-1].path), label)
    _check_generation(open_subject(plan, tiny.workspace).subject, tiny, label)


def _check_operators(subject: Subject, logits: Tensor, label: str) -> None:
    """Check that folding norms, and every operator wherever it is claimed to be exact, changes nothing."""
    graph = subject.model.graph

    def change(plan: Plan) -> float:
        return _difference(logits, exact_logits(replace(subject, plan=plan)))

    for residual in (False, True):
        if change(everything(graph, residual=residual)) < EXACT:
            continue
        _require_exact(change(Plan(fold_norms=True)), f"folding norms is not exact ({label})")
        for site, plan, kinds in apart(graph):
            if not change(plan) < EXACT:
                for kind, one in kinds:
                    _require_exact(change(one), f"`{kind}` at `{site}` is not exact ({label})")
        raise CheckError(f"every operator is exact by itself, and all together are not ({label})")


def _check_writers(subject: Subject, label: str) -> None:
    """Check that what other modules write into the residual is transformed as it is; text alone does not reach them."""
    plan = everything(subject.model.graph, residual=True)
    ends = replace(subject, plan=plan).ends()
    for writer in subject.model.family.writers:
        weight, bias = f"{writer}.weight", f"{writer}.bias"
        stored, has_bias = subject.stored(weight).double(), subject.model.has(bias)
        inputs = torch.randn(4, stored.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        written = linear(inputs, stored, subject.stored(bias).double() if has_bias else None)
        for operator in plan.at(RESIDUAL).operators:
            written = operator.act(written)
        received = linear(inputs, ends[weight], ends[bias] if has_bias else None)
        _require_exact(_difference(written, received), f"`{writer}` does not write the transformed residual ({label})")


def _check_packing(tiny: TinyModel, quantized: str, label: str) -> None:
    """Check that a quantized model, packed, is loaded again by transformers as the model that was quantized."""
    checkpoint, _ = pack(PackRequest(quantized, "hf"), tiny.workspace)
    subject = open_subject(quantized, tiny.workspace).subject
    with double_precision():
        ours = exact_logits(subject)
        theirs = _logits(_loaded(checkpoint.path, subject.model.family, torch.float64))
    apart, size = ((ours - theirs).norm(dim=-1).flatten(), ours.norm(dim=-1).flatten())
    # Rounded to 16 bits, a token may be routed to another expert.
    kept = apart.argsort()[: len(apart) - (len(apart) // 10 if subject.model.graph.dims.experts else 0)]
    change = float(apart[kept].norm() / size[kept].norm())
    if not change < PACKED:
        raise CheckError(f"the packed model is not the quantized one: relative difference {change:.2e} ({label})")


def _check_generation(subject: Subject, tiny: TinyModel, label: str) -> None:
    """Check that a transformed model continues a text greedily as the original does, in float32."""
    whole = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32).whole()
    original = _continued(_loaded(tiny.path, subject.model.family, torch.float32))
    transformed = _continued(whole)
    if not torch.equal(original, transformed):
        same = int((original == transformed).cumprod(-1).sum(-1).min())
        raise CheckError(f"the transformed model continues a text differently after {same} tokens ({label})")


def _continued(model: nn.Module) -> Tensor:
    prompt = random_windows(tokens=8)
    amount = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
    generated: Tensor = model.generate(prompt, do_sample=False, pad_token_id=0, **amount)  # type: ignore[operator]
    return generated[:, prompt.shape[1] :]


def _loaded(path: Path, family: Family, dtype: torch.dtype) -> nn.Module:
    """Load a tiny model, or one that was packed, as transformers does; its fast experts know no float64."""
    options = {} if family.experts is None else {"experts_implementation": "eager"}
    loader = getattr(transformers, family.loader)
    model, info = loader.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True, **options
    )
    wrong = {what: names for what, names in info.items() if names}
    if wrong:
        raise CheckError(f"transformers does not load all of `{path.name}`: {wrong}")
    found: nn.Module = model.eval()
    return found


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=random_windows(), use_cache=False).logits
    return logits


def _difference(expected: Tensor, received: Tensor) -> float:
    return float((received - expected).abs().max() / expected.abs().max())


def _require_exact(difference: float, sentence: str) -> None:
    if not difference < EXACT:
        raise CheckError(f"{sentence}: relative difference {difference:.2e}, allowed {EXACT:.0e}")


def _plugins_with(family: Family) -> Plugins:
    """Return everything that is installed, with this family as the only one."""
    found = Plugins.discover()
    offer = Offer(Entry(family.name, "", ""), Provider("qtool", ""))
    instances = {("families", family.name): family}
    return replace(found, offers={**found.offers, "families": {family.name: offer}}, _instances=instances)
