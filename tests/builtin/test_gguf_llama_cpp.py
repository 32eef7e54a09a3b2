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

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qtool.builtin.models.smollm2 import SmolLM2
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.errors import ResourceError
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.network]

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PACKAGE = "node-llama-cpp@3.22.1"
Q4_0 = "int4-sym-g32-sfp16-signed_full"
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


@pytest.fixture(scope="session")
def node_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package with its prebuilt binary, installed unless QTOOL_NODE_LLAMA_CPP names one."""
    given = os.environ.get("QTOOL_NODE_LLAMA_CPP")
    if given:
        return Path(given)
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("llama.cpp was not run: node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"llama.cpp was not run: {PACKAGE} cannot be installed ({error})")
    return folder / "node_modules" / "node-llama-cpp"


@pytest.fixture
def workspace(tmp_path: Path, cache: Path) -> Workspace:
    return Workspace(Plugins.discover(), tmp_path / "home", cache)


def packed(model: Path, weights: str, to: str, workspace: Workspace) -> tuple[Subject, Path]:
    scheme = ModelScheme(weights=parse_tensor_scheme(weights, workspace.plugins.format))
    artifact, _ = mitigate(MitigateRequest(str(model), "rtn", scheme, dtype="float32"), workspace)
    checkpoint, _ = pack(PackRequest(str(artifact.path), to), workspace)
    return open_subject(str(artifact.path), workspace).subject, checkpoint.path / "model.gguf"


def executed(folder: Path, file: Path, tokens: list[int], **more: object) -> dict[str, Any]:
    request = json.dumps({"tokens": tokens, "texts": [], "generate": 0, "exact": False, **more})
    command = ["node", str(SCRIPT), str(folder), str(file)]
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert all(value is not None for row in answer["logits"] for value in row), "llama.cpp computed NaN"
    return answer


def log_probabilities(logits: object) -> Tensor:
    return torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)


def measured(subject: Subject, tokens: list[int]) -> Tensor:
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=1)
    return log_probabilities(torch.cat([logits for _, logits in executable.forward_windows(torch.tensor([tokens]))])[0])


def divergence(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize(
    ("weights", "to", "largest", "kl"),
    [
        (HALF, "gguf-f16", 0.1, 2e-5),
        (HALF, "gguf", 3.0, 0.015),
        (Q4_0, "gguf", 3.0, 0.02),
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


def in_float32(file: Path) -> Path:
    """Copy a GGUF file with every tensor in float32, where no product of llama.cpp's rounds its inputs."""
    reader, wide = gguf.GGUFReader(file), file.with_name("wide.gguf")
    writer = gguf.GGUFWriter(wide, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wide


def save_model(folder: Path, name: str) -> None:
    """Save a tiny model of values that bfloat16 and float16 hold, and a tokenizer that llama.cpp loads."""
    config = {"tie_word_embeddings": False, **SIZES, **MODELS[name]}
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
    eight = parse_tensor_scheme("int8-sym-g32-sfp16-full", workspace.plugins.format, vector="token")
    for weights in (Q4_0, *(("nvfp4",) if name in ("llama 3", "qwen3") else ())):
        subject, file = packed(tmp_path / "model", weights, "gguf", workspace)
        theirs = log_probabilities(executed(node_llama_cpp, file, tokens)["logits"])
        ours = measured(subject, tokens)
        rounded = measured(replace(subject, scheme=replace(subject.scheme, activations=eight)), tokens)
    assert divergence(ours, theirs) < 2 * divergence(ours, rounded), weights
