"""Tensors are read by the names of modules, whatever files call them and however they stack or scale them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.errors import ModelError, NumericalError
from qtool.model.completeness import require_complete
from qtool.model.prequantized import dequantize_blocks
from tests.model.conftest import Save, Saved

EXPERT = "model.layers.1.mlp.experts"


def test_what_is_read_is_what_transformers_modules_hold(save: Save) -> None:
    for model_type in ("llama", "gpt_neox", "qwen2_vl"):
        saved = save(model_type)
        model = saved.open()
        require_complete(model)
        for name, tensor in saved.state.items():
            assert torch.equal(model.tensor(name), tensor), name
        assert model.dtype == torch.bfloat16
        assert {model.stored_name(name) for name in saved.state} == set(load_file(saved.folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("model_type", "gate", "up", "down", "stored"),
    [
        ("mixtral", "w1", "w3", "w2", "model.layers.1.block_sparse_moe.experts"),
        ("qwen3_moe", "gate_proj", "up_proj", "down_proj", EXPERT),
        ("deepseek_v3", "gate_proj", "up_proj", "down_proj", EXPERT),
    ],
)
def test_every_expert_has_linears_of_its_own(
    save: Save, model_type: str, gate: str, up: str, down: str, stored: str
) -> None:
    saved = save(model_type)
    model = saved.open()
    require_complete(model)
    gate_up, downs = saved.state[f"{EXPERT}.gate_up_proj"], saved.state[f"{EXPERT}.down_proj"]
    assert len(gate_up) == model.graph.dims.experts
    for expert in range(len(gate_up)):
        halves = [model.tensor(f"{EXPERT}.{expert}.{name}.weight") for name in (gate, up)]
        assert torch.equal(torch.cat(halves), gate_up[expert])
        assert torch.equal(model.tensor(f"{EXPERT}.{expert}.{down}.weight"), downs[expert])
        assert model.stored_name(f"{EXPERT}.{expert}.{up}.weight") == f"{stored}.{expert}.{up}.weight"
    inside = model.tensors("model.layers.1.")
    assert torch.equal(inside["mlp.gate.weight"], saved.state["model.layers.1.mlp.gate.weight"])
    assert {f"{linear.spec.module}.weight" for linear in model.graph.readers_of(1)} <= set(inside)


def test_stacked_experts_are_sliced_and_transposed(save: Save) -> None:
    saved = save("gpt_oss")
    model = saved.open()
    require_complete(model)
    inside = model.tensors("model.layers.1.")
    for module in ("gate_up_proj", "down_proj"):
        stacked, biases = saved.state[f"{EXPERT}.{module}"], saved.state[f"{EXPERT}.{module}_bias"]
        for expert, weight in enumerate(stacked):
            name = f"{EXPERT}.{expert}.{module}"
            assert torch.equal(model.tensor(f"{name}.weight"), weight.T)
            assert torch.equal(model.tensor(f"{name}.bias"), biases[expert])
            assert torch.equal(inside[f"mlp.experts.{expert}.{module}.weight"], weight.T)
            assert model.places[f"{name}.weight"].shape == weight.T.shape
            assert model.stored_name(f"{name}.weight") == f"{EXPERT}.{module}"
    assert f"{EXPERT}.gate_up_proj" not in model.places


def test_names_that_modules_have_already_are_left(save: Save) -> None:
    saved = save("qwen2_vl")
    plain = dict(saved.state)
    save_file({name: t.contiguous() for name, t in plain.items()}, saved.folder / "model.safetensors", {"format": "pt"})
    model = saved.open()
    require_complete(model)
    assert {name: model.stored_name(name) for name in model.places} == {name: name for name in plain}
    assert torch.equal(model.tensor("lm_head.weight"), plain["lm_head.weight"])


@pytest.mark.parametrize("kept", ["embedding", "head"])
def test_of_tied_weights_one_may_be_missing(save: Save, kept: str) -> None:
    saved = save("llama", tie_word_embeddings=True)
    if kept == "head":
        saved.change(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    model = saved.open()
    require_complete(model)
    embedding = saved.state["model.embed_tokens.weight"]
    assert torch.equal(model.tensor("model.embed_tokens.weight"), embedding)
    assert not model.has("lm_head.weight")


def float8(saved: Saved, block: tuple[int, int] = (4, 5)) -> dict[str, Tensor]:
    """Turn a model's linears into float8 with scales; return what they stand for in bfloat16."""
    exact: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            codes = (tensors[name].float() * 400).to(torch.float8_e4m3fn)
            rows, columns = codes.shape
            scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.01
            whole = torch.kron(scale, torch.ones(block))[:rows, :columns]
            exact[name] = (codes.float() * whole).bfloat16()
            tensors |= {name: codes, f"{name}_scale_inv": scale}

    saved.change(edit)
    entry = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic", "fmt": "e4m3"}
    saved.configure(quantization_config=entry, torch_dtype="bfloat16")
    return exact


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_float8_blocks_are_dequantised_on_reading(save: Save, model_type: str) -> None:
    saved = save(model_type)
    exact = float8(saved)
    model = saved.open()
    require_complete(model)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    for name, tensor in exact.items():
        assert torch.equal(model.tensor(name), tensor), name
        assert not model.has(f"{name}_scale_inv")
    assert torch.equal(model.tensor("model.norm.weight"), saved.state["model.norm.weight"])


def test_a_scale_belongs_to_the_values_of_its_block() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]).to(torch.float8_e4m3fn)
    found = dequantize_blocks(weight, torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), (2, 2))
    assert found.tolist() == [[1, 2, 30], [4, 5, 60], [700, 800, 9000]]
    assert found.dtype == torch.float32


