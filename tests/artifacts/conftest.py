"""A manifest and the tensors of a small artifact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.artifacts.manifest import Input, Manifest, Step


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        kind="quantized",
        step=Step("mitigate", "gptq", 3, "qtool 0.1.0", {"dampening_frac": 0.01, "order": "activation", "seed": 0}),
        inputs={"plan": Input("a" * 64, "runs/plan.safetensors"), "model": Input("b" * 64, "models/tiny")},
        subject="b" * 64,
        family="llama",
        schemes={"weights": {"format": "int4"}},
        details={"folded": {"residual": 1}},
        counters={"dead_columns": 2},
        about={"created": "2026-01-01T00:00:00Z", "seconds": 1.5, "argv": ["qtool", "mitigate"]},
    )


@pytest.fixture
def blocks() -> dict[str, dict[str, Tensor]]:
    """Tensors of two blocks, of many types and shapes: scalar, empty, odd sizes that misalign what follows."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{i}": {
            f"layers.{i}.codes": torch.randint(0, 16, (3, 5), generator=generator, dtype=torch.uint8),
            f"layers.{i}.scale": torch.rand(3, 1, generator=generator),
            f"layers.{i}.hessian": torch.rand(5, 5, generator=generator, dtype=torch.float64),
            f"layers.{i}.half": torch.rand(7, generator=generator).bfloat16(),
            f"layers.{i}.e4m3": torch.rand(3, generator=generator).to(torch.float8_e4m3fn),
            f"layers.{i}.mask": torch.tensor([True, False, True]),
            f"layers.{i}.count": torch.tensor(7 + i),
            f"layers.{i}.none": torch.empty(0, 4),
        }
        for i in range(2)
    }
