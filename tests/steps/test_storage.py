"""Storage by part: exact to the byte, and the survey's table of what groups cost."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qtool.artifacts.store import Artifact
from qtool.engine.grid import Grid
from qtool.engine.problem import QuantizedLinear
from qtool.engine.storage import foreseen_bytes, part_of
from qtool.engine.stored import linear_tensors
from qtool.errors import SchemeError
from qtool.numerics.groups import from_groups
from qtool.plugins import Plugins
from qtool.scheme import parse_tensor_scheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import Storage, storage_of
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import TinyModel, tiny_model

PARTS = {
    "gptq+lorc": ("int4-asym-g8", "", {"codes", "scales", "zeros", "adapters"}),
    "spqr": ("int3-asym-g8-scales3g16", "", {"codes", "scales", "zeros", "outliers"}),
    "gptq": ("int2-sym-g8-scales5g3", "", {"codes", "scales"}),
    "rtn+qwt": ("int2-g8", "", {"codes", "scales", "compensations"}),
    "rtn": ("nvfp4", "nvfp4", {"codes", "scales", "inputs"}),
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model(hidden_size=32, intermediate_size=48) as model:
        yield model


@pytest.fixture(scope="module")
def plan(tiny: TinyModel) -> Artifact:
    return transform(TransformRequest(str(tiny.statistics.path), "quip"), tiny.workspace)[0]


def quantized(source: Artifact, tiny: TinyModel, method: str, weights: str, activations: str = "") -> Artifact:
    scheme = read_scheme("", {"weights": weights, "activations": activations}, tiny.workspace.plugins)
    settings = {"rank": "2"} if "lorc" in method else {}
    return mitigate(MitigateRequest(str(source.path), method, scheme, settings), tiny.workspace)[0]


def storage(artifact: Artifact, tiny: TinyModel) -> Storage:
    found = storage_of(open_subject(str(artifact.path), tiny.workspace))
    assert found is not None
    return found


@pytest.mark.parametrize("method", PARTS)
def test_the_parts_of_an_artifact_are_its_file_without_its_header(tiny: TinyModel, plan: Artifact, method: str) -> None:
    weights, activations, parts = PARTS[method]
    source = tiny.statistics if activations else plan
    made = quantized(source, tiny, method, weights, activations)
    found = storage(made, tiny)
    here = {part: size for part, size in found.model.items() if part not in ("operators", "unquantized")}
    assert here.keys() == parts
    (length,) = struct.unpack("<Q", made.path.read_bytes()[:8])
    assert sum(here.values()) == made.path.stat().st_size - 8 - length
    online = sum(
        slot.nbytes // {"F64": 4, "F32": 2}.get(slot.dtype, 1)  # matrices count as 16 bits
        for name, slot in plan.header.slots.items()
        for site, index in [(name.split("/")[1], int(name.split("/")[2].partition(".")[0]))]
        if index >= plan.manifest.details["sites"][site]["folded"] or ".out." in site
    )
    assert found.model.get("operators", 0) == (0 if activations else online)
    assert activations or online > 0, "signs are stored"
    shapes = [tiny.subject.model.places[f"{linear.name}.weight"].shape for linear in tiny.subject.model.graph.linears]
    bits = tiny.workspace.plugins.format(weights.partition("-")[0]).bits
    assert found.linears["codes"] == sum(rows * -(-n * bits // 8) for rows, n in shapes)
    assert "inputs" not in found.linears
    assert found.linears == {part: size for part, size in found.model.items() if part not in ("inputs", "unquantized")}
    assert found.bits["linears"] == sum(found.linears.values()) * 8 / sum(rows * n for rows, n in shapes)
    others = {name: place for name, place in tiny.subject.model.places.items() if "_proj" not in name}
    assert found.model["unquantized"] == 2 * sum(torch.Size(place.shape).numel() for place in others.values())


def test_measurements_and_inspect_tell_the_parts(tiny: TinyModel, plan: Artifact) -> None:
    made = quantized(plan, tiny, "gptq+lorc", "int4-asym-g8")
    text = tiny.workspace.home / "own.txt"
    text.write_bytes(bytes(range(97, 123)) * 20)
    request = EvalRequest(str(made.path), perplexity=(str(text),), seq_len=16, max_windows=1)
    metrics = evaluate(request, tiny.workspace)[0]
    found = storage(made, tiny)
    assert Storage(**metrics.manifest.details["storage"]) == found
    assert metrics.manifest.details["bits"] == found.bits
    for artifact in (made, metrics):
        rows = inspect(str(artifact.path), tiny.workspace).tables["storage"].to_json()
        assert {str(row["part"]): row["model_bytes"] for row in rows[:-1]} == found.model
        assert rows[-1]["part"] == "total"
        assert rows[-1]["linears_bits"] == found.bits["linears"]
        assert rows[-1]["model_bytes"] == sum(found.model.values())
        assert rows[-1]["model_bits"] == found.bits["model"]


def test_queries_and_keys_are_not_linears(tiny: TinyModel) -> None:
    affine = transform(TransformRequest(str(tiny.statistics.path), "quarot", {"r3": "on"}), tiny.workspace)
    opened = open_subject(str(affine[0].path), tiny.workspace)
    found = storage_of(opened)
    assert found is not None
    assert found.bits["linears"] == 16 + 8 * found.linears.get("operators", 0) / found.weights

    from qtool.model.plan import SitePlan
    from qtool.numerics.operators import Affine

    turned = SitePlan((Affine.from_matrix(torch.eye(8, dtype=torch.float64) * 2),), 0)
    sites = {**opened.subject.plan.sites, "layers.0.qk_post": turned}
    other = storage_of(replace(opened, subject=replace(opened.subject, plan=replace(opened.subject.plan, sites=sites))))
    assert other is not None

    assert other.linears == found.linears
    assert other.model["operators"] - found.model.get("operators", 0) == 2 * 8 * 8 * 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_a_plan_unties_is_stored_beside_the_embedding(tied: bool) -> None:
    """A rotation's norms are folded into the head, which is the embedding no longer."""
    with tiny_model(hidden_size=32, tie_word_embeddings=tied) as model:
        rotated = transform(TransformRequest(str(model.statistics.path), "quarot"), model.workspace)[0]
        plain, turned = (storage(one, model).model["unquantized"] for one in (model.statistics, rotated))
        embedding = model.subject.model.places["model.embed_tokens.weight"].shape
        assert turned - plain == (2 * torch.Size(embedding).numel() if tied else 0)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "int4-sym-g32-sfp32",
            "int4-asym-g16",
            "int3-asym-g48",
            "int5-channel",
            "int8-asym-tensor-sfp16",
            "fp8-tensor",
        ),
        *("nvfp4", "mxfp4", "fp4-g16-se2m1", "fp4-g48-sint4", "fp4-asym-g16", "nf4", "mxfp6_e2m3", "int2-asym-channel"),
        *("fp8-b4", "fp8-b128", "amxfp4", "amxfp4-se8m0", "fp4_e1m2-g32-sbf16", "fp4_e3m0"),
        *("int3-asym-g16-scales3g16", "int2-g48-scales5g3-sfp32", "int4-asym-channel-scales1g256", "int4-scales4g2"),
    ],
)
def test_what_is_foreseen_is_what_is_stored(found_plugins: Plugins, text: str) -> None:
    scheme = parse_tensor_scheme(text, found_plugins.format)
    fmt = found_plugins.format(scheme.format)
    n_out, n_in = 7, 192
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1))
    grid = Grid.of(scheme, fmt)
    (part,) = grid.parts
    parameters = part.fit(part.groups(weight), global_scale=part.global_scale(weight.abs().amax()))
    codes = from_groups(part.format.encode(part.groups(weight), parameters), weight.shape)
    stored = Counter[str]()
    for name, tensor in linear_tensors("one", QuantizedLinear(codes, (parameters,)), grid).items():
        stored[part_of(name)] += tensor.nbytes
    assert foreseen_bytes(scheme, fmt, n_out, n_in) == stored


