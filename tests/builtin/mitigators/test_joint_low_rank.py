"""SVDQuant, CALDERA, LRC and the intrinsic correction: against slow oracles on tokens, and what all promise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import qtool.builtin.mitigators.lorc as storing
import qtool.numerics.gptq as gptq_numerics
import qtool.numerics.lowrank as lowrank
from qtool.builtin.formats.integer import Int3
from qtool.builtin.mitigators import intrinsic
from qtool.builtin.mitigators.alternation import AlternatingConfig, JointConfig, keep_best
from qtool.builtin.mitigators.caldera import Caldera, CalderaConfig
from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.intrinsic import Intrinsic, IntrinsicConfig
from qtool.builtin.mitigators.lorc import LoRCConfig
from qtool.builtin.mitigators.lrc import LRC, LRCConfig
from qtool.builtin.mitigators.qera import QERA
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.builtin.mitigators.svdquant import SVDQuant, SVDQuantConfig
from qtool.engine.problem import Adapter, LayerProblem
from qtool.errors import NumericalError, UsageError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.testing.mitigators import check_mitigator, correlated_problem
from tests.builtin.mitigators.joint_cases import gptq_as_oracle, parts, problem_of, same_as_seen, streams
from tests.oracles.low_rank_joint import (
    Pair,
    caldera_oracle,
    intrinsic_oracle,
    lrc_oracle,
    moment,
    regressed,
    svdquant_oracle,
)
from tests.oracles.lowrank import output_error, qera_oracle

PLUGINS = Plugins.discover()
ALL: list[tuple[Any, type[JointConfig]]] = [
    (SVDQuant(), SVDQuantConfig),
    (Caldera(), CalderaConfig),
    (LRC(), LRCConfig),
    (Intrinsic(), IntrinsicConfig),
]
EVERY = pytest.mark.parametrize(("method", "config"), ALL)
SEEDS = pytest.mark.parametrize("seed", range(3))
RANK = 4


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Factors are stored as they are computed."""
    with monkeypatch.context() as patch:
        patch.setitem(storing._DTYPES, "bf16", torch.float64)
        yield


class Both:
    """A method on problems with the statistics of two equal streams, as the check of mitigators takes it."""

    version, needs, Config = 1, ("hessian",), object

    def __init__(self, method: Any) -> None:  # noqa: ANN401 - any method
        self.method = method

    def quantize(self, problem: LayerProblem, config: Any) -> Any:  # noqa: ANN401 - as the method
        return self.method.quantize(of_equal_streams(problem), config)


def of_equal_streams(of: LayerProblem) -> LayerProblem:
    hessian = of.need_hessian()
    return replace(of, entries={**of.entries, "cross": hessian, "full_hessian": hessian})


def problem(seed: int = 0) -> LayerProblem:
    return of_equal_streams(correlated_problem(Int3(), Int3().defaults, seed=seed, n_out=24, n_in=48))


def turns(config: type[JointConfig], count: int) -> dict[str, Any]:
    """The option that says how often codes and correction are chosen, where there is one."""
    return {"iterations": count} if issubclass(config, AlternatingConfig) else {}


def best_of(pairs: list[Pair], weight: Tensor, full: Tensor, rounded: Tensor) -> tuple[int, Pair]:
    """The pair whose outputs are nearest, by tokens; the branch reads the first stream."""
    losses = [
        float((weight @ full - decoded @ rounded - branch @ full).square().sum() / full.shape[1])
        for decoded, branch in pairs
    ]
    place = min(range(len(pairs)), key=losses.__getitem__)
    return place, pairs[place]


