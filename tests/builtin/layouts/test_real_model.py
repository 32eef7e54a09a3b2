"""A real model: what transformers loads has the loss, window by window, and the words of qtool's forward pass.

Both compute in float32, so FP4 is not here: the library decodes it to bfloat16 in a model of float32, which then does
not run. The model is stored in float32, and a checkpoint in 16 bits: with float16 that is less than 0.001 in the loss
of a window, with bfloat16 some 0.002. Asymmetric weights are decoded to 16 bits as well; they are compared with qtool's
forward pass of the rounded model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.engine.execute import BlockExecutable
from qtool.engine.problem import QuantizedLinear
from qtool.model import source
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.network]
TEXT = Path(__file__).parents[3] / "LICENSE"
WINDOWS, TOKENS, NEW = 4, 64, 12


def losses(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window."""
    likelihood = logits[:, :-1].double().log_softmax(-1)
    return -likelihood.gather(-1, windows[:, 1:, None]).squeeze(-1).mean(-1)


@pytest.mark.parametrize(
    ("weights", "rounded"),
    [
        ("int4-sym-g64-sfp16", None),
        ("int4-asym-g64-sfp16", torch.float16),
        ("fp8-channel-sfp16", None),
    ],
)
def test_loss_and_words_are_those_of_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, weights: str, rounded: torch.dtype | None
) -> None:
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path, cache)
    scheme = ModelScheme(weights=parse_tensor_scheme(weights, plugins.format))
    artifact, _ = mitigate(MitigateRequest("smollm2-135m", "rtn", scheme, {}), workspace)
    checkpoint, _ = pack(PackRequest(str(artifact.path), "compressed-tensors"), workspace)
    subject = open_subject(str(artifact.path), workspace).subject
    if rounded is not None:
        decode, read = QuantizedLinear.weight, source.read_tensors
        monkeypatch.setattr(QuantizedLinear, "weight", lambda self, grid: decode(self, grid).to(rounded).float())
        monkeypatch.setattr(
            source, "read_tensors", lambda *given: {k: t.to(rounded).float() for k, t in read(*given).items()}
        )
    ids = subject.model.tokenizer()(TEXT.read_text())["input_ids"]
    windows = torch.tensor(ids[: WINDOWS * TOKENS]).reshape(WINDOWS, TOKENS)
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=1)
    theirs: torch.nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = losses(torch.cat([logits for _, logits in executable.forward_windows(windows)]), windows)
        loaded = losses(torch.cat([theirs(window[None]).logits for window in windows]), windows)
        assert (loaded - ours).abs().max() < 1e-3
        whole = executable.whole()
        mine = windows[:1, :32]
        for _ in range(NEW):
            mine = torch.cat([mine, whole(input_ids=mine).logits[:, -1:].argmax(-1)], dim=1)
        made = theirs.generate(
            windows[:1, :32], attention_mask=torch.ones(1, 32, dtype=torch.long), max_new_tokens=NEW, do_sample=False
        )
    assert mine[0, : made.shape[1]].tolist() == made[0].tolist()
    assert made.shape[1] > 32