SURVEY = {32: 1.0, 64: 0.5, 128: 0.25, 256: 0.125, 512: 0.0625}
"""Average extra bits of arXiv:2507.17417, section III-B2, of float32 scales under symmetric weights."""


def test_the_overhead_of_groups_is_the_survey_s() -> None:
    with tiny_model(hidden_size=512, intermediate_size=512, num_attention_heads=8, head_dim=64) as model:
        schemes = [f"int4-sym-g{size}-sfp32" for size in SURVEY]
        found = inspect(str(model.path), model.workspace, weights=schemes).tables["storage_by_scheme"].to_json()
        assert [(row["weights"], row["extra_bits"]) for row in found] == list(
            zip(schemes, SURVEY.values(), strict=True)
        )
        assert [row["bits_per_weight"] for row in found] == [4 + extra for extra in SURVEY.values()]
        made = quantized(model.statistics, model, "rtn", schemes[2])
        assert storage(made, model).bits["linears"] == 4.25


def test_schemes_that_do_not_fit_are_refused(tiny: TinyModel) -> None:
    with pytest.raises(SchemeError, match="group size 32 does not divide"):
        inspect(str(tiny.path), tiny.workspace, weights=["int4-g32"])
    with pytest.raises(SchemeError, match="group size 32 does not divide"):
        inspect(str(tiny.statistics.path), tiny.workspace, weights=["int4-g32"])
