"""Blocks of Hessians in place of the whole: what rounding to nearest finds in them, what it takes, what it tells."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.artifacts.store import Artifact
from qtool.builtin.statistics.hessian import HessianBlocks
from qtool.errors import ArtifactError, UsageError
from qtool.steps.foresee import foresee
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import save_tiny_model, tiny_config
from tests.steps.conftest import Desk

BLOCKS = ("hessian_blocks",)
SEARCH = {"clip": "search", "clip_metric": "output"}


def asked(desk: Desk, source: Artifact, method: str = "rtn", **options: Any) -> MitigateRequest:  # noqa: ANN401 - of the request
    scheme = read_scheme("", {"weights": options.pop("weights", "int4-g8")}, desk.workspace.plugins)
    settings = options.pop("settings", SEARCH)
    return MitigateRequest(str(source.path), method, scheme, settings, **{"propagate": "none", **options})


def assert_same_codes(found: Artifact, expected: Artifact) -> None:
    names = [name for name in expected.names() if not name.startswith("qtool.")]
    assert set(found.names()) == set(expected.names())
    for name in names:
        assert torch.equal(found.tensor(name), expected.tensor(name)), name


@pytest.mark.parametrize("metric", ["hessian", "output"])
@pytest.mark.parametrize("weights", ["int4-g8", "int3-asym-g4", "fp4-g8-se8m0"])
def test_codes_are_those_that_the_whole_gives(desk: Desk, weights: str, metric: str) -> None:
    """Every scale follows from one group's block, so what the two sums differ by in the last bit decides nothing."""
    options: dict[str, Any] = {"weights": weights, "settings": {**SEARCH, "clip_metric": metric}}
    whole, blocks = desk.calibrate(gather=("hessian",)), desk.calibrate(gather=BLOCKS)
    assert sum(blocks.header.slots[n].nbytes for n in blocks.names("layers.")) < 0.4 * sum(
        whole.header.slots[n].nbytes for n in whole.names("layers.")
    )
    (found, _), (expected, _) = (mitigate(asked(desk, one, **options), desk.workspace) for one in (blocks, whole))
    assert_same_codes(found, expected)
    plain, _ = mitigate(asked(desk, whole, weights=weights, settings={}), desk.workspace)
    assert any(not torch.equal(plain.tensor(n), found.tensor(n)) for n in plain.names())
    for report in found.manifest.details["layers"].values():
        assert {"weight_error", "weight_error_rtn"} <= set(report)
        assert "loss" not in report
    assert all("loss" in report for report in expected.manifest.details["layers"].values())


def test_passes_gather_the_whole_alone_as_losses_are_told_in_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered_twice(*_: object) -> None:
        raise AssertionError("the blocks are in the whole")

    blocks = desk.calibrate(gather=BLOCKS)
    monkeypatch.setattr(HessianBlocks, "start", gathered_twice)
    found, _ = mitigate(asked(desk, blocks, propagate="quantized"), desk.workspace)
    assert all({"loss", "loss_rtn"} <= set(one) for one in found.manifest.details["layers"].values())
    mitigate(asked(desk, blocks, "rtn+lorc", propagate="quantized", settings={**SEARCH, "rank": "2"}), desk.workspace)


def test_what_another_method_reads_is_the_whole(desk: Desk) -> None:
    both = desk.calibrate(gather=("hessian", *BLOCKS))
    plain = desk.calibrate(gather=("hessian",))
    (found, _), (expected, _) = (mitigate(asked(desk, one, "rtn+cd"), desk.workspace) for one in (both, plain))
    assert_same_codes(found, expected)
    assert found.manifest.details == expected.manifest.details
    with pytest.raises(ArtifactError, match="the statistics lack `hessian` at"):
        mitigate(asked(desk, desk.calibrate(gather=BLOCKS), "rtn+cd"), desk.workspace)


