"""Scales that are codes themselves: the word, the values by hand, bytes, whole runs, and who refuses them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtool.builtin.mitigators.gptq import GPTQ, GPTQConfig
from qtool.builtin.mitigators.ldlq import LDLQ, LDLQConfig
from qtool.builtin.mitigators.rtn import RTN, ClipOptions
from qtool.engine.grid import Grid
from qtool.engine.problem import LayerProblem
from qtool.engine.storage import foreseen_bytes
from qtool.engine.stored import linear_tensors, read_linear
from qtool.errors import SchemeError
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme, parse_tensor_scheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import storage_of
from qtool.steps.subjects import open_subject
from qtool.testing.mitigators import correlated_problem
from tests.steps.conftest import Desk

LAST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def scheme_of(text: str, plugins: Plugins) -> TensorScheme:
    return parse_tensor_scheme(text, plugins.format)


def grid_of(text: str, plugins: Plugins) -> Grid:
    scheme = scheme_of(text, plugins)
    return Grid.of(scheme, plugins.format(scheme.format))


def problem_of(text: str, plugins: Plugins, n_out: int = 37) -> LayerProblem:
    scheme = scheme_of(text, plugins)
    return correlated_problem(plugins.format(scheme.format), scheme, n_out=n_out)


@pytest.mark.parametrize("text", ["int3-asym-g16-sbf16-scales3g16", "int8-sym-channel-sfp32-full-c0.9-scales8g256"])
def test_the_word_is_written_as_it_is_read(text: str, plugins: Plugins) -> None:
    scheme = scheme_of(text, plugins)
    assert str(scheme) == text
    assert scheme == replace(scheme_of(text.partition("-scales")[0], plugins), **vars_of(text))
    model = ModelScheme(weights=scheme)
    assert ModelScheme.from_json(model.to_json()) == model


def vars_of(text: str) -> dict[str, int]:
    bits, _, rows = text.partition("-scales")[2].partition("g")
    return {"scale_bits": int(bits), "scale_rows": int(rows)}


@pytest.mark.parametrize(
    ("text", "reason", "nearest"),
    [
        ("nvfp4-scales3g16", "scales of `nvfp4` are no codes", "nvfp4-sym-g16-se4m3"),
        ("int4-tensor-scales3g16", "the one scale of a tensor is no code", "int4-sym-tensor-sbf16"),
        ("int4-g16-se8m0-scales3g16", "float ranges, not e8m0", "int4-sym-g16-sbf16-scales3g16"),
        ("int4-g16-signed_full-scales3g16", "have no sign", "int4-sym-g16-sbf16-scales3g16"),
        ("int4-asym-g16-real-scales3g16", "`real` says nothing", "int4-asym-g16-sbf16-scales3g16"),
        ("int4-g16-scales0g16", "codes of 1 to 8 bits, not 0", "int4-sym-g16-sbf16-scales3g16"),
        ("int4-g16-scales9g1", "codes of 1 to 8 bits, not 9", "int4-sym-g16-sbf16-scales3g16"),
        ("int4-g16-scales3g1", "2 to 256 rows share a range of scales, not 1", "int4-sym-g16-sbf16-scales3g16"),
        ("int4-g16-scales3g257", "2 to 256 rows", "int4-sym-g16-sbf16-scales3g16"),
    ],
)
def test_what_means_nothing_names_the_nearest(text: str, reason: str, nearest: str, plugins: Plugins) -> None:
    with pytest.raises(SchemeError, match=reason) as refused:
        scheme_of(text, plugins)
    assert refused.value.hint == f"nearest that works: {nearest}"
    assert str(scheme_of(nearest, plugins)) == nearest


@pytest.mark.parametrize(
    ("parts", "nearest"),
    [
        ({"activations": "int4-asym-token-scales3g16"}, "--activations int4-asym-token-sbf16"),
        ({"weights": "int4", "kv": "int4-asym-token-head-scales3g16"}, "--kv int4-asym-token-head-sbf16"),
        ({"kv": "keys=int4-asym-channel-g32-scales3g16"}, "--kv keys=int4-asym-channel-g32-sbf16,values=none"),
    ],
)
def test_tokens_share_no_ranges_of_scales(parts: dict[str, str], nearest: str, plugins: Plugins) -> None:
    with pytest.raises(SchemeError, match="scales that are codes are of weights") as refused:
        read_scheme("", parts, plugins)
    assert refused.value.hint == f"nearest that works: {nearest}"


def test_values_by_hand(plugins: Plugins) -> None:
    """Two rows of a group, INT2: scales 2/3 and 1/3, zero points 0.75 and 1.5; ranges in float16."""
    weight = torch.tensor([[-0.5, 0.25, 1.0, 1.5], [-0.5, -0.25, 0.0, 0.5]])
    (part,) = grid_of("int2-asym-g4-sfp16-scales2g2", plugins).parts
    own = part.fit(part.groups(weight), global_scale=None)
    assert own.scale_codes is not None
    assert own.zero_point_codes is not None
    half = lambda value: float(torch.tensor(value).half())  # noqa: E731 - the rounding of stored ranges
    low = half(1 / 3)
    step = half((2 / 3 - low) / 3)
    assert own.scale_codes.codes.tolist() == [[3], [0]]
    assert own.scale_codes.low.tolist() == [[low], [low]]
    assert own.scale_codes.step.tolist() == [[step], [step]]
    assert own.zero_point_codes.codes.tolist() == [[0], [3]]
    assert own.zero_point_codes.low.tolist() == [[0.75], [0.75]]
    assert own.zero_point_codes.step.tolist() == [[0.25], [0.25]]
    codes = part.format.encode(part.groups(weight), own)
    assert codes.squeeze(1).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    first, second = part.format.decode(codes, own).squeeze(1).tolist()
    large = torch.tensor(low) + 3 * torch.tensor(step)
    assert first == pytest.approx([float(large) * (code - 0.75) for code in range(4)], rel=1e-6)
    assert second == pytest.approx([low * (code - 1.5) for code in range(4)], rel=1e-6)


def test_symmetric_ones_have_no_zero_points(plugins: Plugins) -> None:
    weight = torch.tensor([[-8.0, 7.0, 1.0, 0.0], [5.0, -1.0, 3.5, -5.0], [0.0, 0.0, 0.0, 0.0]])
    (part,) = grid_of("int4-g4-sfp32-full-scales1g3", plugins).parts
    own = part.fit(part.groups(weight), global_scale=None)
    assert own.zero_point is None
    assert own.zero_point_codes is None
    least = torch.finfo(torch.float32).tiny  # of the group of zeros, which any scale suits
    assert own.scale.squeeze(1).tolist() == pytest.approx([8 / 7, 8 / 7, least], rel=1e-6)


@pytest.mark.parametrize(
    "text", ["int3-asym-g16-scales3g16", "int2-g32-full-scales5g3-sfp16", "int4-asym-channel-scales1g7"]
)
@pytest.mark.parametrize("method", ["rtn", "rtn clipped", "gptq", "gptq fresh", "ldlq"])
def test_methods_store_what_they_decode(text: str, method: str, plugins: Plugins) -> None:
    of = problem_of(text, plugins)
    found = {
        "rtn": lambda: RTN().quantize(of, ClipOptions()),
        "rtn clipped": lambda: RTN().quantize(of, ClipOptions(clip="search")),
        "gptq": lambda: GPTQ().quantize(of, GPTQConfig()),
        "gptq fresh": lambda: GPTQ().quantize(of, GPTQConfig(parameters="fresh", order="groups")),
        "ldlq": lambda: LDLQ().quantize(of, LDLQConfig()),
    }[method]()
    tensors = linear_tensors("one", found, of.grid)
    again = read_linear("one", 64, tensors, of.grid)
    assert torch.equal(again.weight(of.grid), found.weight(of.grid))
    (part,), scheme = of.grid.parts, of.grid.parts[0].scheme
    by_part = foreseen_bytes(scheme, part.format, 37, 64)
    stored = {leaf: tensor.nbytes for leaf, tensor in tensors.items()}
    assert sum(by_part.values()) == sum(stored.values())
    groups, blocks = scheme.groups_of(64, layer="one"), -(-37 // (scheme.scale_rows or 1))
    size = {"fp16": 2, "bf16": 2}[scheme.scale]
    per_level = groups * (-(-37 * (scheme.scale_bits or 0) // 8) + 2 * size * blocks)
    assert by_part["scales"] == per_level
    assert by_part.get("zeros", 0) == (0 if scheme.symmetric else per_level)
    assert (
        found.report["loss"]
        < 2.5 * RTN().quantize(problem_of(text.partition("-scales")[0], plugins), ClipOptions()).report["loss"]
    )


def test_more_bits_of_scales_come_to_real_ones(plugins: Plugins) -> None:
    losses = [
        RTN().quantize(problem_of(f"int4-asym-g16-scales{bits}g16-sfp32", plugins), ClipOptions()).report["loss"]
        for bits in (1, 3, 8)
    ]
    real = RTN().quantize(problem_of("int4-asym-g16-real-sfp32", plugins), ClipOptions()).report["loss"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(real, rel=0.02)
    assert losses[0] > 1.2 * real


def test_layers_with_one_input_do_not_share_ranges(plugins: Plugins) -> None:
    one, other = (problem_of("int3-asym-g16-scales3g16", plugins, n_out) for n_out in (20, 37))
    other = replace(other, hessian=one.hessian)
    both = GPTQ().quantize_siblings([one, other], GPTQConfig())
    for of, found in zip((one, other), both, strict=True):
        alone = GPTQ().quantize(replace(of, memory={}), GPTQConfig())
        assert torch.equal(found.weight(of.grid), alone.weight(of.grid))


def test_rows_with_ranges_of_their_own_are_refused(plugins: Plugins) -> None:
    of = problem_of("int3-asym-g16-scales3g16", plugins)
    found = RTN().quantize(of, ClipOptions())
    (own,) = found.parameters
    assert own.scale_codes is not None
    low = own.scale_codes.low.clone()
    low[5] *= 2
    bad = replace(found, parameters=(replace(own, scale_codes=replace(own.scale_codes, low=low)),))
    with pytest.raises(SchemeError, match="scales of their own, and blocks of 16 rows share theirs"):
        linear_tensors("one", bad, of.grid)
    plain = grid_of("int3-asym-g16", plugins)
    with pytest.raises(SchemeError, match="scales are codes, and the scheme does not say so"):
        linear_tensors("one", found, plain)


@pytest.mark.parametrize("weights", ["int3-asym-g8-scales3g16", "int4-g8-sfp16-scales4g6"])
def test_a_model_is_made_counted_foreseen_and_run(desk: Desk, weights: str) -> None:
    workspace = desk.workspace
    scheme = read_scheme("", {"weights": weights}, workspace.plugins)
    artifact, _ = mitigate(MitigateRequest(str(desk.calibrate().path), "gptq", scheme), workspace)
    opened = open_subject(str(artifact.path), workspace)
    found = storage_of(opened)
    assert found is not None
    (length,) = struct.unpack("<Q", artifact.path.read_bytes()[:8])
    bytes_on_disk = artifact.path.stat().st_size - 8 - length
    assert sum(found.linears.values()) == bytes_on_disk
    (row,) = inspect(str(desk.model), workspace, weights=[weights]).tables["storage_by_scheme"].to_json()
    assert row["bits_per_weight"] == pytest.approx(8 * bytes_on_disk / found.weights, abs=1e-12)
    assert row["scales"] == pytest.approx(8 * found.linears["scales"] / found.weights, abs=1e-12)
    text = workspace.home / "own.txt"
    text.write_bytes(bytes(range(97, 123)) * 20)
    metrics, _ = evaluate(
        EvalRequest(str(artifact.path), perplexity=(str(text),), seq_len=16, max_windows=1), workspace
    )
    assert metrics.manifest.details["bits"] == found.bits
    packed, _ = pack(PackRequest(str(artifact.path), "hf"), workspace)
    last = opened.subject.model.graph.linear(LAST)
    decoded = opened.subject.linear(last).weight(opened.subject.weight_grid(last))
    written = load_file(Path(packed.path) / "model.safetensors")[f"{LAST}.weight"]
    assert torch.equal(written, decoded.to(written.dtype))
    nearest = str(scheme.weights).partition("-scales")[0]
    for layout in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(SchemeError, match="has no scales that are codes themselves") as refused:
            pack(PackRequest(str(artifact.path), layout), workspace)
        assert refused.value.hint.startswith(f"nearest that fits: --weights {nearest}, or qtool pack SOURCE --to hf")
    for layout, hint in (("modelopt", "--weights nvfp4"), ("gguf", "--weights int4")):
        with pytest.raises(SchemeError) as refused:
            pack(PackRequest(str(artifact.path), layout), workspace)
        assert refused.value.hint.startswith(f"nearest that fits: {hint}")
        assert "scales4" not in refused.value.hint


def test_what_is_foreseen_before_any_work_is_what_is_stored(desk: Desk) -> None:
    from qtool.steps.demand import stored_bytes

    for text in ("int3-asym-g8-scales3g16", "int2-g8-scales5g3", "int3-asym-channel-scales1g256"):
        scheme = read_scheme("", {"weights": text}, desk.workspace.plugins)
        artifact, _ = mitigate(MitigateRequest(str(desk.model), "rtn", scheme), desk.workspace)
        stored = load_file(artifact.path)
        for name, size in stored_bytes(open_subject(str(artifact.path), desk.workspace).subject).items():
            assert size == sum(tensor.nbytes for own, tensor in stored.items() if own.startswith(f"{name}.")), text


@pytest.mark.parametrize("method", ["svdquant", "caldera", "beam", "cd", "gptaq", "foem", "qronos"])
def test_other_methods_keep_the_ranges(desk: Desk, method: str) -> None:
    scheme = read_scheme("", {"weights": "int3-asym-g8-scales3g5"}, desk.workspace.plugins)
    name = "rtn+cd" if method == "cd" else method
    settings = {"rank": "2", "iterations": "1"} if method in ("svdquant", "caldera") else {}
    artifact, _ = mitigate(MitigateRequest(str(desk.calibrate().path), name, scheme, settings), desk.workspace)
    assert f"{LAST}.scale.codes" in artifact.header.slots
