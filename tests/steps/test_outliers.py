"""Weights and columns of activations that stay in 16 bits, through the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifacts.store import Artifact
from qtool.engine.execute import BlockExecutable
from qtool.errors import SchemeError
from qtool.steps.labels import labels_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import stored_bits
from qtool.steps.subjects import open_subject
from tests.steps.conftest import Desk

LAST = "model.layers.1.mlp.down_proj"


CODED = "int3-asym-g8-sfp16-scales3g16"


def spqr(desk: Desk, method: str = "spqr", weights: str = CODED, **settings: str) -> Artifact:
    scheme = read_scheme("", {"weights": weights}, desk.workspace.plugins)
    request = MitigateRequest(str(desk.calibrate().path), method, scheme, {"tau": "0.05", **settings})
    return mitigate(request, desk.workspace)[0]


def test_what_is_stored_is_executed_counted_and_packed(desk: Desk) -> None:
    artifact = spqr(desk, "spqr+cd")
    opened = open_subject(str(artifact.path), desk.workspace)
    subject, tensors = opened.subject, load_file(artifact.path)
    share = weights = 0.0
    for linear in subject.model.graph.linears:
        found = subject.linear(linear)
        assert found.outliers is not None
        decoded = found.weight(subject.weight_grid(linear))
        executed = subject.block(linear.layer, torch.float64).state[f"{linear.spec.module}.weight"]
        assert torch.equal(executed, decoded)
        kept = found.outliers.places(decoded.shape[1])
        assert torch.equal(decoded[kept], tensors[f"{linear.name}.outliers.values"].float())
        fraction = artifact.manifest.details["layers"][linear.name]["outlier_fraction"]
        assert fraction == pytest.approx(float(kept.double().mean()))
        share, weights = share + float(kept.sum()), weights + kept.numel()
    assert share > 0.01 * weights
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert stored_bits(opened)["linears"] == pytest.approx(stored / weights, abs=1e-12)
    assert labels_of(opened, desk.workspace)["mitigator"] == "spqr+cd"
    assert "spqr.tau=0.05" in labels_of(opened, desk.workspace)["settings"]
    packed, _ = pack(PackRequest(str(artifact.path), "hf"), desk.workspace)
    last = {linear.name: linear for linear in subject.model.graph.linears}[LAST]
    dense = load_file(Path(packed.path) / "model.safetensors")[f"{LAST}.weight"]
    assert torch.equal(dense, subject.linear(last).weight(subject.weight_grid(last)).to(dense.dtype))


@pytest.mark.parametrize(
    ("weights", "reason", "nearest"),
    [
        (CODED, "compressed-tensors has no scales that are codes", "int3-asym-g8-sfp16"),
        ("int3-asym-g8-real", "zero points of compressed-tensors are whole", "int3-asym-g8-sbf16"),
    ],
)
def test_compressed_tensors_refuses_what_it_has_no_place_for(
    desk: Desk, weights: str, reason: str, nearest: str
) -> None:
    artifact = spqr(desk, weights=weights, tau="none")
    with pytest.raises(SchemeError, match=reason) as refused:
        pack(PackRequest(str(artifact.path), "compressed-tensors"), desk.workspace)
    assert refused.value.hint.startswith(f"nearest that fits: --weights {nearest}")
    assert not list(desk.workspace.home.glob("pack-*"))


def test_settings_are_read_and_a_tau_of_none_is_off(desk: Desk) -> None:
    artifact = spqr(desk, weights="int3-asym-g8-real", **{"tau": "none", "dampening-frac": "0.01"})
    assert not [name for name in artifact.header.slots if ".outliers." in name or ".scale.codes" in name]
    assert artifact.header.slots[f"{LAST}.zero_point"].dtype == "BF16"


def logits(desk: Desk, batch: int = 1, **parts: str) -> torch.Tensor:
    """What LLM.int8(), or a variant of it, makes of three windows."""
    scheme = read_scheme("LLM-INT8", parts, desk.workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
    subject = open_subject(str(artifact.path), desk.workspace).subject
    windows = torch.randint(97, 123, (3, 12), generator=torch.Generator().manual_seed(1))
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64, batch=batch)
    return torch.cat([found for _, found in executable.forward_windows(windows)])


def test_llm_int8_does_not_depend_on_the_batch_and_is_weights_only_where_all_is_large(desk: Desk) -> None:
    some = logits(desk, activations="int4-token-sfp32-full-o2")
    torch.testing.assert_close(logits(desk, 3, activations="int4-token-sfp32-full-o2"), some, rtol=0, atol=1e-9)
    weights_only, none = logits(desk, activations="none"), logits(desk, activations="int4-token-sfp32-full")
    all_large = logits(desk, activations="int4-token-sfp32-full-o0.001")
    assert (some - weights_only).norm() < 0.9 * (none - weights_only).norm()
    assert 20 * (all_large - weights_only).norm() < (some - weights_only).norm()


def test_weights_have_no_outlier_columns(desk: Desk) -> None:
    with pytest.raises(SchemeError, match="weights have no outlier columns"):
        read_scheme("", {"weights": "int8-o6"}, desk.workspace.plugins)
