"""Experts: statistics of all tokens or of the routed ones, routing untouched, and a way out for those that starve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact, open_artifact
from qtool.builtin.mitigators.rtn import ClipOptions
from qtool.engine.block import BlockSolver
from qtool.engine.carry import CarriedStatistics
from qtool.engine.grid import Grid
from qtool.engine.network import Network
from qtool.engine.problem import LayerProblem
from qtool.errors import NumericalError, UsageError
from qtool.model.plan import Plan
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme
from qtool.steps.calibrate import EVERYTHING, CalibrateRequest, calibrate
from qtool.steps.foresee import foresee
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.run import RunRequest, run
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from qtool.testing import save_tiny_model, tiny_config
from tests.steps.conftest import Desk, Watch

TOKENS = 3 * 32
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
UNSEEN, STARVED = 4, 5
"""Experts of the first model: one that no token is ever sent to, and one that few are."""


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    for name, changes in MODELS.items():
        save_tiny_model(folder / name, tiny_config(name, **changes))
    file = folder / "qwen2_moe" / "model.safetensors"
    tensors = load_file(file)
    router = tensors["model.layers.1.mlp.gate.weight"]
    # Two of the first four experts always have positive logits, in every direction; the fifth has 0.
    router[1], router[2], router[3], router[UNSEEN] = -router[0], router[0] / 2, -router[0] / 2, 0.0
    generator = torch.Generator().manual_seed(4)
    router[STARVED] = 0.48 * router[0] - 0.3 * torch.randn(24, generator=generator, dtype=router.dtype)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, found_plugins: Plugins, cache: Path) -> Workspace:
    """A workspace that the tests share: what one of them makes, another finds by its key."""
    home = tmp_path_factory.mktemp("bench")
    return Workspace(found_plugins, home, cache)


@pytest.fixture
def sparse(bench: Workspace, tiny_folder: Path, sparse_folder: Path) -> Desk:
    return Desk(bench, sparse_folder / "qwen2_moe", tiny_folder / "text.txt", [])


@pytest.fixture
def tidy(desk: Desk, sparse_folder: Path) -> Desk:
    """The same model in a workspace that nothing has been made in."""
    return replace(desk, model=sparse_folder / "qwen2_moe")


def weights(desk: Desk, text: str = "int4-g4", **parts: str) -> ModelScheme:
    return read_scheme("", {"weights": text, **parts}, desk.workspace.plugins)


def asked_of(desk: Desk, statistics: Artifact, **how: Any) -> MitigateRequest:  # noqa: ANN401 - fields of the request
    """GPTQ in 4 bits; the search for clip ratios would only take time."""
    plain = {"method": "gptq", "scheme": weights(desk), "settings": {"clip": "none"}, **how}
    return MitigateRequest(str(statistics.path), **plain)


def counts(artifact: Artifact) -> dict[str, list[int]]:
    return {n: artifact.tensor(n).tolist() for n in artifact.names() if n.endswith("experts.tokens")}


def multipliers(network: Network, layer: int) -> dict[str, float]:
    """The calibrated multiplier of each input of a loaded block."""
    roundings = {name: site.rounding for name, site in network.sites[layer].items()}
    found = {name: one.global_scales[0] for name, one in roundings.items() if one is not None}
    return {name: float(scale) for name, scale in found.items() if scale is not None}


def codes(artifact: Artifact) -> dict[str, Tensor]:
    return {name: artifact.tensor(name) for name in artifact.names() if name.endswith(".codes")}


@contextmanager
def routed_inputs(model: nn.Module, module: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what the experts of a block are called with: all tokens, and the experts of each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append((given[0].clone(), given[1].clone()))

    hook = model.get_submodule(module).register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def by_hand(folder: Path, windows: Tensor) -> dict[str, tuple[Tensor, Tensor, int]]:
    """What transformers itself shows of the second block's experts: inputs of all tokens, which are routed, counts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad(), routed_inputs(model, "model.layers.1.mlp.experts") as seen:
        model(windows)
    (x, chosen), experts = seen[0], model.get_submodule("model.layers.1.mlp.experts")
    found = {}
    for expert in range(experts.gate_up_proj.shape[0]):
        gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        rows = (chosen == expert).any(-1)
        inner = (torch.nn.functional.silu(gate) * up).detach()
        found[f"experts.{expert}.up_down"] = (inner, rows, int(rows.sum()))
        found[f"experts.{expert}.mlp_in"] = (x, rows, int(rows.sum()))
    return found


