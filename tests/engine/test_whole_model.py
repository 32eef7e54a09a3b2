"""The divergence of a whole model and its gradients, block by block, are torch's own over transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.engine.model_problem import ModelProblem, ModelResult, Values
from qtool.numerics.scales import decode_scale, encode_scale
from qtool.plugins import Plugins
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from qtool.testing import double_precision, save_tiny_model
from qtool.testing.families import family_configs
from tests.oracles.end_to_end import divergence_oracle, integers_oracle, norms_oracle
from tests.steps.conftest import Watch

IN_FRONT = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "olmo2": (),
    "gpt-neox": ("input_layernorm", "post_attention_layernorm"),
}
"""Norms in front of linears, inside a block; those of the others are Llama's."""
SETTINGS = {"rtn+lorc": {"rank": "3"}, "rtn+qwt": {"rank": "3"}, "spqr": {"tau": "0.05"}}
Probe = Callable[[ModelProblem], object]
Learn = Callable[[ModelProblem], Values]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@dataclass
class Bench:
    """A tiny model of a family with statistics, and a method that only looks."""

    workspace: Workspace
    monkeypatch: pytest.MonkeyPatch
    statistics: Artifact
    model: Path
    seen: list[Any] = field(default_factory=list)

    def asked(self, weights: str, method: str = "rtn", transforms: str = "", **parts: str) -> MitigateRequest:
        scheme = read_scheme("", {"weights": weights, **parts}, self.workspace.plugins)
        source = self.statistics.path
        if transforms:
            source = transform(TransformRequest(str(source), transforms, scheme=scheme), self.workspace)[0].path
        return MitigateRequest(str(source), method, scheme, dict(SETTINGS.get(method, {})))

    def looked(self, asked: MitigateRequest, probe: Probe, learn: Learn = lambda _: {}) -> tuple[Any, Artifact]:
        """Return what a probe finds in the problem that a method behind those asked for is given, and what is made.

        Args:
            asked: What is done before.
            probe: Looks at the problem.
            learn: What the method returns as learned.
        """
        method = self.workspace.plugins.load("mitigators", "e2e-qp")

        def tune(problem: ModelProblem, _: object) -> ModelResult:
            self.seen.append(probe(problem))
            return ModelResult(learn(problem), {"kl": 0.0, "kl_before": 0.0})

        self.monkeypatch.setattr(method, "tune", tune, raising=False)
        output = self.workspace.home / f"probe-{len(self.seen)}.safetensors"
        made, _ = mitigate(replace(asked, method=f"{asked.method}+e2e-qp", output=output), self.workspace)
        return self.seen[-1], made

    def measured(self, artifact: Artifact) -> Tensor:
        """Return the divergence of every calibration window as ``eval`` finds it."""
        windows = self.statistics.tensor("windows").long()
        text = self.workspace.home / "windows.txt"
        text.write_text(self.workspace.model(str(self.model)).tokenizer().decode(windows.flatten()))
        asked = EvalRequest(str(artifact.path), perplexity=(str(text),), seq_len=windows.shape[1], kl=True)
        return evaluate(asked, self.workspace)[0].tensor("kl/windows.txt").double().mean(1)


Opened = Callable[..., Bench]


@pytest.fixture
def bench(plugins: Plugins, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    def opened(family: str, **sizes: int) -> Bench:
        config = next(family_configs(plugins.load("families", family)))
        config.update(sizes)
        config.tie_word_embeddings = False
        save_tiny_model(tmp_path / family, config)
        letters = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(5))
        (tmp_path / "text.txt").write_bytes(bytes(letters.tolist()))
        (tmp_path / "desk").mkdir()
        workspace = Workspace(plugins, tmp_path / "desk", cache)
        request = CalibrateRequest(
            str(tmp_path / family),
            data=str(tmp_path / "text.txt"),
            num_samples=4,
            seq_len=12,
            gather=("absmax", "hessian", "sample", "mean"),
        )
        with double_precision():
            statistics, _ = calibrate(request, workspace)
        return Bench(workspace, monkeypatch, statistics, tmp_path / family)

    return opened


def reference(path: Path) -> Any:  # noqa: ANN401 - transformers' model
    given = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **given)
    return model.eval().requires_grad_(requires_grad=False)


