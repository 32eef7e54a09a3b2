"""A model whose files are not what its config promises is refused before any work, by its headers alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from qtool.errors import ModelError
from qtool.model.completeness import promised_tensors, require_complete
from tests.model.conftest import Save

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("llama", "model.layers.1.post_attention_layernorm.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w3.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight"),
    ],
)
def test_a_missing_tensor_is_named_and_counted(save: Save, model_type: str, missing: str) -> None:
    saved = save(model_type)
    saved.change(lambda tensors: tensors.pop(missing))
    model = saved.open()
    with pytest.raises(ModelError, match=r"promises 1 tensors that the files lack") as refused:
        require_complete(model)
    assert model.stored_name(refused.value.facts[0][1]) == missing  # type: ignore[arg-type]
    assert len(dict(promised_tensors(model))) == refused.value.facts[1][1]


def test_all_that_is_missing_is_counted(save: Save) -> None:
    saved = save("llama")
    saved.configure(num_hidden_layers=4)
    with pytest.raises(ModelError, match="promises 18 tensors that the files lack") as refused:
        require_complete(saved.open())
    assert refused.value.facts[0] == ("first", "model.layers.2.input_layernorm.weight")


def cut(tensor: Tensor, axis: int) -> Tensor:
    return tensor.narrow(axis, 0, tensor.shape[axis] - 1).clone()


@pytest.mark.parametrize(
    ("model_type", "name", "axis", "expected", "received"),
    [
        ("llama", UP, 0, "40 x 24", "39 x 24"),
        ("llama", UP, 1, "40 x 24", "40 x 23"),
        ("llama", "model.layers.0.self_attn.q_proj.weight", 1, "24 x 24", "24 x 23"),
        ("llama", "model.layers.0.self_attn.v_proj.weight", 0, "12 x 24", "11 x 24"),
        ("llama", "model.norm.weight", 0, "24", "23"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", 0, "72 x 24", "71 x 24"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias", 0, "40", "39"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj.weight", 0, "64 x 8", "63 x 8"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.down_proj.weight", 1, "24 x 16", "24 x 15"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", 1, "24 x 40", "24 x 39"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias", 1, "80", "79"),
    ],
)
def test_a_wrong_shape_is_named_expected_before_received(
    save: Save, model_type: str, name: str, axis: int, expected: str, received: str
) -> None:
    saved = save(model_type)
    saved.change(lambda tensors: tensors.update({name: cut(tensors[name], axis)}))
    with pytest.raises(ModelError, match=f"`{name}` has another shape than the config promises") as refused:
        require_complete(saved.open())
    assert refused.value.facts == (("expected", expected), ("received", received))


@pytest.mark.parametrize(("count", "said"), [(2, "has another shape"), (4, "promises 4 tensors that the files lack")])
def test_files_with_another_number_of_stacked_experts_are_refused(save: Save, count: int, said: str) -> None:
    saved = save("gpt_oss")
    saved.configure(num_local_experts=count)
    with pytest.raises(ModelError, match=said):
        require_complete(saved.open())


@pytest.mark.parametrize(
    ("entry", "said", "hint"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits, groups of 128", "qtool pack"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits", "qtool pack"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, pack-quantized",
            "qtool pack",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8", "before fp8"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
            "fp8",
            "before fp8",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", "Mxfp4Config(dequantize=True)"),
    ],
)
def test_a_quantized_model_is_refused_with_its_method(
    save: Save, entry: dict[str, object], said: str, hint: str
) -> None:
    saved = save("llama")
    saved.configure(quantization_config=entry)
    with pytest.raises(ModelError, match="is quantized already") as refused:
        saved.open()
    assert refused.value.facts == (("quantized with", said),)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("file", "method", "hint"),
    [
        ("quantize_config.json", "gptq", "put what quantize_config.json says into config.json"),
        ("quant_config.json", "awq", "put what quant_config.json says into config.json"),
        ("hf_quant_config.json", "modelopt", "qtool pack"),
    ],
)
def test_a_file_beside_the_config_says_it_too(save: Save, file: str, method: str, hint: str) -> None:
    saved = save("llama")
    (saved.folder / file).write_text(json.dumps({"bits": 4}))
    with pytest.raises(ModelError, match="is quantized already") as refused:
        saved.open()
    assert refused.value.facts == (("quantized with", method),)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("leaf", "method"),
    [("qweight", "gptq or awq"), ("weight_packed", "compressed-tensors"), ("SCB", "bitsandbytes")],
)
def test_codes_in_place_of_weights_say_it_too(save: Save, leaf: str, method: str) -> None:
    saved = save("llama")
    codes = UP.replace("weight", leaf)
    saved.change(lambda tensors: tensors.update({codes: tensors.pop(UP).to(torch.int32)}))
    with pytest.raises(ModelError, match="is quantized already") as refused:
        require_complete(saved.open())
    assert refused.value.facts == (("quantized with", method), ("tensor", codes))
