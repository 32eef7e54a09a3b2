"""Statistics are what naive loops over transformers' own activations give, whatever the batch, also after a crash."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.builtin.plugin import register_statistics
from qtool.engine.carry import CarriedStatistics, can_carry_hessians
from qtool.engine.gather import Gathering, SiteObserver, observing
from qtool.engine.linear import SiteInput
from qtool.engine.planner import extend
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.model.plan import Plan, Proposal
from qtool.numerics.moments import PANEL, add_second_moment
from qtool.numerics.operators import Affine, Diag, Hadamard, Kron, Operator, Orthogonal, Shift, Signs
from qtool.numerics.second_moments import diagonal_blocks
from qtool.numerics.token_weights import TokenWeight
from qtool.plugins import Plugins
from qtool.steps.calibrate import EVERYTHING, CalibrateRequest, calibrate
from qtool.steps.demand import known_of
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing import double_precision, save_tiny_model, tiny_config

CPU = torch.device("cpu")
WINDOWS, TOKENS = 5, 16
PAIRED = ("cross", "full_hessian", "held_out")
Proposed = dict[str, list[Operator]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of several families, and a text."""
    folder = tmp_path_factory.mktemp("gather")
    for name, changes in (("llama", {"num_attention_heads": 6, "num_key_value_heads": 3}), ("qwen2", {})):
        save_tiny_model(folder / name, tiny_config(name, **changes))
    letters = torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(5))
    (folder / "text.txt").write_bytes(bytes(letters.tolist()))
    return folder


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture
def workspace(root: Path, plugins: Plugins, tmp_path: Path) -> Workspace:
    (tmp_path / "home").mkdir()
    return Workspace(plugins, tmp_path / "home", root / "cache")


def request(root: Path, name: str = "llama", **changes: Any) -> CalibrateRequest:  # noqa: ANN401 - of a dataclass
    plain = CalibrateRequest(
        str(root / name), data=str(root / "text.txt"), num_samples=WINDOWS, seq_len=TOKENS, token_weight="uniform"
    )
    return replace(plain, **changes)


