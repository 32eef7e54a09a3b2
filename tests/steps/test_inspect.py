"""Inspect tells the truth: what becomes of each parameter, what operators cost, which losses and bits there are."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifacts.store import Artifact, open_artifact
from qtool.builtin.transforms.identity import Identity
from qtool.errors import ModelError
from qtool.model.plan import Proposal, Segment
from qtool.numerics.operators import Block, Diag, Hadamard, Kron, Orthogonal
from qtool.plugins import Plugins
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import read_plan
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.model.conftest import save_model

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("inspected")
    return Workspace(Plugins.discover(), home=folder / "home", cache=folder / "cache")


@pytest.fixture(scope="module")
def statistics(workspace: Workspace) -> Artifact:
    return calibrate(CalibrateRequest("tiny", data="speeches", num_samples=2, seq_len=32), workspace)[0]


@pytest.fixture(scope="module")
def plan(workspace: Workspace, statistics: Artifact) -> Artifact:
    request = TransformRequest(str(statistics.path), "smoothquant+quarot", {"r3": "on"})
    return transform(request, workspace)[0]


@pytest.fixture(scope="module")
def quantized(workspace: Workspace, plan: Artifact) -> Artifact:
    scheme = read_scheme("", {"weights": "int4-g32", "kv": "int8-asym-token-head"}, workspace.plugins)
    return mitigate(MitigateRequest(str(plan.path), "gptq+lorc", scheme, {"rank": "4"}), workspace)[0]


@pytest.fixture
def odd_model(tmp_path: Path, workspace: Workspace) -> Path:
    """The tiny model with a bias, a vector, a matrix that no family knows, and without one linear."""
    source = workspace.model("tiny").path
    shutil.copy(source / "config.json", tmp_path)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    added = {"self_attn.q_proj.bias": (128,), "self_attn.q_norm.weight": (32,), "mlp.router.weight": (4, 128)}
    save_file(
        tensors | {f"model.layers.1.{name}": torch.ones(shape) for name, shape in added.items()},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def described(workspace: Workspace, source: object) -> dict[str, object]:
    """Describe something, by way of the JSON that users read."""
    return json.loads(json.dumps(inspect(str(source), workspace).to_json(), allow_nan=False))


def by(rows: object, key: str) -> dict[str, dict[str, object]]:
    assert isinstance(rows, list)
    return {row[key]: row for row in rows}


def test_every_parameter_of_a_model_has_a_fate(workspace: Workspace) -> None:
    found = described(workspace, "tiny")
    stored = load_file(workspace.model("tiny").path / "model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    rows = by(found["parameters_by_fate"], "parameter")
    assert sum(int(str(row["tensors"])) for row in rows.values()) == len(stored)
    fates = {name.removeprefix("model.layers.*."): row["fate"] for name, row in rows.items()}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name, fate in fates.items():
        expected = "quantized" if any(part in linears for part in name.split(".")) else "folded"
        assert fate == ("kept" if "embed" in name else expected), name


def test_parameters_that_no_family_describes_are_unknown_and_strict_refuses_them(
    workspace: Workspace, odd_model: Path
) -> None:
    rows = by(described(workspace, odd_model)["parameters_by_fate"], "parameter")
    fates = {name.removeprefix("model.layers."): row["fate"] for name, row in rows.items()}
    assert fates["*.self_attn.q_proj.bias"] == "kept"
    assert fates["*.self_attn.q_norm.weight"] == "kept"
    assert fates["*.mlp.router.weight"] == "unknown"
    with pytest.raises(ModelError, match="and this model differ in 2 parameters") as error:
        inspect(str(odd_model), workspace, strict=True)
    assert [name for name, _ in error.value.facts] == [
        "model.layers.1.mlp.router.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    assert inspect("tiny", workspace, strict=True).facts["kind"] == "model"


def fates_of(workspace: Workspace, folder: Path) -> dict[str, dict[str, object]]:
    """Return the rows of a model's parameters by name, after checking that there is one for every stored tensor."""
    found = described(workspace, folder)
    rows = found["parameters_by_fate"]
    assert isinstance(rows, list)
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    assert sum(row["tensors"] for row in rows) == sum(map(len, files))
    return by(rows, "parameter")


def test_the_experts_of_all_layers_share_a_row(workspace: Workspace, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "mixtral", "mixtral").folder
    rows = fates_of(workspace, folder)
    block = "model.layers.*.block_sparse_moe."
    expected = {"tensors": 6, "linears": 6, "shape": "40x24", "dtype": "BF16", "fate": "quantized"}
    assert rows[f"{block}experts.*.w3.weight"].items() >= {**expected, "why": "reads mlp_in"}.items()
    assert rows[f"{block}experts.*.w2.weight"]["why"] == "reads up_down"
    assert rows[f"{block}gate.weight"]["fate"] == "kept"
    assert rows[f"{block}gate.weight"]["why"] == "the router; operators of mlp_in are folded into it"
    found = described(workspace, folder)
    assert (found["experts"], found["experts_chosen"], found["sparse_layers"]) == (3, 2, 2)


