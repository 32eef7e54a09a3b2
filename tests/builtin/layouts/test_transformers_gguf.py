"""transformers does with GGUF files what the table of consumers says: it decodes their weights, or fails as said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import Answer, answer
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace

Packed = Callable[[str], tuple[Subject, Path, Answer]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Packed:
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    def made(weights: str) -> tuple[Subject, Path, Answer]:
        scheme = ModelScheme(parse_tensor_scheme(weights, plugins.format))
        artifact, _ = mitigate(MitigateRequest("tiny", "rtn", scheme, {}, dtype="float32"), workspace)
        checkpoint, _ = pack(PackRequest(str(artifact.path), "gguf"), workspace)
        (file,) = checkpoint.path.glob("*.gguf")
        said = answer(read_checkpoint(file, lambda name: plugins.format(name).bits), "transformers", "any")
        return open_subject(str(artifact.path), workspace).subject, file, said

    return made


@pytest.mark.parametrize("weights", ["int4-sym-g32-sfp16-signed_full", "int8-sym-g32-sfp16", "mxfp4"])
def test_weights_are_decoded_and_the_numbers_are_ours(packed: Packed, weights: str) -> None:
    subject, file, said = packed(weights)
    assert (said.verdict, said.known) == ("loads", "run on a CPU")
    tokens = torch.arange(1, 49)[None]
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        theirs = model.eval()(tokens).logits.log_softmax(-1)
    logits = []
    for one in (subject, Subject(subject.model, subject.plugins)):
        executable = BlockExecutable(one, device=torch.device("cpu"), dtype=torch.float32, batch=1)
        logits += [found.log_softmax(-1) for _, found in executable.forward_windows(tokens)]
    ours, whole = logits
    assert (theirs - ours).abs().mean() < 0.03 * (whole - ours).abs().mean()  # the embedding is float16 there


def test_nvfp4_fails_with_the_message_of_the_table(packed: Packed) -> None:
    _, file, said = packed("nvfp4")
    assert said.verdict == "refuses"
    with pytest.raises(ValueError, match="cannot reshape") as refused:
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert said.message in str(refused.value)
