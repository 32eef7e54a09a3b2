"""The target is what tokens say it is, goes as far as held-out tokens allow, and every solver takes it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.mitigators.target import Target, TargetConfig, best_part
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem
from qtool.errors import NumericalError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.testing import TinyModel, check_retargeter, tiny_model, two_stream_problem

PLUGINS = Plugins.discover()
N_OUT, N_IN, TOKENS, HELD = 10, 16, 400, 40


def streams(seed: int, *, tokens: int = TOKENS, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """What a layer reads and what it would read in full precision, a row a token, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(N_IN, N_IN, generator=generator, dtype=torch.float64) / N_IN**0.5
    f = torch.randn(tokens, N_IN, generator=generator, dtype=torch.float64) @ (mixing @ mixing + 0.2 * torch.eye(N_IN))
    drift = torch.randn(N_IN, N_IN, generator=generator, dtype=torch.float64) * (0.1 / N_IN**0.5)
    errors = torch.randn(tokens, N_IN, generator=generator, dtype=torch.float64)
    return f @ (0.95 * torch.eye(N_IN) + drift) + noise * f.std() * errors, f


def problem_of(x: Tensor, f: Tensor, *, held: int = HELD, seed: int = 0) -> LayerProblem:
    """A layer in float64 that reads these, with the last tokens held out."""
    weight = torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    last = slice(len(x) - held, None)
    entries = {
        "hessian": x.T @ x / len(x),
        "cross": f.T @ x / len(x),
        "held_out": torch.stack([x[last].T @ x[last], f[last].T @ x[last]]) / len(x),
    }
    return LayerProblem("layer", weight, Grid.of(Int3().defaults, Int3()), entries["hessian"], entries)


def details(artifact: Artifact) -> Mapping[str, Mapping[str, float]]:
    found: Mapping[str, Mapping[str, float]] = artifact.manifest.details["layers"]
    return found


def retargeted(of: LayerProblem, **options: Any) -> LayerProblem:  # noqa: ANN401 - of the config
    return Target().retarget(of, TargetConfig(**options))


def ridged(of: LayerProblem, x: Tensor, f: Tensor, ridge: float) -> Tensor:
    """``min ‖V x - W f‖² / tokens + λ ‖V - W‖²`` by least squares on tokens, with rows for the second term."""
    root, size = len(x) ** 0.5, (ridge * (x.T @ x / len(x)).diagonal().mean()).sqrt()
    left = torch.cat([x / root, size * torch.eye(N_IN).double()])
    right = torch.cat([f @ of.weight.T / root, size * of.weight.T])
    solution: Tensor = torch.linalg.lstsq(left, right).solution
    return solution.T


@pytest.mark.parametrize("text", ["int3-g16", "int4-asym", "nvfp4"])
@pytest.mark.parametrize("config", [TargetConfig(), TargetConfig(alpha=0.5), TargetConfig(alpha=1.0, ridge=0.0)])
def test_keeps_the_promises(text: str, config: TargetConfig) -> None:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    check_retargeter(Target(), PLUGINS.format(scheme.format), config, scheme=scheme)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
def test_all_the_way_is_least_squares_on_tokens(ridge: float) -> None:
    x, f = streams(1)
    of = problem_of(x, f)
    found = retargeted(of, alpha=1.0, ridge=ridge).weight
    torch.testing.assert_close(found, ridged(of, x, f, ridge), rtol=0, atol=1e-8)
    half = retargeted(of, alpha=0.5, ridge=ridge).weight
    torch.testing.assert_close(half, (found + of.weight) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"alpha": 1.0, "ridge": 0.0}, {"alpha": 0.3}])
def test_equal_streams_leave_the_weight(options: dict[str, float]) -> None:
    _, f = streams(2)
    of = problem_of(f, f)
    result = retargeted(of, **options)
    torch.testing.assert_close(result.weight, of.weight, rtol=0, atol=1e-12)
    assert result.report["target_shift"] < 1e-24


