"""Checks that a plugin's author runs in their own tests, and that qtool runs on its own methods.

Each ``check_…`` builds small random problems, and raises ``CheckError`` with one sentence where a promise of the
contract is broken. Models are tiny and random, with non-trivial norm weights and biases, grouped queries and a head
size that is not hidden / heads, since defaults hide mistakes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qtool.artifacts.identity import digest_tensor
from qtool.artifacts.store import Artifact
from qtool.engine.execute import BlockExecutable
from qtool.engine.planner import extend
from qtool.engine.problem import LayerProblem, Mitigator, QuantizedLinear
from qtool.engine.subject import Subject
from qtool.model.plan import Plan, Transform
from qtool.numerics.groups import from_groups, to_groups
from qtool.numerics.losses import relative_loss
from qtool.plugins import Plugins
from qtool.scheme import Format, GroupParameters, TensorScheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.transform import context_of
from qtool.steps.workspace import Workspace

EXACT = 1e-9


class CheckError(AssertionError):
    """A promise of the contract is broken; the message says which and how."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny random model in a folder, opened in a workspace of its own.

    Attributes:
        path: The model's folder.
        workspace: Finds the model, writes beside it.
        statistics: Everything calibrate gathers, on random bytes.
    """

    path: Path
    workspace: Workspace
    statistics: Artifact


def tiny_config(model_type: str, **changes: object) -> Any:  # noqa: ANN401 - each family has its own config class
    """Return a small config of a family: two blocks, grouped queries, a head size of its own, odd Hadamard orders."""
    sizes: dict[str, object] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 260,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def save_tiny_model(folder: Path, config: Any, *, seed: int = 0) -> None:  # noqa: ANN401 - see tiny_config
    """Save a random model in float64 with a byte tokenizer; nothing in it is left at a default value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            parameter.data = 0.5 + noise
        elif name.endswith("bias"):
            parameter.data = noise - 0.5
        else:
            parameter.data = (noise - 0.5) * 0.4
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


@contextmanager
def tiny_model(model_type: str = "llama", *, plugins: Plugins | None = None, **changes: object) -> Iterator[TinyModel]:
    """Make a tiny random model of a family, calibrated on random text; everything is removed at the end."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        save_tiny_model(folder, tiny_config(model_type, **changes))
        text = Path(root) / "text.txt"
        generator = torch.Generator().manual_seed(1)
        letters = torch.randint(97, 123, (2000,), generator=generator)
        text.write_bytes(bytes(letters.tolist()))
        workspace = Workspace(plugins or Plugins.discover(), Path(root) / "home", Path(root) / "cache")
        request = CalibrateRequest(str(folder), data=str(text), num_samples=6, seq_len=32, token_weight="uniform")
        with double_precision(folder):
            statistics, _ = calibrate(request, workspace)
        yield TinyModel(folder, workspace, statistics)


@contextmanager
def double_precision(folder: Path) -> Iterator[None]:
    """Let a model's RMS norms compute in the dtype of their input; transformers' own round to float32 on the way."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    kinds = {type(child) for child in module.modules() if type(child).__name__.endswith("RMSNorm")}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(patch.object(kind, "forward", _double_norm))
        yield


def _double_norm(self: nn.Module, x: Tensor) -> Tensor:
    """RMS normalisation in the dtype of the input."""
    variance = x.square().mean(-1, keepdim=True)
    epsilon = float(getattr(self, "variance_epsilon", None) or getattr(self, "eps", 1e-6))  # type: ignore[arg-type]
    weight = self.weight
    if not isinstance(weight, Tensor):
        raise TypeError(type(self).__name__)
    return weight * (x * torch.rsqrt(variance + epsilon))