def inputs_of_linears(path: Path, windows: Tensor) -> dict[str, Tensor]:
    """What transformers' own linears are given in float64, ``[tokens, n]`` in the order of the text."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa").eval()
    seen: dict[str, Tensor] = {}
    readers = {
        "attn_in": "self_attn.k_proj",
        "o_in": "self_attn.o_proj",
        "mlp_in": "mlp.up_proj",
        "up_down": "mlp.down_proj",
    }
    for layer in range(2):
        for site, name in readers.items():

            def keep(_: torch.nn.Module, inputs: tuple[Tensor], site_id: str = f"layers.{layer}.{site}") -> None:
                seen[site_id] = inputs[0].flatten(0, 1)

            model.get_submodule(f"model.layers.{layer}.{name}").register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    return seen


def naive_hessian(x: Tensor, rule: str, parameter: float, window: int) -> Tensor:
    """The weighted mean of outer products, token by token."""
    total, weights = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64), 0.0
    for start in range(0, len(x), window):
        rows = x[start : start + window]
        norms = sorted(math.sqrt(sum(float(v) ** 2 for v in row)) for row in rows)
        median = norms[(len(norms) - 1) // 2]
        for row in rows:
            norm = math.sqrt(float(row @ row))
            factor = {
                "uniform": 1.0,
                "inverse-norm": norm**-parameter,
                "clip": min(1.0, parameter * median / norm),
            }[rule]
            total += torch.outer(row, row) * factor**2
            weights += factor**2
    return total / weights


class TestStatistics:
    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_against_naive_loops(self, root: Path, workspace: Workspace, name: str) -> None:
        artifact, _ = calibrate(request(root, name), workspace)
        windows = artifact.tensor("windows").long()
        assert windows.shape == (WINDOWS, TOKENS)
        expected = inputs_of_linears(root / name, windows)
        assert {n.rpartition(".")[0] for n in artifact.names("layers.")} == set(expected)
        for site, x in expected.items():
            found = artifact.tensors(f"{site}.")
            assert set(found) == set(EVERYTHING)
            naive = {
                "hessian": naive_hessian(x, "uniform", 1.0, TOKENS),
                "absmax": x.abs().amax(0),
                "min": x.amin(0),
                "max": x.amax(0),
                "mean": sum(x) / len(x),
                "mean_abs": sum(x.abs()) / len(x),
            }
            for entry, value in naive.items():
                assert found[entry].dtype == torch.float32
                torch.testing.assert_close(found[entry].double(), value, rtol=1e-5, atol=1e-6, msg=f"{site} {entry}")
            torch.testing.assert_close(found["sample"].double(), x, rtol=2**-7, atol=1e-6)

    @pytest.mark.parametrize(
        ("rule", "parameter"), [("inverse-norm", 1.0), ("inverse-norm", 0.5), ("clip", 1.05), ("clip", 3.0)]
    )
    def test_hessians_under_each_rule(self, root: Path, workspace: Workspace, rule: str, parameter: float) -> None:
        asked = request(root, gather=("hessian",), token_weight=f"{rule}:{parameter}")
        artifact, _ = calibrate(asked, workspace)
        windows = artifact.tensor("windows").long()
        for site, x in inputs_of_linears(root / "llama", windows).items():
            found = artifact.tensor(f"{site}.hessian").double()
            torch.testing.assert_close(found, naive_hessian(x, rule, parameter, TOKENS), rtol=1e-5, atol=1e-6)
            assert torch.equal(found, found.T)

    @pytest.mark.parametrize("token_weight", ["uniform", "inverse-norm:0.5", "clip:1.05"])
    def test_blocks_of_hessians_are_those_of_the_whole(
        self, root: Path, workspace: Workspace, token_weight: str
    ) -> None:
        both = request(root, gather=("hessian", "hessian_blocks"), token_weight=token_weight)
        alone = request(root, gather=("hessian_blocks",), token_weight=token_weight)
        (found, _), (blocks, _) = calibrate(both, workspace), calibrate(alone, workspace)
        names = [name for name in blocks.names() if name.endswith(".hessian_blocks")]
        assert len(names) == 8
        for name in names:
            assert torch.equal(blocks.tensor(name), found.tensor(name))
            whole = found.tensor(name.replace("_blocks", ""))
            size = {24: 8, 48: 16, 40: 8}[len(whole)]
            scale = float(whole.abs().max())
            torch.testing.assert_close(found.tensor(name), diagonal_blocks(whole, size), rtol=0, atol=1e-6 * scale)

    def test_a_sample_is_whole_tokens_in_order_the_same_at_every_site(self, root: Path, workspace: Workspace) -> None:
        artifact, _ = calibrate(request(root, gather=("sample",), sample_size=7), workspace)
        windows = artifact.tensor("windows").long()
        order: list[int] = []
        for site, x in inputs_of_linears(root / "llama", windows).items():
            rows = artifact.tensor(f"{site}.sample")
            assert rows.dtype == torch.bfloat16
            assert rows.shape == (7, x.shape[1])
            distance = (rows.double()[:, None] - x).abs().amax(-1)
            assert float((distance.amin(-1) / x.abs().amax()).max()) < 2**-8
            if not order and site == "layers.1.up_down":  # where no two tokens are alike
                order = distance.argmin(-1).tolist()
        assert order == sorted(set(order))
        for site, x in inputs_of_linears(root / "llama", windows).items():
            torch.testing.assert_close(artifact.tensor(f"{site}.sample"), x[order].bfloat16(), msg=site)
        other, _ = calibrate(request(root, gather=("sample",), sample_size=7, seed=1), workspace)
        assert not torch.equal(other.tensor("layers.0.o_in.sample"), artifact.tensor("layers.0.o_in.sample"))

    @pytest.mark.parametrize("token_weight", ["uniform", "inverse-norm", "clip:1.1"])
    def test_the_batch_does_not_matter(self, root: Path, workspace: Workspace, token_weight: str) -> None:
        found = []
        for batch in (1, 2, 5):
            asked = request(root, "qwen2", batch=batch, token_weight=token_weight)
            found.append(calibrate(replace(asked, output=workspace.home / f"{batch}.safetensors"), workspace)[0])
        assert len({one.manifest.key for one in found}) == 1
        for name in found[0].names():
            for other in found[1:]:
                torch.testing.assert_close(other.tensor(name), found[0].tensor(name), rtol=1e-5, atol=1e-6, msg=name)

    def test_only_what_is_asked_for(self, root: Path, workspace: Workspace) -> None:
        artifact, _ = calibrate(request(root, gather=("mean",)), workspace)
        assert {name.rpartition(".")[2] for name in artifact.names()} == {"mean", "windows"}
        artifact, _ = calibrate(request(root, gather=()), workspace)
        assert artifact.names() == ("windows",)

    def test_every_statistic_is_tested(self) -> None:
        assert {entry.name for entry in register_statistics()} == {
            *EVERYTHING,
            "hessian_blocks",
            "saliency",
            "guided_hessians",
            *PAIRED,
        }

    @pytest.mark.parametrize(
        ("name", "does"),
        [
            *((name, "compares with full precision") for name in PAIRED),
            ("guided_hessians", "weighs inputs by saliency"),
        ],
    )
    def test_what_mitigate_gathers_is_not_for_calibrate(
        self, root: Path, workspace: Workspace, name: str, does: str
    ) -> None:
        with pytest.raises(UsageError, match=f"`{name}` {does}: mitigate gathers it") as refused:
            calibrate(request(root, gather=("hessian", name)), workspace)
        assert refused.value.hint == f"--gather {','.join(EVERYTHING)}"
        assert not list(workspace.home.iterdir())


class TestAfterACrash:
    def test_a_pass_that_goes_on_gives_the_same_bytes(self, root: Path, workspace: Workspace) -> None:
        whole, _ = calibrate(request(root, output=workspace.home / "whole.safetensors"), workspace)
        asked = request(root, output=workspace.home / "resumed.safetensors")
        layers = []

        def counted(items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
            for item in items:
                layers.append(item)
                yield item

        with pytest.raises(KeyboardInterrupt):
            calibrate(asked, replace(workspace, progress=stopping_after(1)))
        assert not (workspace.home / "resumed.safetensors").exists()
        assert (workspace.home / "resumed.safetensors.partial" / "layer-0.safetensors").is_file()
        resumed, reused = calibrate(asked, replace(workspace, progress=counted))
        assert not reused
        assert layers == [0, 1]
        assert resumed.manifest.id == whole.manifest.id
        assert not (workspace.home / "resumed.safetensors.partial").exists()
        for name in whole.names():
            assert torch.equal(resumed.tensor(name), whole.tensor(name))

    def test_a_finished_part_is_not_gathered_again(self, root: Path, workspace: Workspace) -> None:
        asked = request(root, output=workspace.home / "a.safetensors")
        with pytest.raises(KeyboardInterrupt):
            calibrate(asked, replace(workspace, progress=stopping_after(1)))
        part = workspace.home / "a.safetensors.partial" / "layer-0.safetensors"
        marked = {name: tensor.clone() for name, tensor in load_file(part).items()}
        marked["layers.0.o_in.absmax"] += 1
        save_file(marked, part)
        artifact, _ = calibrate(asked, workspace)
        assert torch.equal(artifact.tensor("layers.0.o_in.absmax"), marked["layers.0.o_in.absmax"])


def stopping_after(count: int) -> Any:  # noqa: ANN401 - a Progress
    def progress(items: Iterable[Any], *, total: int, label: str) -> Iterable[Any]:
        for index, item in enumerate(items):
            if index == count:
                raise KeyboardInterrupt
            yield item

    return progress


class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("entry", EVERYTHING)
    def test_the_site_is_named(self, plugins: Plugins, bad: float, entry: str) -> None:
        statistic = plugins.load("statistics", entry)
        observer = SiteObserver("layers.7.mlp_in", {entry: statistic}, Gathering(6, TokenWeight()))
        x = torch.randn(6, 4)
        x[3, 2] = bad
        observer(x)
        if (entry == "max" and bad == -math.inf) or (entry == "min" and bad == math.inf):
            return
        with pytest.raises(
            NumericalError, match=r"of the activations at `layers\.7\.mlp_in` holds NaN or Inf"
        ) as refused:
            observer.result()
        assert refused.value.message.startswith(f"`{entry}` of")
        assert "--dtype float32" in refused.value.hint

    def test_in_a_whole_pass(self, root: Path, workspace: Workspace, tmp_path: Path) -> None:
        for file in (root / "llama").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(NumericalError, match=r"activations at `layers\.1\.up_down`"):
            calibrate(request(root, source=str(tmp_path), dtype="float32"), workspace)


class TestObservers:
    def test_nothing_is_left_attached(self, root: Path, workspace: Workspace) -> None:
        sites = {"attn_in": SiteInput()}

        def fail() -> None:
            with observing(sites, 0, {"attn_in": {}}, Gathering(1, TokenWeight())):
                assert sites["attn_in"].observer is not None
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert sites["attn_in"].observer is None

    def test_activations_are_seen_before_they_are_rounded(self, plugins: Plugins) -> None:
        site = SiteInput()
        site.rounding = lambda x: torch.zeros_like(x)  # type: ignore[assignment]
        seen: list[Tensor] = []
        site.observer = seen.append
        x = torch.randn(2, 3, 4)
        assert site(x).eq(0).all()
        assert torch.equal(seen[0], x.flatten(0, 1))

    def test_moments_are_of_what_is_multiplied_and_the_rest_is_not(self, plugins: Plugins) -> None:
        site, x = SiteInput(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        site.rounding = lambda values: values.round()  # type: ignore[assignment]
        wanted = {name: plugins.load("statistics", name) for name in ("hessian", "absmax", "mean_abs")}
        with observing({"attn_in": site}, 0, {"attn_in": wanted}, Gathering(6, TokenWeight())) as observers:
            site(x[:1])
            site(x[1:])
            found = observers["attn_in"].result().entries
        rows = x.flatten(0, 1)
        torch.testing.assert_close(found["hessian"], rows.round().T @ rows.round() / 6)
        assert torch.equal(found["absmax"], rows.abs().amax(0))
        torch.testing.assert_close(found["mean_abs"], rows.abs().mean(0))


class TestSecondMoments:
    @pytest.mark.parametrize("n", [1, 5, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7])
    def test_the_lower_triangle_is_that_of_the_product(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        first, second = (torch.randn(9, n, generator=generator, dtype=torch.float64) for _ in range(2))
        total = torch.zeros(n, n, dtype=torch.float64)
        add_second_moment(total, first)
        add_second_moment(total, second)
        expected = first.T @ first + second.T @ second
        torch.testing.assert_close(total.tril(), expected.tril())

    def test_the_tokens_are_not_modified(self) -> None:
        x = torch.randn(3, 4)
        kept = x.clone()
        add_second_moment(torch.zeros(4, 4), x)
        assert torch.equal(x, kept)


class TestCarrying:
    """Statistics carried through a plan are those of the transformed model."""

    @pytest.fixture(params=["llama", "qwen2"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def both(
        self, root: Path, workspace: Workspace, name: str, proposals: list[Proposed], token_weight: str = "uniform"
    ) -> tuple[CarriedStatistics, Artifact]:
        """Carried through a plan, and gathered on the transformed model, both computed in float64."""
        opened = open_subject(str(root / name), workspace)
        plan = Plan()
        for proposal in proposals:
            plan = extend(plan, Proposal(proposal), opened.model.graph, method="test")
        with double_precision():
            gathered, _ = calibrate(request(root, name, token_weight=token_weight), workspace)
            plan_path = written_plan(plan, opened, workspace)
            transformed, _ = calibrate(request(root, source=str(plan_path), token_weight=token_weight), workspace)
        assert torch.equal(gathered.tensor("windows"), transformed.tensor("windows"))
        return CarriedStatistics(gathered, opened.model, plan), transformed

    def everything(self, root: Path, workspace: Workspace, name: str) -> list[Proposed]:
        """A rotation of the residual, per-head operators at vo, scales, and online operators at every site."""
        graph = open_subject(str(root / name), workspace).model.graph
        dims, generator = graph.dims, torch.Generator().manual_seed(11)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        first: Proposed = {"residual": [Orthogonal(torch.linalg.qr(draw(24, 24)).Q.contiguous())]}
        second: Proposed = {}
        for layer in range(2):
            eye = torch.eye(8, dtype=torch.float64)
            heads = dims.num_kv_heads
            first[f"layers.{layer}.vo"] = [Affine.from_matrix(eye + 0.2 * draw(heads, 8, 8), heads)]
            first[f"layers.{layer}.up_down"] = [Diag(0.5 + draw(40).abs()), Hadamard(40)]
            second[f"layers.{layer}.attn_in"] = [Diag(0.5 + draw(24).abs())]
            second[f"layers.{layer}.mlp_in"] = [Kron(torch.eye(4).double() + 0.1 * draw(4, 4), torch.eye(6).double())]
            second[f"layers.{layer}.o_in"] = [
                Signs(1 - 2 * torch.randint(0, 2, (graph.width("o_in"),), generator=generator))
            ]
        return [first, second]

    def test_hessian_mean_and_sample_are_exact(self, root: Path, workspace: Workspace, name: str) -> None:
        carried, transformed = self.both(root, workspace, name, self.everything(root, workspace, name))
        assert len(carried) == 8
        for site in carried:
            found, expected = carried[site].entries, transformed.tensors(f"{site}.")
            for entry in ("hessian", "mean"):
                scale = float(expected[entry].abs().max())
                torch.testing.assert_close(
                    found[entry], expected[entry], rtol=0, atol=2e-6 * scale, msg=f"{site} {entry}"
                )
            # Rows are stored in bfloat16, here before the operators and there behind them.
            scale = float(expected["sample"].abs().max())
            torch.testing.assert_close(found["sample"], expected["sample"].float(), rtol=0, atol=0.02 * scale, msg=site)

    def test_blocks_of_hessians_are_exact_where_they_are_not_mixed(self, root: Path, workspace: Workspace) -> None:
        opened = open_subject(str(root / "qwen2"), workspace)
        flips = torch.sign(torch.arange(24) % 2 - 0.5)
        first: Proposed = {"residual": [Signs(flips.long())], "layers.0.up_down": [Diag(torch.linspace(-2, 2, 40))]}
        second: Proposed = {
            "layers.0.attn_in": [Hadamard(24, block_size=8)],
            "layers.0.mlp_in": [Hadamard(24)],
            "layers.1.up_down": [Hadamard(40, block_size=4)],
        }
        plan = Plan()
        for proposal in (first, second):
            plan = extend(plan, Proposal(proposal), opened.model.graph, method="test")
        asked = request(root, "qwen2", gather=("hessian_blocks",), token_weight="inverse-norm")
        with double_precision():
            gathered, _ = calibrate(replace(asked, token_weight="uniform"), workspace)
            behind = replace(asked, source=str(written_plan(plan, opened, workspace)), token_weight="uniform")
            transformed, _ = calibrate(behind, workspace)
        carried = CarriedStatistics(gathered, opened.model, plan)
        for site, found in carried.items():
            if site == "layers.0.mlp_in":
                assert not found.entries
                with pytest.raises(ArtifactError, match="lack `hessian_blocks`") as refused:
                    found.need("hessian_blocks", site=site)
                assert "mix channels of different blocks" in refused.value.message
                assert refused.value.hint == "qtool calibrate PLAN --gather hessian_blocks"
                continue
            expected = transformed.tensor(f"{site}.hessian_blocks")
            scale = float(expected.abs().max())
            torch.testing.assert_close(found.entries["hessian_blocks"], expected, rtol=0, atol=2e-6 * scale)

    def test_folding_the_norms_alone(self, root: Path, workspace: Workspace) -> None:
        flips: Proposed = {"residual": [Signs(1 - 2 * (torch.arange(24) % 2))]}
        carried, transformed = self.both(root, workspace, "qwen2", [flips])
        for site in carried:
            expected = transformed.tensors(f"{site}.")
            for entry in ("hessian", "mean", "absmax", "min", "max", "mean_abs"):
                torch.testing.assert_close(carried[site].entries[entry], expected[entry], rtol=2e-5, atol=1e-6)
            assert carried[site].estimated == frozenset()

    @pytest.mark.parametrize("token_weight", ["inverse-norm", "clip:1.05"])
    def test_weighted_hessians_follow_what_keeps_the_norm_of_a_token(
        self, root: Path, workspace: Workspace, token_weight: str
    ) -> None:
        rotations: Proposed = {}
        for layer in range(2):
            for site, width in (("attn_in", 24), ("o_in", 48), ("mlp_in", 24), ("up_down", 40)):
                rotations[f"layers.{layer}.{site}"] = [Hadamard(width)]
        carried, transformed = self.both(root, workspace, "llama", [rotations], token_weight=token_weight)
        for site in carried:
            expected = transformed.tensor(f"{site}.hessian")
            scale = float(expected.abs().max())
            torch.testing.assert_close(carried[site].entries["hessian"], expected, rtol=0, atol=2e-6 * scale)

    def test_extremes_are_exact_through_scales_and_estimated_through_rotations(
        self, root: Path, workspace: Workspace
    ) -> None:
        scales: Proposed = {
            "layers.0.attn_in": [Diag(torch.linspace(-2, 2, 24).double())],
            "layers.0.up_down": [Diag(torch.linspace(0.5, 2, 40).double())],
            "layers.1.mlp_in": [Hadamard(24)],
            "layers.1.up_down": [Hadamard(40), Diag(torch.linspace(0.5, 2, 40).double())],
        }
        carried, transformed = self.both(root, workspace, "llama", [scales])
        extremes = ("absmax", "min", "max", "mean_abs")
        for site in ("layers.0.attn_in", "layers.0.up_down", "layers.0.o_in"):
            assert carried[site].estimated == frozenset()
            for entry in extremes:
                expected = transformed.tensor(f"{site}.{entry}")
                torch.testing.assert_close(carried[site].entries[entry], expected, rtol=2e-5, atol=1e-6)
        for site in ("layers.1.mlp_in", "layers.1.up_down"):
            assert carried[site].estimated == frozenset(extremes)
            for entry in extremes:
                expected = transformed.tensor(f"{site}.{entry}")
                torch.testing.assert_close(
                    carried[site].entries[entry], expected, rtol=0, atol=0.03 * float(expected.abs().max())
                )

    def test_a_channel_that_its_norm_switches_off(self, root: Path, workspace: Workspace, tmp_path: Path) -> None:
        for file in (root / "llama").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.0.input_layernorm.weight"][3] = 0.0
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        opened = open_subject(str(tmp_path), workspace)
        flip = extend(Plan(), Proposal({"residual": [Signs(torch.ones(24).long())]}), opened.model.graph, method="test")
        gathered, _ = calibrate(request(root, source=str(tmp_path)), workspace)
        found = CarriedStatistics(gathered, opened.model, flip)["layers.0.attn_in"].entries
        assert all(torch.isfinite(entry).all() for entry in found.values())
        assert float(found["absmax"][3]) == 0.0

    def test_value_heads_are_seen_in_front_of_what_runs_at_the_output_projection(
        self, root: Path, workspace: Workspace
    ) -> None:
        gathered, _ = calibrate(request(root), workspace)
        model = open_subject(str(root / "llama"), workspace).model
        width = model.graph.width("o_in")
        mixed = extend(Plan(), Proposal({"layers.0.o_in": [Hadamard(width)]}), model.graph, method="test")
        plain, carried = (CarriedStatistics(gathered, model, plan) for plan in (Plan(), mixed))
        for entry, expected in plain["layers.0.o_in"].entries.items():
            assert torch.equal(carried["layers.0.vo"].entries[entry], expected)
        assert not torch.equal(carried["layers.0.o_in"].entries["mean"], plain["layers.0.o_in"].entries["mean"])

    def test_a_hessian_with_token_weights_is_not_carried_through_a_shift(
        self, root: Path, workspace: Workspace
    ) -> None:
        gathered, _ = calibrate(request(root, token_weight="inverse-norm"), workspace)
        model = open_subject(str(root / "llama"), workspace).model
        shifted = extend(Plan(), Proposal({"layers.0.attn_in": [Shift(torch.ones(24))]}), model.graph, method="test")
        with pytest.raises(ArtifactError, match="the mean that a shift needs counts all tokens alike") as refused:
            CarriedStatistics(gathered, model, shifted)["layers.0.attn_in"]
        assert refused.value.hint == "qtool calibrate MODEL --token-weight uniform"
        blocks = request(root, gather=("hessian_blocks", "mean"), token_weight="inverse-norm")
        with pytest.raises(ArtifactError, match="the mean that a shift needs counts all tokens alike"):
            CarriedStatistics(calibrate(blocks, workspace)[0], model, shifted)["layers.0.attn_in"]
        unread = CarriedStatistics(gathered, model, shifted, moments=())
        for layer in range(2):
            site = f"layers.{layer}.attn_in"
            assert set(unread[site].entries) == set(gathered.tensors(f"{site}.")) - {"hessian"}
        assert not can_carry_hessians(model, shifted, "inverse-norm")
        assert can_carry_hessians(model, shifted, "uniform")
        assert can_carry_hessians(model, Plan(), "inverse-norm")
        subject = open_subject(str(root / "llama"), workspace).subject
        assert known_of((), "none", gathered.manifest, subject) == ("hessian",)
        subject = replace(subject, plan=shifted)
        assert known_of((), "none", gathered.manifest, subject) == ()
        assert known_of(("absmax",), "none", gathered.manifest, subject) == ("absmax",)
        assert known_of(("absmax",), "quantized", gathered.manifest, subject) == ("absmax", "hessian")

    def test_blocks_of_hessians_come_from_the_whole_where_that_is_gathered(
        self, root: Path, workspace: Workspace
    ) -> None:
        subject = open_subject(str(root / "llama"), workspace).subject
        needs = ("hessian_blocks", "absmax")
        for gather, propagate, known in [
            (("hessian", "absmax"), "none", ("hessian", "absmax")),
            (("hessian", "hessian_blocks", "absmax"), "none", ("hessian", "absmax")),
            (("hessian_blocks", "absmax"), "none", needs),
            (("absmax",), "none", needs),
            (("hessian_blocks", "absmax"), "quantized", ("hessian", "absmax")),
        ]:
            gathered, _ = calibrate(request(root, gather=gather), workspace)
            assert known_of(needs, propagate, gathered.manifest, subject) == known
        assert known_of(needs, "none", None, subject) == needs

    def test_sites_that_nothing_was_gathered_at(self, root: Path, workspace: Workspace) -> None:
        gathered, _ = calibrate(request(root), workspace)
        carried = CarriedStatistics(gathered, open_subject(str(root / "llama"), workspace).model, Plan())
        assert torch.equal(carried["layers.0.vo"].entries["mean"], carried["layers.0.o_in"].entries["mean"])
        assert "layers.0.qk_post" not in carried
        assert "residual" not in carried
        assert "layers.9.attn_in" not in carried
        assert set(carried) == {f"layers.{i}.{s}" for i in range(2) for s in ("attn_in", "o_in", "mlp_in", "up_down")}
        assert carried["layers.0.attn_in"].tokens == WINDOWS * TOKENS


def written_plan(plan: Plan, opened: Any, workspace: Workspace) -> Path:  # noqa: ANN401 - an Opened
    """Write a plan as the step transform does."""
    from qtool.artifacts.manifest import Manifest, Step
    from qtool.artifacts.store import ArtifactWriter

    tensors, described = plan.to_state()
    manifest = Manifest(
        "plan", Step("transform", "test", 1, "tests", {}), opened.inputs, opened.model.id, "any", details=described
    )
    writer = ArtifactWriter(workspace.home / "plan.safetensors", manifest)
    writer.begin()
    writer.add("plan", tensors)
    return writer.finish(manifest).path