@pytest.mark.parametrize("text", ["int3-g16", "int2", "nvfp4"])
def test_no_way_at_all_is_plain_gptq(text: str) -> None:
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    for seed in range(3):
        of = two_stream_problem(PLUGINS.format(scheme.format), scheme, seed=seed)
        plain = GPTQ().quantize(replace(of, memory={}), GPTQConfig())
        aimed = GPTQ().quantize(retargeted(of, alpha=0.0), GPTQConfig())
        assert torch.equal(aimed.codes, plain.codes)
        assert all(torch.equal(a.scale, b.scale) for a, b in zip(aimed.parameters, plain.parameters, strict=True))


@pytest.mark.parametrize(("seed", "noise", "tokens"), [(3, 0.3, 60), (4, 0.6, 80), (5, 0.05, 400), (6, 2.0, 60)])
def test_the_part_is_the_best_on_held_out_tokens(seed: int, noise: float, tokens: int) -> None:
    """A grid search over explicit tokens, of a shift that was learned from the others."""
    x, f = streams(seed, tokens=tokens, noise=noise)
    held = tokens // 4
    of = problem_of(x, f, held=held)
    shift = ridged(of, x[:-held], f[:-held], 0.01) - of.weight

    def error(alpha: float) -> float:
        return float(((of.weight + alpha * shift) @ x[-held:].T - of.weight @ f[-held:].T).square().sum())

    grid = [index / 1000 for index in range(1001)]
    best = min(grid, key=error)
    result = retargeted(of)
    assert result.report["target_alpha"] == pytest.approx(best, abs=1e-3)
    whole = retargeted(of, alpha=1.0).weight - of.weight
    torch.testing.assert_close(result.weight, of.weight + result.report["target_alpha"] * whole, rtol=0, atol=1e-10)
    hessian = x.T @ x / tokens
    moved = result.weight - of.weight
    energy = float((moved @ hessian * moved).sum() / (of.weight @ hessian * of.weight).sum())
    assert result.report["target_shift"] == pytest.approx(energy, rel=1e-9)


def test_before_it_the_weight_as_it_was_is_rounded_and_misses_the_target() -> None:
    x, f = streams(8)
    of = problem_of(x, f)
    result = retargeted(of, alpha=1.0)
    nearest = RTN().quantize(of, ClipOptions()).weight(of.grid).double()
    missed, signal = ((x @ weight.T).square().sum() for weight in (result.weight - nearest, result.weight))
    assert result.report["loss_before"] == pytest.approx(float(missed / signal), rel=1e-6)
    solved = GPTQ().quantize(result, GPTQConfig())
    assert solved.report["loss"] < solved.report["loss_rtn"] < result.report["loss_before"]


def test_the_part_is_inside_somewhere_and_at_both_ends() -> None:
    """The cases above are not all at an end, and what points the wrong way is not followed."""
    x, f = streams(3, tokens=60)
    assert 0.05 < retargeted(problem_of(x, f, held=15)).report["target_alpha"] < 0.95
    eye, weight = torch.eye(N_IN).double(), torch.ones(1, N_IN).double()
    assert best_part(weight, -weight, eye, 2 * eye) == 0.0
    assert best_part(weight, weight, eye, 3 * eye) == 1.0
    assert best_part(weight, weight, eye, 1.25 * eye) == pytest.approx(0.25)
    assert best_part(weight, weight, 0 * eye, eye) == 0.0


def test_gptq_behind_it_comes_nearer_to_full_precision() -> None:
    """On tokens that nobody has seen."""
    total = alone = 0.0
    for seed in range(6):
        x, f = streams(10 + seed, tokens=2 * TOKENS, noise=0.2)
        of = problem_of(x[:TOKENS], f[:TOKENS], seed=seed)
        outputs = f[TOKENS:] @ of.weight.T
        for aimed in (True, False):
            result = GPTQ().quantize(retargeted(of) if aimed else of, GPTQConfig())
            left = (x[TOKENS:] @ result.weight(of.grid).double().T - outputs).square().sum() / outputs.square().sum()
            total, alone = total + float(left) * aimed, alone + float(left) * (not aimed)
    assert total < 0.97 * alone