def test_groups_beyond_a_block_are_refused_in_a_dry_run_too(desk: Desk) -> None:
    request = asked(desk, desk.calibrate(gather=BLOCKS), weights="int4")
    for step in (mitigate, lambda *given: foresee(mitigate, *given)):
        with pytest.raises(UsageError, match="do not lie in blocks of its Hessian") as refused:
            step(request, desk.workspace)
        assert refused.value.facts == (("groups", 24), ("blocks", 8))
    mitigate(replace(request, settings={**SEARCH, "clip_metric": "hessian"}), desk.workspace)


def test_a_dry_run_counts_their_bytes(desk: Desk) -> None:
    solving = {}
    for gather, mine in ((BLOCKS, 8 * (3 * 24 + 40)), (("hessian",), 3 * 24**2 + 40**2)):
        statistics = desk.calibrate(gather=gather)
        stored = sum(statistics.header.slots[name].nbytes for name in statistics.names("layers.0."))
        found = json.loads(json.dumps(foresee(mitigate, asked(desk, statistics), desk.workspace).to_json()))
        assert found["statistics"] == gather[0]
        assert found["statistics_bytes_of_largest_layer"] == stored == 4 * mine
        parts = {row["part"]: row["bytes"] for row in found["estimate"]}
        assert parts["statistics of a layer"] == stored
        solving[gather[0]] = parts["solving a site"]
    assert solving["hessian"] - solving["hessian_blocks"] == 6 * 4 * 40**2, "copies of the largest matrix"


def test_behind_transforms(desk: Desk) -> None:
    """Blocks follow where a transform keeps them apart; behind another one they are gathered on the plan."""
    statistics = desk.calibrate(gather=("hessian", *BLOCKS, "absmax"))
    small = desk.calibrate(gather=(*BLOCKS, "absmax"))
    for method, settings in [("smoothquant", {}), ("block-hadamard", {"block": "4"})]:
        plans = [
            transform(TransformRequest(str(one.path), method, settings=settings), desk.workspace)[0]
            for one in (small, statistics)
        ]
        found, expected = (mitigate(asked(desk, plan), desk.workspace)[0] for plan in plans)
        assert_same_codes(found, expected)
    plan, _ = transform(TransformRequest(str(small.path), "quarot"), desk.workspace)
    with pytest.raises(ArtifactError, match="the statistics lack `hessian_blocks` at") as refused:
        mitigate(asked(desk, plan), desk.workspace)
    assert refused.value.hint == "qtool calibrate PLAN --gather absmax,hessian_blocks"
    workspace = replace(
        desk.workspace, inputs={"statistics": desk.calibrate(source=str(plan.path), gather=BLOCKS).path}
    )
    behind, _ = mitigate(asked(desk, plan), workspace)
    whole = replace(
        desk.workspace, inputs={"statistics": desk.calibrate(source=str(plan.path), gather=("hessian",)).path}
    )
    assert_same_codes(behind, mitigate(asked(desk, plan, output=desk.workspace.home / "w.safetensors"), whole)[0])


@pytest.mark.parametrize("experts", ["all", "routed"])
def test_experts(desk: Desk, tmp_path: Any, experts: str) -> None:  # noqa: ANN401 - a Path
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    save_tiny_model(tmp_path / "sparse", tiny_config("qwen3_moe", **changes))
    desk = replace(desk, model=tmp_path / "sparse")
    both = desk.calibrate(gather=("hessian", *BLOCKS), experts=experts)
    names = [name for name in both.names("layers.1.experts.") if name.endswith(".hessian_blocks")]
    assert len(names) == (8 if experts == "routed" else 4)
    for name in names:
        whole, size = both.tensor(name.removesuffix("_blocks")), both.tensor(name).shape[-1]
        cut = torch.stack([whole[i : i + size, i : i + size] for i in range(0, len(whole), size)])
        torch.testing.assert_close(both.tensor(name), cut, rtol=0, atol=1e-6 * float(whole.abs().max()))
    few, whole = (desk.calibrate(gather=gather, experts=experts) for gather in (BLOCKS, ("hessian",)))
    (found, _), (expected, _) = (mitigate(asked(desk, one), desk.workspace) for one in (few, whole))
    assert_same_codes(found, expected)