class TestGathering:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("mode", ["all", "routed"])
    def test_hessians_are_those_of_the_right_tokens(
        self, sparse: Desk, sparse_folder: Path, name: str, mode: str
    ) -> None:
        folder = sparse_folder / name
        found = replace(sparse, model=folder).calibrate(experts=mode, token_weight="uniform", batch=2)
        expected = by_hand(folder, found.tensor("windows").long())
        tokens = [expected[f"experts.{expert}.mlp_in"][2] for expert in range(len(expected) // 2)]
        assert counts(found)["layers.1.experts.tokens"] == tokens
        assert sum(tokens) == 2 * TOKENS
        stored = {n.removeprefix("layers.1.").rpartition(".")[0] for n in found.names("layers.1.experts.")}
        sites = {site for site in expected if mode == "routed" or site.endswith("up_down")}
        assert stored - {"experts"} == {site for site in sites if mode == "all" or expected[site][2]}
        for site in stored - {"experts"}:
            inner, rows, _ = expected[site]
            x = inner if mode == "all" else inner[rows]
            hessian = found.tensor(f"layers.1.{site}.hessian").double()
            torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-5, atol=1e-7, msg=site)
            torch.testing.assert_close(found.tensor(f"layers.1.{site}.absmax").double(), x.abs().amax(0))

    @pytest.mark.parametrize("name", MODELS)
    def test_the_choice_changes_nothing_outside_of_experts(self, sparse: Desk, sparse_folder: Path, name: str) -> None:
        here = replace(sparse, model=sparse_folder / name)
        every, routed = here.calibrate(experts="all"), here.calibrate(experts="routed")
        plain = [n for n in every.names() if "experts." not in n]
        assert plain == [n for n in routed.names() if "experts." not in n]
        for entry in plain:  # where a product lies in memory may change its last bit
            torch.testing.assert_close(every.tensor(entry), routed.tensor(entry), rtol=1e-5, atol=1e-7, msg=entry)
        assert counts(every) == counts(routed)

    def test_batches_make_no_difference_to_who_gets_what(self, sparse: Desk) -> None:
        one = sparse.calibrate(experts="routed", batch=1, output=sparse.workspace.home / "one.safetensors")
        three = sparse.calibrate(experts="routed", batch=3, output=sparse.workspace.home / "three.safetensors")
        assert counts(one) == counts(three)
        for name in one.names("layers.1.experts."):
            torch.testing.assert_close(one.tensor(name).float(), three.tensor(name).float(), rtol=1e-5, atol=1e-6)

    def test_an_expert_without_tokens_has_no_statistics(self, sparse: Desk) -> None:
        found = sparse.calibrate(experts="routed")
        assert counts(found)["layers.1.experts.tokens"][UNSEEN] == 0
        assert 0 < counts(found)["layers.1.experts.tokens"][STARVED] < 2 * TOKENS / 6 / 4
        assert not found.names(f"layers.1.experts.{UNSEEN}.")
        assert sparse.calibrate(experts="all").names(f"layers.1.experts.{UNSEEN}.up_down.")

    def test_all_is_the_default_and_another_question_has_another_key(self, sparse: Desk) -> None:
        every, routed = sparse.calibrate(), sparse.calibrate(experts="routed")
        assert calibrate(sparse.request(experts="all"), sparse.workspace)[1]
        assert (every.manifest.step.config["experts"], routed.manifest.step.config["experts"]) == ("all", "routed")
        assert every.manifest.key != routed.manifest.key

    def test_interrupted_and_run_again(self, desk: Desk, sparse_folder: Path) -> None:
        desk = replace(desk, model=sparse_folder / "mixtral")
        asked = desk.request(experts="routed")
        whole = calibrate(replace(asked, output=desk.workspace.home / "whole.safetensors"), desk.workspace)[0]
        with pytest.raises(KeyboardInterrupt):
            calibrate(asked, replace(desk.workspace, progress=Watch(1)))
        assert calibrate(asked, desk.workspace)[0].manifest.id == whole.manifest.id


class TestRefusals:
    def test_a_model_without_experts(self, desk: Desk) -> None:
        for mode in ("all", "routed"):
            with pytest.raises(UsageError, match="have no experts to choose for"):
                desk.calibrate(experts=mode)
        statistics = desk.calibrate()
        assert "experts" not in statistics.manifest.step.config
        for method in ("rtn", "gptq"):
            asked = asked_of(desk, statistics, method=method)
            with pytest.raises(UsageError, match="have no experts to choose for"):
                mitigate(replace(asked, experts="routed"), desk.workspace)
            with pytest.raises(UsageError, match="routed tokens only"):
                mitigate(replace(asked, expert_share=0.5), desk.workspace)

    def test_a_mode_that_is_none(self, sparse: Desk) -> None:
        with pytest.raises(UsageError, match="no statistics of experts are `some`") as refused:
            sparse.calibrate(experts="some")
        assert ("known", "all, routed") in refused.value.facts

    def test_weights_that_need_whole_windows(self, sparse: Desk) -> None:
        with pytest.raises(UsageError, match="a router sends no whole windows"):
            sparse.calibrate(experts="routed", token_weight="clip:3")
        sparse.calibrate(experts="all", token_weight="clip:3")

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_that_is_none(self, sparse: Desk, share: float) -> None:
        asked = asked_of(sparse, sparse.calibrate(experts="routed"))
        with pytest.raises(UsageError, match="`expert_share` is from 0 to 1"):
            mitigate(replace(asked, expert_share=share), sparse.workspace)

    def test_a_share_without_effect(self, sparse: Desk) -> None:
        asked = asked_of(sparse, sparse.calibrate(), expert_share=0.5)
        with pytest.raises(UsageError, match="routed tokens only"):
            mitigate(asked, sparse.workspace)

    def test_carried_statistics_are_what_they_are(self, sparse: Desk) -> None:
        asked = asked_of(sparse, sparse.calibrate(), propagate="none")
        with pytest.raises(UsageError, match="choice of tokens for experts") as refused:
            mitigate(replace(asked, experts="routed"), sparse.workspace)
        assert "--experts routed" in refused.value.hint
        mitigate(replace(asked, experts="all"), sparse.workspace)


class TestSolving:
    @pytest.fixture(params=[{}, {"propagate": "none"}, {"true_sequential": True, "round_activations": True}])
    def how(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return dict(request.param)

    def test_the_starved_are_shrunk_counted_and_named(self, sparse: Desk, how: dict[str, Any]) -> None:
        statistics = sparse.calibrate(experts="routed")
        asked = asked_of(sparse, statistics, **how)
        found, _ = mitigate(asked, sparse.workspace)
        notes = found.manifest.details["experts"]
        assert list(notes) == ["1"]
        assert notes["1"]["shrunk_experts"] == [UNSEEN, STARVED]
        assert notes["1"]["experts_rtn"] == []
        assert sum(notes["1"]["tokens"]) == 2 * TOKENS
        assert found.manifest.counters["shrunk_experts"] == 2
        assert "experts_rtn" not in found.manifest.counters
        assert found.manifest.step.config["experts"] == "routed"
        assert found.manifest.step.config["expert_share"] == 0.25
        with pytest.raises(NumericalError, match="something unusual"):
            mitigate(replace(asked, strict=True), sparse.workspace)

    def test_with_all_tokens_nobody_starves(self, sparse: Desk, how: dict[str, Any]) -> None:
        asked = asked_of(sparse, sparse.calibrate(), strict=True, **how)
        found, _ = mitigate(asked, sparse.workspace)
        assert found.manifest.counters == {}
        assert found.manifest.details["experts"]["1"]["tokens"][UNSEEN] == 0
        assert "expert_share" not in found.manifest.step.config

    def test_a_pass_follows_the_statistics_unless_told_otherwise(self, sparse: Desk) -> None:
        every, routed = sparse.calibrate(), sparse.calibrate(experts="routed")
        asked = asked_of(sparse, every)
        plain, _ = mitigate(asked, sparse.workspace)
        told, _ = mitigate(replace(asked, experts="routed"), sparse.workspace)
        followed, _ = mitigate(replace(asked, source=str(routed.path)), sparse.workspace)
        assert plain.manifest.step.config["experts"] == "all"
        assert told.manifest.step.config["experts"] == followed.manifest.step.config["experts"] == "routed"
        assert told.manifest.key != plain.manifest.key
        same = codes(followed)
        assert all(torch.equal(tensor, same[name]) for name, tensor in codes(told).items())

    def test_an_unseen_expert_goes_by_all_tokens(self, sparse: Desk) -> None:
        """Its Hessian of gate and up is then that of the site, as in the other mode."""
        every, routed = (
            mitigate(
                asked_of(sparse, sparse.calibrate(experts=mode), propagate="none"),
                sparse.workspace,
            )[0]
            for mode in ("all", "routed")
        )
        mine, theirs = codes(routed), codes(every)
        for module in ("gate_proj", "up_proj"):
            name = f"model.layers.1.mlp.experts.{UNSEEN}.{module}.codes"
            assert torch.equal(mine[name], theirs[name])
        name = "model.layers.1.mlp.experts.0.gate_proj.codes"
        assert not torch.equal(mine[name], theirs[name])

    def test_with_nothing_to_go_by_its_weights_are_rounded_to_nearest(
        self, sparse: Desk, found_plugins: Plugins, how: dict[str, Any]
    ) -> None:
        asked = asked_of(sparse, sparse.calibrate(experts="routed"), expert_share=0.0, **how)
        found, _ = mitigate(asked, sparse.workspace)
        assert found.manifest.counters["experts_rtn"] == 1
        assert "shrunk_experts" not in found.manifest.counters
        assert found.manifest.details["experts"]["1"]["experts_rtn"] == [UNSEEN]
        subject = open_subject(str(found.path), sparse.workspace).subject
        assert subject.scheme.weights is not None
        fmt, nearest = found_plugins.format("int4"), found_plugins.load("mitigators", "rtn")
        for module in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{UNSEEN}.{module}"
            problem = LayerProblem(
                name, subject.model.tensor(f"{name}.weight").float(), Grid.of(subject.scheme.weights, fmt)
            )
            linear = next(one for one in subject.model.graph.linears if one.name == name)
            assert torch.equal(subject.linear(linear).codes, nearest.quantize(problem, ClipOptions()).codes), module

    def test_every_expert_input_has_its_multiplier(self, sparse: Desk, how: dict[str, Any]) -> None:
        scheme = weights(sparse, "fp4-sym-g4-se4m3", activations="fp4-sym-g4-se4m3")
        statistics = sparse.calibrate(experts="routed")
        asked = asked_of(sparse, statistics, method="rtn", scheme=scheme, **how)
        found, _ = mitigate(asked, sparse.workspace)
        stored = {n.removeprefix("layers.1.") for n in found.names("layers.1.") if n.endswith("input_global_scale")}
        sites = ("attn_in", "o_in", "mlp_in", "shared.up_down", *(f"experts.{e}.up_down" for e in range(6)))
        assert stored == {f"{site}.input_global_scale" for site in sites}
        if how == {"propagate": "none"}:
            for expert in (0, STARVED, UNSEEN):
                own = [statistics.tensor(n).max() for n in statistics.names(f"layers.1.experts.{expert}.up_down.abs")]
                every = [
                    statistics.tensor(n).max()
                    for n in statistics.names("layers.1.experts.")
                    if n.endswith("down.absmax")
                ]
                amax = max(own) if expert == 0 else max(every)
                scale = found.tensor(f"layers.1.experts.{expert}.up_down.input_global_scale")
                assert float(scale) == pytest.approx(float(amax) / (6 * 448), rel=1e-6)

    def test_a_finished_block_is_propagated_as_it_will_be_executed(
        self, sparse: Desk, sparse_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = replace(sparse, model=sparse_folder / "mixtral")
        scheme = weights(here, "fp4-sym-g4-se4m3", activations="fp4-sym-g4-se4m3")
        seen: dict[str, float] = {}
        install = BlockSolver.install

        def watched(block: BlockSolver, network: Network, layer: int, *rest: Any) -> None:  # noqa: ANN401 - passed on
            install(block, network, layer, *rest)
            seen.update(multipliers(network, layer))

        monkeypatch.setattr(BlockSolver, "install", watched)
        asked = asked_of(here, here.calibrate(experts="routed"), scheme=scheme, round_activations=True)
        found, _ = mitigate(asked, here.workspace)
        subject = open_subject(str(found.path), here.workspace).subject
        network = Network(subject, device=torch.device("cpu"), dtype=torch.float32)
        network.load(0)
        assert len(seen) == 3 + 4 * 2
        assert seen == multipliers(network, 0)

    def test_interrupted_and_run_again(self, desk: Desk, sparse_folder: Path) -> None:
        desk = replace(desk, model=sparse_folder / "mixtral")
        statistics = desk.calibrate(experts="routed")
        asked = asked_of(desk, statistics, expert_share=1.0)
        whole, _ = mitigate(replace(asked, output=desk.workspace.home / "whole.safetensors"), desk.workspace)
        with pytest.raises(KeyboardInterrupt):
            mitigate(asked, replace(desk.workspace, progress=Watch(1)))
        again, _ = mitigate(asked, desk.workspace)
        assert again.manifest.id == whole.manifest.id
        assert again.manifest.counters == whole.manifest.counters
        assert again.manifest.details == whole.manifest.details
        assert set(again.manifest.details["experts"]) == {"0", "1"}

    def test_behind_a_transform(self, sparse: Desk) -> None:
        """The experts' statistics are carried with their sites; a rotation keeps what the tokens' norms give."""
        statistics = sparse.calibrate(experts="routed")
        plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), sparse.workspace)
        opened = open_subject(str(plan.path), sparse.workspace)
        carried = CarriedStatistics(statistics, opened.model, opened.subject.plan)
        plain = CarriedStatistics(statistics, opened.model, Plan())
        for expert in (0, STARVED):
            name = f"layers.1.experts.{expert}.up_down"
            traces = [one[name].entries["hessian"].diagonal().sum() for one in (carried, plain)]
            torch.testing.assert_close(*traces, rtol=1e-5, atol=0)
        for how in ({}, {"propagate": "none"}):
            asked = asked_of(sparse, plan, **how)
            found, _ = mitigate(asked, sparse.workspace)
            assert found.manifest.details["experts"]["1"]["shrunk_experts"] == [UNSEEN, STARVED]


class TestInspecting:
    def test_statistics(self, sparse: Desk) -> None:
        artifact = sparse.calibrate(experts="routed")
        described = json.loads(json.dumps(inspect(str(artifact.path), sparse.workspace).to_json()))
        tokens = counts(artifact)["layers.1.experts.tokens"]
        (row,) = described["experts"]
        ordered = sorted(tokens)
        assert row == {
            **{"layer": 1, "experts": 6, "tokens_if_even": 2 * TOKENS / 6, "least": 0, "most": max(tokens)},
            **{"median": (ordered[2] + ordered[3]) / 2, "starved": f"{UNSEEN}, {STARVED}"},
        }
        assert described["experts"] == [row]
        sites = {one["site"]: one for one in described["sites"]}
        assert sites["experts.*.up_down"]["channels"] == 16
        names = [n for n in artifact.names("layers.1.experts.") if ".up_down." in n]
        assert sites["experts.*.up_down"]["bytes"] == sum(artifact.header.slots[n].nbytes for n in names)
        largest = max(float(artifact.tensor(n).max()) for n in names if n.endswith("absmax"))
        assert sites["experts.*.up_down"]["absmax"] == largest
        assert not any("tokens" in site for site in sites)

    def test_quantized(self, sparse: Desk) -> None:
        statistics = sparse.calibrate(experts="routed")
        found, _ = mitigate(asked_of(sparse, statistics), sparse.workspace)
        described = inspect(str(found.path), sparse.workspace).to_json()
        (row,) = described["experts"]
        assert (row["shrunk"], row["rounded_to_nearest"]) == (f"{UNSEEN}, {STARVED}", None)
        assert row["least"] == 0
        assert described["expert_share"] == 0.25
        assert [(one["counter"], one["value"]) for one in described["counters"]] == [("shrunk_experts", 2)]
        losses = {one["linear"]: one["loss"] for one in described["losses"]}
        reports = found.manifest.details["layers"]
        mean = sum(reports[f"model.layers.1.mlp.experts.{e}.up_proj"]["loss"] for e in range(6)) / 6
        assert losses["model.layers.1.mlp.experts.*.up_proj"] == pytest.approx(mean)
        assert "model.layers.1.mlp.experts.0.up_proj" not in losses


class TestForeseeing:
    @pytest.mark.parametrize("mode", ["all", "routed"])
    def test_the_statistics_take_what_was_said(self, tidy: Desk, mode: str) -> None:
        asked = tidy.request(experts=mode, gather=tuple(n for n in EVERYTHING if n != "sample"))
        said = foresee(calibrate, asked, tidy.workspace).to_json()
        assert said["state"] == "to do"
        assert not list(tidy.workspace.home.iterdir())
        found, _ = calibrate(asked, tidy.workspace)
        missing = [e for e, n in enumerate(counts(found)["layers.1.experts.tokens"]) if not n and mode == "routed"]
        sizes = {n: slot.nbytes for n, slot in found.header.slots.items()}
        unseen = sum(size for n, size in sizes.items() if n.startswith("layers.1.experts.0.")) * len(missing)
        layer = sum(size for n, size in sizes.items() if n.startswith("layers.1.") and not n.endswith("tokens"))
        assert said["largest_layer"] == 1
        assert said["statistics_bytes_of_largest_layer"] == layer + unseen
        assert said["disk_bytes_at_least"] == sum(sizes.values()) + unseen
        assert said["path"] == str(found.path)
        assert foresee(calibrate, asked, tidy.workspace).to_json()["state"] == "there"

    def test_samples_are_shares_of_one(self, tidy: Desk) -> None:
        every, routed = (
            foresee(calibrate, tidy.request(experts=mode, gather=("sample",), sample_size=60), tidy.workspace)
            for mode in ("all", "routed")
        )
        inner, hidden = 2 * 16 * 60, 2 * 24 * 60
        ordinary = hidden + 2 * 32 * 60 + hidden + 2 * 20 * 60
        assert every.facts["statistics_bytes_of_largest_layer"] == ordinary + 6 * inner
        assert routed.facts["statistics_bytes_of_largest_layer"] == ordinary + 2 * (inner + hidden)

    @pytest.mark.parametrize("scheme", ["int4-g4", "int3-asym", "fp8"])
    def test_the_codes_take_what_was_said(self, tidy: Desk, scheme: str) -> None:
        asked = asked_of(tidy, tidy.calibrate(), scheme=weights(tidy, scheme), propagate="none")
        said = foresee(mitigate, asked, tidy.workspace).to_json()
        found, _ = mitigate(asked, tidy.workspace)
        assert said["disk_bytes_at_least"] == sum(slot.nbytes for slot in found.header.slots.values())
        hessians = 24 * 24 * 2 + 32 * 32 + 20 * 20 + 6 * 16 * 16
        assert said["statistics_bytes_of_largest_layer"] == 4 * hessians

    @pytest.mark.parametrize("settings", [{}, {"experts": "true"}])
    def test_low_rank_corrections_count_where_experts_have_them(self, tidy: Desk, settings: dict[str, str]) -> None:
        settings = {"rank": "2", **settings}
        scheme = weights(tidy, "int4-g4")
        how = {"scheme": scheme, "method": "rtn+lorc", "settings": settings, "propagate": "none"}
        asked = asked_of(tidy, tidy.calibrate(), **how)
        said = foresee(mitigate, asked, tidy.workspace).to_json()
        found, _ = mitigate(asked, tidy.workspace)
        assert said["disk_bytes_at_least"] == sum(slot.nbytes for slot in found.header.slots.values())

    def test_what_would_be_refused_is_refused(self, tidy: Desk) -> None:
        with pytest.raises(UsageError, match="no statistics of experts"):
            foresee(calibrate, CalibrateRequest(**{**vars(tidy.request()), "experts": "few"}), tidy.workspace)


class TestRecipes:
    RECIPE = """
        model: {model}
        calibrate: {{data: {text}, num_samples: 3, seq_len: 32, experts: routed}}
        matrix: {{mitigate: [{{method: gptq, set: {{clip: none}}}}], scheme: [{{weights: int4-g4}}]}}
        mitigate: {{propagate: none, expert_share: {share}}}
        eval: {{perplexity: [{text}], seq_len: 32, max_windows: 1}}
        full_precision: false
    """

    def written(self, desk: Desk, share: object) -> Path:
        path = desk.workspace.home / "recipe.yaml"
        path.write_text(self.RECIPE.format(model=desk.model, text=desk.text, share=share))
        return path

    def test_a_recipe_says_it_too(self, tidy: Desk) -> None:
        recipe = self.written(tidy, 1)
        before = run(RunRequest(recipe, dry_run=True), tidy.workspace)
        assert before.outcomes[0].demand is not None
        assert before.outcomes[0].demand.layer == 1
        assert " GB " in before.text.splitlines()[2]
        done = run(RunRequest(recipe), tidy.workspace)
        calibrated, quantized = (open_artifact(Path(one.path)).manifest for one in done.outcomes[:2])
        assert calibrated.step.config["experts"] == "routed"
        assert quantized.step.config["expert_share"] == 1.0
        assert quantized.details["experts"]["1"]["shrunk_experts"][-1] == STARVED

    @pytest.mark.parametrize("share", ["few", "true"])
    def test_a_share_is_a_number(self, tidy: Desk, share: str) -> None:
        with pytest.raises(UsageError, match=r"`mitigate\.expert_share`"):
            run(RunRequest(self.written(tidy, share)), tidy.workspace)


def test_rounding_to_nearest_takes_no_notice_of_experts(sparse: Desk) -> None:
    """Its codes are the same whatever its loss is told in, and so is the key."""
    every, routed = sparse.calibrate(experts="all"), sparse.calibrate(experts="routed")
    asked = MitigateRequest(str(every.path), "rtn", weights(sparse), output=sparse.workspace.home / "plain.safetensors")
    plain, _ = mitigate(asked, sparse.workspace)
    again = replace(asked, experts="routed", output=sparse.workspace.home / "again.safetensors")
    found, _ = mitigate(again, sparse.workspace)
    assert found.manifest.key == plain.manifest.key
    assert found.manifest.details["layers"] == plain.manifest.details["layers"]
    assert all("loss" in report for report in found.manifest.details["layers"].values())
    other, _ = mitigate(replace(asked, source=str(routed.path), output=None), sparse.workspace)
    assert all("loss" not in report for report in other.manifest.details["layers"].values())


def test_passes_gather_hessians_that_calibration_did_not(sparse: Desk) -> None:
    bare = sparse.calibrate(experts="all", gather=())
    scheme = weights(sparse, "int4-g4", activations="fp4-g4-se4m3")
    found, _ = mitigate(MitigateRequest(str(bare.path), "rtn", scheme), sparse.workspace)
    assert all("loss" in report for report in found.manifest.details["layers"].values())