@EVERY
@pytest.mark.parametrize("text", ["int4-g32", "nvfp4", "int3-asym"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_keeps_the_contract(method: Any, config: type[JointConfig], text: str, dtype: Any) -> None:  # noqa: ANN401
    scheme = parse_tensor_scheme(text, PLUGINS.format)
    options = config(rank=5, dtype=dtype, **turns(config, 2))
    check_mitigator(Both(method), PLUGINS.format(scheme.format), options, scheme=scheme)


@pytest.mark.parametrize("name", ["svdquant", "caldera", "lrc", "intrinsic"])
def test_is_found_by_its_name(name: str) -> None:
    assert type(PLUGINS.load("mitigators", name)).__name__.lower() == name


@SEEDS
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_svdquant_equals_its_oracle(seed: int, solver: Any, exact: None) -> None:  # noqa: ANN401
    _, inputs = streams(seed)
    of, options = problem_of(inputs, inputs, seed), SVDQuantConfig(rank=RANK, iterations=3, solver=solver)

    def rounded(target: Tensor, hessian: Tensor) -> Tensor:
        clip = ClipOptions(**{name: getattr(options, name) for name in ClipOptions.__dataclass_fields__})
        return RTN().quantize(replace(of, weight=target, hessian=hessian), clip).weight(of.grid).double()

    pairs = svdquant_oracle(of.weight, inputs, gptq_as_oracle(of, options) if solver == "gptq" else rounded, RANK, 3)
    place, (decoded, branch) = best_of(pairs, of.weight, inputs, inputs)
    result = SVDQuant().quantize(of, options)
    ours, added = parts(result, of)
    assert result.report["best_iteration"] == place + 1
    torch.testing.assert_close(ours, decoded, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(added, branch, rtol=0, atol=1e-6)
    assert result.adapter is not None
    assert result.adapter.reads == "full"


@SEEDS
def test_caldera_equals_its_oracle(seed: int, exact: None) -> None:
    _, inputs = streams(seed)
    of, options = problem_of(inputs, inputs, seed), CalderaConfig(rank=RANK, iterations=4)
    pairs = caldera_oracle(of.weight, inputs, gptq_as_oracle(of, options), RANK, 4)
    place, (decoded, correction) = best_of(pairs, of.weight, inputs, inputs)
    result = Caldera().quantize(of, options)
    ours, added = parts(result, of)
    assert result.report["best_iteration"] == place + 1
    torch.testing.assert_close(ours, decoded, rtol=1e-6, atol=1e-7)
    assert same_as_seen(added, correction, inputs, 1e-5)


@SEEDS
@pytest.mark.parametrize("size", [0.05, 0.3])
def test_lrc_equals_its_oracle(seed: int, size: float, exact: None) -> None:
    full, rounded = streams(seed, size)
    of, options = problem_of(full, rounded, seed), LRCConfig(rank=RANK, iterations=3, dampening_frac=0.0)
    pairs = lrc_oracle(of.weight, (full, rounded), gptq_as_oracle(of, options), RANK, 3)
    place, (decoded, branch) = best_of(pairs, of.weight, full, rounded)
    result = LRC().quantize(of, options)
    ours, added = parts(result, of)
    assert result.report["best_iteration"] == place + 1
    torch.testing.assert_close(ours, decoded, rtol=1e-6, atol=1e-7)
    assert same_as_seen(added, branch, full, 1e-5)
    signal = (of.weight @ full).square().sum()
    nearest = RTN().quantize(of, ClipOptions()).weight(of.grid)
    for key, codes, correction in (("target_loss", ours, added), ("target_loss_before", nearest, added * 0)):
        left = of.weight @ full - codes.to(full) @ rounded - correction @ full
        assert result.report[key] == pytest.approx(float(left.square().sum() / signal), rel=1e-5)
    assert result.report["target_loss"] < result.report["target_loss_before"]


def test_lrc_brings_the_target_nearer_than_what_minds_one_stream() -> None:
    """The floor of the noise is the same for all; what they lose above it is not."""
    totals = dict.fromkeys(("gptq", "qera", "lrc"), 0.0)
    for seed in range(6):
        full, rounded = streams(seed)
        of = problem_of(full, rounded, seed)
        left = GPTQ().quantize(of, GPTQConfig())
        corrected = QERA().quantize(of.after(left), LoRCConfig(rank=RANK))
        branch = LRC().quantize(of, LRCConfig(rank=RANK))
        signal = (of.weight @ full).square().sum()
        for name, outputs in (
            ("gptq", left.weight(of.grid).double() @ rounded),
            ("qera", sum(parts(corrected, of)) @ rounded),
            ("lrc", parts(branch, of)[0] @ rounded + parts(branch, of)[1] @ full),
        ):
            totals[name] += float((of.weight @ full - outputs).square().sum() / signal)
    assert totals["lrc"] < 0.8 * totals["qera"] < 0.8 * totals["gptq"]


@SEEDS
def test_lrc_of_equal_streams_is_gptq_and_qera_and_goes_on_as_caldera(seed: int, exact: None) -> None:
    """Then ``R = C = H``: the target is ``W - LR``, ``T`` is ``W - Ŵ``, and the loss is that of the output."""
    _, inputs = streams(seed)
    of = problem_of(inputs, inputs, seed)
    left = GPTQ().quantize(of, GPTQConfig())
    expected = QERA().quantize(of.after(left), LoRCConfig(rank=RANK))
    first = LRC().quantize(of, LRCConfig(rank=RANK, iterations=1))
    assert torch.equal(first.codes, expected.codes)
    torch.testing.assert_close(parts(first, of)[1], parts(expected, of)[1], rtol=0, atol=1e-10)
    assert first.report["target_loss"] == pytest.approx(first.report["loss"], rel=1e-6)
    _, least = qera_oracle(of.weight, first.weight(of.grid), of.need_hessian(), RANK)
    theory = least / output_error(of.weight, of.need_hessian())
    assert first.report["target_loss"] == pytest.approx(theory, rel=1e-5)
    on = LRC().quantize(of, LRCConfig(rank=RANK, iterations=4))
    caldera = Caldera().quantize(of, CalderaConfig(rank=RANK, iterations=4, factor_iterations=0))
    assert torch.equal(on.codes, caldera.codes)
    assert on.report["loss"] == pytest.approx(caldera.report["loss"], rel=1e-5)


@SEEDS
def test_the_intrinsic_correction_equals_its_oracle(seed: int, exact: None) -> None:
    _, inputs = streams(seed)
    of, options = problem_of(inputs, inputs, seed), IntrinsicConfig(rank=RANK, finish="none")
    decoded, correction = intrinsic_oracle(of.weight, inputs, gptq_as_oracle(of, options), RANK)
    result = Intrinsic().quantize(of, options)
    ours, added = parts(result, of)
    torch.testing.assert_close(ours, decoded, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(added, correction, rtol=0, atol=1e-7)
    # What both lose is what the solver saw.
    vectors = torch.linalg.eigh(of.need_hessian())[1][:, :-RANK]
    rest = vectors @ vectors.T @ of.need_hessian() @ vectors @ vectors.T
    seen = output_error(of.weight - ours, rest) / output_error(of.weight, of.need_hessian())
    assert result.report["loss"] == pytest.approx(seen, rel=1e-4)
    finished = Intrinsic().quantize(of, IntrinsicConfig(rank=RANK))
    assert torch.equal(finished.codes, result.codes)
    assert finished.report["loss"] < result.report["loss"]
    _, least = qera_oracle(of.weight, ours, of.need_hessian(), RANK)
    assert finished.report["loss"] == pytest.approx(least / output_error(of.weight, of.need_hessian()), rel=1e-4)


def test_the_intrinsic_correction_beats_gptq_and_qera() -> None:
    totals = dict.fromkeys(("gptq", "lorc", "none", "qera", "behind"), 0.0)
    for seed in range(8):
        of = problem(seed)
        left = GPTQ().quantize(of, GPTQConfig())
        totals["gptq"] += left.report["loss"]
        totals["behind"] += QERA().quantize(of.after(left), LoRCConfig(rank=RANK)).report["loss"]
        for finish in ("none", "qera"):
            totals[finish] += Intrinsic().quantize(of, IntrinsicConfig(rank=RANK, finish=finish)).report["loss"]  # type: ignore[arg-type]
    assert totals["qera"] < 0.9 * totals["behind"] < 0.9 * totals["gptq"]
    assert totals["qera"] < 0.9 * totals["none"] < 0.9 * totals["gptq"]


def test_siblings_share_eigenvectors_and_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {"eigenvectors": 0, "factor": 0}

    def counted(name: str, function: Any) -> Any:  # noqa: ANN401 - any function
        def call(*given: Any) -> Any:  # noqa: ANN401 - what it takes
            calls[name] += 1
            return function(*given)

        return call

    monkeypatch.setattr(intrinsic, "leading_eigenvectors", counted("eigenvectors", lowrank.leading_eigenvectors))
    monkeypatch.setattr(gptq_numerics, "factorize_inverse", counted("factor", gptq_numerics.factorize_inverse))
    of = problem()
    weights = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(3)).unbind()
    siblings = [replace(of, name=f"linear {i}", weight=one, seed=i) for i, one in enumerate(weights)]
    options = IntrinsicConfig(rank=RANK, finish="none")
    together = Intrinsic().quantize_siblings(siblings, options)
    again = Intrinsic().quantize_siblings(siblings[:1], options)[0]
    assert calls == {"eigenvectors": 1, "factor": 1}
    alone = [Intrinsic().quantize(replace(one, memory={}), options) for one in siblings]
    for ours, theirs in zip([*together, again], [*alone, alone[0]], strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert ours.adapter is not None
        assert theirs.adapter is not None
        assert torch.equal(ours.adapter.up, theirs.adapter.up)
        assert torch.equal(ours.adapter.down, alone[0].adapter.down)  # type: ignore[union-attr]
        assert ours.report == pytest.approx(theirs.report)
    mixed = [replace(siblings[0], expert=True), *siblings[1:]]
    results = Intrinsic().quantize_siblings([replace(one, memory={}) for one in mixed], options)
    assert [one.adapter is None for one in results] == [True, False, False]
    assert torch.equal(results[1].codes, alone[1].codes)
    assert torch.equal(results[0].codes, GPTQ().quantize(siblings[0], GPTQConfig()).codes)


@pytest.mark.parametrize(("method", "config"), ALL[:3])
def test_siblings_are_solved_as_one_and_as_each_alone(
    method: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved: list[int] = []
    whole = GPTQ.quantize_siblings

    def counted(self: GPTQ, problems: Sequence[LayerProblem], config: Any) -> Any:  # noqa: ANN401
        solved.append(len(problems))
        return whole(self, problems, config)

    monkeypatch.setattr(GPTQ, "quantize_siblings", counted)
    of = problem()
    weights = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(3)).unbind()
    siblings = [replace(of, name=f"linear {i}", weight=one, seed=i, memory={}) for i, one in enumerate(weights)]
    expert = replace(siblings[0], name="expert", expert=True)
    options = config(rank=RANK, iterations=3)
    together = method.quantize_siblings([siblings[0], expert, *siblings[1:]], options)
    assert solved == [1, 3, 3, 3]
    for one, ours in zip([siblings[0], expert, *siblings[1:]], together, strict=True):
        theirs = method.quantize(replace(one, memory={}), options)
        assert torch.equal(ours.codes, theirs.codes)
        assert (ours.adapter is None) == (theirs.adapter is None) == one.expert
        if ours.adapter is not None and theirs.adapter is not None:
            torch.testing.assert_close(ours.adapter.product(), theirs.adapter.product(), rtol=1e-4, atol=1e-6)
        assert ours.report == pytest.approx(theirs.report, rel=1e-5)
    assert torch.equal(together[1].codes, GPTQ().quantize(expert, options).codes)


@pytest.mark.parametrize(("method", "config"), ALL[:3])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_best_iterate_is_kept(method: Any, config: Any, dtype: Any) -> None:  # noqa: ANN401
    improved, key = 0, "target_loss" if isinstance(method, LRC) else "loss"
    for seed in range(3):
        found = [method.quantize(problem(seed), config(rank=RANK, dtype=dtype, iterations=k)) for k in (1, 2, 5)]
        losses = [one.report[key] for one in found]
        assert losses == sorted(losses, reverse=True)
        assert [one.report["iterations"] for one in found] == [1, 2, 5]
        assert all(one.report["best_iteration"] <= one.report["iterations"] for one in found)
        improved += losses[-1] < losses[0]
    assert improved >= 1


def test_of_equally_good_iterates_the_first_is_kept() -> None:
    of = problem()
    solved = GPTQ().quantize(of, GPTQConfig())
    adapters = [Adapter(torch.zeros(1, 48), torch.zeros(24, 1) + i) for i in range(4)]
    losses, others = iter([3.0, 1.0, 1.0, 2.0]), iter([3.0, 4.0, 2.0, 2.0])
    rounds = [[(solved, one), (solved, one)] for one in adapters]
    best, other = keep_best([of, of], rounds, [lambda *_: next(losses), lambda *_: next(others)])
    assert (best.adapter is adapters[1], other.adapter is adapters[2]) == (True, True)
    assert (best.report["iterations"], best.report["best_iteration"]) == (4.0, 2.0)
    assert (other.report["iterations"], other.report["best_iteration"]) == (4.0, 3.0)


@EVERY
def test_the_report_measures_what_is_stored(method: Any, config: type[JointConfig]) -> None:  # noqa: ANN401
    of = problem()
    result = method.quantize(of, config(rank=RANK))
    decoded, added = parts(result, of)
    signal = output_error(of.weight, of.need_hessian())
    nearest = RTN().quantize(of, ClipOptions()).report["loss"]
    assert result.report["loss"] == pytest.approx(
        output_error(of.weight - decoded - added, of.need_hessian()) / signal, rel=1e-3
    )
    assert result.report["loss_before"] == result.report["loss_rtn"] == pytest.approx(nearest, rel=1e-5)
    assert result.report["rank"] == RANK
    assert result.counters == GPTQ().quantize(of, GPTQConfig()).counters


@EVERY
def test_of_full_rank_nothing_but_the_storage_is_lost(method: Any, config: type[JointConfig]) -> None:  # noqa: ANN401
    report = method.quantize(problem(), config(rank=24)).report
    assert report["loss"] < 1e-4 * report["loss_rtn"]


@EVERY
def test_factors_of_8_bits_change_little(method: Any, config: Any) -> None:  # noqa: ANN401
    """Where codes are chosen again, they are others: then only on average."""
    wide, narrow = list[float](), list[float]()
    for seed in range(4):
        for dtype, losses in (("bf16", wide), ("int8", narrow)):
            options = config(rank=RANK, dtype=dtype, **turns(config, 1))
            losses.append(method.quantize(problem(seed), options).report["loss"])
    assert sum(narrow) == pytest.approx(sum(wide), rel=0.01 if not isinstance(method, SVDQuant) else 0.05)


def test_caldera_makes_up_for_the_rounding_of_its_factors() -> None:
    """Of what 8 bits lose over full precision, a part."""
    exact = 0.0
    losses = {count: 0.0 for count in (0, 1, 5)}
    for seed in range(4):
        of = problem(seed)
        for count in losses:
            options = CalderaConfig(rank=22, dtype="int8", iterations=1, factor_iterations=count)
            losses[count] += (made := Caldera().quantize(of, options)).report["loss"]
        _, least = qera_oracle(of.weight, made.weight(of.grid), of.need_hessian(), 22)
        exact += least / output_error(of.weight, of.need_hessian())
    lost = [losses[count] - exact for count in (0, 1, 5)]
    assert 0 < lost[2] < 0.9 * lost[1] < 0.9 * lost[0]


@EVERY
def test_experts_go_without_unless_asked(method: Any, config: Any) -> None:  # noqa: ANN401
    of = replace(problem(), expert=True)
    plain = method.quantize(of, config(rank=1000))
    assert plain.adapter is None
    assert torch.equal(plain.codes, GPTQ().quantize(of, GPTQConfig()).codes)
    asked = method.quantize(of, config(rank=RANK, experts=True))
    assert asked.adapter is not None
    assert torch.equal(asked.codes, method.quantize(problem(), config(rank=RANK)).codes)


@EVERY
def test_refuses_what_it_cannot_do(method: Any, config: type[JointConfig]) -> None:  # noqa: ANN401
    of = problem()
    with pytest.raises(UsageError, match=r"has no part of rank 32\n  weight  \(24, 48\)\nhint: --set rank=24"):
        method.quantize(of, config())
    with pytest.raises(UsageError, match="starts from the weight, so it has to come first"):
        method.quantize(of.after(GPTQ().quantize(of, GPTQConfig())), config(rank=2))
    with pytest.raises(UsageError, match="no Hessian was gathered for `layer`"):
        method.quantize(replace(of, hessian=None), config(rank=2))
    with pytest.raises(NumericalError, match="the Hessian of `layer` holds NaN or Inf"):
        method.quantize(replace(of, hessian=of.need_hessian() * torch.nan), config(rank=2))
    with pytest.raises(UsageError, match="`rank` is 1 or more, not 0"):
        config(rank=0)
    with pytest.raises(UsageError, match="`dampening_frac` is from 0 to 10"):
        config(rank=2, dampening_frac=-1.0)


@pytest.mark.parametrize("name", ["cross", "full_hessian"])
def test_lrc_asks_for_both_streams(name: str) -> None:
    of = problem()
    bare = {key: one for key, one in of.entries.items() if key != name}
    with pytest.raises(UsageError, match=f"no `{name}` was gathered for `layer`"):
        LRC().quantize(replace(of, entries=bare), LRCConfig(rank=2))
    with pytest.raises(NumericalError, match=f"`{name}` of `layer` holds NaN"):
        LRC().quantize(replace(of, entries={**bare, name: of.need_hessian() * torch.nan}), LRCConfig(rank=2))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SVDQuantConfig, {"iterations": 0}, "`iterations` is from 1 to 1000, not 0\nhint: --set iterations=10"),
        (SVDQuantConfig, {"solver": "rtn", "order": "natural"}, "`order` has no effect on the solver `rtn`"),
        (CalderaConfig, {"factor_iterations": -1}, "`factor_iterations` is from 0 to 1000, not -1"),
        (LRCConfig, {"reads": "quantized"}, "the branch of `lrc` reads what is not rounded\nhint: --method caldera"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(config: Any, options: dict[str, Any], message: str) -> None:  # noqa: ANN401
    with pytest.raises(UsageError) as raised:
        config(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (SVDQuantConfig, "solver", "cd"),
        (IntrinsicConfig, "finish", "svd"),
        (LoRCConfig, "dtype", "int4"),
        (LoRCConfig, "reads", "both"),
    ],
)
def test_values_that_an_option_does_not_have_are_refused(config: Any, option: str, value: str) -> None:  # noqa: ANN401
    with pytest.raises((UsageError, TypeCheckError), match=rf"`{option}` has no value `{value}`|Actual value"):
        config(**{option: value})


def test_where_inputs_are_apart_the_intrinsic_codes_are_the_nearest() -> None:
    """Also those of inputs that the correction takes over alone, of which nothing is left in the Hessian."""
    of = problem()
    diagonal = torch.diag(torch.logspace(-2, 2, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(2))])
    result = Intrinsic().quantize(replace(of, hessian=diagonal), IntrinsicConfig(rank=RANK, clip="none"))
    assert torch.equal(result.codes, RTN().quantize(of, ClipOptions()).codes)
    assert result.counters["dead_columns"] == 0


@pytest.mark.parametrize("tokens", [3, 10])
@EVERY
def test_few_samples_and_dead_inputs(method: Any, config: type[JointConfig], tokens: int) -> None:  # noqa: ANN401
    """With fewer tokens than the rank, nothing is left of the Hessian beside the correction."""
    of = problem()
    inputs = of.entries["sample"][:tokens].clone()
    inputs[:, [3, 40]] = 0.0
    of = of_equal_streams(replace(of, hessian=inputs.T @ inputs / tokens))
    result = method.quantize(of, config(rank=RANK))
    assert result.report["loss"] < 0.1 * result.report["loss_rtn"]
    assert result.counters["dead_columns"] == 2
    assert result.counters["fallback_rtn"] == (isinstance(method, Intrinsic) and tokens < RANK)


def test_the_oracle_regresses() -> None:
    full, rounded = streams(1)
    of = problem_of(full, rounded)
    expected = of.weight @ of.entries["cross"] @ torch.linalg.inv(moment(rounded))
    torch.testing.assert_close(regressed(of.weight @ full, rounded), expected, rtol=0, atol=1e-8)
