"""The shapes in signatures are checked while tests run: the flag that `make test` gives reaches every worker."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from qtool.numerics.hadamard import hadamard_rotate


def test_a_wrong_shape_is_refused_at_the_call(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("run without --jaxtyping-packages=qtool,beartype.beartype")
    with pytest.raises(TypeCheckError, match="signs"):
        hadamard_rotate(torch.zeros(2, 4), signs=torch.ones(8))