def moved(values: Values, scale: str = "fp32") -> dict[str, Tensor]:
    """Other values that the formats hold."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, value in values.items():
        other = value * (0.8 + 0.4 * torch.rand(value.shape, generator=generator))
        found[name] = decode_scale(encode_scale(other, scale), scale) if name.endswith(".scale") else other  # type: ignore[arg-type]
    return found


def near(loss: float) -> Any:  # noqa: ANN401 - pytest's own
    """The logarithms of a divergence are in float32."""
    return pytest.approx(loss, rel=2e-6, abs=2e-7)


def assert_alike(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Values come in float32."""
    assert found[0] == near(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            found[1][name].double(),
            gradient,
            rtol=1e-4,
            atol=1e-9 + 1e-5 * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(
    ("family", "weights", "scale"),
    [
        ("llama", "int4-g8-sfp32", "fp32"),
        ("llama", "int3-asym-g4-sbf16", "bf16"),
        ("gemma2", "int4-g8-signed_full-sfp16", "fp16"),
        ("mixtral", "int4-asym-g8-sfp16", "fp16"),
        ("qwen3-moe", "int4-g8-sbf16", "bf16"),
        ("qwen3", "int2-asym-channel", "bf16"),
        ("phi3", "int4-g8-signed_full", "bf16"),
        ("olmo2", "int4-g8-sfp16", "fp16"),
        ("gpt-neox", "int3-g8", "bf16"),
        ("llama", "int4-tensor-sfp32", "fp32"),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_model(bench: Opened, family: str, weights: str, scale: str) -> None:
    own = bench(family)
    asked = replace(own.asked(weights), batch=2)
    bits = int(weights[3])
    with double_precision():
        left, _ = mitigate(asked, own.workspace)
        model = reference(own.model)
        graph = own.workspace.model(str(own.model)).graph
        tensors = {name: left.tensor(name) for name in left.names()}
        integers = {
            one.name: integers_oracle(tensors, one.name, graph.width(one.spec.reads), bits=bits)
            for one in graph.linears
        }
        norms = norms_oracle(model, IN_FRONT.get(family, ("input_layernorm", "post_attention_layernorm")))
        offset = float(family.startswith("gemma"))
        start = {f"{name}.scale": tensors[f"{name}.scale"].double() for name in integers}
        start |= {name: model.get_parameter(name) + offset for name in norms}

        def probe(problem: ModelProblem) -> Any:  # noqa: ANN401 - several things
            own = {**problem.norms, **problem.scales}
            rows, others = [2, 0, 3], moved(own, scale)
            found = [(problem.loss(rows, given), problem.descend(rows, given)) for given in ({}, own, others)]
            gains = {name: others[name] for name in problem.norms}
            return problem, own, others, found, problem.loss(rows, gains), problem.loss([1], others)

        (problem, given, others, found, of_gains, of_one), _ = own.looked(asked, probe)
        windows = own.statistics.tensor("windows").long()
        expected = [
            divergence_oracle(model, windows[[2, 0, 3]], integers, one, offset=offset) for one in (start, start, others)
        ]
        mixed = start | {name: others[name] for name in norms}
        assert of_gains == near(divergence_oracle(model, windows[[2, 0, 3]], integers, mixed, offset=offset)[0])
        alone = divergence_oracle(model, windows[[1]], integers, others, offset=offset)[0]
    assert of_one == near(alone)
    assert problem.windows == len(windows) == 4
    assert problem.norms.keys() == set(norms)
    assert problem.scales.keys() == {f"{name}.scale" for name in integers}
    for name, value in start.items():
        assert given[name].dtype == torch.float32
        torch.testing.assert_close(given[name].double(), value.double(), rtol=1e-6, atol=0)
    assert expected[0][0] > 1e-4
    for (loss, descended), one in zip(found, expected, strict=True):
        assert loss == near(one[0])
        if descended[1]:
            assert_alike(descended, one)
    assert found[1][1][1].keys() == start.keys()
    idle = {name for name, gradient in expected[2][1].items() if not bool(gradient.any())}
    assert not any("experts" not in name for name in idle)  # an expert may have no token
    assert (
        float(expected[2][1][next(name for name in norms if ".0." not in name and ".1." not in name)].abs().max())
        > 1e-6
    )


W4A4 = {"weights": "int4-g8-sfp32", "activations": "int4-asym-token"}
NVFP4 = {"weights": "nvfp4", "activations": "nvfp4"}


@pytest.mark.parametrize(
    ("family", "method", "transforms", "parts", "offered"),
    [
        ("gemma", "rtn", "quarot", W4A4, True),
        ("llama", "rtn", "atom", W4A4, True),
        ("llama", "gptq", "quarot", NVFP4, False),
        ("llama", "spqr", "", {"weights": "int3-asym-g8-real"}, False),
        ("llama", "rtn+lorc", "", {"weights": "int3-g8-sfp16", "activations": "int8-sym-token"}, True),
        ("llama", "rtn+qwt", "", {"weights": "int3-g8"}, True),
        ("gemma2", "gptq", "", {"weights": "int3-asym-g8"}, True),
        ("llama", "gptq", "", {"weights": "int3-asym-g8-offset"}, True),
        ("mixtral", "rtn", "quarot", {"weights": "int4-g8-signed_full", "activations": "int8-sym-token"}, True),
    ],
)
def test_it_is_the_model_as_eval_executes_it(
    bench: Opened, family: str, method: str, transforms: str, parts: dict[str, str], *, offered: bool
) -> None:
    """At no values that of the methods to the left, and at others that of what is stored with them."""
    own = bench(family, hidden_size=32, intermediate_size=48)
    with double_precision():
        asked = replace(own.asked(method=method, transforms=transforms, **parts), round_activations=True)
        left, _ = mitigate(asked, own.workspace)

        def changed(problem: ModelProblem) -> dict[str, Tensor]:
            return moved({**problem.norms, **problem.scales}, "fp32")

        def probe(problem: ModelProblem) -> Any:  # noqa: ANN401 - several things
            before, behind = ([problem.loss([row], one) for row in range(4)] for one in ({}, changed(problem)))
            return before, behind, problem.loss([0, 1, 2, 3], changed(problem)), bool(problem.scales)

        (before, behind, together, scales), made = own.looked(asked, probe, changed)
        assert scales is offered
        torch.testing.assert_close(torch.tensor(before).double(), own.measured(left), rtol=2e-5, atol=3e-7)
        torch.testing.assert_close(torch.tensor(behind).double(), own.measured(made), rtol=2e-5, atol=3e-7)
    assert min(before) > 1e-4
    assert max(abs(one - other) / one for one, other in zip(before, behind, strict=True)) > 0.05
    assert together == near(sum(behind) / 4)


def test_scales_of_channels_apart_move_their_own_columns(bench: Opened) -> None:
    """Along each of its gradients the loss changes as it says."""
    own = bench("llama")
    with double_precision():
        asked = own.asked(transforms="atom", **W4A4)
        asked = replace(asked, scheme=replace(asked.scheme, activations=None))

        def probe(problem: ModelProblem) -> Any:  # noqa: ANN401 - several things
            found, start = {}, problem.scales
            _, gradients = problem.descend([1], start)
            for name, gradient in gradients.items():
                pushed = start[name] * gradient.sign() * 1e-2
                losses = [problem.loss([1], {name: start[name] + way * pushed}) for way in (1, -1)]
                found[name] = (losses[0] - losses[1]) / 2, float((gradient * pushed).sum())
            return found

        found, _ = own.looked(asked, probe)
    assert sum(".segments.0.scale" in name for name in found) == 14
    for name, (measured, told) in found.items():
        assert abs(told) > 1e-6, name
        assert measured == pytest.approx(told, rel=0.02, abs=3e-7), name


@pytest.mark.parametrize(
    ("weights", "method"),
    [
        ("int4-g8-se8m0", "rtn"),
        ("fp4-g8-se4m3", "rtn"),
        ("mxfp4", "rtn"),
        ("fp8-b8-sbf16", "rtn"),
        ("int3-asym-g8-real", "spqr"),
        ("int3-asym-g8-scales3g16", "rtn"),
    ],
)
def test_scales_that_cannot_be_moved_by_little_are_not_offered(bench: Opened, weights: str, method: str) -> None:
    own = bench("llama", hidden_size=32, intermediate_size=64)
    asked = own.asked(weights, method)
    (norms, scales), _ = own.looked(asked, lambda problem: (list(problem.norms), list(problem.scales)))
    assert len(norms) == 5
    assert scales == []


def test_gradients_pass_what_is_rounded_on_the_way(bench: Opened) -> None:
    """Activations and a cache of 8 bits change next to nothing, and gradients as little."""
    own = bench("llama")
    rounded = {"activations": "int8-asym-token", "kv": "int8-asym-token-head"}
    with double_precision():

        def probe(problem: ModelProblem) -> Any:  # noqa: ANN401 - two things
            return problem.descend([0, 1], moved({**problem.norms, **problem.scales}))

        found = [own.looked(own.asked("int3-g8", **parts), probe)[0] for parts in ({}, rounded)]
    assert found[0][0] != found[1][0] == pytest.approx(found[0][0], rel=0.02)
    for name, gradient in found[0][1].items():
        assert float((found[1][1][name] - gradient).norm()) < 0.1 * float(gradient.norm()), name


def test_a_window_with_gradients_is_shown_as_four(bench: Opened) -> None:
    own, watch, shown = bench("llama"), Watch(), list[int]()
    own.workspace = replace(own.workspace, progress=watch)

    def probe(problem: ModelProblem) -> None:
        shown.append(len(watch.seen))
        problem.loss([1, 2, 3], {})
        shown.append(len(watch.seen))
        problem.descend([0, 2], dict(problem.norms))
        shown.append(len(watch.seen))

    own.looked(own.asked("int4-g8"), probe)
    assert shown == [2, 5, 13]  # two blocks first
