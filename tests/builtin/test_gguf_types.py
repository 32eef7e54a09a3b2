"""llama.cpp and transformers read every block type that ``doctor`` says they do, and decode it as the gguf package.

Measured on a tiny Llama of random blocks, 24 tokens, as mean KL divergence from the same values in float32: llama.cpp
1e-8 to 2e-3 (it rounds inputs to 8 bits), transformers 2e-12 at most.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoModelForCausalLM

from qtool.consumers.case import Case
from qtool.consumers.table import answer, devices_of
from qtool.plugins import Plugins
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.workspace import Workspace
from tests.builtin.llama_cpp import decoded, divergence, executed, in_float32, log_probabilities, rewritten
from tests.builtin.test_gguf_llama_cpp import save_model

pytestmark = [pytest.mark.slow, pytest.mark.network]

# Where a block has the float16 numbers that multiply its codes; IQ1_M has them in pieces of four bits.
HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": ()},
}
# What is added to all values of a block, in steps: minus half the largest code, so that they are of both signs.
OFFSETS = {"Q4_1": -7.5, "Q5_1": -15.5}


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random codes of a type, scaled so that values are about as large as weights."""
    size, held = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    codes = np.random.default_rng(seed).integers(0, 256, (rows, columns // size, held), dtype=np.uint8)

    def scaled(scale: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
        half, blocks = np.array([scale], np.float16), codes.copy()
        for at in HALVES[kind]:
            blocks[..., at : at + 2] = half.view(np.uint8)
        if kind in OFFSETS:
            blocks[..., 2:4] = (half * np.float16(OFFSETS[kind])).view(np.uint8)
        if kind == "IQ1_M":
            for place in range(4):
                nibble = int(half.view(np.uint16)[0]) >> 4 * place & 15
                blocks[..., 49 + 2 * place] = blocks[..., 49 + 2 * place] & 15 | nibble << 4
        return blocks.reshape(rows, -1)

    return scaled(0.06 / float(np.sqrt(np.square(gguf.dequantize(scaled(1.0), GGMLQuantizationType[kind])).mean())))


def stored(kind: str, tensor: Any) -> tuple[Any, GGMLQuantizationType | None]:  # noqa: ANN401 - the library's
    """Return random blocks in place of the matrices of blocks, other tensors in float32."""
    if not tensor.name.startswith("blk.") or len(tensor.shape) < 2:
        return decoded(tensor)
    columns, rows = (int(size) for size in tensor.shape)
    return random_blocks(kind, rows, columns, len(tensor.name) + rows), GGMLQuantizationType[kind]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float16, whose rows blocks of 256 divide."""
    folder = tmp_path_factory.mktemp("plain")
    workspace = Workspace(Plugins.discover(), folder / "home", folder / "cache")
    save_model(folder / "model", "llama", hidden_size=256, intermediate_size=512, head_dim=64)
    scheme = read_scheme("", {"weights": "mxfp4"}, workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(folder / "model"), "rtn", scheme, dtype="float32"), workspace)
    checkpoint, _ = pack(PackRequest(str(artifact.path), "gguf-f16"), workspace)
    return checkpoint.path / "model.gguf"


@pytest.mark.parametrize("kind", HALVES)
def test_consumers_compute_what_the_blocks_say(node_llama_cpp: Path, plain: Path, kind: str) -> None:
    for consumer in ("llama.cpp", "transformers"):
        assert answer([Case("gguf", kind, bits=4)], consumer, devices_of(consumer)[0]).verdict == "loads"
    tokens = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    file = rewritten(plain, f"{kind}.gguf", partial(stored, kind))
    exact = log_probabilities(executed(node_llama_cpp, in_float32(file), tokens, exact=True)["logits"])
    entropy = float(-(exact.exp() * exact).sum(-1).mean())
    assert 2 < entropy < 5  # of 260 tokens: the model says something
    rounded = log_probabilities(executed(node_llama_cpp, file, tokens)["logits"])
    assert divergence(exact, rounded) < 5e-3
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert divergence(exact, log_probabilities(model(torch.tensor([tokens])).logits[0].detach())) < 1e-10
