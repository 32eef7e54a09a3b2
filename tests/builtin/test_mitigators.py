from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from qtool.builtin.formats.fp4 import E2M1, MXFP4, NVFP4
from qtool.builtin.formats.fp8 import E4M3
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.builtin.mitigators.cd import CDConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.lorc import LoRC, LoRCConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.plugin import register_mitigators
from qtool.engine.composition import Composition
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem, QuantizedLinear, SiblingMitigator
from qtool.errors import NumericalError, SchemeError, ShapeError, UsageError
from qtool.model.plan import Segment
from qtool.numerics import triangular
from qtool.numerics.groups import to_groups
from qtool.numerics.second_moments import diagonal_blocks
from qtool.scheme import Format, TensorScheme
from tests.oracles.gptq import Order, Params, gptq_oracle, visiting_order
from tests.oracles.lowrank import lorc_oracle, output_error
from tests.oracles.rounding import Grid as OracleGrid
from tests.oracles.rounding import int_grid, mxfp4_grid, nvfp4_global_scale, nvfp4_grid

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int2(), Int3(), Int4(), Int8(), E2M1(), MXFP4(), NVFP4(), E4M3())
}


def scheme_of(text: str) -> TensorScheme:
    """Read ``int4``, ``int4-g16`` (float32 scales) or ``int4-tensor``."""
    name, _, where = text.partition("-")
    scheme = FORMATS[name].defaults
    if where.startswith("g"):
        return replace(scheme, strategy="group", group_size=int(where[1:]), scale="fp32")
    return replace(scheme, strategy="tensor") if where else scheme


