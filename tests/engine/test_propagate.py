"""Two streams through a model: one in full precision, one as it is quantized; and blocks that gradients go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.builtin.formats.integer import Int4
from qtool.builtin.mitigators.autoround import AutoRound
from qtool.engine.block_problem import BlockProblem, BlockResult, Compensation
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.network import Network
from qtool.engine.online import KernelHadamard
from qtool.engine.problem import Adapter
from qtool.engine.stream import Stream
from qtool.errors import UsageError
from qtool.numerics.operators import Hadamard
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.calibrate import WINDOWS
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from qtool.testing import tiny_config
from qtool.testing.tiny_models import TinyModel, tiny_model_of
from tests.oracles.hadamard import sylvester_oracle

CPU = torch.device("cpu")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
W4A4 = {"weights": "int3-g16", "activations": "int4-asym-token-sfp32", "kv": "int4-asym-token-head"}
STEPS = {"autoround.steps": "3", "autoround.rate": "0.1", "autoround.range_rate": "0.01"}


@pytest.fixture(scope="module")
def tinies() -> Iterator[Callable[[str], TinyModel]]:
    plugins, made = Plugins.discover(), dict[str, TinyModel]()
    with ExitStack() as stack:

        def of(model_type: str) -> TinyModel:
            if model_type not in made:
                own = MOE if "moe" in model_type else {}
                config = tiny_config(model_type, hidden_size=32, intermediate_size=64, **own)
                gathered = tiny_model_of(config, plugins, gather=("hessian", "absmax", "sample"))
                made[model_type] = stack.enter_context(gathered)
            return made[model_type]

        yield of


@dataclass
class Seen:
    """What the blocks of a run were given."""

    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watch what AutoRound sees."""
    found, refine = Seen(), AutoRound.refine

    def watched(self: AutoRound, block: BlockProblem, config: Any) -> BlockResult:  # noqa: ANN401 - passed on
        rows = range(block.windows)
        found.inputs.append(block.inputs(rows).clone())
        found.targets.append(block.targets(rows).clone())
        result = refine(self, block, config)
        weights = {name: one.weight(block.problems[name].grid) for name, one in result.linears.items()}
        with torch.no_grad():
            found.outputs.append(block.forward(weights, block.inputs(rows)))
        return result

    monkeypatch.setattr(AutoRound, "refine", watched)
    return found


def asked(tiny: TinyModel, method: str = "autoround", **changes: Any) -> MitigateRequest:  # noqa: ANN401 - of a request
    scheme = read_scheme("", changes.pop("scheme", W4A4), tiny.workspace.plugins)
    plain = MitigateRequest(str(tiny.statistics.path), method, scheme, settings=STEPS, dtype="float32")
    return replace(plain, **changes)


def elsewhere(request: MitigateRequest, tiny: TinyModel, name: str) -> MitigateRequest:
    return replace(request, output=tiny.workspace.home / f"{name}.safetensors")


