"""A config is held against the names, types and shapes of the tensors that the files have, whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifacts.layout import TensorSlot
from qtool.consumers.agreement import require_agreement
from qtool.consumers.case import CT, Case
from qtool.consumers.shapes import LAYOUTS, misfit, shapes_of
from qtool.errors import ArtifactError
from qtool.plugins import Plugins

HOME = Path(__file__).parents[1] / "builtin" / "checkpoints"
MADE = sorted(str(found.parent.relative_to(HOME)) for found in HOME.glob("*/*/expected.json"))
TYPES = {"I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
NAME = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Any]], object]
FAMILIES = Plugins.discover().every("families")


def copied(made: str, folder: Path, change: Change) -> Path:
    """Copy a checkpoint of another tool, and change its `quantization_config`."""
    folder.mkdir(exist_ok=True)
    config = json.loads((HOME / made / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    for file in (HOME / made).glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def weights(**changed: Any) -> Change:  # noqa: ANN401 - JSON
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changed)


def case(method: str, layout: str, bits: int, group_size: int = -1, **about: Any) -> Case:  # noqa: ANN401 - fields
    element = LAYOUTS[method, layout].element or ("float" if bits == 8 and method != "gptq" else "int")
    strategy = "group" if group_size > 0 else "channel"
    fields = {"bits": bits, "type": element, "strategy": strategy, "group_size": group_size}
    return Case(method, layout, **fields | about)


SOUND = [
    *(case("gptq", "gptq", bits, 32) for bits in (2, 3, 4, 8)),
    case("gptq", "gptq_v2", 4),
    case("awq", "gemm", 4, 32),
    *(case(CT, "pack-quantized", bits, 32, symmetric=False) for bits in range(2, 9)),
    case(CT, "pack-quantized", 4),
    case(CT, "int-quantized", 8, strategy="tensor"),
    case(CT, "float-quantized", 8, 128, strategy="block", block="64x128"),
    case(CT, "nvfp4-pack-quantized", 4, 16, strategy="tensor_group"),
    case(CT, "mxfp6-pack-quantized", 6, 32),
    case(CT, "mxfp8-quantized", 8, 32),
    case("modelopt", "W4A16_NVFP4", 4, 16, strategy="tensor_group"),
    case("modelopt", "FP8", 8, strategy="tensor"),
    case("fp8", "e4m3", 8, 128, strategy="block", block="128x128"),
]
N_OUT, N_IN = 96, 192


def slots_of(own: Case) -> dict[str, TensorSlot]:
    """Return tensors as the table has them, scales and zero points of any type."""
    layout = LAYOUTS[own.method, own.layout]
    kinds = {layout.codes: layout.types[0], "weight_zero_point": "I32" if layout.types == ("I32",) else "I8"}
    shapes = shapes_of(own, N_OUT, N_IN)
    return {leaf: TensorSlot(kinds.get(leaf, "F16"), shape, 0, 0) for leaf, shape in shapes.items()}


@pytest.mark.parametrize("own", SOUND, ids=lambda own: f"{own.method}-{own.layout}-{own.bits}")
@pytest.mark.parametrize("n_in", [N_IN, None])
def test_a_linear_in_its_layout_fits(own: Case, n_in: int | None) -> None:
    slots = slots_of(own)
    assert misfit(own, slots, n_in) is None
    assert misfit(own, {leaf: one for leaf, one in slots.items() if leaf not in ("g_idx", "qzeros")}, n_in) is None


@pytest.mark.parametrize("own", SOUND, ids=lambda own: f"{own.method}-{own.layout}-{own.bits}")
def test_any_tensor_of_another_length_or_lacking_is_told(own: Case) -> None:
    slots = slots_of(own)
    for leaf, slot in slots.items():
        longer = TensorSlot(slot.dtype, (*slot.shape[:-1], 1 + (slot.shape or (1,))[-1]), 0, 0)
        odd = misfit(own, slots | {leaf: longer}, N_IN)
        assert odd is not None
        assert f"`{leaf}`" in odd.said or leaf == "scales"  # which tell how many outputs there are
        if leaf not in ("g_idx", "qzeros"):
            odd = misfit(own, {name: one for name, one in slots.items() if name != leaf}, N_IN)
            assert odd is not None
            assert f"there is `{leaf}`" in odd.said


def test_words_that_each_begin_with_a_code_and_zero_points_in_bytes_are_of_before() -> None:
    own = case(CT, "pack-quantized", 3, 32, symmetric=False)
    slots = slots_of(own)
    older = {"weight_packed": TensorSlot("I32", (N_OUT, -(-N_IN // 10)), 0, 0)}
    for zeros in (TensorSlot("I32", (-(-N_OUT // 10), 6), 0, 0), TensorSlot("I8", (N_OUT, 6), 0, 0)):
        for n_in in (N_IN, None):
            assert misfit(own, slots | older | {"weight_zero_point": zeros}, n_in) is None
    assert misfit(own, slots | {"weight_packed": TensorSlot("I32", (N_OUT, 19), 0, 0)}, N_IN) is not None


def test_experts_in_one_tensor_and_weights_in_floats_are_not_compared() -> None:
    own = case(CT, "float-quantized", 8)
    stacked = {"weight": TensorSlot("F8_E4M3", (4, 8, 8), 0, 0), "weight_scale": TensorSlot("F32", (4, 8, 1), 0, 0)}
    assert misfit(own, stacked, 8) is None
    plain = {"weight": TensorSlot("BF16", (8, 8), 0, 0), "weight_scale": TensorSlot("F32", (3, 3), 0, 0)}
    assert misfit(case(CT, "pack-quantized", 4), plain, 8) is None


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("families", [FAMILIES, {}], ids=["family", "no family"])
def test_what_other_tools_wrote_is_what_its_config_says(made: str, families: dict[str, Any]) -> None:
    require_agreement(HOME / made, families)


PACKED, EIGHT, BLOCKS = "llm_compressor/w4a16-asym-g32", "llm_compressor/w8a8-asym", "llm_compressor/fp8-small-block"
LIES: list[tuple[str, Change, str]] = [
    (PACKED, weights(group_size=16), "INT4 in groups of 16, asymmetric as pack-quantized, so `weight_scale` is"),
    (PACKED, weights(num_bits=8), "so `weight_packed` is"),
    (PACKED, weights(strategy="channel", group_size=None), "so `weight_scale` is"),
    (PACKED, weights(type="float"), "FP4 in groups of 32, asymmetric as pack-quantized"),
    (PACKED, lambda config: config["ignore"].append("re:.*up_proj$"), "`ignore` lists it, by `re:.*up_proj$`"),
    (PACKED, lambda config: config["config_groups"]["group_0"].update(targets=["re:.*q_proj"]), "no group names it"),
    (EIGHT, weights(strategy="tensor"), "with one scale, asymmetric as int-quantized, so `weight_scale` is one number"),
    ("llm_compressor/w4a8", weights(symmetric=False), "so there is `weight_zero_point`"),
    (EIGHT, lambda config: config["config_groups"]["group_0"].update(format="pack-quantized"), "`weight_packed`"),
    (BLOCKS, weights(block_structure=[16, 16]), "FP8 in blocks of 16x16 as float-quantized, so `weight_scale` is"),
    ("llm_compressor/nvfp4", weights(group_size=32), "so `weight_scale` is"),
    ("modelopt/fp8", lambda config: config.update(quant_algo="NVFP4"), "there is `weight_scale_2`"),
    ("modelopt/nvfp4", lambda config: config["ignore"].append("*.up_proj"), "left in 16 bits, by `*.up_proj`"),
    ("modelopt/mixed", lambda config: config["quantized_layers"].pop(NAME), "`quantized_layers` does not name it"),
]


@pytest.mark.parametrize(("made", "change", "says"), LIES, ids=[f"{made} {says}" for made, _, says in LIES])
def test_a_config_of_other_tensors_will_not_load(tmp_path: Path, made: str, change: Change, says: str) -> None:
    with pytest.raises(ArtifactError, match=r"the checkpoint will not load: `model\.layers\.0\.") as refused:
        require_agreement(copied(made, tmp_path, change), FAMILIES)
    (said, text), (found, there) = refused.value.facts
    assert (said, found) == ("config says", "file has")
    assert says in str(text)
    assert there
    assert refused.value.hint


WORDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, case("gptq", "gptq", 4, 32)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, case("awq", "gemm", 4, 32)),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        case("fp8", "e4m3", 8, 128, strategy="block", block="128x128"),
    ),
}


def written(folder: Path, method: str, **changed: Any) -> Path:  # noqa: ANN401 - JSON
    """Write a checkpoint of no family with one linear."""
    config, own = WORDS[method]
    (folder / "config.json").write_text(json.dumps({"model_type": "some", "quantization_config": config | changed}))
    made = {leaf: TYPES.get(slot.dtype, torch.float16) for leaf, slot in slots_of(own).items()}
    tensors = {f"{NAME}.{leaf}": torch.zeros(slots_of(own)[leaf].shape).to(kind) for leaf, kind in made.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("method", "changed", "says"),
    [
        ("gptq", {"group_size": 64}, "INT4 in groups of 64 as gptq, so `qzeros` is 3 x 12"),
        ("gptq", {"bits": 8}, "INT8 in groups of 32 as gptq"),
        ("gptq", {"group_size": -1}, "INT4 with a scale for each output as gptq"),
        ("gptq", {"dynamic": {r".*up_proj": {"group_size": 64}}}, "in groups of 64"),
        ("gptq", {"dynamic": {r"-:.*up_proj": {}}}, "`dynamic` leaves it in 16 bits, by `-:.*up_proj`"),
        ("gptq", {"dynamic": {r".*down_proj": {"bits": 8}}}, ""),
        ("gptq", {"format": "marlin"}, ""),
        ("awq", {"group_size": 64}, "so `qzeros` is 3 x 12"),
        ("awq", {"modules_to_not_convert": ["up_proj"]}, "`modules_to_not_convert` lists it, by `up_proj`"),
        ("awq", {"modules_to_not_convert": ["up", "gate"]}, ""),
        ("awq", {"version": "gemv"}, ""),
        ("fp8", {"weight_block_size": [64, 64]}, "FP8 in blocks of 64x64 as e4m3, so `weight_scale_inv` is 2 x 3"),
        *((method, {}, "") for method in WORDS),
    ],
)
def test_a_linear_of_no_family_is_told_by_its_tensors(
    tmp_path: Path, method: str, changed: dict[str, Any], says: str
) -> None:
    folder = written(tmp_path, method, **changed)
    if not says:
        return require_agreement(folder, FAMILIES)
    with pytest.raises(ArtifactError, match=f"`{NAME}` is not stored as its config says") as refused:
        require_agreement(folder, FAMILIES)
    assert says in str(refused.value.facts[0][1])


def without(folder: Path, *marks: str) -> Path:
    """Leave out tensors whose names contain a mark."""
    for file in folder.glob("*.safetensors"):
        held = {name: one for name, one in load_file(file).items() if not any(mark in name for mark in marks)}
        save_file(held, file)
    return folder


@pytest.mark.parametrize(
    ("mark", "missing"),
    [
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("layers.1.input_layernorm", "model.layers.1.input_layernorm"),
        ("model.norm", "model.norm"),
        ("embed_tokens", "model.embed_tokens"),
    ],
)
def test_a_module_that_is_missing_without_an_index_is_named(tmp_path: Path, mark: str, missing: str) -> None:
    folder = copied(PACKED, tmp_path, lambda config: None)
    require_agreement(folder, FAMILIES)
    with pytest.raises(ArtifactError, match="its files lack modules that its config promises") as refused:
        require_agreement(without(folder, mark), FAMILIES)
    assert dict(refused.value.facts)["first"] == missing


def test_nothing_is_said_of_what_files_may_call_otherwise(tmp_path: Path) -> None:
    folder = copied(PACKED, tmp_path, lambda config: None)
    require_agreement(without(folder, "up_proj", "gate_proj"), FAMILIES)  # as if they were stored as one
    for file in folder.glob("*.safetensors"):
        renamed = {name.replace("model.", "language_model.model."): one for name, one in load_file(file).items()}
        save_file({name: one for name, one in renamed.items() if "norm" not in name}, file)
    require_agreement(folder, FAMILIES)


@pytest.mark.parametrize("made", MADE)
def test_codes_of_which_the_config_says_nothing_are_refused(made: str, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "moved", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"says nothing of them\n  file has  .*\nhint: check"):
        require_agreement(folder, FAMILIES)
    (folder / "quantize_config.json").write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=r"hint: put what quantize_config\.json says"):
        require_agreement(folder, FAMILIES)
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"quantization_config": said}}))
    require_agreement(folder, {})


def test_weights_in_16_bits_of_what_a_group_names_are_refused(tmp_path: Path) -> None:
    folder = copied("llm_compressor/w4a16-asym-g32", tmp_path / "plain", lambda _: None)
    require_agreement(folder, FAMILIES)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    codes = [name for name in tensors if name.startswith(f"{NAME}.")]
    shape = tensors[f"{NAME}.weight_shape"].tolist()
    kept = {name: tensor for name, tensor in tensors.items() if name not in codes}
    save_file({**kept, f"{NAME}.weight": torch.zeros(shape, dtype=torch.bfloat16)}, file)
    with pytest.raises(ArtifactError, match=rf"`{NAME}` is not stored as its config says\n.*codes as pack-quantized"):
        require_agreement(folder, FAMILIES)
    copied("llm_compressor/w4a16-asym-g32", tmp_path / "listed", lambda said: said["ignore"].append(NAME))
    (tmp_path / "listed" / "model.safetensors").write_bytes(file.read_bytes())
    require_agreement(tmp_path / "listed", FAMILIES)


@pytest.mark.parametrize(
    ("own", "scale"),
    [
        (case(CT, "float-quantized", 8, 128, strategy="block", block="64x128"), "weight_scale"),
        (case("fp8", "e4m3", 8, 128, strategy="block", block="64x128"), "weight_scale_inv"),
    ],
)
def test_blocks_are_counted_along_outputs_and_inputs(own: Case, scale: str) -> None:
    assert shapes_of(own, 96, 320) == {"weight": (96, 320), scale: (2, 3)}
