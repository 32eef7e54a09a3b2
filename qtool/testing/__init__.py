"""Checks that a plugin's author runs in their own tests, and that qtool runs on its own methods.

Each ``check_…`` builds small random problems, and raises ``CheckError`` with one sentence where a promise of the
contract is broken. Models are tiny and random, with non-trivial norm weights and biases, grouped queries and a head
size that is not hidden / heads, since defaults hide mistakes.
"""

from __future__ import annotations

from qtool.testing.blocks import block_problem, check_block_mitigator
from qtool.testing.families import check_family, family_configs
from qtool.testing.formats import check_format
from qtool.testing.kernels import check_kernel
from qtool.testing.mitigators import check_mitigator, check_retargeter, correlated_problem, two_stream_problem
from qtool.testing.models import check_model_mitigator, model_problem
from qtool.testing.promise import EXACT, CheckError
from qtool.testing.tiny_models import (
    TinyModel,
    double_precision,
    exact_logits,
    save_tiny_model,
    tiny_config,
    tiny_model,
)
from qtool.testing.transforms import check_transform, plan_of

__all__ = [
    "EXACT",
    "CheckError",
    "TinyModel",
    "block_problem",
    "check_block_mitigator",
    "check_family",
    "check_format",
    "check_kernel",
    "check_mitigator",
    "check_model_mitigator",
    "check_retargeter",
    "check_transform",
    "correlated_problem",
    "double_precision",
    "exact_logits",
    "family_configs",
    "model_problem",
    "plan_of",
    "save_tiny_model",
    "tiny_config",
    "tiny_model",
    "two_stream_problem",
]
