"""A tensor whose scales fall out of the range of their format, at either end, is named, with how many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from qtool.errors import NumericalError
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from tests.steps.conftest import Desk

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("text", ["int4-g8-sfp16", "int4-asym-g8-offset-sfp16"])
def test_a_tensor_is_named_with_the_scales_that_are_too_large(desk: Desk, tmp_path: Path, text: str) -> None:
    def grow(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.weight"][3:5] *= 1e9

    scheme = ModelScheme(parse_tensor_scheme(text, desk.workspace.plugins.format))
    found, _ = mitigate(MitigateRequest(str(desk.copied(tmp_path / "grown", grow)), "rtn", scheme), desk.workspace)
    assert found.manifest.counters == {f"saturated_scales {NAME}": 2 * 3}


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("int4-g8-sfp16", 1e-3),  # few bits left
        ("int4-g8-sfp16", 1e-9),  # below the least
        ("fp4-g8-se4m3", 1e-5),
        ("amxfp4-channel", 1e-9),
        ("int4-g8-sbf16", 1e-38),
        ("int4-g8-se8m0", 1e-38),
    ],
)
def test_a_tensor_is_named_with_the_scales_that_are_too_small(
    desk: Desk, tmp_path: Path, text: str, factor: float
) -> None:
    def fade(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.weight"][3:5] *= factor

    scheme = ModelScheme(parse_tensor_scheme(text, desk.workspace.plugins.format))
    asked = MitigateRequest(str(desk.copied(tmp_path / "faded", fade)), "rtn", scheme)
    groups = 2 * (2 if text.startswith("amx") else 3)
    counted = {f"subnormal_scales {NAME}": groups}
    assert mitigate(asked, desk.workspace)[0].manifest.counters == counted
    assert desk.told[-1].endswith(f"not as usual: subnormal_scales {NAME} {groups}")
    with pytest.raises(NumericalError, match="something unusual happened") as refused:
        mitigate(replace(asked, strict=True), desk.workspace)
    assert refused.value.facts == tuple(counted.items())
    assert mitigate(replace(asked, source=str(desk.model)), desk.workspace)[0].manifest.counters == {}