def full_precision(tiny: TinyModel, windows: Tensor) -> list[Tensor]:
    """Inputs of the first block and outputs of all, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="sdpa").eval()
    found: list[Tensor] = []

    def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:  # noqa: ANN401 - a hook's
        if not found:
            found.append(given[0] if given else named["hidden_states"])
        found.append(result[0] if isinstance(result, tuple) else result)

    for block in model.model.layers:
        block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    return found


def executed(artifact: Artifact, workspace: Workspace, windows: Tensor, *, rounds: bool) -> list[Tensor]:
    """Inputs of the first block and outputs of all, as the artifact is executed."""
    subject = open_subject(str(artifact.path), workspace).subject
    if not rounds:
        subject = replace(subject, scheme=replace(subject.scheme, activations=None, kv=None))
    network = Network(subject, device=CPU, dtype=torch.float32)
    stream = Stream(network, windows, batch=6, spill=workspace.home)
    found = [stream.states.clone()]
    for layer in range(len(network.blocks)):
        network.load(layer)
        stream.run(layer, keep=True)
        found.append(stream.states.clone())
    return found


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_targets_are_outputs_in_full_precision(
    tinies: Callable[[str], TinyModel], seen: Seen, model_type: str, rounds: bool
) -> None:
    tiny = tinies(model_type)
    request = asked(tiny, round_activations=rounds)
    mitigate(elsewhere(request, tiny, f"targets-{rounds}"), tiny.workspace)
    expected = full_precision(tiny, tiny.statistics.tensor(WINDOWS).long())
    assert len(seen.targets) == 2
    torch.testing.assert_close(seen.inputs[0], expected[0])
    for layer in range(2):
        torch.testing.assert_close(seen.targets[layer], expected[layer + 1], rtol=1e-4, atol=1e-5)
    assert (seen.inputs[1] - seen.targets[0]).abs().max() > 1e-2


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("method", ["autoround", "gptq+lorc+autoround"])
def test_inputs_are_outputs_of_what_is_quantized(
    tinies: Callable[[str], TinyModel], seen: Seen, rounds: bool, method: str
) -> None:
    tiny = tinies("llama")
    settings = {**STEPS, **({"lorc.rank": "3", "lorc.reads": "full"} if "lorc" in method else {})}
    request = asked(tiny, method, round_activations=rounds, settings=settings)
    artifact, _ = mitigate(elsewhere(request, tiny, f"{method}-{rounds}"), tiny.workspace)
    windows = tiny.statistics.tensor(WINDOWS).long()
    states = executed(artifact, tiny.workspace, windows, rounds=rounds)
    torch.testing.assert_close(seen.inputs[1], states[1], rtol=1e-5, atol=1e-6)
    # The block itself is learned as it is going to be executed, whatever is propagated.
    if rounds:
        torch.testing.assert_close(seen.outputs[1], states[2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.outputs[0], states[1], rtol=1e-5, atol=1e-6)
    else:
        assert (seen.outputs[0] - states[1]).abs().max() > 1e-3


def test_static_multipliers_and_rotations_are_executed_as_they_are_learned(
    tinies: Callable[[str], TinyModel], seen: Seen
) -> None:
    tiny = tinies("qwen3_moe")
    scheme = {"weights": "nvfp4", "activations": "nvfp4", "kv": "int4-asym-token-head"}
    wanted = read_scheme("", scheme, tiny.workspace.plugins)
    plan, _ = transform(TransformRequest(str(tiny.statistics.path), "quarot", scheme=wanted), tiny.workspace)
    request = asked(tiny, scheme=scheme, source=str(plan.path), round_activations=True)
    artifact, _ = mitigate(request, tiny.workspace)
    states = executed(artifact, tiny.workspace, tiny.statistics.tensor(WINDOWS).long(), rounds=True)
    for layer in range(2):
        torch.testing.assert_close(seen.inputs[layer], states[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.outputs[layer], states[layer + 1], rtol=1e-4, atol=1e-5)


@dataclass
class Stopping:
    """A progress that is interrupted after some items."""

    stop_after: int

    def __call__(self, items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
        for index, item in enumerate(items):
            if index == self.stop_after:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("method", ["autoround", "gptaq", "gptq+autoround+qera"])
def test_an_interruption_changes_nothing(tinies: Callable[[str], TinyModel], method: str) -> None:
    tiny = tinies("llama")
    settings = {key: value for key, value in STEPS.items() if "autoround" in method}
    settings |= {"qera.rank": "2"} if "qera" in method else {}
    request = asked(tiny, method, settings=settings)
    whole, _ = mitigate(elsewhere(request, tiny, f"whole-{method}"), tiny.workspace)
    parts = elsewhere(request, tiny, f"parts-{method}")
    with pytest.raises(KeyboardInterrupt):
        mitigate(parts, replace(tiny.workspace, progress=Stopping(1)))
    resumed, reused = mitigate(parts, tiny.workspace)
    assert not reused
    assert resumed.manifest.id == whole.manifest.id
    assert resumed.manifest.details == whole.manifest.details
    assert ("blocks" in whole.manifest.details) == ("autoround" in method)


def test_a_batch_size_changes_nothing(tinies: Callable[[str], TinyModel]) -> None:
    tiny = tinies("llama")
    request = asked(tiny, round_activations=True)
    codes = []
    for batch in (1, 6):
        artifact, _ = mitigate(elsewhere(replace(request, batch=batch), tiny, f"batch-{batch}"), tiny.workspace)
        subject = open_subject(str(artifact.path), tiny.workspace).subject
        codes.append(torch.cat([subject.linear(linear).codes.flatten() for linear in subject.model.graph.linears]))
    assert (codes[0] == codes[1]).double().mean() > 0.995  # up to the order of sums


@pytest.mark.parametrize("method", ["autoround", "lwc", "gptq+autoround"])
@pytest.mark.parametrize(
    ("model_type", "change", "reason", "hint"),
    [
        ("llama", {"propagate": "none"}, "which takes passes over the text", "--propagate quantized"),
        ("qwen3_moe", {"experts": "routed"}, "and routed experts see other tokens there", "--experts all"),
    ],
)
def test_what_excludes_full_precision_is_refused(
    tinies: Callable[[str], TinyModel], method: str, model_type: str, change: dict[str, Any], reason: str, hint: str
) -> None:
    tiny = tinies(model_type)
    with pytest.raises(UsageError) as raised:
        mitigate(asked(tiny, method, settings={}, **change), tiny.workspace)
    assert str(raised.value) == f"`{method}` compares with full precision, {reason}\nhint: {hint}"


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("rounds", [False, True])
def test_differentiable_is_run_with_the_weights_that_it_is_given(
    tinies: Callable[[str], TinyModel], model_type: str, rounds: bool
) -> None:
    tiny, layer = tinies(model_type), 1
    scheme = read_scheme(
        "", {key: W4A4[key] for key in ("activations", "kv")} if rounds else {}, tiny.workspace.plugins
    )
    network = Network(replace(tiny.subject, scheme=scheme), device=CPU, dtype=torch.float32)
    hidden, arguments = network.embed(torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0)))
    network.load(layer)
    plain = network.run(layer, hidden, arguments[layer])
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    network.compensations[layer] = Compensation(torch.linspace(-0.1, 0.1, 32), down=matrix)
    missing = hidden @ matrix.T + torch.linspace(-0.1, 0.1, 32)
    torch.testing.assert_close(network.run(layer, hidden, arguments[layer]), plain + missing, rtol=1e-4, atol=1e-5)
    linears = network.subject.model.graph.linears_of(layer)
    first = network.linear(layer, linears[0].spec.module)
    first.adapter = Adapter(0.1 * torch.ones(1, first.weight.shape[1]), torch.ones(first.weight.shape[0], 1))
    loaded = {one.spec.module: network.linear(layer, one.spec.module).weight.detach().clone() for one in linears}
    expected = network.run(layer, hidden, arguments[layer])
    assert torch.equal(network.differentiable(layer, hidden, arguments[layer], loaded), expected)
    other = {name: (weight * 1.1).requires_grad_(True) for name, weight in loaded.items()}
    changed = network.differentiable(layer, hidden, arguments[layer], other)
    assert (changed - expected).abs().max() > 1e-2
    gradients = torch.autograd.grad(changed.square().mean(), list(other.values()))
    assert all(bool(gradient.any()) for gradient in gradients)
    assert torch.equal(network.run(layer, hidden, arguments[layer]), expected)
    for one in linears:
        network.linear(layer, one.spec.module).weight.data = other[one.spec.module].detach()
    assert torch.equal(network.run(layer, hidden, arguments[layer]), changed.detach())
    if not rounds:
        name = next(iter(other))
        small = 1e-2 * gradients[0] / gradients[0].norm()
        sides = [
            network.differentiable(layer, hidden, arguments[layer], {**other, name: other[name] + sign * small})
            for sign in (1, -1)
        ]
        slope = float((sides[0].square().mean() - sides[1].square().mean()).detach()) / 2e-2
        assert slope == pytest.approx(float(gradients[0].norm()), rel=2e-2)


def test_roundings_are_put_back(tinies: Callable[[str], TinyModel]) -> None:
    tiny = tinies("llama")
    scheme = read_scheme("", {"activations": "int4-token", "kv": "int4-asym-token-head"}, tiny.workspace.plugins)
    network = Network(replace(tiny.subject, scheme=scheme), device=CPU, dtype=torch.float32)
    hidden, arguments = network.embed(torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(0)))
    network.load(0)
    plain = Network(tiny.subject, device=CPU, dtype=torch.float32)
    plain.load(0)
    rounded = network.run(0, hidden, arguments[0])
    with network.exact(0):
        assert torch.equal(network.run(0, hidden, arguments[0]), plain.run(0, hidden, arguments[0]))
    assert torch.equal(network.run(0, hidden, arguments[0]), rounded)
    own = {name: site.rounding for name, site in network.sites[0].items()}
    with plain.rounded_by(0, own.__getitem__, network.blocks[0].self_attn.kv_path.rounding):
        assert torch.equal(plain.run(0, hidden, arguments[0]), rounded)
    assert not torch.equal(plain.run(0, hidden, arguments[0]), rounded)


@pytest.mark.parametrize("text", ["int4-asym-token-sfp32", "int4-tensor", "int4-token-o2.5"])
def test_gradients_pass_straight_through_roundings(text: str) -> None:
    rounding = Rounding(Grid.of(parse_tensor_scheme(text, lambda _: Int4(), vector="token"), Int4()))
    generator = torch.Generator().manual_seed(0)
    x, sent = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    expected = rounding(x)
    x.requires_grad_(True)
    found = rounding(x)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found, x, sent)
    assert torch.equal(gradient, sent)


@pytest.mark.parametrize("order", [16, 24])
def test_gradients_go_through_rotations_by_kernels(order: int) -> None:
    class Dense:
        operation, preference = "sylvester", 0

        def supports(self, device: torch.device) -> bool:
            return True

        def run(self, x: Tensor) -> Tensor:
            n = x.shape[-1]
            return (x.detach() @ sylvester_oracle(n).to(x)) / n**0.5

    signs = torch.where(torch.arange(order) % 3 == 0, -1, 1).to(torch.int8)
    operator = Hadamard(order, signs)
    x = torch.randn(3, order, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    sent = torch.randn(3, order, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = [one.act(x) for one in (operator, KernelHadamard(operator, Dense()))]
    torch.testing.assert_close(results[1], results[0])
    found, expected = (torch.autograd.grad(result, x, sent)[0] for result in reversed(results))
    torch.testing.assert_close(found, expected)
