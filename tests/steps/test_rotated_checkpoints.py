"""A checkpoint with online rotations is measured, inspected and laid out anew as the artifact that it came from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifacts.store import CHECKPOINT_MANIFEST, open_artifact
from qtool.errors import UsageError
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace


@pytest.fixture(scope="module")
def rotated(library: Workspace) -> tuple[str, Path]:
    """The artifact of a model whose down projections read rotated inputs, and its checkpoint."""
    plan, _ = transform(TransformRequest("tiny", "quarot", {"r3": "off", "head_mix": "false"}), library)
    assert [site for site in plan.manifest.details["sites"] if "up_down" in site]
    scheme = read_scheme("", {"weights": "int4-sym-g32"}, library.plugins)
    artifact, _ = mitigate(MitigateRequest(str(plan.path), "rtn", scheme, {}), library)
    checkpoint, _ = pack(PackRequest(str(artifact.path), "compressed-tensors"), library)
    assert "transform_config" in json.loads((checkpoint.path / "config.json").read_text())["quantization_config"]
    return str(artifact.path), checkpoint.path


def test_its_perplexity_is_that_of_the_artifact(library: Workspace, rotated: tuple[str, Path]) -> None:
    artifact, checkpoint = rotated
    about = {"perplexity": ("speeches",), "seq_len": 64, "max_windows": 4, "dtype": "float32", "kl": True}
    ours, theirs = (
        evaluate(EvalRequest(source, **about), library)[0]  # type: ignore[arg-type]
        for source in (artifact, str(checkpoint))
    )
    # the checkpoint has embedding, norms and head in 16 bits
    assert theirs.manifest.details["values"] == pytest.approx(ours.manifest.details["values"], rel=2e-3)
    assert theirs.manifest.details["labels"]["executed"] == (
        ours.manifest.details["labels"]["executed"] + ", from the codes of the checkpoint"
    )


@pytest.mark.parametrize("own", [True, False])
def test_it_becomes_what_the_artifact_becomes_or_is_refused_by_name(
    library: Workspace, rotated: tuple[str, Path], tmp_path: Path, own: bool
) -> None:
    artifact, checkpoint = rotated
    if not own:
        shutil.copytree(checkpoint, tmp_path / "foreign", ignore=shutil.ignore_patterns(CHECKPOINT_MANIFEST))
        checkpoint = tmp_path / "foreign"
    direct, through = (
        pack(PackRequest(str(source), "hf", tmp_path / name), library)[0].path
        for source, name in ((artifact, "direct"), (checkpoint, "through"))
    )
    one, other = (load_file(path / "model.safetensors") for path in (direct, through))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for to in ("gptq", "modelopt"):
        with pytest.raises(UsageError) as refused:
            pack(PackRequest(str(checkpoint), to), library)
        assert to == "modelopt" or ("up_down", "hadamard") in refused.value.facts


def test_what_is_not_for_transformers_is_not_opened_but_refused(
    library: Workspace, rotated: tuple[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(rotated[1], tmp_path / "other")
    about = open_artifact(tmp_path / "other").manifest
    unread = {name: words for name, words in about.details["consumers"].items() if name != "transformers"}
    text = replace(about, details={**about.details, "consumers": unread}).to_text()
    (tmp_path / "other" / CHECKPOINT_MANIFEST).write_text(text)
    with pytest.raises(UsageError, match="transformers does not read it"):
        evaluate(EvalRequest(str(tmp_path / "other"), perplexity=("speeches",), seq_len=64, max_windows=1), library)