def problem(text: str, *, seed: int = 0, n_out: int = 12, n_in: int = 64, with_hessian: bool = True) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in // 3, generator=generator)
    inputs = mixing @ torch.randn(n_in // 3, 4 * n_in, generator=generator)
    inputs = inputs / n_in**0.5 + 0.3 * torch.randn(n_in, 4 * n_in, generator=generator)
    weight = 0.05 * torch.randn(n_out, n_in, generator=generator)
    scheme = scheme_of(text)
    hessian = inputs @ inputs.T / inputs.shape[1]
    return LayerProblem(
        "model.layers.0.mlp.up_proj",
        weight,
        Grid.of(scheme, FORMATS[scheme.format]),
        hessian=hessian if with_hessian else None,
    )


def on_grid(of: LayerProblem, **changes: Any) -> Grid:  # noqa: ANN401 - fields of a scheme
    """Return the grid of a problem with other choices in its scheme."""
    part = of.grid.parts[0]
    return Grid.of(replace(part.scheme, **changes), part.format)


def decoded(result: QuantizedLinear, of: LayerProblem) -> Tensor:
    return result.weight(of.grid)


def measured(result: QuantizedLinear, of: LayerProblem) -> float:
    """The loss of what is stored, adapter included, in float64."""
    assert of.hessian is not None
    stands = decoded(result, of).double()
    if result.adapter is not None:
        stands = stands + result.adapter.up.double() @ result.adapter.down.double()
    return output_error(of.weight.double() - stands, of.hessian) / output_error(of.weight, of.hessian)


def oracle_grid(of: LayerProblem) -> OracleGrid:
    if of.grid.parts[0].scheme.format == "nvfp4":
        return nvfp4_grid(nvfp4_global_scale(of.weight.flatten().tolist()))
    if of.grid.parts[0].scheme.format == "mxfp4":
        return mxfp4_grid("even")
    return int_grid(4, "tight", "bfloat16" if of.grid.parts[0].scheme.scale == "bf16" else "float32")


def test_the_plugin_offers_these_classes_with_their_contract() -> None:
    for entry in register_mitigators():
        module, _, name = entry.target.partition(":")
        offered = getattr(importlib.import_module(module), name)
        if isinstance(offered, Composition):
            continue  # of methods that are looked at themselves
        method = offered()
        assert method.version >= 1
        assert all(isinstance(need, str) for need in method.needs)
        method.Config()
    assert GPTQ.needs == ("hessian",)


class TestRTN:
    @pytest.mark.parametrize("text", ["int4", "int4-g16", "mxfp4", "nvfp4"])
    def test_rounds_each_group_by_itself(self, text: str) -> None:
        of = problem(text, n_out=4)
        result, grid = RTN().quantize(of, ClipOptions()), oracle_grid(of)
        size = of.grid.parts[0].scheme.group_size or 64
        for start in range(0, 64, size):
            scale, zero = grid.fit(of.weight[:, start : start + size].double())
            for col in range(start, start + size):
                codes = grid.encode(of.weight[:, col].double(), scale, zero)
                expected = grid.decode(codes, scale, zero)
                torch.testing.assert_close(decoded(result, of)[:, col].double(), expected, rtol=1e-6, atol=1e-9)
        assert result.report["clipped_fraction"] == 0.0
        assert result.report["loss"] == result.report["loss_rtn"]
        assert result.report["loss"] == pytest.approx(measured(result, of), rel=1e-4)

    def test_one_scale_for_a_whole_tensor(self) -> None:
        of = problem("int8-tensor")
        result = RTN().quantize(of, ClipOptions())
        assert result.parameters[0].scale.shape == (1,)
        # A bfloat16 scale is rounded down by 2^-8 at most, half a step of 127: the largest magnitude clips by a step.
        error = (of.weight - decoded(result, of)).abs().max()
        assert float(error) <= float(result.parameters[0].scale) * 1.01

    @pytest.mark.parametrize("metric", ["mse", "hessian"])
    @pytest.mark.parametrize("text", ["int3", "int3-g32", "int3-tensor", "nvfp4"])
    def test_the_clip_search_lowers_what_it_looks_at(self, text: str, metric: str) -> None:
        of = problem(text)
        assert of.hessian is not None
        plain = RTN().quantize(of, ClipOptions())
        found = RTN().quantize(of, ClipOptions(clip="search", clip_norm=2.0, clip_metric=metric))  # type: ignore[arg-type]
        seen = of.hessian.diagonal() if metric == "hessian" else torch.ones(64)
        before, after = (
            to_groups(
                (of.weight - decoded(result, of)).square() * seen,
                of.grid.parts[0].scheme.strategy,
                of.grid.parts[0].scheme.group_size,
            ).sum(-1)
            for result in (plain, found)
        )
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < float(before.sum())
        assert 0 < found.report["clipped_fraction"] <= 1
        assert 0.2 < found.report["mean_clip"] < 1
        assert found.report["loss_rtn"] == plain.report["loss"]
        assert found.report["loss"] == pytest.approx(measured(found, of), rel=1e-4)

    def test_the_hessian_metric_minds_the_diagonal(self) -> None:
        of = problem("int3-g32")
        assert of.hessian is not None
        weights = torch.ones(64)
        weights[of.weight[0, :32].abs().argmax()] = 0.0
        options = ClipOptions(clip="search", clip_metric="hessian")
        ignored = RTN().quantize(replace(of, hessian=torch.diag(weights)), options)
        minded = RTN().quantize(replace(of, hessian=torch.eye(64)), options)
        assert float(ignored.parameters[0].scale[0, 0]) < float(minded.parameters[0].scale[0, 0])
        assert torch.equal(ignored.parameters[0].scale[:, 1], minded.parameters[0].scale[:, 1])

    def test_without_a_hessian_it_reports_the_error_of_the_weight(self) -> None:
        of = problem("int3", with_hessian=False)
        report = RTN().quantize(of, ClipOptions(clip="search")).report
        assert set(report) == {"weight_error", "weight_error_rtn", "clipped_fraction", "mean_clip"}
        assert 0 < report["weight_error"] < report["weight_error_rtn"]

    def test_a_metric_that_was_not_gathered_is_asked_for(self) -> None:
        options = ClipOptions(clip="search", clip_metric="hessian")
        with pytest.raises(UsageError, match=r"no Hessian was gathered for `model.layers.0.mlp.up_proj`"):
            RTN().quantize(problem("int4", with_hessian=False), options)


class TestGPTQ:
    @pytest.mark.parametrize("dead", [False, True])
    @pytest.mark.parametrize("order", ["natural", "activation", "groups"])
    @pytest.mark.parametrize("source", ["fresh", "static", "stale"])
    @pytest.mark.parametrize("text", ["int4", "int4-g16", "mxfp4", "nvfp4"])
    def test_equals_the_oracle(self, text: str, source: Params, order: Order, dead: bool) -> None:
        of = problem(text, seed=2, n_out=3)
        assert of.hessian is not None
        hessian = of.hessian.double()
        if dead:
            hessian[[3, 40]] = 0
            hessian[:, [3, 40]] = 0
        # The method brings the mean of the live diagonal between 1/2 and 1; the oracle is given the same.
        live = hessian.diagonal()[hessian.diagonal() > 0].mean()
        hessian *= 2.0 ** -torch.frexp(live).exponent
        source = "static" if order == "activation" else source
        config = GPTQConfig(block_size=24, parameters=source, order=order, clip="none")
        result = GPTQ().quantize(replace(of, weight=of.weight.double(), hessian=hessian), config)
        _, values, *_ = gptq_oracle(
            of.weight,
            hessian,
            **oracle_grid(of)._asdict(),
            group_size=of.grid.parts[0].scheme.group_size or 64,
            params=source,
            block_size=24,
            order=order,
        )
        torch.testing.assert_close(decoded(result, of).double(), values, rtol=1e-6, atol=1e-9)
        assert result.counters["dead_columns"] == (2 if dead else 0)

    @pytest.mark.parametrize("text", ["int4", "int3-g16", "int4-tensor", "fp4", "nvfp4", "mxfp4", "fp8"])
    def test_beats_nearest_rounding_and_reports_what_one_measures(self, text: str) -> None:
        solved = nearest = 0.0
        for seed in range(5):
            of = problem(text, seed=seed)
            result = GPTQ().quantize(of, GPTQConfig())
            assert result.report["loss"] == pytest.approx(measured(result, of), rel=1e-3)
            plain = RTN().quantize(of, ClipOptions())
            assert result.report["loss_rtn"] == plain.report["loss"]
            assert result.report["dampening_frac"] == 0.01
            assert set(result.counters.values()) == {0}
            solved, nearest = solved + result.report["loss"], nearest + plain.report["loss"]
        assert solved < 0.8 * nearest

    @pytest.mark.parametrize("text", ["int4", "int4-g16", "int4-tensor", "nvfp4", "mxfp4", "fp8"])
    @pytest.mark.parametrize("options", [{"clip": "none"}, {"clip": "search", "clip_metric": "hessian"}])
    def test_is_nearest_rounding_on_a_diagonal_hessian(self, text: str, options: dict[str, str]) -> None:
        of = problem(text, n_out=32)
        assert of.hessian is not None
        of = replace(of, hessian=torch.diag(of.hessian.diagonal()))
        config = GPTQConfig(clip_norm=2.4, clip_grid=80, **options)  # type: ignore[arg-type]
        solved, nearest = GPTQ().quantize(of, config), RTN().quantize(of, ClipOptions(**options))  # type: ignore[arg-type]
        assert torch.equal(solved.codes, nearest.codes)
        assert torch.equal(solved.parameters[0].scale, nearest.parameters[0].scale)
        assert solved.report["clipped_fraction"] == pytest.approx(nearest.report["clipped_fraction"])
        assert (solved.report["clipped_fraction"] > 0) == (config.clip == "search")

    def test_clipping_and_more_bits_and_finer_groups_help(self) -> None:
        def loss(text: str, **options: object) -> float:
            config = GPTQConfig(**options)  # type: ignore[arg-type]
            return sum(GPTQ().quantize(problem(text, seed=seed), config).report["loss"] for seed in range(4))

        assert loss("int3") < loss("int3", clip="none")
        assert loss("int4") < loss("int3") < loss("int2")
        assert loss("int3-g16") < loss("int3-g32") < loss("int3-g64")

    def test_the_unit_of_the_inputs_does_not_matter_even_with_dead_ones(self) -> None:
        of = problem("int4-g16")
        assert of.hessian is not None
        hessian = of.hessian.clone()
        hessian[5] = hessian[:, 5] = 0
        one, other = (GPTQ().quantize(replace(of, hessian=hessian * unit), GPTQConfig()) for unit in (1.0, 2.0**-30))
        assert torch.equal(one.codes, other.codes)
        assert one.report["loss"] == pytest.approx(other.report["loss"])

    def test_dead_inputs_are_set_beside_the_mean_of_the_live_ones(self) -> None:
        of = problem("int4-g16", n_out=3)
        assert of.hessian is not None
        hessian = of.hessian.double()
        hessian[8:] = 0
        hessian[:, 8:] = 0
        hessian *= 2.0 ** -torch.frexp(hessian.diagonal()[:8].mean()).exponent
        config = GPTQConfig(dampening_frac=1.0, clip="none", parameters="fresh", order="natural")
        result = GPTQ().quantize(replace(of, weight=of.weight.double(), hessian=hessian), config)
        grid = oracle_grid(of)._asdict()
        _, values, *_ = gptq_oracle(of.weight, hessian, **grid, group_size=16, dampening_frac=1.0)
        torch.testing.assert_close(decoded(result, of).double(), values, rtol=1e-6, atol=1e-9)
        assert result.counters["dead_columns"] == 56

    def test_uses_the_global_scale_that_it_is_given(self) -> None:
        of = problem("nvfp4")
        (own,) = GPTQ().quantize(of, GPTQConfig()).parameters
        given = torch.tensor(2.0**-13)
        shared = replace(of, global_scales=(given,))
        for method, config in ((GPTQ(), GPTQConfig()), (RTN(), ClipOptions())):
            (parameters,) = method.quantize(shared, config).parameters  # type: ignore[arg-type]
            assert parameters.global_scale == given
            assert own.global_scale is not None
            assert own.global_scale != given
            assert float(parameters.step().max()) == pytest.approx(float(own.step().max()), rel=0.1)

    def test_raised_dampening_is_counted_and_told(self) -> None:
        of = problem("int4")
        hessian = torch.diag(torch.ones(64))
        hessian[0, 0] = -0.03
        result = GPTQ().quantize(replace(of, hessian=hessian), GPTQConfig(dampening_frac=0.001))
        assert result.report["dampening_frac"] == pytest.approx(0.1)
        assert result.counters == {"dead_columns": 0, "raised_dampening": 1, "float64_factors": 0, "fallback_rtn": 0}

    def test_float64_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        of, factor = problem("int4"), triangular.inverse_cholesky
        monkeypatch.setattr(triangular, "inverse_cholesky", lambda h: factor(h) if h.dtype == torch.float64 else None)
        assert GPTQ().quantize(of, GPTQConfig()).counters["float64_factors"] == 1

    @pytest.mark.parametrize("options", [{"clip": "none"}, {"clip": "search"}])
    @pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.diag(torch.linspace(-1, 1.5, 64))])
    def test_falls_back_to_nearest_rounding_and_counts_it(self, hessian: Tensor, options: dict[str, str]) -> None:
        of = replace(problem("int4-g16"), hessian=hessian)
        config = GPTQConfig(clip_norm=2.4, clip_grid=80, **options)  # type: ignore[arg-type]
        result, nearest = GPTQ().quantize(of, config), RTN().quantize(of, ClipOptions(**options))  # type: ignore[arg-type]
        assert torch.equal(result.codes, nearest.codes)
        assert int(result.codes.max()) > 8
        assert result.counters["fallback_rtn"] == 1
        assert result.counters["dead_columns"] == int((hessian.diagonal() == 0).sum())
        assert result.report == nearest.report

    @pytest.mark.parametrize("bad", [False, True])
    @pytest.mark.parametrize("text", ["int4", "int4-g16", "nvfp4", "int4-tensor"])
    def test_siblings_get_what_each_gets_alone(self, text: str, bad: bool) -> None:
        one = problem(text)
        siblings = [
            replace(one, name=str(rows), weight=size * problem(text, seed=rows, n_out=rows).weight)
            for rows, size in ((5, 1.0), (12, 0.5), (3, 2.0))
        ]
        if one.grid.parts[0].scheme.format == "nvfp4":
            siblings = [replace(sibling, global_scales=(torch.tensor(2.0**-13),)) for sibling in siblings]
        if bad:
            siblings = [replace(sibling, hessian=torch.zeros(64, 64)) for sibling in siblings]
        method, config = GPTQ(), GPTQConfig()
        assert isinstance(method, SiblingMitigator)
        for sibling, result in zip(siblings, method.quantize_siblings(siblings, config), strict=True):
            alone = method.quantize(sibling, config)
            assert torch.equal(result.codes, alone.codes)
            assert torch.equal(result.parameters[0].scale, alone.parameters[0].scale)
            assert result.parameters[0].global_scale == alone.parameters[0].global_scale
            assert result.report == pytest.approx(alone.report, rel=1e-5)
            assert result.counters == alone.counters
            assert result.counters["fallback_rtn"] == int(bad)

    def test_a_zero_point_goes_with_its_row(self) -> None:
        one = problem("int4-g16")
        grid = on_grid(one, symmetric=False)
        siblings = [replace(one, grid=grid, weight=one.weight[rows] + 0.02) for rows in (slice(5), slice(5, 12))]
        together = GPTQ().quantize(replace(one, grid=grid, weight=one.weight + 0.02), GPTQConfig())
        parts = GPTQ().quantize_siblings(siblings, GPTQConfig())
        assert torch.equal(torch.cat([decoded(part, one) for part in parts]), decoded(together, one))
        for part, rows in zip(parts, (slice(5), slice(5, 12)), strict=True):
            assert part.parameters[0].zero_point is not None
            assert together.parameters[0].zero_point is not None
            assert torch.equal(part.parameters[0].zero_point, together.parameters[0].zero_point[rows])

    def test_every_sibling_is_checked(self) -> None:
        one = problem("int4")
        broken = replace(one, name="broken", weight=one.weight / 0)
        with pytest.raises(NumericalError, match="`broken` holds NaN or Inf"):
            GPTQ().quantize_siblings([one, broken], GPTQConfig())

    def test_a_hessian_that_was_not_gathered_is_asked_for(self) -> None:
        with pytest.raises(UsageError, match="hint: qtool calibrate"):
            GPTQ().quantize(problem("int4", with_hessian=False), GPTQConfig())


