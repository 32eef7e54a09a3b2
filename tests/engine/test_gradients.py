"""The backward pass, block by block, is torch's own over the whole model; what calibrate keeps of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.engine.fold import written_operators
from qtool.engine.gradients import BackwardPass
from qtool.engine.network import Network
from qtool.engine.saliency import Saliencies, saliency_name
from qtool.engine.stream import Stream
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, NumericalError, UsageError
from qtool.model.plan import Plan, SitePlan
from qtool.numerics.operators import Diag
from qtool.numerics.saliency import group_saliency, row_groups, scaled_saliency, shared_saliency
from qtool.plugins import Plugins
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from qtool.testing import double_precision, save_tiny_model
from qtool.testing.families import family_configs
from tests.oracles.guidedquant import gradients_oracle, guided_hessians_oracle, saliency_oracle
from tests.steps.conftest import Watch

CPU = torch.device("cpu")
SITES = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "up_down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


@pytest.fixture
def workspace(tmp_path: Path, plugins: Plugins) -> Workspace:
    (tmp_path / "home").mkdir()
    return Workspace(plugins, tmp_path / "home", tmp_path / "cache")


def saved(folder: Path, name: str, plugins: Plugins) -> Path:
    config = next(family_configs(plugins.load("families", name)))
    config.tie_word_embeddings = False
    save_tiny_model(folder / name, config)
    return folder / name


def windows(count: int = 3, tokens: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(3))


def gradients(subject: Subject, ids: Tensor, *, batch: int, spill: Path, first: int = 0) -> dict[str, Tensor]:
    """What the engine finds at every linear, by full name."""
    way = BackwardPass(Network(subject, device=CPU, dtype=torch.float64), ids, batch=batch, spill=spill, first=first)
    graph = subject.model.graph
    found: dict[str, list[Tensor]] = {}
    way.forward(range(graph.dims.num_layers))
    for layer in reversed(range(first, graph.dims.num_layers)):
        linears = {one.spec.module: found.setdefault(one.name, []).append for one in graph.linears_of(layer)}
        way.backward(layer, linears)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-neox", "stablelm-parallel", "phi3", "olmo2"])
def test_gradients_are_those_of_the_whole_model(
    family: str, plugins: Plugins, workspace: Workspace, tmp_path: Path
) -> None:
    path = saved(tmp_path, family, plugins)
    subject = open_subject(str(path), workspace).subject
    with double_precision():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
        expected = gradients_oracle(model, windows(), [one.name for one in subject.model.graph.linears])
        received = gradients(subject, windows(), batch=2, spill=tmp_path)
    assert received.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 1e-6
        torch.testing.assert_close(received[name], gradient, rtol=1e-9, atol=1e-12 + 1e-9 * float(gradient.abs().max()))
        assert not bool(gradient.reshape(3, -1, gradient.shape[-1])[:, -1].any())  # predicts nothing


def test_neither_the_batch_nor_where_the_way_back_ends_nor_the_disk_matters(
    plugins: Plugins, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(str(saved(tmp_path, "llama", plugins)), workspace).subject
    whole = gradients(subject, windows(), batch=3, spill=tmp_path)
    monkeypatch.setattr("qtool.engine.stream.free_memory", lambda: 0)
    short = gradients(subject, windows(), batch=1, spill=tmp_path / "spill", first=1)
    assert len(short) * 2 == len(whole)
    for name, gradient in short.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["quarot", "quip-sharp"])
def test_behind_a_plan_gradients_are_turned_as_outputs_are(
    method: str, plugins: Plugins, workspace: Workspace, tmp_path: Path
) -> None:
    """For z T a loss has the gradient g T^-T."""
    path = saved(tmp_path, "llama", plugins)
    subject = open_subject(str(path), workspace).subject
    plan, _ = transform(TransformRequest(str(path), method), workspace)
    behind = open_subject(str(plan.path), workspace).subject
    with double_precision():
        plain = gradients(subject, windows(), batch=2, spill=tmp_path)
        turned = gradients(behind, windows(), batch=2, spill=tmp_path)
    changed = set[str]()
    for linear in subject.model.graph.linears:
        expected = plain[linear.name]
        for operator, rows in written_operators(subject.model.graph, behind.plan, linear):
            columns = torch.cat([torch.arange(len(expected.T))[one] for one in rows])
            expected = expected.clone()
            expected[:, columns] = operator.weight_in(expected[:, columns])
            changed.add(linear.spec.module)
        torch.testing.assert_close(turned[linear.name], expected, rtol=1e-8, atol=1e-9)
    assert changed >= ({"self_attn.o_proj", "mlp.down_proj"} if method == "quarot" else {"self_attn.q_proj"})


def test_running_without_gradients_leaves_no_graph(plugins: Plugins, workspace: Workspace, tmp_path: Path) -> None:
    subject = open_subject(str(saved(tmp_path, "llama", plugins)), workspace).subject
    network = Network(subject, device=CPU, dtype=torch.float64)
    stream = Stream(network, windows(), batch=3, spill=tmp_path)
    network.load(0)
    assert not network.run(0, stream.states, stream.arguments_of(0)).requires_grad
    assert not network.logits(stream.states).requires_grad


@pytest.mark.parametrize(("n_out", "groups"), [(8, 4), (10, 4), (3, 4), (7, 1)])
def test_groups_of_rows_are_contiguous_and_even(n_out: int, groups: int) -> None:
    found = row_groups(n_out, groups)
    assert [row for one in found for row in range(one.start, one.stop)] == list(range(n_out))
    sizes = [one.stop - one.start for one in found]
    assert (len(found), max(sizes) - min(sizes) <= 1) == (min(groups, n_out), True)
    gradient = torch.randn(6, n_out, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_saliency(gradient, groups), saliency_oracle(gradient, groups))


def test_saliency_is_scaled_by_a_power_of_two() -> None:
    saliency = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-30
    scaled = scaled_saliency(saliency)
    assert 0.5 <= float(scaled.mean()) < 1
    assert torch.frexp(scaled / saliency).mantissa.unique().tolist() == [0.5]
    assert not bool(scaled_saliency(torch.zeros(3, 2)).any())


def test_linears_of_a_site_count_alike() -> None:
    one, other = torch.tensor([[1.0, 3.0], [6.0, 2.0]]), torch.tensor([[1e9], [3e9]])
    torch.testing.assert_close(shared_saliency([one, other]), torch.tensor([(2 / 3 + 0.5) / 2, (4 / 3 + 1.5) / 2]))
    torch.testing.assert_close(shared_saliency([one * 1e-6, other]), shared_saliency([one, other]))
    torch.testing.assert_close(shared_saliency([one, one * 0]), torch.tensor([2 / 3, 4 / 3]) / 2)


class TestCalibrate:
    @pytest.fixture
    def asked(self, plugins: Plugins, tmp_path: Path) -> CalibrateRequest:
        path = saved(tmp_path, "llama", plugins)
        letters = torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(5))
        (tmp_path / "text.txt").write_bytes(bytes(letters.tolist()))
        return CalibrateRequest(
            str(path), data=str(tmp_path / "text.txt"), num_samples=5, seq_len=16, gather=("saliency",), batch=2
        )

    def test_what_is_kept_of_a_linear(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        with double_precision():
            artifact, _ = calibrate(asked, workspace)
            model: Any = AutoModelForCausalLM.from_pretrained(
                asked.source, dtype=torch.float64, attn_implementation="eager"
            )
            graph = workspace.model(asked.source).graph
            ids = artifact.tensor("windows").long()
            expected = gradients_oracle(model.eval(), ids, [one.name for one in graph.linears])
        assert len(artifact.names("layers.")) == len(graph.linears)
        for linear in graph.linears:
            found = artifact.tensor(f"layers.{linear.layer}.{linear.spec.module}.saliency")
            wanted = saliency_oracle(expected[linear.name], 4)
            assert found.dtype == torch.bfloat16
            assert 0.49 < float(found.double().mean()) < 1.01
            factor = round(float(torch.log2(found.double().sum() / wanted.sum())))
            torch.testing.assert_close(found.double(), wanted * 2.0**factor, rtol=2**-8, atol=1e-12)

    def test_interrupted_and_run_again(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        asked = replace(asked, gather=("hessian", "saliency"))
        whole, _ = calibrate(replace(asked, output=workspace.home / "whole.safetensors"), workspace)
        for stop in (1, 3, 5, 8):  # on the way there, on the way back, in the pass of the other statistics, never
            watch = Watch(stop)
            with suppress(KeyboardInterrupt):
                resumed, _ = calibrate(asked, replace(workspace, progress=watch))
        assert watch.seen == [0, 1]  # the gradients were there, and one block of the rest
        assert resumed.manifest.id == whole.manifest.id
        assert resumed.manifest.tensors == whole.manifest.tensors

    def test_tokens_weighed_by_gradients(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        rule = "gradient,o_in=uniform"
        asked = replace(asked, gather=("hessian", "saliency", "sample"), sample_size=80)
        plain, _ = calibrate(asked, workspace)
        weighed, _ = calibrate(replace(asked, token_weight=rule), workspace)
        for layer in range(2):
            for site, modules in SITES.items():
                x = plain.tensor(f"layers.{layer}.{site}.sample").float()
                found = [plain.tensor(f"layers.{layer}.{module}.saliency").double() for module in modules]
                weights = torch.stack([one.mean(1) / one.mean() for one in found]).mean(0)
                weights = torch.ones(80) if site == "o_in" else weights
                expected = guided_hessians_oracle(x, weights[:, None])[0]
                hessian = weighed.tensor(f"layers.{layer}.{site}.hessian").double()
                # samples are bfloat16
                torch.testing.assert_close(hessian, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
                if site != "o_in":
                    other = plain.tensor(f"layers.{layer}.{site}.hessian").double()
                    assert float((other - hessian).abs().max()) > 0.05 * float(expected.abs().max())

    def test_a_rotation_of_the_residual_turns_outputs(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        """Of a plan's own model saliency is exact; what is carried there from the model is exact in the mean."""
        with double_precision():
            artifact, _ = calibrate(asked, workspace)
            plan, _ = transform(TransformRequest(asked.source, "quarot"), workspace)
            behind, _ = calibrate(replace(asked, source=str(plan.path)), workspace)
        subject = open_subject(str(plan.path), workspace).subject
        carried = Saliencies(subject.model.graph, artifact.tensor, subject.plan)
        for linear in subject.model.graph.linears:
            found, own = carried.of(linear).double(), behind.tensor(saliency_name(linear)).double()
            turned = linear.spec.module.endswith(("o_proj", "down_proj", "v_proj"))
            if turned:
                found, own = found.mean(1), own.mean(1)
                assert torch.equal(carried.of(linear), carried.of(linear)[:, :1].expand(-1, 4))
            torch.testing.assert_close(found / found.mean(), own / own.mean(), rtol=0.02, atol=1e-4)

    def test_what_scales_outputs_is_refused(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        artifact, _ = calibrate(asked, workspace)
        graph = workspace.model(asked.source).graph
        plan = Plan({"layers.0.up_down": SitePlan((Diag(torch.full((graph.width("up_down"),), 2.0)),), 1)})
        carried = Saliencies(graph, artifact.tensor, plan)
        by_name = {one.spec.module: one for one in graph.linears_of(0)}
        down = by_name["mlp.down_proj"]
        assert torch.equal(carried.of(down), Saliencies(graph, artifact.tensor).of(down))
        with pytest.raises(ArtifactError, match=r"the plan changes the outputs of `model\.layers\.0\.mlp\.up_proj`"):
            carried.of(by_name["mlp.up_proj"])
        with pytest.raises(ArtifactError, match="calibrate PLAN"):
            carried.at(0, "mlp_in")

    def test_what_cannot_be_gathered_is_refused(
        self, asked: CalibrateRequest, workspace: Workspace, plugins: Plugins, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="which is not gathered"):
            calibrate(replace(asked, gather=("hessian",), token_weight="uniform,up_down=gradient"), workspace)
        with pytest.raises(UsageError, match="two tokens"):
            calibrate(replace(asked, seq_len=1), workspace)
        with pytest.raises(UsageError, match=r"known +attn_in, o_in, mlp_in, up_down"):
            calibrate(replace(asked, token_weight="uniform,down_in=gradient"), workspace)
        experts = saved(tmp_path, "mixtral", plugins)
        with pytest.raises(UsageError, match="a token reaches some of them only"):
            calibrate(replace(asked, source=str(experts)), workspace)

    def test_an_overflow_is_told(self, asked: CalibrateRequest, workspace: Workspace) -> None:
        tensors = load_file(Path(asked.source) / "model.safetensors")
        tensors["lm_head.weight"] *= 1e25
        save_file(tensors, Path(asked.source) / "model.safetensors", {"format": "pt"})
        with pytest.raises(NumericalError, match=r"`saliency` of the gradients at `layers\.1\."):
            calibrate(replace(asked, dtype="float32"), workspace)
