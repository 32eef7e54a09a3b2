"""A block by hand and blocks of tiny models, for the tests of methods that learn from what a block puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.engine.block_problem import BlockProblem, BlockResult
from qtool.engine.problem import LayerProblem, QuantizedLinear
from qtool.plugins import Plugins
from qtool.scheme import Format, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import tiny_config
from qtool.testing.mitigators import correlated_problem
from qtool.testing.tiny_models import TinyModel, tiny_model_of

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3())
}
CPU = torch.device("cpu")
WIDE, INNER, WINDOWS, TOKENS = 32, 48, 8, 6
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}


def by_hand(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """A block of two linears: ``x + W_down silu(W_up x)``."""
    inner = torch.nn.functional.silu(hidden @ weights["up"].T)
    return hidden + inner @ weights["down"].T


@dataclass
class HandBlock:
    """The block by hand, with everything that was run through it."""

    text: str
    previous: Callable[[LayerProblem], QuantizedLinear] | None = None
    run: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.states = torch.randn(WINDOWS, TOKENS, WIDE, generator=generator)
        self.exact = self.states + 0.02 * torch.randn(self.states.shape, generator=generator)
        scheme = parse_tensor_scheme(self.text, FORMATS.__getitem__)
        made = {
            name: correlated_problem(FORMATS[scheme.format], scheme, seed=seed, n_out=n_out, n_in=n_in)
            for seed, (name, n_out, n_in) in enumerate([("up", INNER, WIDE), ("down", WIDE, INNER)])
        }
        if self.previous is not None:
            made = {name: one.after(self.previous(one)) for name, one in made.items()}
        self.problems = {name: replace(one, name=name) for name, one in made.items()}

    def targets(self, rows: Sequence[int]) -> Tensor:
        return by_hand({name: one.weight for name, one in self.problems.items()}, self.exact[list(rows)])

    def problem(self, seed: int = 0) -> BlockProblem:
        def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            self.run.append({name: weight.detach().clone() for name, weight in weights.items()})
            return by_hand(weights, hidden)

        return BlockProblem(
            0, self.problems, lambda rows: self.states[list(rows)], self.targets, forward, WINDOWS, True, CPU, seed
        )

    def decoded(self, linears: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
        return {name: linear.weight(self.problems[name].grid) for name, linear in linears.items()}


def measured_loss(block: BlockProblem, weights: Mapping[str, Tensor], rows: Sequence[int]) -> float:
    """The squared error of the outputs over their energy, with all windows at once."""
    with torch.no_grad():
        outputs, targets = block.forward(weights, block.inputs(rows)).double(), block.targets(rows).double()
    return float((outputs - targets).square().sum() / targets.square().sum())


def decoded(block: BlockProblem, linears: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    return {name: linear.weight(block.problems[name].grid) for name, linear in linears.items()}


class Tinies:
    """Tiny random models by model type, whose groups of 16 and 32 divide everything."""

    def __init__(self, plugins: Plugins, stack: ExitStack) -> None:
        self.plugins, self.stack = plugins, stack
        self.made: dict[str, TinyModel] = {}

    def of(self, model_type: str = "llama") -> TinyModel:
        if model_type not in self.made:
            own = MOE if model_type == "qwen3_moe" else {}
            config = tiny_config(model_type, hidden_size=32, intermediate_size=64, **own)
            made = tiny_model_of(config, self.plugins, gather=("hessian", "absmax", "sample"))
            self.made[model_type] = self.stack.enter_context(made)
        return self.made[model_type]

    def solved(self, method: str, scheme: Mapping[str, str], **changes: Any) -> Artifact:  # noqa: ANN401 - of a request
        """Mitigate a tiny model: ``model_type`` and ``transforms`` beside the fields of a request."""
        tiny, transforms = self.of(changes.pop("model_type", "llama")), changes.pop("transforms", "")
        wanted = read_scheme("", scheme, self.plugins)
        source = str(tiny.statistics.path)
        if transforms:
            source = str(transform(TransformRequest(source, transforms, scheme=wanted), tiny.workspace)[0].path)
        asked = MitigateRequest(source, method, wanted, dtype="float32", **changes)
        return mitigate(asked, tiny.workspace)[0]


@contextmanager
def tiny_models() -> Iterator[Tinies]:
    with ExitStack() as stack:
        yield Tinies(Plugins.discover(), stack)


Look = Callable[[BlockProblem, BlockResult], None]


def watch(patch: pytest.MonkeyPatch, method: type, look: Look) -> None:
    """Look at every block that a method refines, while it can still be run."""
    refine = method.refine  # type: ignore[attr-defined]

    def watched(self: object, block: BlockProblem, config: object) -> BlockResult:
        result: BlockResult = refine(self, block, config)
        look(block, result)
        return result

    patch.setattr(method, "refine", watched)