class TestLoRC:
    def test_starts_from_nearest_rounding(self) -> None:
        of = problem("int3")
        result, nearest = LoRC().quantize(of, LoRCConfig(rank=4)), RTN().quantize(of, ClipOptions())
        assert torch.equal(result.codes, nearest.codes)
        assert result.report["loss_rtn"] == nearest.report["loss"]
        assert result.report["loss"] < nearest.report["loss"]

    def test_takes_what_the_method_to_the_left_made(self) -> None:
        of = problem("int3")
        left = GPTQ().quantize(of, GPTQConfig())
        result = LoRC().quantize(of.after(left), LoRCConfig(rank=4))
        assert result.codes is left.codes
        assert result.parameters is left.parameters
        assert result.counters == left.counters
        assert result.report["loss_rtn"] == left.report["loss_rtn"]
        assert result.report["dampening_frac"] == 0.01
        assert result.report["loss"] < left.report["loss"]

    @pytest.mark.parametrize(
        ("dtype", "torch_dtype", "tolerance"), [("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)]
    )
    def test_is_the_best_correction_up_to_its_storage(
        self, dtype: str, torch_dtype: torch.dtype, tolerance: float
    ) -> None:
        of = problem("int3")
        result = LoRC().quantize(of, LoRCConfig(rank=4, dtype=dtype))  # type: ignore[arg-type]
        assert result.adapter is not None
        up, down = result.adapter.up, result.adapter.down
        assert up.dtype == down.dtype == torch_dtype
        expected, least = lorc_oracle(of.weight, decoded(result, of), 4)
        assert float((up.double() @ down.double() - expected).norm() / expected.norm()) < tolerance
        left = (of.weight - decoded(result, of)).double() - up.double() @ down.double()
        assert float(left.square().sum()) == pytest.approx(least, rel=1e-3)
        assert result.report["loss"] == pytest.approx(measured(result, of), rel=1e-3)
        assert result.report["rank"] == 4.0

    def test_the_error_falls_with_the_rank_to_that_of_the_storage(self) -> None:
        of = problem("int2", with_hessian=False)
        errors = [LoRC().quantize(of, LoRCConfig(rank=rank)).report["weight_error"] for rank in (1, 3, 6, 11, 12)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4 < 1e-2 < errors[0]

    def test_refuses_what_it_cannot_do(self) -> None:
        of = problem("int3")
        with pytest.raises(UsageError, match=r"has no part of rank 32\n  weight  \(12, 64\)\nhint: --set rank=12"):
            LoRC().quantize(of, LoRCConfig())
        corrected = LoRC().quantize(of, LoRCConfig(rank=2))
        with pytest.raises(UsageError, match=r"already has a low-rank correction\nhint: one correction alone"):
            LoRC().quantize(of.after(corrected), LoRCConfig(rank=2))
        huge = replace(of, weight=of.weight * 1e12, hessian=None)
        with pytest.raises(
            NumericalError, match=r"`model.layers.0.mlp.up_proj` overflows fp16\nhint: --set dtype=bf16"
        ):
            LoRC().quantize(huge, LoRCConfig(rank=2, dtype="fp16"))


def in_blocks(of: LayerProblem, size: int = 32) -> LayerProblem:
    """Return a problem of which only blocks of the Hessian are known."""
    assert of.hessian is not None
    return replace(of, hessian=None, entries={"hessian_blocks": diagonal_blocks(of.hessian, size)})


class TestBlocksOfAHessian:
    """The clip search finds in blocks what it finds in the whole; losses are then of the weight."""

    @pytest.mark.parametrize("metric", ["hessian", "output"])
    @pytest.mark.parametrize("text", ["int3-g32", "int4-g16", "nvfp4", "mxfp4"])
    def test_codes_and_scales_are_the_same_to_the_bit(self, text: str, metric: str) -> None:
        options = ClipOptions(clip="search", clip_metric=metric)  # type: ignore[arg-type]
        of = problem(text)
        whole, blocks = RTN().quantize(of, options), RTN().quantize(in_blocks(of), options)
        assert torch.equal(blocks.codes, whole.codes)
        assert torch.equal(blocks.parameters[0].scale, whole.parameters[0].scale)
        plain = RTN().quantize(of, ClipOptions())
        assert not torch.equal(plain.parameters[0].scale, whole.parameters[0].scale)
        assert {"loss", "loss_rtn"} <= set(whole.report)
        assert {"weight_error", "weight_error_rtn"} <= set(blocks.report)
        assert "loss" not in blocks.report

    @pytest.mark.parametrize("text", ["int4", "int4-tensor", "int4-g64"])
    def test_the_diagonal_is_in_blocks_of_any_size(self, text: str) -> None:
        options = ClipOptions(clip="search", clip_metric="hessian")
        of = problem(text)
        whole = RTN().quantize(of, options)
        for size in (1, 16, 64):
            blocks = RTN().quantize(in_blocks(of, size), options)
            assert torch.equal(blocks.codes, whole.codes)

    @pytest.mark.parametrize(("text", "group"), [("int4", 64), ("int4-tensor", 64), ("int3-g64", 64)])
    def test_groups_beyond_a_block_need_the_whole(self, text: str, group: int) -> None:
        options = ClipOptions(clip="search", clip_metric="output")
        with pytest.raises(
            UsageError, match=r"groups of `model\.layers\.0\.mlp\.up_proj` do not lie in blocks"
        ) as refused:
            RTN().quantize(in_blocks(problem(text)), options)
        assert refused.value.facts == (("groups", group), ("blocks", 32))
        assert refused.value.hint == "qtool calibrate MODEL --gather hessian,absmax,sample"

    def test_the_whole_is_preferred(self) -> None:
        of = problem("int4-g16")
        other = replace(of, entries={"hessian_blocks": torch.eye(32).repeat(2, 1, 1)})
        options = ClipOptions(clip="search", clip_metric="output")
        assert torch.equal(RTN().quantize(of, options).codes, RTN().quantize(other, options).codes)

    def test_what_is_wrong_with_them_is_said(self) -> None:
        of = in_blocks(problem("int4-g16"))
        options = ClipOptions(clip="search", clip_metric="output")
        blocks = of.entries["hessian_blocks"].clone()
        for wrong in (blocks[:1], blocks[:, :16]):
            with pytest.raises(ShapeError, match="does not fit its weight"):
                RTN().quantize(replace(of, entries={"hessian_blocks": wrong}), options)
        blocks[1, 2, 3] = torch.nan
        with pytest.raises(NumericalError, match=r"Hessian of `model.layers.0.mlp.up_proj` holds NaN"):
            RTN().quantize(replace(of, entries={"hessian_blocks": blocks}), options)


METHODS: list[Callable[[LayerProblem], QuantizedLinear]] = [
    lambda of: RTN().quantize(of, ClipOptions()),
    lambda of: GPTQ().quantize(of, GPTQConfig()),
    lambda of: LoRC().quantize(of, LoRCConfig(rank=2)),
]


AWQ_SEARCH: dict[str, Any] = {"clip": "search", "clip_metric": "output", "clip_grid": 20, "clip_floor": 0.5}


class TestClipByOutput:
    @pytest.mark.parametrize("text", ["int3-g16", "int3", "int3-tensor", "nvfp4"])
    def test_each_group_has_the_clip_with_the_least_output_error(self, text: str) -> None:
        of = problem(text, n_out=4)
        assert of.hessian is not None
        part = of.grid.parts[0]
        found = RTN().quantize(of, ClipOptions(**AWQ_SEARCH))
        size = part.scheme.group_size or 64
        energies = []
        for clip in (None, *(1 - i / 38 for i in range(20))):
            if clip is None:
                rounded = decoded(found, of)
            else:
                scale = of.grid.global_scales(of.weight.abs().amax(0))[0]
                groups = part.groups(of.weight)
                rounded = part.format.round(groups, part.fit(groups, global_scale=scale, clip=clip))
            error = (rounded.reshape(4, 64) - of.weight).double().reshape(4, -1, size)
            blocks = torch.stack([of.hessian[i : i + size, i : i + size].double() for i in range(0, 64, size)])
            by_group = torch.einsum("rgi,gij,rgj->rg", error, blocks, error)
            energies.append(by_group.sum().reshape(1, 1) if text.endswith("tensor") else by_group)
        chosen, least = energies[0], torch.stack(energies[1:]).amin(0)
        torch.testing.assert_close(chosen, least, rtol=1e-4, atol=1e-12)
        assert bool((least < energies[1]).any())

    def test_gptq_searches_the_same_on_the_weight_before_it_is_solved(self) -> None:
        of = problem("int3-g16")
        nearest = RTN().quantize(of, ClipOptions(**AWQ_SEARCH))
        solved = GPTQ().quantize(of, GPTQConfig(**AWQ_SEARCH))
        assert torch.equal(solved.parameters[0].scale, nearest.parameters[0].scale)
        assert not torch.equal(solved.codes, nearest.codes)
        assert solved.report["loss"] < nearest.report["loss"]

    def test_the_options_say_that_they_need_blocks_of_a_hessian(self) -> None:
        assert ClipOptions(**AWQ_SEARCH).needs == ("hessian_blocks",)
        assert ClipOptions(clip_metric="output").needs == ()
        with pytest.raises(UsageError, match="no Hessian was gathered"):
            RTN().quantize(problem("int3", with_hessian=False), ClipOptions(**AWQ_SEARCH))

    def test_the_range_that_the_scheme_keeps_is_where_the_search_starts(self) -> None:
        of = problem("int4-g16")
        kept = replace(of, grid=on_grid(of, clip=0.6))
        plain, clipped = RTN().quantize(of, ClipOptions()), RTN().quantize(kept, ClipOptions())
        torch.testing.assert_close(clipped.parameters[0].scale, 0.6 * plain.parameters[0].scale)
        found = RTN().quantize(kept, ClipOptions(clip="search", clip_norm=2.0))
        assert bool((found.parameters[0].scale <= clipped.parameters[0].scale).all())
        assert found.report["loss_rtn"] == clipped.report["loss"]
        torch.testing.assert_close(
            GPTQ().quantize(kept, GPTQConfig(clip="none")).parameters[0].scale, clipped.parameters[0].scale
        )


def mixed(text: str, apart: str, *, channels: int = 16, **options: Any) -> LayerProblem:  # noqa: ANN401 - of `problem`
    """A problem whose last channels are in another format."""
    of = problem(text, **options)
    segment = Segment(channels, apart)
    return replace(of, grid=Grid.segmented(of.grid.parts[0].scheme, [segment], FORMATS.__getitem__))


class TestMixedGrids:
    @pytest.mark.parametrize("order", ["natural", "activation"])
    @pytest.mark.parametrize(("text", "apart"), [("int3-g16", "int8"), ("int3", "int4"), ("nvfp4", "int8")])
    def test_gptq_equals_a_solver_of_one_column_at_a_time(self, text: str, apart: str, order: Order) -> None:
        of = mixed(text, apart, n_out=3)
        assert of.hessian is not None
        of = replace(of, hessian=of.hessian + 0.1 * torch.eye(64))
        config = GPTQConfig(clip="none", order=order)
        result = GPTQ().quantize(of, config)
        scales = of.grid.global_scales(of.weight.abs().amax(0))
        current = of.weight.double().clone()
        hessian = of.hessian.double() + 0.01 * of.hessian.diagonal().double().mean() * torch.eye(64).double()
        left = visiting_order(hessian, order)
        values = torch.zeros_like(current)
        while left:
            inverse = torch.linalg.inv(hessian[left][:, left])
            col = left.pop(0)
            place, part = next((c, p) for c, p in of.grid.places(64) if c.start <= col < c.stop)
            size = part.scheme.group_size or place.stop - place.start
            start = place.start + (col - place.start) // size * size
            scale = scales[of.grid.parts.index(part)]
            parameters = part.fit(of.weight[:, start : start + size], global_scale=scale)
            values[:, col] = part.format.round(current[:, col : col + 1].float(), parameters)[:, 0].double()
            step = (current[:, col] - values[:, col]) / inverse[0, 0]
            current[:, left] -= torch.outer(step, inverse[0, 1:])
        torch.testing.assert_close(decoded(result, of).double(), values, rtol=1e-6, atol=1e-8)
        assert result.report["loss"] < result.report["loss_rtn"]
        assert result.report["loss"] == pytest.approx(measured(result, of), rel=1e-3)

    @pytest.mark.parametrize("config", [GPTQConfig(), GPTQConfig(parameters="fresh", order="natural")])
    @pytest.mark.parametrize("text", ["int4-g16", "nvfp4", "int4-tensor"])
    def test_siblings_get_what_each_gets_alone(self, text: str, config: GPTQConfig) -> None:
        one = mixed(text, "int8")
        siblings = [
            replace(one, name=str(rows), weight=problem(text, seed=rows, n_out=rows).weight) for rows in (5, 12)
        ]
        shared = one.grid.global_scales(torch.full((64,), 0.3))
        siblings = [replace(sibling, global_scales=shared) for sibling in siblings]
        for sibling, result in zip(siblings, GPTQ().quantize_siblings(siblings, config), strict=True):
            alone = GPTQ().quantize(sibling, config)
            assert torch.equal(result.codes, alone.codes)
            for ours, theirs in zip(result.parameters, alone.parameters, strict=True):
                torch.testing.assert_close(ours.scale, theirs.scale)
            assert result.report == pytest.approx(alone.report, rel=1e-5)

    @pytest.mark.parametrize("metric", ["hessian", "output"])
    @pytest.mark.parametrize("parameters", ["static", "fresh"])
    def test_each_group_is_clipped_by_its_own_part_of_the_hessian(self, parameters: Any, metric: Any) -> None:  # noqa: ANN401
        of = mixed("int3-g16", "int3")
        sizes = torch.logspace(-2, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
        of = replace(of, hessian=sizes.diag())  # nothing is updated, so that fresh groups are as static ones
        search = {"clip": "search", "clip_metric": metric, "clip_norm": 2.0, "clip_grid": 40}
        solved = GPTQ().quantize(of, GPTQConfig(parameters=parameters, order="natural", **search))
        nearest = RTN().quantize(of, ClipOptions(**search))
        alike = RTN().quantize(of, ClipOptions(**{**search, "clip_metric": "mse"}))
        for own, theirs, other in zip(solved.parameters, nearest.parameters, alike.parameters, strict=True):
            assert torch.equal(own.scale, theirs.scale)
            assert not torch.equal(own.scale, other.scale)

    def test_better_channels_lower_the_error_and_the_correction_starts_from_it(self) -> None:
        plain, better = problem("int3-g16"), mixed("int3-g16", "int8", channels=32)
        for method in METHODS:
            assert method(better).report["loss"] < method(plain).report["loss"]
        left = GPTQ().quantize(better, GPTQConfig())
        corrected = LoRC().quantize(better.after(left), LoRCConfig(rank=2))
        assert corrected.report["loss"] == pytest.approx(measured(corrected, better), rel=1e-3)
        assert corrected.report["weight_error" if better.hessian is None else "loss"] < left.report["loss"]

    @pytest.mark.parametrize("method", [0, 1, 2])
    def test_groups_that_do_not_divide_a_part_are_refused(self, method: int) -> None:
        with pytest.raises(SchemeError, match=r"sets channels apart in the input of `model\.layers\.0\.mlp\.up_proj`"):
            METHODS[method](mixed("int4-g16", "int8", channels=8))


@pytest.mark.parametrize("method", METHODS, ids=["rtn", "gptq", "lorc"])
class TestEveryMethod:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused_by_name(
        self, method: Callable[[LayerProblem], QuantizedLinear], value: float
    ) -> None:
        of = problem("int4")
        assert of.hessian is not None
        weight, hessian = of.weight.clone(), of.hessian.clone()
        weight[1, 2] = hessian[3, 3] = value
        with pytest.raises(
            NumericalError, match=r"weight of `model.layers.0.mlp.up_proj` holds NaN.*\n  values  1 of 768"
        ):
            method(replace(of, weight=weight))
        with pytest.raises(NumericalError, match=r"Hessian of `model.layers.0.mlp.up_proj` holds NaN"):
            method(replace(of, hessian=hessian))

    def test_shapes_that_do_not_fit_are_refused(self, method: Callable[[LayerProblem], QuantizedLinear]) -> None:
        of = problem("int4")
        with pytest.raises((ShapeError, TypeCheckError), match=r"does not fit its weight|hessian"):
            method(replace(of, hessian=torch.eye(63)))
        with pytest.raises(
            SchemeError, match=r"group size 48 does not divide the input of `model.layers.0.mlp.up_proj`"
        ):
            method(replace(of, grid=Grid.of(scheme_of("int4-g48"), FORMATS["int4"])))

    def test_two_runs_agree_and_the_problem_stays(self, method: Callable[[LayerProblem], QuantizedLinear]) -> None:
        of = problem("int4-g16")
        assert of.hessian is not None
        before = of.weight.clone(), of.hessian.clone()
        first, second = method(of), method(of)
        assert torch.equal(first.codes, second.codes)
        assert first.report == second.report
        assert torch.equal(of.weight, before[0])
        assert torch.equal(of.hessian, before[1])

    def test_a_weight_of_zeros_costs_nothing(self, method: Callable[[LayerProblem], QuantizedLinear]) -> None:
        of = problem("int4-g16")
        of = replace(of, weight=torch.zeros_like(of.weight))
        result = method(of)
        assert not decoded(result, of).any()
        assert result.report["loss"] == 0.0

    def test_the_report_is_plain_and_finite(self, method: Callable[[LayerProblem], QuantizedLinear]) -> None:
        result = method(problem("nvfp4"))
        assert all(type(value) is float for value in result.report.values())
        assert all(type(value) is int for value in result.counters.values())
        assert {"loss", "loss_rtn"} <= set(result.report)
        assert result.codes.dtype == torch.uint8


@pytest.mark.parametrize("method", METHODS[:2], ids=["rtn", "gptq"])
def test_nothing_made_before_is_thrown_away(method: Callable[[LayerProblem], QuantizedLinear]) -> None:
    of = problem("int4")
    with pytest.raises(UsageError, match="starts from the weight, so it has to come first"):
        method(of.after(RTN().quantize(of, ClipOptions())))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    of = problem("fp4-g16")
    weight, seen = of.weight + 1, torch.zeros(64, 64)
    weight[:, 0], weight[:, 1], seen[0, 0] = 0.0, -1.0, 1.0
    of = replace(of, weight=weight, hessian=seen, grid=on_grid(of, symmetric=False))
    with pytest.raises(NumericalError, match=r"the loss of `model.layers.0.mlp.up_proj` is not finite"):
        RTN().quantize(of, ClipOptions())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ClipOptions, {"clip": "best"}, "`clip` has no value `best`\n  known  none, search\nhint: --set clip=none"),
        (ClipOptions, {"clip": "search", "clip_metric": "max"}, "`clip_metric` has no value `max`"),
        (ClipOptions, {"clip_norm": 0.0}, "`clip_norm` is above 0 and up to 16, not 0.0\nhint: --set clip_norm=2.4"),
        (ClipOptions, {"clip_norm": float("nan")}, "`clip_norm` is above 0 and up to 16, not nan"),
        (ClipOptions, {"clip_grid": 100}, "`clip_grid` is from 1 to 99 ratios, not 100"),
        (ClipOptions, {"clip_floor": 0.0}, "`clip_floor` is from 0.01 to 1, not 0.0\nhint: --set clip_floor=0.5"),
        (ClipOptions, {"clip_ceiling": 0.9}, "`clip_ceiling` is from 1 to 4, not 0.9\nhint: --set clip_ceiling=1.75"),
        (ClipOptions, {"clip_ceiling": float("nan")}, "`clip_ceiling` is from 1 to 4, not nan"),
        (ClipOptions, {"clip_metric": "output", "clip_norm": 3.0}, "`clip_norm` has no effect on the metric `output`"),
        (GPTQConfig, {"clip": "yes"}, "`clip` has no value `yes`"),
        (GPTQConfig, {"dampening_frac": -0.1}, "`dampening_frac` is from 0 to 10, not -0.1"),
        (GPTQConfig, {"dampening_frac": float("inf")}, "`dampening_frac` is from 0 to 10, not inf"),
        (GPTQConfig, {"block_size": 0}, "`block_size` is a number of columns, not 0"),
        (GPTQConfig, {"parameters": "old"}, "`parameters` has no value `old`\n  known  fresh, static, stale"),
        (GPTQConfig, {"parameters": "fresh"}, "hint: --set parameters=fresh --set order=groups"),
        (GPTQConfig, {"order": "first"}, "`order` has no value `first`\n  known  natural, activation, groups"),
        (CDConfig, {"visits": "first"}, "`visits` has no value `first`\n  known  activation, natural, greedy"),
        (GPTQConfig, {"order": "activation", "parameters": "stale"}, "so it cannot fit stale parameters"),
        (LoRCConfig, {"rank": 0}, "`rank` is 1 or more, not 0"),
        (LoRCConfig, {"dtype": "fp8"}, "`dtype` has no value `fp8`\n  known  bf16, fp16"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(config: type, options: dict[str, object], message: str) -> None:
    with pytest.raises((UsageError, TypeCheckError)) as raised:
        config(**options)
    if isinstance(raised.value, UsageError):
        assert message in str(raised.value)
