"""GPTQ and AWQ checkpoints are laid out in another way with the same codes, scales and zero points, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.builtin.exporters import packed_words
from qtool.builtin.exporters.awq import AWQ
from qtool.builtin.exporters.gptq import GPTQ
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, QtoolError, SchemeError, UsageError
from qtool.model.naming import Place
from qtool.model.reading import read_place
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.steps.conftest import Quantize, save_llama
from tests.steps.test_transcode import edited, foreign, same

NAME = "model.layers.1.mlp.gate_proj"
READERS = {"gptq": GPTQ(), "gptq-v2": GPTQ(), "awq": AWQ()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=64, inner=128)


def configured(folder: Path, **changes: object) -> Path:
    """Change the ``quantization_config``; None takes a key out."""
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in said.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, layout: str, workspace: Workspace) -> Subject:
    return READERS[layout].open(folder, workspace.plugins, cache=workspace.cache)


PATHS = [
    ("int4-sym-g32", "gptq", "compressed-tensors"),
    ("int4-sym-g32", "gptq", "gptq-v2"),
    ("int4-sym-g32", "gptq-v2", "gptq"),
    ("int4-asym-g32", "gptq-v2", "compressed-tensors"),
    ("int4-asym-channel", "gptq-v2", "awq"),
    ("int4-sym-channel", "awq", "gptq"),
    ("int4-asym-g32", "awq", "gptq-v2"),
    ("int4-asym-g32", "awq", "compressed-tensors"),
    ("int4-sym-g32", "awq", "compressed-tensors"),
    ("int2-sym-g32", "gptq", "compressed-tensors"),
    ("int3-asym-g32", "gptq-v2", "compressed-tensors"),
    ("int3-sym-g32", "gptq", "hf"),
    ("int8-sym-g32", "gptq", "compressed-tensors"),
    ("int8-asym-channel", "gptq-v2", "hf"),
    ("int4-asym-g32", "awq", "hf"),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("weights", "layout", "to"), PATHS)
def test_a_checkpoint_gives_what_its_artifact_gives(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, weights: str, layout: str, to: str, own: bool
) -> None:
    quantized = quantize(weights)
    packed = pack(PackRequest(quantized, layout), workspace)[0].path
    direct = pack(PackRequest(quantized, to, tmp_path / "direct"), workspace)[0]
    packed = packed if own else foreign(packed, tmp_path / "foreign")
    through = pack(PackRequest(str(packed), to, tmp_path / "through"), workspace)[0]
    same(through.path, direct.path)
    configs = [json.loads((one.path / "config.json").read_text()) for one in (through, direct)]
    assert configs[0] == configs[1]
    assert through.manifest.details["bits"] == direct.manifest.details["bits"]
    assert through.manifest.details["labels"]["mitigator"] == ("rtn" if own else "unknown")


@pytest.mark.parametrize(("weights", "layout", "to"), PATHS)
def test_codes_scales_and_zero_points_are_those_of_the_artifact(
    quantize: Quantize, workspace: Workspace, weights: str, layout: str, to: str
) -> None:
    del to
    quantized = quantize(weights)
    packed = pack(PackRequest(quantized, layout), workspace)[0].path
    ours, theirs = open_subject(quantized, workspace).subject, opened(packed, layout, workspace)
    assert theirs.scheme.weights == ours.scheme.weights
    for linear in ours.model.graph.linears:
        one, other = ours.packed(linear), theirs.packed(linear)
        assert torch.equal(one.stream, other.stream)
        assert torch.equal(one.parameters.scale, other.parameters.scale)
        zero = one.parameters.zero_point
        assert zero is None if other.parameters.zero_point is None else torch.equal(zero, other.parameters.zero_point)


def test_several_schemes_and_linears_in_16_bits_are_read(source: Path, workspace: Workspace, tmp_path: Path) -> None:
    text = "int4-sym-g32,down_proj=int8-sym-channel,layers.0.self_attn=none,o_proj=int4-asym-g32"
    scheme = read_scheme("", {"weights": text}, workspace.plugins)
    quantized = str(mitigate(MitigateRequest(str(source), "rtn", scheme), workspace)[0].path)
    packed = foreign(pack(PackRequest(quantized, "gptq-v2"), workspace)[0].path, tmp_path / "foreign")
    read, ours = opened(packed, "gptq-v2", workspace), open_subject(quantized, workspace).subject
    for linear in ours.model.graph.linears:
        assert read.scheme.of(linear.name).weights == ours.scheme.of(linear.name).weights, linear.name
    for one, name in ((quantized, "direct"), (str(packed), "through")):
        pack(PackRequest(one, "compressed-tensors", tmp_path / name), workspace)
    same(tmp_path / "through", tmp_path / "direct")
    said = json.loads((packed / "config.json").read_text())["quantization_config"]["dynamic"]
    unmarked = {pattern.removeprefix("+:"): choices for pattern, choices in said.items()}
    again = opened(configured(packed, dynamic=unmarked), "gptq-v2", workspace)
    assert again.scheme == read.scheme


def test_other_words_for_the_same_are_understood(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    packed = foreign(pack(PackRequest(quantize("int4-asym-g32"), "awq"), workspace)[0].path, tmp_path / "awq")
    before = opened(packed, "awq", workspace).scheme
    older = configured(packed, bits=None, group_size=None, w_bit=4, q_group_size=32, version="GEMM")
    assert opened(older, "awq", workspace).scheme == before
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "gptq"), workspace)[0].path, tmp_path / "gptq")
    before = opened(packed, "gptq", workspace).scheme
    without = {name: one for name, one in load_file(packed / "model.safetensors").items() if "g_idx" not in name}
    save_file(without, packed / "model.safetensors", {"format": "pt"})
    older = configured(packed, checkpoint_format=None, pack_dtype=None, dynamic=None, lm_head=None)
    assert opened(older, "gptq", workspace).scheme == before
    pack(PackRequest(str(older), "compressed-tensors", tmp_path / "out"), workspace)
    packed = foreign(pack(PackRequest(quantize("int4-asym-g32"), "gptq-v2"), workspace)[0].path, tmp_path / "v2")
    first, newer = opened(packed, "gptq-v2", workspace), {"checkpoint_format": None, "format": "gptq_v2"}
    again = opened(configured(packed, **newer), "gptq-v2", workspace)
    for linear in first.linears:
        zeros, known = (one.packed(linear).parameters.zero_point for one in (again, first))
        assert zeros is not None
        assert known is not None
        assert torch.equal(zeros, known)


def test_zero_points_in_the_middle_are_symmetric_only_where_all_are(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "awq"), workspace)[0].path, tmp_path / "foreign")
    assert str(opened(packed, "awq", workspace).scheme.weights).startswith("int4-sym")
    zeros = load_file(packed / "model.safetensors")[f"{NAME}.qzeros"].clone()
    zeros[1, 2] ^= 1
    read = opened(edited(packed, **{f"{NAME}.qzeros": zeros}), "awq", workspace)
    assert {str(one).partition("-g")[0] for one in read.scheme.every("weights")} == {"int4-asym"}
    found = read.packed(read.model.graph.linear(NAME)).parameters.zero_point
    assert found is not None
    assert sorted(found.unique().tolist()) == [8.0, 9.0]
    assert int((found != 8).sum()) == 1


def with_order(packed: Path) -> Path:
    order = load_file(packed / "model.safetensors")[f"{NAME}.g_idx"]
    return edited(configured(packed, desc_act=True), **{f"{NAME}.g_idx": order.roll(1)})


def with_zeros(packed: Path, word: int) -> Path:
    zeros = load_file(packed / "model.safetensors")[f"{NAME}.qzeros"].clone()
    zeros[0, 0] = word
    return edited(packed, **{f"{NAME}.qzeros": zeros})


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("gptq", {"pack_dtype": "int8"}, "a layout of GPTQ that is not read"),
        ("gptq", {"checkpoint_format": "marlin"}, "a layout of GPTQ that is not read"),
        ("gptq", {"format": "marlin", "checkpoint_format": None}, "a layout of GPTQ that is not read"),
        ("gptq", {"format": "gptq_v2"}, "a layout of GPTQ that is not read"),
        ("gptq", {"is_marlin_format": True}, "a layout of GPTQ that is not read"),
        ("gptq", {"bits": 5}, "codes of 5 bits"),
        ("gptq", {"bits": 8}, "do not fit the config"),
        ("gptq", {"group_size": 64}, "do not fit the config"),
        ("awq", {"version": "gemv"}, "a layout of AWQ that is not read"),
        ("awq", {"format": "gemv", "version": None}, "a layout of AWQ that is not read"),
        ("awq", {"zero_point": False}, "a layout of AWQ that is not read"),
        ("awq", {"group_size": 16}, "do not fit the config"),
    ],
)
def test_what_makes_it_another_layout_is_refused(
    quantize: Quantize, workspace: Workspace, tmp_path: Path, layout: str, changes: dict[str, Any], message: str
) -> None:
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), layout), workspace)[0].path, tmp_path / "foreign")
    with pytest.raises((SchemeError, ArtifactError), match=message):
        pack(PackRequest(str(configured(packed, **changes)), "compressed-tensors", tmp_path / "out"), workspace)
    assert not (tmp_path / "out").exists()


def test_columns_in_an_order_of_their_own_are_refused(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "gptq"), workspace)[0].path, tmp_path / "foreign")
    opened(configured(packed, desc_act=True), "gptq", workspace)  # and yet in the order of the groups
    with pytest.raises(ArtifactError, match="are in an order of their own") as refused:
        opened(with_order(packed), "gptq", workspace)
    assert "qtool mitigate" in refused.value.hint


def test_zero_points_that_readers_disagree_on_are_refused(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "gptq"), workspace)[0].path, tmp_path / "foreign")
    with pytest.raises(ArtifactError, match=r"cannot read the zero points of `model\.layers\.1\.mlp\.gate_proj`"):
        opened(with_zeros(packed, 0x77777778), "gptq", workspace)
    with pytest.raises(ArtifactError, match="wrapped round, which readers take for 0 or for 16"):
        opened(configured(with_zeros(packed, 0x7777777F), sym=False), "gptq", workspace)


def test_the_layout_that_it_has_already_is_refused(quantize: Quantize, workspace: Workspace, tmp_path: Path) -> None:
    for layout in READERS:
        packed = pack(PackRequest(quantize("int4-sym-g32"), layout), workspace)[0].path
        with pytest.raises(UsageError, match=f"is laid out for {layout} already"):
            pack(PackRequest(str(packed), layout, tmp_path / "out"), workspace)


def test_scales_that_the_model_would_round_are_refused_and_no_others(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    """compressed-tensors' loaders cast scales to the dtype of the model, which is bfloat16."""
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "gptq"), workspace)[0].path, tmp_path / "foreign")
    pack(PackRequest(str(packed), "compressed-tensors", tmp_path / "out"), workspace)
    scales: Tensor = load_file(packed / "model.safetensors")[f"{NAME}.scales"].clone()
    scales[1, 3] = 1.0009765625
    odd = edited(packed, **{f"{NAME}.scales": scales})
    with pytest.raises(QtoolError, match="float16 scales would make a bfloat16 model compute in float16"):
        pack(PackRequest(str(odd), "compressed-tensors", tmp_path / "refused"), workspace)
    pack(PackRequest(str(odd), "gptq-v2", tmp_path / "v2"), workspace)
    assert torch.equal(load_file(tmp_path / "v2" / "model.safetensors")[f"{NAME}.scales"], scales)


