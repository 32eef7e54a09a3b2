"""A real model: what transformers loads has the loss, window by window, and the words of qtool's forward pass.

Both compute in float32. The model is stored in float32, and a checkpoint in 16 bits: with float16 that is less than
0.001 in the loss of a window, with bfloat16 some 0.002. Asymmetric weights are decoded to 16 bits as well; they are
compared with qtool's forward pass of the rounded model.

FP4 and the blocks of 32 are decoded to bfloat16 in the first forward pass, in a model of bfloat16 too: with another it
does not run. From then on it computes in float32, and qtool with embedding, norms and weights in bfloat16. MXFP4, MXFP8
and what they round are equal to the last bit; of NVFP4 the library rounds scales to bfloat16 before it multiplies by
them, which moves the losses by less than 0.0003.

Where activations are rounded, the last digits of float16 are no small matter: whatever moves a value by one part in
10^4, or the order of a sum, takes other values over a tie, and those others. The loss of a window of 64 tokens moves by
up to 0.1, whichever of the two computes it, and by as much between float32 and float64. So there qtool runs the model
with embedding and norms in float16, as the checkpoint has them; then the losses are equal, and no value differs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.engine.execute import BlockExecutable
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.engine.problem import QuantizedLinear
from qtool.model import source
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme, parse_tensor_scheme
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


def loaded(directory: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - its type is the family's
    """Load a checkpoint in a dtype, decode it, and let it compute in float32, which transformers' own cast refuses."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]))
    return torch.nn.Module.float(model)


def observed_inputs(model: torch.nn.Module, scheme: TensorScheme) -> Counter[str]:
    """Let a loaded model count the values of its linears' inputs, and those that qtool rounds to another value."""
    rounding, found = Rounding(Grid.of(scheme, Plugins.discover().format(scheme.format))), Counter[str]()

    def compare(module: Any, inputs: tuple[Tensor]) -> None:  # noqa: ANN401 - what the library makes of a linear
        (x,) = inputs
        theirs = forward_quantize(module, x, "input", module.quantization_scheme.input_activations)
        found["values"] += x.numel()
        found["others"] += int((rounding(x) != theirs).sum())

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.register_forward_pre_hook(compare)
    return found


@pytest.mark.parametrize(
    ("weights", "activations", "rounded"),
    [
        ("int4-sym-g64-sfp16", None, ()),
        ("int4-asym-g64-sfp16", None, ("weights", "others")),
        ("fp8-channel-sfp16", None, ()),
        ("int8-sym-channel-sfp16", "int8-sym-token-sfp32-half", ("others",)),
        ("fp8-channel-sfp16", "fp8-token", ("others",)),
        ("mxfp4", None, ("weights", "others")),
        ("nvfp4", None, ("weights", "others")),
        ("mxfp4", "mxfp4", ("weights", "others")),
        ("mxfp8", "mxfp8-rceil", ("weights", "others")),
    ],
)
def test_loss_and_words_are_those_of_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache: Path,
    weights: str,
    activations: str | None,
    rounded: tuple[str, ...],
) -> None:
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path, cache)
    inputs = None if activations is None else parse_tensor_scheme(activations, plugins.format, vector="token")
    scheme = ModelScheme(parse_tensor_scheme(weights, plugins.format), inputs)
    artifact, _ = mitigate(MitigateRequest("smollm2-135m", "rtn", scheme, {}), workspace)
    checkpoint, _ = pack(PackRequest(str(artifact.path), "compressed-tensors"), workspace)
    subject = open_subject(str(artifact.path), workspace).subject
    decode, read = QuantizedLinear.weight, source.read_tensors
    blocks = weights.startswith(("mx", "nv"))
    stored = torch.bfloat16 if blocks else torch.float16

    def short(tensor: Tensor) -> Tensor:
        return tensor.to(stored).float()

    if "weights" in rounded:
        monkeypatch.setattr(QuantizedLinear, "weight", lambda self, grid: short(decode(self, grid)))
    if "others" in rounded:
        monkeypatch.setattr(source, "read_tensors", lambda *given: {k: short(t) for k, t in read(*given).items()})
    ids = subject.model.tokenizer()(TEXT.read_text())["input_ids"]
    windows = torch.tensor(ids[: WINDOWS * TOKENS]).reshape(WINDOWS, TOKENS)
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32, batch=1)
    theirs = loaded(checkpoint.path, torch.bfloat16 if blocks else torch.float32)
    with torch.no_grad():
        ours = losses(torch.cat([logits for _, logits in executable.forward_windows(windows)]), windows)
        found = losses(torch.cat([theirs(window[None]).logits for window in windows]), windows)
        assert (found - ours).abs().max() < (1e-6 if weights.startswith("mx") else 1e-3)
        if inputs is not None:
            counted = observed_inputs(theirs, inputs)
            theirs(windows[:1])
            assert counted["others"] == 0
            assert counted["values"] > 10**6
        whole = executable.whole()
        mine = windows[:1, :32]
        for _ in range(NEW):
            mine = torch.cat([mine, whole(input_ids=mine).logits[:, -1:].argmax(-1)], dim=1)
        asked = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "use_cache": inputs is None,
        }  # a cache sums in another order
        made = theirs.generate(windows[:1, :32], attention_mask=torch.ones(1, 32, dtype=torch.long), **asked)
    assert mine[0, : made.shape[1]].tolist() == made[0].tolist()
    assert made.shape[1] > 32
