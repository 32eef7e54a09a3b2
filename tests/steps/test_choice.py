"""Which of some schemes has the least error: what is measured, and that what is written is read again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.engine.carry import CarriedStatistics
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.numerics.losses import relative_loss
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace

FLOATS = ("fp4", "fp4_e1m2", "fp4_e3m0")
INPUTS = [f"{name}-token" for name in FLOATS]


def told(workspace: Workspace, source: Artifact, **schemes: list[str]) -> dict[str, Any]:
    return inspect(str(source.path), workspace, **schemes).to_json()


def rounded(x: Tensor, values: list[float], scale: float) -> Tensor:
    """Round to the nearest of a few values, of ties to any."""
    table = torch.tensor(sorted({*values, *(-value for value in values)}), dtype=torch.float64) * scale
    return table[(x.double().unsqueeze(-1) - table).abs().argmin(-1)]


def test_errors_of_inputs_are_those_of_the_outputs_of_all_that_read_them(
    library: Workspace, speeches: Artifact
) -> None:
    found = told(library, speeches, activations=["int4-tensor-full", "fp4_e3m0-tensor"])
    rows = {row["linear"]: row for row in found["errors_of_activations"]}
    assert len(rows) == 4 * 7
    model = library.model("tiny")
    sample = speeches.tensor("layers.1.attn_in.sample").double()
    names = [f"model.layers.1.self_attn.{one}_proj" for one in "qkv"]
    weights = torch.cat([model.tensor(f"{name}.weight") for name in names]).double()
    amax = float(sample.abs().max())
    powers = [0.0, *(2.0**k for k in range(-2, 5))]
    for scheme, values, largest in (
        ("int4-sym-tensor-sbf16-full", list(map(float, range(8))), 7),
        ("fp4_e3m0-sym-tensor-sfp32", powers, 16),
    ):
        scale = torch.tensor(amax / largest)
        scale = scale.bfloat16() if "bf16" in scheme else scale
        error = ((rounded(sample, values, float(scale)) - sample) @ weights.T).square().sum()
        for name in names:
            assert rows[name][scheme] == pytest.approx(float(error / (sample @ weights.T).square().sum()), rel=0.02)


def test_errors_of_weights_are_those_of_rounding_to_nearest(library: Workspace, speeches: Artifact) -> None:
    found = told(library, speeches, weights=["fp4_e3m0-tensor", "int8-channel"])
    rows = {row["linear"]: row for row in found["errors_of_weights"]}
    weight = library.model("tiny").tensor("model.layers.2.mlp.down_proj.weight").float()
    hessian = speeches.tensor("layers.2.up_down.hessian").float()
    nearest = rounded(weight, [0.0, *(2.0**k for k in range(-2, 5))], float(weight.abs().max()) / 16).float()
    row = rows["model.layers.2.mlp.down_proj"]
    assert row["fp4_e3m0-sym-tensor-sfp32"] == pytest.approx(relative_loss(weight, nearest, hessian), rel=1e-3)
    assert row["least"] == found["least_weights"] == "int8-sym-channel-sbf16"
    assert "errors_of_activations" not in found


def test_the_least_are_written_as_mitigate_takes_them(library: Workspace, speeches: Artifact) -> None:
    found = told(library, speeches, weights=list(FLOATS), activations=INPUTS)
    scheme = read_scheme(
        "", {"weights": found["least_weights"], "activations": found["least_activations"]}, library.plugins
    )
    formats = set()
    for part in ("weights", "activations"):
        for row in found[f"errors_of_{part}"]:
            errors = {name: value for name, value in row.items() if isinstance(value, float)}
            assert len(errors) == 3
            assert row["least"] == min(errors, key=lambda name: errors[name])
            assert str(getattr(scheme.of(row["linear"]), part)) == row["least"]
            formats.add(row["least"].partition("-")[0])
    assert len(formats) > 1  # or one scheme without exceptions were as good
    artifact, _ = mitigate(MitigateRequest(str(speeches.path), "rtn", scheme, propagate="none"), library)
    assert sum(name.endswith(".codes") for name in artifact.names()) == 28


def test_behind_a_plan_they_are_other_errors(library: Workspace, speeches: Artifact) -> None:
    plan, _ = transform(TransformRequest(str(speeches.path), "quarot"), library)
    asked = {"activations": ["int4-token-sfp32-full"]}
    plain, turned = (told(library, one, **asked)["errors_of_activations"] for one in (speeches, plan))
    assert len(plain) == len(turned)
    name = "int4-sym-token-sfp32-full"
    assert sum(row[name] for row in turned) < 0.9 * sum(row[name] for row in plain)
    subject = open_subject(str(plan.path), library).subject
    carried = CarriedStatistics(speeches, subject.model, subject.plan)["layers.1.up_down"].entries["sample"].double()
    weight = subject.folded(1)["mlp.down_proj.weight"].double()
    step = carried.abs().amax(-1, keepdim=True) / 7
    error = (((carried / step).round() * step - carried) @ weight.T).square().sum() / (
        carried @ weight.T
    ).square().sum()
    (row,) = (row for row in turned if row["linear"] == "model.layers.1.mlp.down_proj")
    assert row[name] == pytest.approx(float(error), rel=0.01)


def test_what_cannot_be_measured(library: Workspace, speeches: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="measured on statistics"):
        inspect("tiny", library, activations=["fp4-token"])
    scheme = read_scheme("W4A16-g64", {}, library.plugins)
    done, _ = mitigate(MitigateRequest(str(speeches.path), "rtn", scheme, propagate="none"), library)
    with pytest.raises(UsageError, match="errors in schemes for statistics and plans"):
        told(library, done, weights=["fp4"])
    with pytest.raises(SchemeError, match="static scales: those are of activations"):
        told(library, speeches, weights=["fp4-tensor-static"])
    with pytest.raises(SchemeError, match=re.escape("`layers.0.attn_in`")):
        told(library, speeches, activations=["fp4-g48"])
    request = CalibrateRequest("tiny", data="speeches", num_samples=2, seq_len=32, gather=("absmax",))
    bare, _ = calibrate(request, library)
    with pytest.raises(ArtifactError, match="lack `sample`"):
        told(library, bare, activations=["fp4-token"])
