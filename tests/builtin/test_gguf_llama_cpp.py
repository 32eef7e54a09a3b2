"""llama.cpp, as npm's node-llama-cpp brings it, computes what qtool measures on the files that qtool writes.

Measured on SmolLM2-135M, 34 tokens, RTN, as the largest difference of a log-probability over the vocabulary, and as
mean KL divergence: F16 0.04 and 4e-6; Q8_0 1.14 and 0.0034; Q4_0 1.27 and 0.0061; MXFP4 1.13 and 0.0062. In blocks it
rounds activations to 8 bits, which in qtool's own forward pass makes differences of up to 1.1 to 1.6 as well.

That this and other rounding of llama.cpp's is all that differs is shown on tiny models. In float32, the cache too, the
KL divergence is 1e-13; where GELU is computed it is up to 2e-6, for llama.cpp has a table of GELU in float16, and 5e-9
where qtool rounds likewise. In Q4_0 it is at most 1.5 times what the same 8 bits do to qtool's own: 1e-4 mostly, and
7e-3 in six blocks of Gemma 3, whose norms (1 + w, also of queries, keys and outputs) make rounding grow threefold with
every two blocks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qtool.artifacts.store import Artifact
from qtool.builtin.exporters.gguf import FILE, GGUF
from qtool.builtin.models.smollm2 import SmolLM2
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.errors import ResourceError
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.scheme_parts import Rule
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.layouts.conftest import changed
from tests.builtin.llama_cpp import divergence, executed, in_float32, log_probabilities
from tests.builtin.packed import written

pytestmark = [pytest.mark.slow, pytest.mark.network]

Q4_0 = "int4-sym-g32-sfp16-signed_full"
Q4_1 = "int4-asym-g32-offset-sfp16"
HALF = "int8-sym-g32-sfp16"
TEXT = "The capital of France is Paris, and in 1789 there were  600000 people. def f(x):\n\n  return x's"
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 260, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TIED = {"tie_word_embeddings": True, "hidden_size": 96}  # Gemma's, scaled by a root that is no whole number
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 32, **TIED}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},
    "qwen3": {},
    "gemma": TIED,
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {**WINDOWS, "num_hidden_layers": 6},
}


@pytest.fixture
def workspace(tmp_path: Path, cache: Path) -> Workspace:
    return Workspace(Plugins.discover(), tmp_path / "home", cache)


def quantized(model: Path, weights: str, workspace: Workspace) -> Artifact:
    scheme = read_scheme("", {"weights": weights}, workspace.plugins)
    return mitigate(MitigateRequest(str(model), "rtn", scheme, dtype="float32"), workspace)[0]


def packed(model: Path, weights: str, to: str, workspace: Workspace) -> tuple[Subject, Path]:
    artifact = quantized(model, weights, workspace)
    checkpoint, _ = pack(PackRequest(str(artifact.path), to), workspace)
    return open_subject(str(artifact.path), workspace).subject, checkpoint.path / "model.gguf"


def measured(subject: Subject, tokens: list[int]) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=1)
    return log_probabilities(torch.cat([logits for _, logits in executable.forward_windows(torch.tensor([tokens]))])[0])


@pytest.mark.parametrize(
    ("weights", "to", "largest", "kl"),
    [
        (HALF, "gguf-f16", 0.1, 2e-5),
        (HALF, "gguf", 3.0, 0.015),
        (Q4_0, "gguf", 3.0, 0.02),
        (Q4_1, "gguf", 3.0, 0.02),
        ("mxfp4", "gguf", 3.0, 0.02),
    ],
)
def test_smollm2_has_the_probabilities_that_qtool_measures(
    node_llama_cpp: Path, workspace: Workspace, cache: Path, weights: str, to: str, largest: float, kl: float
) -> None:
    try:
        model = SmolLM2().fetch(Path(os.environ.get("QTOOL_TEST_CACHE", cache)))
    except ResourceError as error:
        pytest.skip(f"llama.cpp was not run: SmolLM2 cannot be fetched ({error})")
    subject, file = packed(model, weights, to, workspace)
    tokenizer: Any = subject.model.tokenizer()
    tokens = tokenizer(TEXT).input_ids
    answer = executed(node_llama_cpp, file, tokens, texts=[TEXT], generate=8)
    assert answer["tokenized"] == [tokens]
    ours, theirs = measured(subject, tokens), log_probabilities(answer["logits"])
    assert len(answer["followed"]) == 8
    assert answer["followed"][0] == int(theirs[-1].argmax())
    assert float((ours - theirs).abs().max()) < largest
    assert divergence(ours, theirs) < kl


def save_model(folder: Path, name: str, **changes: object) -> None:
    """Save a tiny model of values that bfloat16 and float16 hold, and a tokenizer that llama.cpp loads."""
    config = {"tie_word_embeddings": False, **SIZES, **MODELS[name], **changes}
    save_tiny_model(folder, AutoConfig.for_model(name.partition(" ")[0], **config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_computed_as_qtool_does(
    node_llama_cpp: Path, workspace: Workspace, tmp_path: Path, name: str
) -> None:
    save_model(tmp_path / "model", name)
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    subject, file = packed(tmp_path / "model", "mxfp4", "gguf-f16", workspace)
    theirs = log_probabilities(executed(node_llama_cpp, in_float32(file), tokens, exact=True)["logits"])
    assert divergence(measured(subject, tokens), theirs) < (1e-5 if name.startswith("gemma") else 1e-11)
    for weights in (Q4_0, *(("nvfp4",) if name in ("llama 3", "qwen3") else ())):
        assert_blocks(*packed(tmp_path / "model", weights, "gguf", workspace), node_llama_cpp, tokens)


def assert_blocks(subject: Subject, file: Path, folder: Path, tokens: list[int]) -> None:
    """Say that llama.cpp is as far away as 8 bits of inputs in groups of 32 are, which it rounds to."""
    eight = parse_tensor_scheme("int8-sym-g32-sfp16-full", subject.plugins.format, vector="token")
    theirs, ours = log_probabilities(executed(folder, file, tokens)["logits"]), measured(subject, tokens)
    rules = (*subject.scheme.rules, Rule("activations", "lm_head", eight))
    rounded = measured(replace(subject, scheme=replace(subject.scheme, activations=eight, rules=rules)), tokens)
    assert divergence(ours, theirs) < 2 * divergence(ours, rounded)


@pytest.mark.parametrize(
    ("name", "weights", "changes"),
    [
        ("llama", f"{Q4_0},lm_head={HALF}", {}),
        ("llama", f"{Q4_0},lm_head=mxfp4,embed_tokens={Q4_1}", {"tie_word_embeddings": True}),
        ("llama", f"none,lm_head={Q4_0},embed_tokens=mxfp4", {}),
        ("llama", f"{HALF},lm_head={HALF},embed_tokens={HALF}", {"tie_word_embeddings": True}),
        ("llama 3", f"nvfp4,lm_head=nvfp4,embed_tokens={Q4_0}", {}),
        ("qwen3", f"{HALF},lm_head=nvfp4,embed_tokens={HALF}", {}),
        ("qwen2", f"{Q4_0},lm_head={Q4_1},embed_tokens={HALF}", {}),
        ("gemma", f"{Q4_0},lm_head={HALF},embed_tokens={HALF}", {}),
        ("gemma3_text", f"{Q4_0},lm_head=mxfp4", {"tie_word_embeddings": False}),
    ],
)
def test_heads_and_embeddings_in_blocks_are_computed_as_qtool_does(
    node_llama_cpp: Path, workspace: Workspace, tmp_path: Path, name: str, weights: str, changes: dict[str, Any]
) -> None:
    save_model(tmp_path / "model", name, **changes)
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    subject, file = packed(tmp_path / "model", weights, "gguf", workspace)
    assert_blocks(subject, file, node_llama_cpp, tokens)
    _, half = packed(tmp_path / "model", weights, "gguf-f16", workspace)
    limits = {half: 1e-5} if "nvfp4" in weights else {half: 1e-5, file: 1e-5 if name.startswith("gemma") else 1e-11}
    for each, limit in limits.items():
        theirs = log_probabilities(executed(node_llama_cpp, in_float32(each), tokens, exact=True)["logits"])
        assert divergence(measured(subject, tokens), theirs) < limit


@pytest.mark.parametrize("name", ["llama with biases", "gemma"])
def test_q4_1_is_computed_as_qtool_does(node_llama_cpp: Path, workspace: Workspace, tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "model", name)
    subject, file = packed(tmp_path / "model", Q4_1, "gguf", workspace)
    assert {one.tensor_type.name for one in gguf.GGUFReader(file).tensors} >= {"Q4_1"}
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    assert_blocks(subject, file, node_llama_cpp, tokens)


@pytest.mark.parametrize("name", ["llama with biases", "gemma"])
def test_zero_points_of_q4_1_are_computed_as_qtool_does(
    node_llama_cpp: Path, workspace: Workspace, tmp_path: Path, name: str
) -> None:
    """With scales of powers of two, for most others have offsets that float16 does not have."""
    save_model(tmp_path / "model", name)
    subject = open_subject(str(quantized(tmp_path / "model", "int4-asym-g32-sfp16", workspace).path), workspace).subject
    assert subject.quantized is not None
    held = {key: subject.quantized.tensor(key) for key in subject.quantized.names() if key.endswith(".scale")}
    scales = {key: (2.0 ** scale.float().log2().round()).half() for key, scale in held.items()}
    subject = changed(subject, tmp_path / "changed", **scales)
    written(GGUF(), subject, tmp_path / "out")
    assert {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / FILE).tensors} >= {"Q4_1"}
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    assert_blocks(subject, tmp_path / "out" / FILE, node_llama_cpp, tokens)


LINES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "for (int i = 0; i < n; i++) { sum += weights[i] * inputs[i]; }",
    "In 1789 there were 600000 people in Paris.  Two spaces, and  two more.",
    "quantization, quantized, quantizing; weights and inputs; the weights of the inputs",
)
TEXTS = (
    *("the quantized inputs of the fox", "two  spaces,   three", "12345 people", "new\nline\n\nmore", "tab\tand end "),
    *("é, 😀 and 日本語", "", "x", "thethe queen, we tested one tin", "▁"),
)


def save_pieces(folder: Path, *, prefix: bool) -> int:
    """Train pieces on a few lines; save them as transformers turns a SentencePiece model, and return how many.

    It merges all halves of a piece that are pieces, those of the first piece first.
    """
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=lambda text: learned.get_vocab()[text])
    halves = [(text[:at], text[at:]) for text in pieces for at in range(1, len(text))]
    merges = [two for two in halves if all(half in pieces for half in two)]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = [*special.values(), *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            {text: i for i, text in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(vocabulary)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_pieces_are_those_of_transformers(
    node_llama_cpp: Path, workspace: Workspace, tmp_path: Path, name: str
) -> None:
    rows = save_pieces(tmp_path / "tokenizer", prefix=name == "llama") + 5
    save_model(tmp_path / "model", name, vocab_size=rows)
    save_pieces(tmp_path / "model", prefix=name == "llama")
    subject, file = packed(tmp_path / "model", "mxfp4", "gguf-f16", workspace)
    tokenizer: Any = subject.model.tokenizer()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    tokens = [one for found in ids for one in found]
    assert len(ids[0]) < 0.7 * len(TEXTS[0])
    answer = executed(node_llama_cpp, in_float32(file), tokens[:60], texts=list(TEXTS), exact=True)
    assert dict(zip(TEXTS, answer["tokenized"], strict=True)) == dict(zip(TEXTS, ids, strict=True))
    assert answer["restored"] == [text.replace("▁", " ") for text in TEXTS]
    apart = divergence(measured(subject, tokens[:60]), log_probabilities(answer["logits"]))
    assert apart < (1e-5 if name == "gemma" else 1e-11)