def test_linears_of_a_site_share_the_work() -> None:
    x, f = streams(7)
    one, two = problem_of(x, f), replace(problem_of(x, f, seed=9))
    shared = replace(two, memory=one.memory)
    retargeted(one)
    kept = {key: value.clone() for key, value in one.memory.items()}
    assert len(kept) == 2
    assert torch.equal(retargeted(shared).weight, retargeted(two).weight)
    assert set(one.memory) == set(kept)
    assert all(torch.equal(one.memory[key], kept[key]) for key in kept)
    other = retargeted(shared, ridge=0.5)
    assert torch.equal(other.weight, retargeted(replace(two, memory={}), ridge=0.5).weight)


class TestBadInput:
    def test_behind_a_method_that_rounds(self) -> None:
        of = problem_of(*streams(0))
        with pytest.raises(UsageError, match="`target` starts from the weight, so it has to come first"):
            retargeted(of.after(GPTQ().quantize(of, GPTQConfig())))

    @pytest.mark.parametrize("missing", ["cross", "held_out"])
    def test_a_moment_that_was_not_gathered(self, missing: str) -> None:
        of = problem_of(*streams(0))
        of = replace(of, entries={name: entry for name, entry in of.entries.items() if name != missing})
        with pytest.raises(UsageError, match=f"no `{missing}` was gathered for `layer`"):
            retargeted(of)
        if missing == "held_out":
            assert "held_out" not in TargetConfig(alpha=0.5).needs
            retargeted(of, alpha=0.5)

    @pytest.mark.parametrize("bad", ["cross", "held_out"])
    def test_a_moment_that_is_not_finite(self, bad: str) -> None:
        of = problem_of(*streams(0))
        entry = of.entries[bad].clone()
        entry[..., 1, 2] = float("nan")
        with pytest.raises(NumericalError, match=f"`{bad}` of `layer` holds NaN or Inf"):
            retargeted(replace(of, entries={**of.entries, bad: entry}))

    @pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.1}, {"ridge": -1.0}, {"ridge": 11.0}])
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(UsageError, match=f"`{next(iter(options))}` is from 0 to"):
            TargetConfig(**options)

    def test_channels_that_are_never_seen(self) -> None:
        x, f = streams(0)
        x, f = x.clone(), f.clone()
        x[:, 3], f[:, 3] = 0.0, 0.0
        of = problem_of(x, f)
        for ridge in (0.0, 0.01):
            result = retargeted(of, alpha=1.0, ridge=ridge)
            assert bool(torch.isfinite(result.weight).all())
            torch.testing.assert_close(result.weight[:, 3], of.weight[:, 3], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama", plugins=PLUGINS) as model:
        yield model


class TestCompositions:
    def asked(self, tiny: TinyModel, method: str, name: str = "", **settings: str) -> MitigateRequest:
        scheme = read_scheme("", {"weights": "int3"}, tiny.workspace.plugins)
        output = tiny.workspace.home / f"{name or method}.safetensors"
        return MitigateRequest(str(tiny.statistics.path), method, scheme, settings, output=output)

    @pytest.mark.parametrize("method", ["target", "gptq+target"])
    def test_one_that_rounds_nothing_at_the_end_is_refused_before_any_work(
        self, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        def opened(*_: object) -> None:
            raise AssertionError("work was done")

        monkeypatch.setattr("qtool.steps.mitigate.open_subject", opened)
        with pytest.raises(UsageError, match="`target` says what the methods behind it aim at, and rounds nothing"):
            mitigate(self.asked(tiny, method), tiny.workspace)

    def test_behind_a_method_that_rounds_it_is_refused(self, tiny: TinyModel) -> None:
        with pytest.raises(UsageError, match="`target` starts from the weight, so it has to come first"):
            mitigate(self.asked(tiny, "gptq+target+cd"), tiny.workspace)

    @pytest.mark.parametrize(
        ("method", "reason", "hint"),
        [
            ("qronos+cd", "`cd` aims at the weight, and so undoes how `qronos` corrects", "target+gptq+cd"),
            ("gptaq+qera+cd", "`qera` aims at the weight, and so undoes how `gptaq`", "target+gptq+qera+cd"),
            ("lrc+cd+autoround", "`cd` aims at the weight, and so undoes how `lrc`", "target+gptq+cd+autoround"),
            ("target+qronos+cd", "`qronos` corrects .* as `target` does already", "target+gptq+cd"),
            ("target+lrc", "`lrc` corrects .* as `target` does already", "target+gptq"),
        ],
    )
    def test_deviations_are_not_corrected_twice_nor_is_that_undone(
        self, tiny: TinyModel, method: str, reason: str, hint: str
    ) -> None:
        with pytest.raises(UsageError, match=reason) as refused:
            mitigate(self.asked(tiny, method), tiny.workspace)
        assert refused.value.hint == f"--method {hint}"

    def test_blocks_go_on_from_codes_that_correct_deviations(self, tiny: TinyModel) -> None:
        found, _ = mitigate(self.asked(tiny, "gptaq+autoround", steps="2"), tiny.workspace)
        assert all("loss_cross" not in report and "loss" in report for report in details(found).values())
        alone, _ = mitigate(self.asked(tiny, "gptaq"), tiny.workspace)
        assert all("loss_cross" in report for report in details(alone).values())

    def test_no_way_gives_the_codes_of_gptq(self, tiny: TinyModel) -> None:
        plain, _ = mitigate(replace(self.asked(tiny, "gptq"), true_sequential=True), tiny.workspace)
        none, _ = mitigate(self.asked(tiny, "target+gptq", "none", alpha="0"), tiny.workspace)
        some, _ = mitigate(self.asked(tiny, "target+gptq", "some"), tiny.workspace)
        assert set(plain.names()) == set(none.names())
        assert all(torch.equal(plain.tensor(name), none.tensor(name)) for name in plain.names())
        assert any(not torch.equal(plain.tensor(name), some.tensor(name)) for name in plain.names())
        reports = some.manifest.details["layers"]
        assert all(0 <= report["target_alpha"] <= 1 for report in reports.values())
        assert {"loss", "loss_before", "target_shift"} <= set(reports["model.layers.1.mlp.down_proj"])
        assert all(report["loss_before"] == report["loss_rtn"] for report in details(none).values())
        last, _ = mitigate(self.asked(tiny, "target+gptq+lorc", rank="2"), tiny.workspace)
        before = {name: report["loss_before"] for name, report in details(last).items()}
        first = [name for name in before if "layers.0.self_attn.q_proj" in name]
        assert all(before[name] == reports[name]["loss"] for name in first), "of what the last method started from"
        assert len(first) == 1

    @pytest.mark.parametrize("method", ["target+rtn", "target+autoround", "target+ldlq+cd"])
    def test_others_take_it_too(self, tiny: TinyModel, method: str) -> None:
        settings = {"steps": "4"} if "autoround" in method else {}
        artifact, _ = mitigate(self.asked(tiny, method, **settings), tiny.workspace)
        shifts = [report["target_shift"] for report in artifact.manifest.details["layers"].values()]
        assert max(shifts[:3]) == 0.0  # in front of the first block both streams are one
        assert (max(shifts[3:7]) > 0) == (method != "target+autoround")  # behind q, k and v that are rounded no longer
        assert max(shifts[7:]) > 0

    def test_a_method_that_sees_whole_blocks_starts_from_it(self, tiny: TinyModel) -> None:
        """AutoRound without steps is rounding to nearest."""
        asked = replace(self.asked(tiny, "target+rtn", "all", alpha="1"), true_sequential=False)
        nearest, _ = mitigate(asked, tiny.workspace)
        block, _ = mitigate(self.asked(tiny, "target+autoround", "block", alpha="1", steps="0"), tiny.workspace)
        plain, _ = mitigate(self.asked(tiny, "rtn", "plain"), tiny.workspace)
        names = [name for name in nearest.names() if name.endswith(".codes")]
        assert all(torch.equal(nearest.tensor(name), block.tensor(name)) for name in names)
        assert any(not torch.equal(nearest.tensor(name), plain.tensor(name)) for name in names)