def test_a_stacked_tensor_says_how_many_linears_it_holds(workspace: Workspace, tmp_path: Path) -> None:
    rows = fates_of(workspace, save_model(tmp_path / "gpt_oss", "gpt_oss").folder)
    stacked = rows["model.layers.*.mlp.experts.gate_up_proj"]
    assert (stacked["tensors"], stacked["linears"], stacked["shape"]) == (2, 6, "3x24x80")
    assert (stacked["fate"], stacked["why"]) == ("quantized", "reads mlp_in; of all experts")
    assert rows["model.layers.*.mlp.experts.down_proj_bias"]["fate"] == "kept"
    assert rows["model.layers.*.self_attn.sinks"]["fate"] == "kept"


def test_towers_further_heads_and_float8_are_explained(workspace: Workspace, tmp_path: Path) -> None:
    rows = fates_of(workspace, save_model(tmp_path / "qwen2_vl", "qwen2_vl").folder)
    assert rows["visual.blocks.*.attn.qkv.weight"]["why"] == "the vision tower"
    assert rows["model.layers.*.self_attn.q_proj.weight"]["fate"] == "quantized"
    further = save_model(tmp_path / "deepseek_v3", "deepseek_v3")
    added = {
        "model.layers.2.eh_proj.weight": torch.ones(24, 48),
        "model.layers.2.mlp.odd.weight": torch.ones(5, 24),
    }
    codes = torch.ones(24, 40).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.down_proj.weight"
    further.change(lambda tensors: tensors.update(added | {name: codes, f"{name}_scale_inv": torch.ones(1, 1)}))
    further.configure(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    rows = fates_of(workspace, further.folder)
    assert rows["model.layers.*.eh_proj.weight"]["fate"] == "kept"
    assert "(MTP)" in str(rows["model.layers.*.mlp.odd.weight"]["why"])
    assert rows["model.layers.*.mlp.down_proj.weight"]["why"] == "reads up_down; float8, dequantised on reading"
    assert rows["model.layers.*.mlp.down_proj.weight_scale_inv"]["fate"] == "quantized"
    assert inspect(str(further.folder), workspace, strict=True).facts["family"] == "deepseek"


def test_stacked_experts_that_the_config_forgets_are_unknown(workspace: Workspace, tmp_path: Path) -> None:
    saved = save_model(tmp_path / "gpt_oss", "gpt_oss")
    saved.configure(num_local_experts=2)
    rows = fates_of(workspace, saved.folder)
    assert rows["model.layers.*.mlp.experts.down_proj"]["fate"] == "unknown"


def test_blocks_that_the_config_forgets_are_unknown(workspace: Workspace, tmp_path: Path) -> None:
    saved = save_model(tmp_path / "llama", "llama")
    saved.configure(num_hidden_layers=1)
    with pytest.raises(ModelError, match="differ in 7 parameters"):
        inspect(str(saved.folder), workspace, strict=True)


def test_statistics_name_their_text_and_the_layer_of_the_largest_activation(
    workspace: Workspace, statistics: Artifact
) -> None:
    found = described(workspace, statistics.path)
    assert (found["data"], found["tokens"], found["stored_windows"]) == ("speeches", 64, 2)
    assert found["token_weight"] == "uniform"
    sites = by(found["sites"], "site")
    assert list(sites) == ["attn_in", "mlp_in", "o_in", "up_down"]
    for site, row in sites.items():
        largest = [float(statistics.tensor(f"layers.{i}.{site}.absmax").max()) for i in range(4)]
        assert row["absmax"] == max(largest)
        assert row["absmax_layer"] == largest.index(max(largest))
        assert row["channels"] == (384 if site == "up_down" else 128)


def test_a_plan_lists_operators_with_what_the_online_ones_cost(workspace: Workspace, plan: Artifact) -> None:
    found = described(workspace, plan.path)
    sites = by(found["sites"], "site")
    operators = read_plan(plan)
    up_down, qk = operators.at("layers.0.up_down"), operators.at("layers.0.qk_post")
    assert sites["up_down"]["online"] == len(up_down.online) > 0
    assert sites["up_down"]["flops_per_token"] == 4 * sum(one.flops() for one in up_down.online)
    # Four query and two key heads of 32 channels, in each of four layers.
    assert sites["qk_post"]["flops_per_token"] == 4 * 6 * qk.operators[0].flops()
    assert sites["residual"] == {**sites["residual"], "folded": 1, "online": 0, "flops_per_token": 0}
    assert sites["residual"]["operators"] == "hadamard[128]"
    total = sites.pop("total")
    weights = sum(math.prod(shape) for name, shape in shapes_of(workspace).items() if name.endswith("_proj.weight"))
    assert total["flops_per_token"] == sites["up_down"]["flops_per_token"] + sites["qk_post"]["flops_per_token"]  # type: ignore[operator]
    assert total["of_linears"] == pytest.approx(total["flops_per_token"] / (2 * weights))  # type: ignore[operator]
    assert found["linears_flops_per_token"] == 2 * weights
    nbytes = [int(str(row["bytes"])) for row in sites.values()]
    assert sum(nbytes) == sum(slot.nbytes for slot in plan.header.slots.values()) == total["bytes"]
    assert (found["quarot.r3"], found["smoothquant.alpha"]) == ("on", 0.5)


def shapes_of(workspace: Workspace) -> dict[str, tuple[int, ...]]:
    return {name: place.shape for name, place in workspace.model("tiny").places.items()}


class Proposed:
    """A transform that proposes what a test gives it."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = Identity.Config

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal

    def plan(self, context: object, config: object) -> Proposal:
        return self.proposal


def planned(proposal: Proposal, workspace: Workspace, source: str, folder: Path) -> dict[str, dict[str, object]]:
    """Return the rows of the plan of a proposal."""
    plugins = replace(workspace.plugins, _instances={("transforms", "identity"): Proposed(proposal)})
    own = replace(workspace, plugins=plugins)
    artifact, _ = transform(TransformRequest(source, "identity", output=folder / "plan.safetensors"), own)
    return by(described(workspace, artifact.path)["sites"], "site")


class TestSites:
    def test_what_linears_absorb_on_their_output_is_undone_online(self, workspace: Workspace, tmp_path: Path) -> None:
        proposal = Proposal(
            {
                "layers.0.out.self_attn.k_proj": [Hadamard(64), Diag(torch.linspace(1, 2, 64))],
                "layers.2.out.self_attn.k_proj": [Hadamard(64), Diag(torch.linspace(1, 4, 64))],
                "layers.1.out.mlp.down_proj": [Block(torch.eye(4)[None] * 2, 128)],
            }
        )
        rows = planned(proposal, workspace, "tiny", tmp_path)
        inverse = Hadamard(64).inverse().flops() + Diag(torch.ones(64)).inverse().flops()
        keys = rows["out.self_attn.k_proj"]
        assert (keys["layers"], keys["folded"], keys["online"]) == (2, 2, 2)
        assert keys["flops_per_token"] == 2 * inverse
        assert keys["condition"] == pytest.approx(4)
        down = rows["out.mlp.down_proj"]
        assert down["flops_per_token"] == Block(torch.eye(4)[None], 128).inverse().flops()

    def test_what_positions_let_through_costs_nothing(self, workspace: Workspace, tmp_path: Path) -> None:
        pairs = torch.rand(2, 16).add(1).repeat(1, 2)
        rows = planned(Proposal({"layers.1.qk_pre": [Diag(pairs, heads=2)]}), workspace, "tiny", tmp_path)
        assert rows["qk_pre"] | {"folded": 1, "online": 0, "flops_per_token": 0} == rows["qk_pre"]
        assert rows["qk_pre"]["condition"] == pytest.approx(float(pairs.max() / pairs.min()))
        assert rows["total"]["flops_per_token"] == 0

    def test_conditions_of_one_site_multiply(self, workspace: Workspace, tmp_path: Path) -> None:
        first, second = torch.ones(128), torch.ones(128)
        first[0], second[0] = 10, 5
        rows = planned(Proposal({"layers.0.attn_in": [Diag(first), Diag(second)]}), workspace, "tiny", tmp_path)
        assert rows["attn_in"]["condition"] == pytest.approx(50)

    def test_sizes_are_those_of_blocks(self, workspace: Workspace, tmp_path: Path) -> None:
        """Operators that repeat at a site cost what they cost, as often as they repeat."""
        operators = {
            "layers.0.attn_in": [Hadamard(128, block_size=16), Block(torch.eye(32)[None], 128)],
            "layers.0.mlp_in": [Kron(torch.eye(8), torch.eye(16))],
            "layers.0.o_in": [Orthogonal(torch.eye(32).repeat(4, 1, 1), heads=4)],
        }
        rows = planned(Proposal(operators), workspace, "tiny", tmp_path)
        assert rows["attn_in"]["operators"] == "hadamard[8x16] block[4x32]"
        assert rows["mlp_in"]["operators"] == "kron[8*16]"
        assert rows["o_in"]["operators"] == "orthogonal[4x32]"
        for site, name in (("layers.0.attn_in", "attn_in"), ("layers.0.mlp_in", "mlp_in"), ("layers.0.o_in", "o_in")):
            assert rows[name]["flops_per_token"] == sum(one.flops() for one in operators[site])

    def test_segments_have_a_column(self, workspace: Workspace, tmp_path: Path) -> None:
        segments = {"layers.0.attn_in": (Segment(16, "int8"),), "layers.1.attn_in": (Segment(16, "int8"),)}
        rows = planned(Proposal(segments=segments), workspace, "tiny", tmp_path)
        assert (rows["attn_in"]["segments"], rows["attn_in"]["layers"]) == ("16 int8", 2)
        assert rows["total"]["segments"] is None

    def test_experts_count_by_the_tokens_that_they_get(self, workspace: Workspace, tmp_path: Path) -> None:
        """The model has 3 experts of 40 channels, of which 2 are chosen."""
        folder = save_model(tmp_path / "mixtral", "mixtral").folder
        sites = {f"layers.0.experts.{e}.up_down": [Hadamard(40)] for e in range(3)}
        outputs = {"layers.1.out.mlp.experts.1.w1": [Hadamard(40)]}
        rows = planned(Proposal({**sites, **outputs}), workspace, str(folder), tmp_path)
        assert rows["experts.*.up_down"]["flops_per_token"] == 2 * Hadamard(40).flops()
        assert (rows["experts.*.up_down"]["layers"], rows["experts.*.up_down"]["online"]) == (1, 1)
        out = rows["out.mlp.experts.*.w1"]
        assert out["flops_per_token"] == round(2 / 3 * Hadamard(40).flops())
        model = workspace.model(str(folder))
        sizes = {linear: model.places[f"{linear.name}.weight"].shape for linear in model.graph.linears}
        spent = sum(2 * math.prod(s) * (1 if one.expert is None else 2 / 3) for one, s in sizes.items())
        assert rows["total"]["of_linears"] == pytest.approx((2 + 2 / 3) * Hadamard(40).flops() / spent)


def test_a_quantized_artifact_shows_losses_bits_and_options(workspace: Workspace, quantized: Artifact) -> None:
    found = described(workspace, quantized.path)
    reports = quantized.manifest.details["layers"]
    losses = by(found["losses"], "linear")
    assert list(next(iter(losses.values())))[:3] == ["linear", "loss_rtn", "loss"]
    assert {name: row["loss"] for name, row in losses.items()} == {name: row["loss"] for name, row in reports.items()}
    modules = by(found["losses_by_module"], "module")
    mean = sum(report["loss"] for name, report in reports.items() if name.endswith("v_proj")) / 4
    assert modules["v_proj"]["mean_loss"] == pytest.approx(mean, rel=1e-12)
    assert modules["v_proj"]["worst"] == max((n for n in reports if "v_proj" in n), key=lambda n: reports[n]["loss"])
    assert found["loss_before"].startswith("what the last method that tells it started from")
    assert modules["v_proj"]["mean_loss_rtn"] > modules["v_proj"]["mean_loss_before"] > modules["v_proj"]["mean_loss"]
    evaluated, _ = evaluate(
        EvalRequest(str(quantized.path), perplexity=("speeches",), seq_len=32, max_windows=1), workspace
    )
    assert found["bits_per_weight_linears"] == evaluated.manifest.details["bits"]["linears"]
    assert (found["weights"], found["activations"]) == (
        str(read_scheme("", {"weights": "int4-g32"}, workspace.plugins).weights),
        "16 bits",
    )
    assert (found["gptq.block_size"], found["lorc.rank"]) == (128, 4)
    metrics = described(workspace, evaluated.path)
    values = {row["metric"]: row["value"] for row in by(metrics["metrics"], "metric").values()}
    assert values == evaluated.manifest.details["values"]
    assert by(metrics["protocol"], "setting")["seq_len"]["value"] == 32


def test_layers_are_in_the_order_of_their_numbers(
    workspace: Workspace, quantized: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = {f"model.layers.{i}.mlp.up_proj": {"loss": 1 / (i + 1)} for i in (10, 2, 0)}
    manifest = replace(quantized.manifest, details={**quantized.manifest.details, "layers": reports})
    monkeypatch.setattr("qtool.steps.inspect.open_artifact", lambda path: Artifact(path, manifest))
    rows = inspect(str(quantized.path), workspace).tables["losses"].rows
    assert [row[0] for row in rows] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 10)]


def test_an_artifact_whose_model_is_gone_is_described_without_what_needs_it(
    workspace: Workspace, quantized: Artifact, tmp_path: Path
) -> None:
    warned: list[str] = []
    apart = replace(workspace, inputs={"model": tmp_path / "gone"}, warn=warned.append)
    found = described(apart, quantized.path)
    assert "bits_per_weight_linears" not in found
    assert len(by(found["losses"], "linear")) == 28
    assert "cannot be found" in warned[0]
    assert open_artifact(quantized.path).manifest.id == found["id"]
