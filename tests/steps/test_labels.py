"""Labels through the steps, on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from qtool.artifacts.store import Artifact
from qtool.model.card import ModelCard, write_card
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.labels import labels_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.testing import TinyModel, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model() as model:
        write_card(model.path, ModelCard("little", "made of noise"))
        yield model


@pytest.fixture(scope="module")
def quantized(tiny: TinyModel) -> Artifact:
    settings = {"alpha": "0.25"}
    plan, _ = transform(TransformRequest(str(tiny.statistics.path), "smoothquant", settings, seed=3), tiny.workspace)
    scheme = ModelScheme(weights=parse_tensor_scheme("int4-channel", tiny.workspace.plugins.format))
    request = MitigateRequest(
        str(plan.path), "gptq", scheme, {"dampening_frac": "0.5"}, propagate="none", true_sequential=True
    )
    return mitigate(request, tiny.workspace)[0]


def labels(source: object, tiny: TinyModel) -> dict[str, str]:
    return labels_of(open_subject(str(source), tiny.workspace), tiny.workspace)


def test_a_model_is_full_precision(tiny: TinyModel) -> None:
    assert labels(tiny.path, tiny) == {
        "model": "little",
        "transform": "identity",
        "mitigator": "full precision",
        "scheme": "16 bits",
        "executed": "16 bits",
        "footnote": "made of noise",
    }


def test_a_quantized_artifact_says_how_it_was_made(tiny: TinyModel, quantized: Artifact) -> None:
    found = labels(quantized.path, tiny)
    scheme = str(ModelScheme.from_json(quantized.manifest.schemes))
    assert found == {
        "model": "little",
        "transform": "smoothquant",
        "mitigator": "gptq",
        "scheme": scheme,
        "weights": str(ModelScheme.from_json(quantized.manifest.schemes).weights),
        "activations": "16 bits",
        "kv": "16 bits",
        "executed": f"fake-quantized: {scheme}",
        "propagate": "none",
        "token_weight": "uniform",
        "settings": "smoothquant.alpha=0.25, gptq.dampening_frac=0.5, true_sequential",
        "seed": "calibrate 0, mitigate 0, transform 3",
        "calibration": "text.txt, 6 x 32 tokens",
        "footnote": "made of noise",
    }


def test_statistics_that_are_gone_are_left_out(tiny: TinyModel, quantized: Artifact) -> None:
    hidden = tiny.statistics.path.with_suffix(".moved")
    tiny.statistics.path.rename(hidden)
    try:
        found = labels(quantized.path, tiny)
    finally:
        hidden.rename(tiny.statistics.path)
    assert "calibration" not in found
    assert found["seed"] == "mitigate 0, transform 3"


def test_a_plugin_that_is_gone_leaves_all_of_its_options(tiny: TinyModel, quantized: Artifact) -> None:
    offers = tiny.workspace.plugins.offers
    without = {**offers, "mitigators": {}}
    bare = replace(tiny.workspace, plugins=replace(tiny.workspace.plugins, offers=without, _instances={}))
    found = labels_of(open_subject(str(quantized.path), bare), bare)
    assert "gptq.block_size=128" in found["settings"]
    assert "smoothquant.alpha=0.25, gptq.block_size" in found["settings"]