def test_biases_of_0_that_the_model_does_not_have_are_left_out(
    quantize: Quantize, workspace: Workspace, tmp_path: Path
) -> None:
    """AutoGPTQ stored such."""
    packed = foreign(pack(PackRequest(quantize("int4-sym-g32"), "gptq"), workspace)[0].path, tmp_path / "foreign")
    pack(PackRequest(str(packed), "compressed-tensors", tmp_path / "direct"), workspace)
    edited(packed, **{f"{NAME}.bias": torch.zeros(128, dtype=torch.float16)})
    pack(PackRequest(str(packed), "compressed-tensors", tmp_path / "through"), workspace)
    same(tmp_path / "through", tmp_path / "direct")
    edited(packed, **{f"{NAME}.bias": torch.ones(128, dtype=torch.float16)})
    for to in ("compressed-tensors", "hf", "awq", "gguf-f16"):  # before any work, and those who would add it too
        with pytest.raises(ArtifactError, match="biases that its model does not have"):
            pack(PackRequest(str(packed), to, tmp_path / "refused"), workspace)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_codes_are_not_read_before_they_are_asked_for(
    quantize: Quantize, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    packed = pack(PackRequest(quantize("int4-sym-g32"), layout), workspace)[0].path
    read: list[str] = []

    def reading(place: Place) -> Tensor:
        read.append(place.name.rpartition(".")[2])
        return read_place(place)

    monkeypatch.setattr(packed_words, "read_place", reading)
    subject = opened(packed, layout, workspace)
    assert "qzeros" in read
    assert "qweight" not in read
    subject.packed(subject.linears[0])
    assert read.count("qweight") == 1
