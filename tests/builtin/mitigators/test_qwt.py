"""What is added to a block's output is what regression on tokens says, only where it helps, and executed as stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.formats.integer import Int2, Int3
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.qwt import QwT, QwTConfig
from qtool.engine.block_problem import BlockProblem, BlockResult, Compensation
from qtool.engine.execute import BlockExecutable
from qtool.engine.network import Network
from qtool.errors import NumericalError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import stored_bits
from qtool.steps.subjects import open_subject
from qtool.testing import TinyModel, block_problem, check_block_mitigator, tiny_model

PLUGINS = Plugins.discover()
HIDDEN, WINDOWS = 32, 16
HELD = range(14, 16)
"""The last eighth of the windows."""


def refined(block: BlockProblem, **options: Any) -> BlockResult:  # noqa: ANN401 - of the config
    return QwT().refine(block, QwTConfig(**options))


def int2() -> BlockProblem:
    return block_problem(Int2(), Int2.defaults)


def lacking(block: BlockProblem, rows: range) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs with weights rounded to nearest, and what those lack, a row a token, in float64."""
    weights = {}
    for name, problem in block.problems.items():
        ((_, part),) = problem.grid.places(problem.weight.shape[1])
        groups = part.groups(problem.weight)
        weights[name] = part.format.round(groups, part.fit(groups, global_scale=None)).reshape(problem.weight.shape)
    x = block.inputs(rows)
    y = block.forward(weights, x)
    return tuple(one.flatten(0, 1).double() for one in (x, y, block.targets(rows) - y))  # type: ignore[return-value]


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether it is the same up to the rounding to bfloat16 in which it is stored."""
    return float((found.double() - expected).norm() / expected.norm()) < 2**-8


@pytest.mark.parametrize("form", ["full", "low-rank", "affine"])
@pytest.mark.parametrize("text", ["int2", "int4-g16", "nvfp4"])
def test_keeps_the_promises_of_a_block_mitigator(form: str, text: str) -> None:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    config = QwTConfig(form=form, rank=5)  # type: ignore[arg-type]
    check_block_mitigator(QwT(), PLUGINS.format(scheme.format), config, scheme=scheme)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_full_is_least_squares_on_tokens_with_a_column_of_ones(batch: int) -> None:
    block = int2()
    found = refined(block, form="full", ridge=0.0, batch=batch).compensation
    x, _, missing = lacking(block, range(HELD.start))
    solution = torch.linalg.lstsq(with_ones(x), missing).solution
    assert found is not None
    assert found.up is None
    assert found.scale is None
    assert close(found.matrix(), solution[:HIDDEN].T)
    assert close(found.bias, solution[HIDDEN])


@pytest.mark.parametrize("rank", [1, 6, HIDDEN])
def test_a_rank_is_the_best_of_that_rank(rank: int) -> None:
    block = int2()
    found = refined(block, form="low-rank", rank=rank, ridge=0.0).compensation
    x, _, missing = lacking(block, range(HELD.start))
    solution = torch.linalg.lstsq(with_ones(x), missing).solution[:HIDDEN]
    fitted = (x - x.mean(0)) @ solution
    _, _, v = torch.linalg.svd(fitted, full_matrices=False)
    expected = (solution @ v[:rank].T @ v[:rank]).T
    assert found is not None
    assert found.up is not None
    assert found.up.shape == (HIDDEN, rank)
    assert close(found.matrix(), expected)
    assert close(found.bias, missing.mean(0) - expected @ x.mean(0))


def test_affine_is_a_factor_and_a_shift_of_each_channel_of_the_output() -> None:
    block = int2()
    found = refined(block, form="affine", ridge=0.0).compensation
    _, y, missing = lacking(block, range(HELD.start))
    assert found is not None
    assert found.scale is not None
    assert found.down is None
    for channel in range(HIDDEN):
        solution = torch.linalg.lstsq(
            with_ones(y[:, channel : channel + 1]), missing[:, channel : channel + 1]
        ).solution
        assert float(found.scale[channel]) == pytest.approx(float(solution[0]), rel=2**-8)
        assert float(found.bias[channel]) == pytest.approx(float(solution[1]), rel=2**-8)


@pytest.mark.parametrize("form", ["full", "low-rank", "affine"])
def test_errors_are_those_of_the_windows_that_were_held_out(form: str) -> None:
    block = int2()
    result = refined(block, form=form)
    x, y, missing = lacking(block, HELD)
    energy = (y + missing).square().sum()
    assert result.report["block_loss_before"] == pytest.approx(float(missing.square().sum() / energy), rel=1e-5)
    assert result.compensation is not None
    left = y + missing - result.compensation.added(x, y)
    assert result.report["block_loss"] == pytest.approx(float(left.square().sum() / energy), rel=1e-4)
    assert result.report["block_loss"] < result.report["block_loss_before"]


def test_nothing_is_added_where_it_does_not_help_on_windows_that_were_held_out() -> None:
    """What the last windows lack is the opposite of what all others do."""
    block = int2()
    _, y, _ = lacking(block, range(WINDOWS))
    outputs = y.float().view(WINDOWS, -1, HIDDEN)
    signs = torch.tensor([-1.0 if index in HELD else 1.0 for index in range(WINDOWS)])[:, None, None]
    odd = replace(block, targets=lambda rows: (outputs + 0.5 * signs)[list(rows)])
    result = refined(odd, form="full")
    assert result.compensation is None
    assert result.report["block_loss"] == result.report["block_loss_before"]
    even = replace(block, targets=lambda rows: (outputs + 0.5)[list(rows)])
    assert refined(even, form="full").compensation is not None


def test_it_starts_from_what_the_method_to_the_left_made() -> None:
    block = block_problem(Int3(), Int3.defaults)
    made = {}
    for name, problem in block.problems.items():
        first = GPTQ().quantize(problem, GPTQConfig())
        made[name] = LoRC().quantize(problem.after(first), LoRCConfig(rank=2, dtype="int8"))
    behind = replace(block, problems={name: one.after(made[name]) for name, one in block.problems.items()})
    result = refined(behind, form="full")
    for name, linear in result.linears.items():
        assert torch.equal(linear.codes, made[name].codes)
        assert linear.adapter is made[name].adapter
        assert linear.report["loss"] == pytest.approx(made[name].report["loss"], rel=1e-6)  # scales of factors count
        assert linear.report["changed_fraction"] == 0.0


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": 0}, "`rank` is 1 or more"),
            ({"ridge": -0.1}, "`ridge` is from 0 to 10"),
            ({"batch": 0}, "`batch` is a number of windows"),
        ],
    )
    def test_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(UsageError, match=match):
            QwTConfig(**options)

    def test_a_rank_beyond_the_hidden_size(self) -> None:
        with pytest.raises(UsageError, match="`rank` is 32 at most, the hidden size") as refused:
            refined(int2(), rank=33)
        assert refused.value.hint == "--set rank=32"

    @pytest.mark.parametrize("what", ["inputs", "targets"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, what: str, bad: float) -> None:
        block = int2()
        of_rows = getattr(block, what)
        broken = replace(block, **{what: lambda rows: of_rows(rows).clone().index_fill_(1, torch.tensor(3), bad)})
        with pytest.raises(NumericalError, match="the outputs of block 0 are not finite"):
            refined(broken)

    def test_a_single_window_judges_itself(self) -> None:
        one = block_problem(Int2(), Int2.defaults, windows=1)
        result = refined(one, rank=1, ridge=1.0)
        assert result.report["block_loss"] <= result.report["block_loss_before"]


class TestCompensation:
    def parts(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"bias": (5,), "scale": (5,), "down": (2, 5), "up": (5, 2), "square": (5, 5)}
        return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    def test_what_is_added(self) -> None:
        p, x, y = self.parts(), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
        cases = {
            "bias": (Compensation(p["bias"]), y + p["bias"]),
            "affine": (Compensation(p["bias"], scale=p["scale"]), y + y * p["scale"] + p["bias"]),
            "full": (Compensation(p["bias"], down=p["square"]), y + x @ p["square"].T + p["bias"]),
            "low-rank": (
                Compensation(p["bias"], down=p["down"], up=p["up"]),
                y + x @ p["down"].T @ p["up"].T + p["bias"],
            ),
        }
        for name, (compensation, expected) in cases.items():
            torch.testing.assert_close(compensation.added(x, y), expected, msg=name)
            known = y if name == "affine" else x
            torch.testing.assert_close(y + known @ compensation.matrix().T + p["bias"], expected, msg=name)
        assert cases["full"][0].added(x.bfloat16(), y.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama", plugins=PLUGINS) as model:
        yield model


def solved(tiny: TinyModel, method: str, activations: str = "", **settings: str) -> Artifact:
    """Weights of 2 bits; a name for each method, activations and options."""
    parts = {"weights": "int2", **({"activations": activations} if activations else {})}
    scheme = read_scheme("", parts, tiny.workspace.plugins)
    name = "-".join([method, activations, *(f"{key}{value}" for key, value in settings.items())])
    asked = MitigateRequest(
        str(tiny.statistics.path),
        method,
        scheme,
        settings,
        round_activations=bool(activations),
        output=tiny.workspace.home / f"{name}.safetensors",
    )
    return mitigate(asked, tiny.workspace)[0]


FORMS = [{"form": "full"}, {"form": "low-rank", "rank": "12"}, {"form": "affine"}]


class TestOnAModel:
    @pytest.mark.parametrize("settings", FORMS)
    def test_blocks_are_not_worse_and_executed_as_they_were_solved(
        self, tiny: TinyModel, settings: dict[str, str]
    ) -> None:
        artifact = solved(tiny, "rtn+qwt", **settings)
        reports = artifact.manifest.details["blocks"]
        assert set(reports) == {"0", "1"}
        assert all(one["block_loss"] <= one["block_loss_before"] for one in reports.values())
        assert any(one["block_loss"] < one["block_loss_before"] for one in reports.values())
        windows = tiny.statistics.tensor("windows").long()
        subject = open_subject(str(artifact.path), tiny.workspace).subject
        executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64)
        (blockwise,) = (logits for _, logits in executable.forward_windows(windows))
        with torch.no_grad():
            whole = executable.whole()(windows).logits
        torch.testing.assert_close(whole, blockwise, rtol=0, atol=1e-9)
        plain = open_subject(str(solved(tiny, "rtn").path), tiny.workspace).subject
        (bare,) = (
            logits
            for _, logits in BlockExecutable(plain, device=torch.device("cpu"), dtype=torch.float64).forward_windows(
                windows
            )
        )
        assert not torch.equal(bare, blockwise)

    @pytest.mark.parametrize("settings", FORMS)
    @pytest.mark.parametrize("activations", ["", "int4-sym-token", "fp4-g8-se4m3"])
    def test_reported_errors_are_those_of_the_stored_model(
        self, tiny: TinyModel, settings: dict[str, str], activations: str
    ) -> None:
        """Two whole runs: one of the model, one of what lies in the artifact; the last window is held out."""
        artifact = solved(tiny, "rtn+qwt", activations, **settings)
        subject = open_subject(str(artifact.path), tiny.workspace).subject
        windows = tiny.statistics.tensor("windows").long()
        exact, quantized = (
            Network(one, device=torch.device("cpu"), dtype=torch.float64) for one in (tiny.subject, subject)
        )
        f, arguments = exact.embed(windows)
        x = f
        for layer in (0, 1):
            content = quantized.load(layer)
            exact.load(layer)
            f, y = exact.run(layer, f, arguments[layer]), quantized.run(layer, x, arguments[layer])
            report = artifact.manifest.details["blocks"][str(layer)]
            quantized.compensations[layer] = None
            bare = quantized.run(layer, x, arguments[layer])
            expected = bare if content.compensation is None else content.compensation.added(x, bare)
            assert torch.equal(y, expected)
            for key, outputs in (("block_loss", y), ("block_loss_before", bare)):
                left = (outputs - f)[-1].square().sum() / f[-1].square().sum()
                assert report[key] == pytest.approx(float(left), rel=1e-4), (layer, key)
            x = y

    def test_what_is_stored_and_counted(self, tiny: TinyModel) -> None:
        plain, low = solved(tiny, "rtn"), solved(tiny, "rtn+qwt", form="low-rank", rank="12")
        names = set(low.names()) - set(plain.names())
        parts = ("bias", "down", "up")
        assert {name for name in names if ".layers.0." in name} == {
            f"model.layers.0.compensation.{part}" for part in parts
        }
        added = [low.tensor(name) for name in names]
        assert {one.dtype for one in added} == {torch.bfloat16}
        bits = [stored_bits(open_subject(str(one.path), tiny.workspace)) for one in (plain, low)]
        count = sum(tiny.subject.stored(f"{one.name}.weight").numel() for one in tiny.subject.model.graph.linears)
        more = 16 * sum(one.numel() for one in added) / count
        assert bits[1]["linears"] - bits[0]["linears"] == pytest.approx(more, rel=1e-9)

    def test_a_method_behind_it_sees_it_and_full_precision_does_not(
        self, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def refine(block: BlockProblem, config: Any) -> BlockResult:  # noqa: ANN401 - of another method
            del config
            starts = {name: one.previous for name, one in block.problems.items()}
            weights = {name: made.weight(block.problems[name].grid) for name, made in starts.items() if made}
            rows = range(block.windows)
            x = block.inputs(rows)
            seen.append((x, block.forward(weights, x), block.targets(rows), torch.zeros(0)))
            return BlockResult({name: made for name, made in starts.items() if made})

        method = tiny.workspace.plugins.load("mitigators", "autoround")
        monkeypatch.setattr(method, "refine", refine, raising=False)
        artifact = solved(tiny, "rtn+qwt+autoround", form="full", steps="3")
        subject = open_subject(str(artifact.path), tiny.workspace).subject
        windows = tiny.statistics.tensor("windows").long()
        exact, quantized = (
            Network(one, device=torch.device("cpu"), dtype=torch.float64) for one in (tiny.subject, subject)
        )
        f, arguments = exact.embed(windows)
        x = f
        for layer, (inputs, outputs, targets, _) in enumerate(seen):
            exact.load(layer)
            assert quantized.load(layer).compensation is not None
            f, y = exact.run(layer, f, arguments[layer]), quantized.run(layer, x, arguments[layer])
            for found, expected in ((inputs, x), (outputs, y), (targets, f)):
                torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
            x = y

    def test_one_at_most_is_added(self, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def refine(block: BlockProblem, config: Any) -> BlockResult:  # noqa: ANN401 - of another method
            del config
            starts = {name: one.previous for name, one in block.problems.items() if one.previous is not None}
            return BlockResult(starts, Compensation(torch.zeros(24)))

        monkeypatch.setattr(tiny.workspace.plugins.load("mitigators", "autoround"), "refine", refine, raising=False)
        with pytest.raises(UsageError, match="two methods add to the output of a block"):
            solved(tiny, "rtn+qwt+autoround", form="affine")

    @pytest.mark.parametrize("target", ["compressed-tensors", "hf"])
    def test_checkpoints_have_no_place_for_it(
        self, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        artifact = solved(tiny, "rtn+qwt", form="affine")
        exporter = tiny.workspace.plugins.load("exporters", target)

        def write(*_: object) -> None:
            raise AssertionError("work was done")

        monkeypatch.setattr(exporter, "write", write, raising=False)
        output = tiny.workspace.home / "checkpoint"
        with pytest.raises(UsageError, match="checkpoints have no place for what is added") as refused:
            pack(PackRequest(str(artifact.path), target, output), tiny.workspace)
        assert ("first", "model.layers.0") in refused.value.facts
        assert refused.value.hint.startswith("qtool mitigate without the method")
        assert not output.exists()
