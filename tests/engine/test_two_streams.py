"""What methods are told of both streams is what two whole runs of the model show; every block goes on from there."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.builtin.mitigators.rtn import round_nearest
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.errors import UsageError
from qtool.plugins import Plugins
from qtool.steps import mitigate as step
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.options import Configured
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.testing import TinyModel, tiny_model

ENTRIES = ("hessian", "cross", "full_hessian", "held_out")
WINDOWS, TOKENS = 6, 32
Moments = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, TinyModel]]:
    plugins = Plugins.discover()
    with ExitStack() as stack:
        yield {name: stack.enter_context(tiny_model(name, plugins=plugins)) for name in ("llama", "mixtral")}


@dataclass(frozen=True)
class Empty:
    """No options."""


class Recording:
    """Rounds to nearest and remembers what it was told."""

    version, needs, Config = 1, ENTRIES, Empty

    def __init__(self) -> None:
        self.seen: dict[str, Moments] = {}

    def quantize(self, problem: LayerProblem, config: Empty) -> QuantizedLinear:
        self.seen[problem.name] = {name: problem.entries[name].double() for name in ENTRIES}
        return round_nearest(problem)


def recorded(
    tiny: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,  # noqa: ANN401 - fields of the request
) -> tuple[dict[str, Moments], Artifact]:
    """What a method is told of each linear, and what was made of them."""
    method, parts = Recording(), {"weights": "int2", "activations": changes.pop("activations", "")}
    monkeypatch.setattr(step, "configure", lambda *_: (Configured("recording", method, Empty(), "tests"),))
    scheme = read_scheme("", {name: text for name, text in parts.items() if text}, tiny.workspace.plugins)
    name = f"{tiny.path.parent.name}-{len(list(tiny.workspace.home.iterdir()))}.safetensors"
    asked = MitigateRequest(str(tiny.statistics.path), "recording", scheme, output=tiny.workspace.home / name)
    changes = {"token_weight": "uniform", "batch": 2, "true_sequential": False, **changes}
    artifact, reused = mitigate(replace(asked, **changes), tiny.workspace)
    assert not reused
    return method.seen, artifact


def model_of(tiny: TinyModel) -> Any:  # noqa: ANN401 - a model of transformers
    loaded = {"dtype": torch.float64, "attn_implementation": "sdpa", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(tiny.path, **loaded).eval()


def with_block(
    model: Any,  # noqa: ANN401 - as above
    artifact: Artifact,
    tiny: TinyModel,
    layer: int,
    names: Container[str] | None = None,
) -> Any:  # noqa: ANN401 - as above
    """Put a quantized block, or some linears of it, into a model of transformers."""
    subject = open_subject(str(artifact.path), tiny.workspace).subject
    for linear in subject.model.graph.linears_of(layer):
        if names is not None and linear.name not in names:
            continue
        weight = subject.linear(linear).weight(subject.weight_grid(linear)).double()
        if linear.expert is None:
            model.get_submodule(linear.name).weight.data = weight
            continue
        experts, which = model.model.layers[layer].mlp.experts, linear.name.rpartition(".")[2]
        half = len(experts.gate_up_proj[0]) // 2
        rows = {"w1": slice(0, half), "w3": slice(half, None), "w2": slice(None)}[which]
        (experts.down_proj if which == "w2" else experts.gate_up_proj).data[linear.expert, rows] = weight
    return model


def inputs(model: Any, windows: Tensor, layer: int) -> dict[str, Tensor]:  # noqa: ANN401 - a model of transformers
    """What the linears of a block read in one run of the whole model, a row a token, by site."""
    block, seen = model.model.layers[layer], dict[str, Tensor]()
    dense = {"attn_in": "self_attn.v_proj", "o_in": "self_attn.o_proj"}
    sparse = hasattr(block.mlp, "experts")
    rest = {"mlp_in": "mlp.experts"} if sparse else {"mlp_in": "mlp.gate_proj", "up_down": "mlp.down_proj"}
    for site, name in (dense | rest).items():

        def keep(_: torch.nn.Module, given: tuple[Tensor, ...], site: str = site) -> None:
            seen[site] = given[0].flatten(0, -2)

        block.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    if sparse:
        for expert, weight in enumerate(block.mlp.experts.gate_up_proj.detach()):
            gate, up = (seen["mlp_in"] @ weight.T).chunk(2, -1)
            seen[f"experts.{expert}.up_down"] = gate * torch.sigmoid(gate) * up
    return seen


def by_hand(x: Tensor, f: Tensor, rule: str) -> Moments:
    """All four, with the last window held out."""
    scales = 1 / x.norm(dim=-1, keepdim=True) if rule == "inverse-norm" else torch.ones(len(x), 1).double()
    x, f, weight = x * scales, f * scales, float(scales.square().sum())
    held = slice(-TOKENS, None)
    return {
        "hessian": x.T @ x / weight,
        "cross": f.T @ x / weight,
        "full_hessian": f.T @ f / weight,
        "held_out": torch.stack([x[held].T @ x[held], f[held].T @ x[held]]) / weight,
    }


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("rule", ["uniform", "inverse-norm"])
def test_moments_of_both_streams(
    models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch, name: str, rule: str
) -> None:
    tiny = models[name]
    changes = {"experts": "all"} if name == "mixtral" else {}
    seen, artifact = recorded(tiny, monkeypatch, token_weight=rule, **changes)
    windows = tiny.statistics.tensor("windows").long()
    assert windows.shape == (WINDOWS, TOKENS)
    graph = tiny.subject.model.graph
    assert set(seen) == {linear.name for linear in graph.linears}
    for layer in (0, 1):
        exact = inputs(model_of(tiny), windows, layer)
        model = model_of(tiny) if layer == 0 else with_block(model_of(tiny), artifact, tiny, 0)
        quantized = inputs(model, windows, layer)
        for linear in graph.linears_of(layer):
            site = linear.spec.reads
            found, expected = seen[linear.name], by_hand(quantized[site], exact[site], rule)
            for entry in ENTRIES:
                assert distance(found[entry], expected[entry]) < 1e-5, (linear.name, entry)
            if layer == 0:
                assert distance(found["cross"], found["hessian"]) < 1e-6
            else:  # it does matter which is which
                for other in (found["cross"].T, found["hessian"], found["full_hessian"]):
                    assert distance(other, expected["cross"]) > 1e-3


def test_full_precision_stays_so_where_activations_are_rounded(
    models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = models["llama"]
    seen, artifact = recorded(tiny, monkeypatch, activations="int3-sym-token", round_activations=True)
    windows = tiny.statistics.tensor("windows").long()
    for layer in (0, 1):
        for site, f in inputs(model_of(tiny), windows, layer).items():
            names = [one.name for one in tiny.subject.model.graph.linears_of(layer) if one.spec.reads == site]
            for name in names:
                assert distance(seen[name]["full_hessian"], by_hand(f, f, "uniform")["hessian"]) < 1e-5, name
    scheme = open_subject(str(artifact.path), tiny.workspace).subject.scheme.activations
    assert scheme is not None
    rounding, model = Rounding(Grid.of(scheme, tiny.workspace.plugins.format(scheme.format))), model_of(tiny)
    for name in "qkv":
        attention = model.model.layers[0].self_attn
        attention.get_submodule(f"{name}_proj").register_forward_pre_hook(lambda _, given: (rounding(given[0]),))
    x, f = inputs(model, windows, 0)["o_in"], inputs(model_of(tiny), windows, 0)["o_in"]
    found, expected = seen["model.layers.0.self_attn.o_proj"], by_hand(rounding(x), f, "uniform")
    assert distance(expected["hessian"], expected["full_hessian"]) > 1e-2
    assert distance(expected["hessian"], by_hand(x, f, "uniform")["hessian"]) > 1e-2  # of what is multiplied
    for entry in ENTRIES:
        assert distance(found[entry], expected[entry]) < 1e-5, entry


def test_tokens_of_experts_are_counted_once(models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models["mixtral"]
    _, artifact = recorded(tiny, monkeypatch, experts="all")
    chosen = tiny.subject.model.config.num_experts_per_tok
    for notes in artifact.manifest.details["experts"].values():
        assert sum(notes["tokens"]) == WINDOWS * TOKENS * chosen


def test_without_a_second_stream_it_is_refused(models: dict[str, TinyModel]) -> None:
    tiny = models["llama"]
    scheme = read_scheme("", {"weights": "int4"}, tiny.workspace.plugins)
    asked = MitigateRequest(str(tiny.statistics.path), "target+gptq", scheme, propagate="none")
    with pytest.raises(UsageError, match="which takes passes over the text"):
        mitigate(asked, tiny.workspace)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_stage_after_the_other_is_the_default_and_full_precision_stays_so(
    models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tiny = models[name]
    changes = {"experts": "all"} if name == "mixtral" else {}
    seen, artifact = recorded(tiny, monkeypatch, true_sequential=None, **changes)
    assert artifact.manifest.step.config["true_sequential"] is True
    windows = tiny.statistics.tensor("windows").long()
    graph = tiny.subject.model.graph
    for layer in (0, 1):
        model = model_of(tiny) if layer == 0 else with_block(model_of(tiny), artifact, tiny, 0)
        linears, exact = graph.linears_of(layer), inputs(model_of(tiny), windows, layer)
        for stage in sorted({linear.stage for linear in linears}):
            before = [linear.name for linear in linears if linear.stage < stage]
            quantized = inputs(with_block(deepcopy(model), artifact, tiny, layer, before), windows, layer)
            for linear in (one for one in linears if one.stage == stage):
                site = linear.spec.reads
                expected = by_hand(quantized[site], exact[site], "uniform")
                for entry in ENTRIES:
                    assert distance(seen[linear.name][entry], expected[entry]) < 1e-5, (linear.name, entry)
                if before:
                    assert distance(expected["cross"], expected["hessian"]) > 1e-3


@dataclass
class Stopping:
    """Progress that is interrupted after one block."""

    seen: list[Any] = field(default_factory=list)

    def __call__(self, items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
        for item in items:
            if self.seen:
                raise KeyboardInterrupt
            self.seen.append(item)
            yield item


@pytest.mark.parametrize("method", ["target+gptq", "rtn+qwt"])
def test_what_was_interrupted_goes_on_with_both_streams(models: dict[str, TinyModel], method: str) -> None:
    tiny = models["llama"]
    settings = {"form": "affine"} if "qwt" in method else {}
    scheme = read_scheme("", {"weights": "int3"}, tiny.workspace.plugins)
    asked = MitigateRequest(str(tiny.statistics.path), method, scheme, settings)
    whole, _ = mitigate(replace(asked, output=tiny.workspace.home / f"whole-{method}.safetensors"), tiny.workspace)
    asked = replace(asked, output=tiny.workspace.home / f"resumed-{method}.safetensors")
    with pytest.raises(KeyboardInterrupt):
        mitigate(asked, replace(tiny.workspace, progress=Stopping()))
    resumed, _ = mitigate(asked, tiny.workspace)
    assert resumed.manifest.id == whole.manifest.id
