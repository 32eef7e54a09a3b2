"""A tiny Llama, written as GGUF by the reference writer, comes out of the conversion weight for weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.errors import ArtifactError, ModelError, ResourceError, UsageError
from qtool.model import gguf as conversion
from qtool.model.card import ModelCard, read_card
from qtool.model.gguf import convert_gguf, exact_dtype, staged_folder
from qtool.plugins import Plugins
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 64, 4, 2, 16, 96, 2
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
Weights = dict[str, np.ndarray]


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in GPT-2's vocabulary, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


VOCAB = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĠĠ", "ĊĊ", "Ġa", "ab"]
MERGES = ["Ġ Ġ", "Ċ Ċ", "Ġ a", "a b"]


def rows_for_ggml(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k as GGUF stores them: row ``2i + s`` of a head is row ``s * head_dim / 2 + i``."""
    half = HEAD_DIM // 2
    order = [h * HEAD_DIM + s * half + i for h in range(heads) for i in range(half) for s in range(2)]
    return weight[order]


def random_weights(round_to: torch.dtype) -> Weights:
    """Weights by their transformers names, each exactly representable in ``round_to``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    all_shapes = {f"model.layers.{n}.{k}.weight": s for n in range(LAYERS) for k, s in shapes.items()}
    all_shapes |= {"model.embed_tokens.weight": (len(VOCAB), HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {k: torch.randn(s, generator=generator).to(round_to).float().numpy() for k, s in all_shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(
        weights: Weights,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        pre: str = "smollm",
        extra: dict[str, np.ndarray] | None = None,
        keys: dict[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INTERMEDIATE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(50000.0)
        writer.add_rope_dimension_count(HEAD_DIM)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(VOCAB))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(VOCAB)
        writer.add_token_types([3, 3, 3] + [1] * (len(VOCAB) - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        for key, value in (keys or {}).items():
            writer.add_key_value(f"llama.{key}", value, gguf.GGUFValueType.get_type(value))
        for name, weight in (gguf_names(weights) | (extra or {})).items():
            if weight.ndim == 1:
                writer.add_tensor(name, weight)
            else:
                writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def gguf_names(weights: Weights) -> Weights:
    renamed = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(LAYERS):
        for short, long in NAMES.items():
            weight = weights[f"model.layers.{layer}.{long}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = rows_for_ggml(weight, HEADS if short == "attn_q" else KV_HEADS)
            renamed[f"blk.{layer}.{short}.weight"] = weight
    return renamed


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_comes_out_exactly_and_no_wider_than_needed(
    write: Callable[..., Path], dtype: torch.dtype
) -> None:
    weights = random_weights(dtype)
    path = write(weights)
    convert_gguf(path, path.parent / "model")
    stored = load_file(path.parent / "model" / "model.safetensors")
    assert set(stored) == set(weights)
    for name, weight in weights.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name].float(), torch.from_numpy(weight)), name
    config = json.loads((path.parent / "model" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_quantized_weights_are_dequantized_once(write: Callable[..., Path]) -> None:
    weights = random_weights(torch.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write(weights, kind)
    convert_gguf(path, path.parent / "model")
    stored = load_file(path.parent / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    # Blocks of Q8_0 lie along a row, so reordering rows and quantizing may be swapped.
    expected = gguf.dequantize(gguf.quantize(weights[name], kind), kind)
    assert stored[name].dtype == torch.float32
    assert torch.equal(stored[name], torch.from_numpy(expected))
    assert not np.array_equal(expected, weights[name])
    said = "its weights were dequantized from Q8_0, so what quantizes them rounds again"
    assert read_card(path.parent / "model") == ModelCard("tiny", said)


def test_a_file_of_codes_is_told_once_and_packed_without_rounding_again(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    told: list[str] = []
    workspace = Workspace(Plugins.discover(), tmp_path / "home", tmp_path / "cache", warn=told.append)
    for kind, codes in ((gguf.GGMLQuantizationType.Q4_0, True), (gguf.GGMLQuantizationType.F16, False)):
        path = write(random_weights(torch.float16), kind)
        if codes:
            packed = pack(PackRequest(str(path), "hf", tmp_path / "hf"), workspace)[0].path
            assert told == []
        else:
            with pytest.raises(ArtifactError, match="holds nothing to pack") as refused:
                pack(PackRequest(str(path), "hf"), workspace)
            assert refused.value.hint.startswith("qtool mitigate")
        folder = open_subject(str(path), workspace).model.path
        assert all("dequantized from Q4_0" in one for one in told)
        assert len(told) == codes
        open_subject(str(folder), workspace)
        assert len(told) == codes
        assert read_card(folder).name == "tiny"
        told.clear()
        if codes:
            decoded, stored = load_file(folder / "model.safetensors"), load_file(packed / "model.safetensors")
            assert stored.keys() >= decoded.keys()
            assert all(torch.equal(stored[name], tensor.to(stored[name].dtype)) for name, tensor in decoded.items())


def test_config_and_tied_head(write: Callable[..., Path]) -> None:
    path = write(random_weights(torch.bfloat16))
    convert_gguf(path, path.parent / "model")
    config = json.loads((path.parent / "model" / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(VOCAB),
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 128,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    assert "quantization_config" not in config


def test_untied_head_is_kept(write: Callable[..., Path]) -> None:
    weights = random_weights(torch.bfloat16)
    head = weights["model.embed_tokens.weight"][::-1].copy()
    path = write(weights, extra={"output.weight": head})
    convert_gguf(path, path.parent / "model")
    stored = load_file(path.parent / "model" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"].float(), torch.from_numpy(head))
    assert json.loads((path.parent / "model" / "config.json").read_text())["tie_word_embeddings"] is False


def tokens_of(folder: Path, text: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    return tokenizer.convert_ids_to_tokens(ids)


def test_digits_are_split_before_words(write: Callable[..., Path]) -> None:
    path = write(random_weights(torch.bfloat16))
    convert_gguf(path, path.parent / "model")
    # GPT-2's split alone would give a lone space to " 12": "Ġ", "Ġ", "1", "2".
    assert tokens_of(path.parent / "model", "ab  12\n\n3 a") == ["ab", "ĠĠ", "1", "2", "ĊĊ", "3", "Ġa"]


def test_words_alone_are_split_as_gpt2_does(write: Callable[..., Path]) -> None:
    path = write(random_weights(torch.bfloat16), pre="gpt-2")
    convert_gguf(path, path.parent / "model")
    assert tokens_of(path.parent / "model", "ab  12\n\n3 a") == ["ab", "Ġ", "Ġ", "1", "2", "Ċ", "Ċ", "3", "Ġa"]


def test_special_tokens_and_chat_template(write: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    path = write(random_weights(torch.bfloat16))
    convert_gguf(path, path.parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(path.parent / "model")
    assert tokenizer("<|im_start|>ab<|im_end|>")["input_ids"] == [1, VOCAB.index("ab"), 2]  # and no BOS before them
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "hello"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "unheard-of"}, "splits text into words in a way that is not known"),
        ({"keys": {"rope.scaling.type": "linear"}}, r"does not read\n  llama.rope.scaling.type +linear\n  read +none"),
        ({"keys": {"attn_logit_softcapping": 3.0}}, r"does not read\n  llama.attn_logit_softcapping +3.0\n"),
        ({"keys": {"attention.sliding_window": 64}}, r"does not read\n  llama.attention.sliding_window +64\n"),
        ({"keys": {"attention.scale": 0.5}}, r"does not read\n  llama.attention.scale +0.5\n"),
        ({"keys": {"expert_count": 4}}, r"does not read\n  llama.expert_count +4\n"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "do not hold the same weights"),
    ],
)
def test_what_cannot_be_carried_over_exactly_is_refused(
    write: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    path = write(random_weights(torch.bfloat16), **options)
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, path.parent / "model")
    assert_nothing_left(path.parent, path.name)


def test_keys_that_change_nothing_are_left_out(write: Callable[..., Path]) -> None:
    neutral = {"rope.scaling.type": "none", "rope.scaling.finetuned": False, "expert_count": 0, "attention.scale": 1.0}
    path = write(random_weights(torch.bfloat16), keys=neutral)
    convert_gguf(path, path.parent / "model")
    assert "scaling" not in (path.parent / "model" / "config.json").read_text()


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.6, 0.999])
def test_truncated_file(write: Callable[..., Path], fraction: float) -> None:
    path = write(random_weights(torch.bfloat16))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ModelError, match="truncated") as caught:
        convert_gguf(path, path.parent / "model")
    assert caught.value.hint
    assert_nothing_left(path.parent, path.name)


def test_not_gguf_and_missing(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match=r"is not a GGUF file\n  first bytes expected  b'GGUF'\n"):
        convert_gguf(tmp_path / "model.bin", tmp_path / "model")
    with pytest.raises(ModelError, match="no such file"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "model")
    assert_nothing_left(tmp_path, "model.bin")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    path = write(random_weights(torch.bfloat16))

    def interrupt(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()  # all but the last file is there
        raise interruption

    monkeypatch.setattr(conversion, "_name_tokenizer_class", interrupt)
    with pytest.raises(interruption):
        convert_gguf(path, path.parent / "model")
    assert_nothing_left(path.parent, path.name)


def test_full_disk(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    path = write(random_weights(torch.bfloat16))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(ResourceError, match="No space left"):
        convert_gguf(path, path.parent / "model")
    assert_nothing_left(path.parent, path.name)


def test_output_path_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("keep me")
    with pytest.raises(UsageError, match="taken"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    with pytest.raises(UsageError, match="taken"), staged_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "model" / "precious").read_text() == "keep me"
    assert_nothing_left(tmp_path, "model")


def test_staged_folder_appears_whole(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "deep" / "model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "sub" / "file").read_text() == "content"
    assert_nothing_left(tmp_path / "deep", "model")


def test_exact_dtype_looks_at_every_tensor() -> None:
    fine = torch.tensor([1.0, 1.5])
    only_half = torch.tensor([1.0 + 2**-10])
    only_bfloat = torch.tensor([2.0**100])
    assert exact_dtype([fine, only_bfloat]) == torch.bfloat16
    assert exact_dtype([fine, only_half]) == torch.float16
    assert exact_dtype([only_half, only_bfloat]) == torch.float32
    with pytest.raises(ModelError, match="not finite"):
        exact_dtype([fine, torch.tensor([float("nan")])])
