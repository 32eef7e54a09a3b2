"""What is no number, or becomes none in a checkpoint's own dtype, is named: never packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import NumericalError, UsageError
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Quantize, save_llama
from tests.steps.test_transcode import edited, foreign

NAME = "model.layers.1.mlp.down_proj"
NAN, INF = float("nan"), float("inf")
E4M3_NAN, E8M0_NAN = 0xFF, 0xFF


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=64, inner=128)


@pytest.mark.parametrize(
    ("weights", "activations", "layout", "leaf", "value", "to"),
    [
        ("int4-sym-g32", "", "compressed-tensors", "weight_scale", NAN, "hf"),
        ("int4-sym-g32", "", "compressed-tensors", "weight_scale", INF, "gptq"),
        ("int4-sym-g32", "", "gptq", "scales", INF, "awq"),
        ("int4-sym-g32", "", "awq", "scales", NAN, "hf"),
        ("mxfp4", "", "compressed-tensors", "weight_scale", E8M0_NAN, "hf"),
        ("nvfp4", "", "compressed-tensors", "weight_scale", E4M3_NAN, "hf"),
        ("nvfp4", "", "compressed-tensors", "weight_global_scale", 0.0, "hf"),
        ("nvfp4", "", "compressed-tensors", "weight_global_scale", INF, "hf"),
        ("nvfp4", "", "modelopt", "weight_scale_2", INF, "hf"),
        ("fp8-channel", "fp8-token", "compressed-tensors", "weight", E4M3_NAN, "modelopt"),
        ("fp8-channel", "fp8-token", "modelopt", "weight", 0x7F, "hf"),
    ],
)
def test_codes_and_scales_of_others_that_are_no_numbers_are_named(
    quantize: Quantize,
    workspace: Workspace,
    tmp_path: Path,
    weights: str,
    activations: str,
    layout: str,
    leaf: str,
    value: float,
    to: str,
) -> None:
    packed = pack(PackRequest(quantize(weights, activations), layout), workspace)[0].path
    whole = load_file(packed / "model.safetensors")[f"{NAME}.{leaf}"]
    flat = (whole.view(torch.uint8) if isinstance(value, int) else whole).view(-1)
    flat[-1] = value
    odd = edited(foreign(packed, tmp_path / "odd"), **{f"{NAME}.{leaf}": whole})
    with pytest.raises(NumericalError, match=f"`{NAME}` holds NaN or Inf"):
        pack(PackRequest(str(odd), to), workspace)
    assert not [*workspace.home.glob(f"*pack-{to}-*")]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize(
    ("weights", "value", "to"),
    [
        ("int4-sym-g32-sfp16", 7e4, "compressed-tensors"),
        ("int4-sym-g32-sfp16", -7e4, "gptq"),
        ("int4-sym-g32-sbf16", 3.4e38, "compressed-tensors"),
        ("int4-sym-g32-sbf16", 3.4e38, "hf"),
    ],
)
def test_what_a_checkpoints_dtype_does_not_have_is_named(
    source: Path, workspace: Workspace, tmp_path: Path, name: str, weights: str, value: float, to: str
) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in source.iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    tensors = {key: tensor.float() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name][3] = value
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    scheme = read_scheme("", {"weights": weights}, workspace.plugins)
    quantized, _ = mitigate(MitigateRequest(str(wide), "rtn", scheme), workspace)
    with pytest.raises(UsageError, match=f"`{name}` has values that"):
        pack(PackRequest(str(quantized.path), to), workspace)


def test_a_weight_that_decodes_to_more_than_its_dtype_has_is_named(
    source: Path, workspace: Workspace, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in source.iterdir():
        (half / file.name).write_bytes(file.read_bytes().replace(b'"bfloat16"', b'"float16"'))
    tensors = {key: tensor.half() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[f"{NAME}.weight"][3, :2] = torch.tensor([-65504.0, 65504.0])
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    scheme = read_scheme("", {"weights": "int4-sym-channel-half"}, workspace.plugins)
    quantized, _ = mitigate(MitigateRequest(str(half), "rtn", scheme), workspace)
    with pytest.raises(UsageError, match=f"`{NAME}.weight` has values that float16"):
        pack(PackRequest(str(quantized.path), "hf"), workspace)