def exact_logits(subject: Subject, *, seed: int = 2, tokens: int = 24) -> Float[Tensor, "windows tokens vocab"]:
    """Return a subject's logits in float64 on random tokens; use inside ``double_precision``."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 256, (2, tokens), generator=generator)
    runs = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64)
    return torch.cat([logits for _, logits in runs.forward_windows(windows)])


def check_transform(transform: Transform, config: object = None, *, families: Sequence[str] | None = None) -> None:
    """Check that a transform leaves the function of every family's model unchanged, to 1e-9 in float64.

    Args:
        transform: The method.
        config: Its options; None for its defaults.
        families: Names of families; None for all that are installed.

    Raises:
        CheckError: The logits changed; names the family and the largest difference. Or the method proposes other
            operators when it is asked again.
    """
    plugins = Plugins.discover()
    options = transform.Config() if config is None else config
    for name in families or sorted(plugins.offers["families"]):
        for model_type in plugins.load("families", name).model_types:
            for tied in (False, True):
                with tiny_model(model_type, plugins=plugins, tie_word_embeddings=tied) as tiny:
                    _check_invariance(transform, options, tiny, f"{model_type}, {'tied' if tied else 'untied'} head")


def plan_of(transform: Transform, options: object, tiny: TinyModel) -> tuple[Subject, Plan]:
    """Return a tiny model's subject, and the plan that a transform makes for it."""
    model = tiny.workspace.model(str(tiny.path))
    subject = Subject(model, tiny.workspace.plugins)
    context = context_of(subject, tiny.statistics)
    return subject, extend(Plan(), transform.plan(context, options), model.graph, method=type(transform).__name__)


def _check_invariance(transform: Transform, options: object, tiny: TinyModel, label: str) -> None:
    subject, plan = plan_of(transform, options, tiny)
    again = plan_of(transform, options, tiny)[1]
    if _digest(plan) != _digest(again):
        raise CheckError(f"{type(transform).__name__} proposes other operators when it is asked again ({label})")
    with double_precision(tiny.path):
        before = exact_logits(subject)
        after = exact_logits(replace(subject, plan=plan))
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference < EXACT:
        raise CheckError(
            f"{type(transform).__name__} changes the model ({label}): relative difference {difference:.2e}, "
            f"allowed {EXACT:.0e}"
        )


def _digest(plan: Plan) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what two plans that are alike to the last bit have in common."""
    tensors, described = plan.to_state()
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()}, described


def correlated_problem(
    fmt: Format, scheme: TensorScheme, *, seed: int = 0, n_out: int = 32, n_in: int = 64
) -> LayerProblem:
    """Return a layer with random weights and strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in) * 0.3
    x = torch.randn(512, n_in, generator=generator) @ mixing @ mixing
    weight = torch.randn(n_out, n_in, generator=generator)
    scale = fmt.global_scale(weight.abs().amax(), scheme)
    entries = {"hessian": x.T @ x / len(x), "absmax": x.abs().amax(0), "mean_abs": x.abs().mean(0), "sample": x}
    return LayerProblem("layer", weight, scheme, fmt, entries["hessian"], entries, scale)


def check_mitigator(
    mitigator: Mitigator, fmt: Format, config: object = None, *, scheme: TensorScheme | None = None
) -> None:
    """Check a mitigator on correlated random layers.

    It must not modify its inputs, give the same codes and scales twice, keep to the format's codes, report the loss
    that one measures, and be no worse than rounding to nearest over several layers together.

    Args:
        mitigator: The method.
        fmt: Format of the weights.
        config: Its options; None for its defaults.
        scheme: Scheme of the weights; None for the format's default.

    Raises:
        CheckError: A promise is broken.
    """
    chosen = scheme or fmt.defaults
    options = mitigator.Config() if config is None else config
    name = type(mitigator).__name__
    total = nearest = 0.0
    for seed in range(4):
        problem = correlated_problem(fmt, chosen, seed=seed)
        kept = {"weight": problem.weight.clone(), **{entry: t.clone() for entry, t in problem.entries.items()}}
        result, again = mitigator.quantize(problem, options), mitigator.quantize(problem, options)
        for entry, tensor in {"weight": problem.weight, **problem.entries}.items():
            if not torch.equal(kept[entry], tensor):
                raise CheckError(f"{name} modifies the {entry} that it is given")
        if not torch.equal(result.codes, again.codes):
            raise CheckError(f"{name} gives other codes when it is asked again")
        if not torch.equal(result.parameters.scale, again.parameters.scale):
            raise CheckError(f"{name} gives other scales when it is asked again")
        if int(result.codes.max()) >= 2**fmt.bits:
            raise CheckError(f"{name} gives codes beyond {fmt.bits} bits")
        measured, reported = _measured_loss(result, problem), result.report.get("loss", math.nan)
        if not abs(measured - reported) <= 1e-3 * max(measured, 1e-6):
            raise CheckError(f"{name} reports the loss {reported:.6g}, measured {measured:.6g}")
        total += measured
        nearest += float(relative_loss(problem.weight, _nearest(problem), problem.need_hessian()))
    if not total <= nearest * (1 + 1e-6):
        raise CheckError(f"{name} is worse than rounding to nearest: {total:.6g} against {nearest:.6g}")