def test_float8_without_scales_or_with_others_is_refused(save: Save) -> None:
    saved = save("llama")
    float8(saved)
    name = "model.layers.1.mlp.up_proj.weight"
    saved.change(lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(3, 3)}))
    with pytest.raises(ModelError, match=f"scales of `{name}` do not fit") as refused:
        require_complete(saved.open())
    assert refused.value.facts == (("expected", (10, 5)), ("received", (3, 3)))
    saved.change(lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(ModelError, match=f"`{name}` holds codes without scales"):
        require_complete(saved.open())
    with pytest.raises(ModelError, match=f"`{name}` holds codes without scales"):
        saved.open().tensor(name)


def test_heads_for_further_tokens_are_left_alone_but_blocks_that_the_config_forgets_are_not(save: Save) -> None:
    saved = save("deepseek_v3")
    before, block = set(load_file(saved.folder / "model.safetensors")), "model.layers.1."

    def edit(tensors: dict[str, Tensor]) -> None:
        again = {name.replace(block, "model.layers.2."): t.clone() for name, t in tensors.items() if block in name}
        tensors |= again | {"model.layers.2.eh_proj.weight": torch.ones(24, 48), "mtp.norm.weight": torch.ones(24)}

    saved.change(edit)
    model = saved.open()
    assert set(model.left_alone) == set(load_file(saved.folder / "model.safetensors")) - before
    assert all("MTP" in reason for reason in model.left_alone.values())
    saved.configure(num_hidden_layers=1)
    alone = saved.open().left_alone
    assert "model.layers.1.mlp.gate.weight" in alone  # a dense block alone is no measure of sparse ones
    saved.change(lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))
    saved.configure(num_hidden_layers=2)
    assert set(saved.open().left_alone) == {"mtp.norm.weight"}


def test_buffers_of_old_files_are_left_alone(save: Save) -> None:
    saved = save("gpt_neox")
    prefix = "gpt_neox.layers.0.attention."
    old = {
        f"{prefix}bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        f"{prefix}masked_bias": torch.tensor(-1e9),
        f"{prefix}rotary_emb.inv_freq": torch.ones(3),
    }
    saved.change(lambda tensors: tensors.update(old))
    model = saved.open()
    require_complete(model)
    assert set(model.left_alone) == set(old)
    assert not [name for name in model.tensors("gpt_neox.layers.0.") if f"gpt_neox.layers.0.{name}" in old]


def test_towers_are_left_alone_but_for_what_writes_the_residual(save: Save) -> None:
    model = save("qwen2_vl").open()
    assert set(model.left_alone.values()) == {"the vision tower"}
    tower = {name for name in model.places if name.startswith("model.visual.")}
    assert tower - set(model.left_alone) == {f"model.visual.merger.mlp.2.{leaf}" for leaf in ("weight", "bias")}


def test_shards_are_read_as_one(save: Save) -> None:
    saved = save("qwen3_moe")
    whole = load_file(saved.folder / "model.safetensors")
    shard(saved.folder, whole)
    model = saved.open()
    require_complete(model)
    assert all(torch.equal(model.tensor(name), tensor) for name, tensor in whole.items())
    files = {tensor.file.name for tensor in model.stored.values()}
    assert files == {"model-0.safetensors", "model-1.safetensors"}


def shard(folder: Path, tensors: dict[str, Tensor], *, twice: str = "") -> None:
    """Write the weights as two shards with an index, one tensor in both."""
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file or name == twice}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_tensor_in_two_shards_is_refused(save: Save) -> None:
    saved = save("llama")
    shard(saved.folder, load_file(saved.folder / "model.safetensors"), twice="model.norm.weight")
    with pytest.raises(ModelError, match=r"two files of .* hold the tensor `model\.norm\.weight`") as refused:
        require_complete(saved.open())
    assert refused.value.facts == (("first", "model-0.safetensors"), ("second", "model-1.safetensors"))


def test_an_index_that_promises_too_much_is_refused(save: Save) -> None:
    saved = save("llama")
    shard(saved.folder, load_file(saved.folder / "model.safetensors"))
    (saved.folder / "model-1.safetensors").rename(saved.folder / "elsewhere")
    with pytest.raises(ModelError, match="names files that are not there") as refused:
        saved.open()
    assert refused.value.facts == (("first", "model-1.safetensors"), ("missing", "1 of 2"))
    (saved.folder / "elsewhere").rename(saved.folder / "model-1.safetensors")
    index = json.loads((saved.folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.more.weight"] = "model-1.safetensors"
    (saved.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="promises a tensor that no file has") as refused:
        require_complete(saved.open())
    assert refused.value.facts == (("tensor", "model.more.weight"), ("file", "model-1.safetensors"))


def test_what_is_not_finite_is_named(save: Save) -> None:
    saved = save("gpt_oss")
    saved.change(lambda tensors: tensors[f"{EXPERT}.down_proj"][2].fill_(torch.inf))
    model = saved.open()
    assert torch.isfinite(model.tensor(f"{EXPERT}.1.down_proj.weight")).all()
    with pytest.raises(NumericalError, match=rf"`{EXPERT}\.2\.down_proj\.weight` holds NaN or Inf"):
        model.tensors("model.layers.1.")


def test_a_config_that_contradicts_itself_is_refused(save: Save) -> None:
    saved = save("gpt_oss")
    saved.configure(num_hidden_layers=1)
    with pytest.raises(ModelError, match="transformers cannot read the config") as refused:
        saved.open()
    assert "layer_types" in str(refused.value.facts[0][1])