def _measured_loss(result: QuantizedLinear, problem: LayerProblem) -> float:
    weight = result.weight(problem.scheme, problem.format)
    if result.adapter is not None:
        weight = weight + result.adapter.up.float() @ result.adapter.down.float()
    return float(relative_loss(problem.weight, weight, problem.need_hessian()))


def _nearest(problem: LayerProblem) -> Tensor:
    groups = to_groups(problem.weight, problem.scheme.strategy, problem.scheme.group_size)
    parameters = problem.format.fit(groups, problem.scheme, global_scale=problem.global_scale)
    return from_groups(problem.format.round(groups, parameters), problem.weight.shape)


def check_format(fmt: Format, *, scheme: TensorScheme | None = None) -> None:
    """Check a format: every code decodes and encodes to itself; rounding is idempotent, to the nearest, ties to even.

    Raises:
        CheckError: A promise is broken.
    """
    chosen = scheme or fmt.defaults
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 32, generator=generator)
    scale = fmt.global_scale(values.abs().amax(), chosen)
    parameters = fmt.fit(values, chosen, global_scale=scale)
    rounded = fmt.round(values, parameters)
    decoded = fmt.decode(fmt.encode(values, parameters), parameters)
    if not torch.equal(rounded, decoded):
        raise CheckError(f"`{fmt.name}`: round is not decode after encode")
    if not torch.equal(fmt.round(rounded, parameters), rounded):
        raise CheckError(f"`{fmt.name}`: rounding a rounded value changes it")
    codes = torch.arange(2**fmt.bits, dtype=torch.int64).to(torch.uint8).expand(16, -1)
    levels = fmt.decode(codes, parameters)
    finite = torch.isfinite(levels)
    back = fmt.decode(fmt.encode(torch.where(finite, levels, 0.0), parameters), parameters)
    if not torch.equal(back[finite], levels[finite]):
        raise CheckError(f"`{fmt.name}`: a code does not survive decoding and encoding")
    distance = (values.unsqueeze(-1) - torch.where(finite, levels, torch.inf).unsqueeze(1)).abs().amin(-1)
    if ((values - rounded).abs() > distance * (1 + 1e-5) + 1e-7).any():
        raise CheckError(f"`{fmt.name}`: a value is not rounded to the nearest level")
    if parameters.zero_point is None or not parameters.zero_point.frac().any():
        _check_ties(fmt, parameters)


def _check_ties(fmt: Format, parameters: GroupParameters) -> None:
    """Check that values halfway between neighbouring levels go up and down in turn, on a grid with steps of 1."""
    zero_point, multiplier = parameters.zero_point, parameters.global_scale
    unit = GroupParameters(
        torch.ones(1),
        None if zero_point is None else zero_point[:1],
        None if multiplier is None else torch.ones_like(multiplier),
    )
    levels = fmt.decode(torch.arange(2**fmt.bits).to(torch.uint8)[None], unit)
    levels = torch.tensor(sorted(set(levels[torch.isfinite(levels)].tolist())))
    ties = (levels[1:] + levels[:-1]) / 2
    up = fmt.round(ties[None], unit)[0] > ties
    if (up[1:] == up[:-1]).any():
        raise CheckError(f"`{fmt.name}`: a value between two levels does not go to the even one")


def check_kernel(
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Mapping[str, Any]],
    *,
    rtol: float = 1e-5,
) -> None:
    """Check that a kernel gives what the pure function gives.

    Args:
        run: The kernel.
        reference: The pure function of ``qtool.numerics``.
        inputs: Keyword arguments of several calls.
        rtol: Largest difference relative to the largest reference value.

    Raises:
        CheckError: They differ.
    """
    for index, arguments in enumerate(inputs):
        expected, received = reference(**arguments), run(**arguments)
        if expected.shape != received.shape:
            shapes = f"{tuple(received.shape)} in call {index}, the reference {tuple(expected.shape)}"
            raise CheckError(f"the kernel gives the shape {shapes}")
        difference = float((expected - received.to(expected)).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= rtol:
            raise CheckError(
                f"the kernel differs from the reference in call {index}: {difference:.2e}, allowed {rtol:.0e}"
            )
