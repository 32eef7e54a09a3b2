"""The shapes in signatures are checked while tests run: the flag that `make test` gives reaches every worker."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from qtool.numerics.hadamard import hadamard_rotate


def test_a_wrong_shape_is_refused_at_the_call(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("run without --jaxtyping-packages, as in `make test`")
    with pytest.raises(TypeCheckError, match="signs"):
        hadamard_rotate(torch.zeros(2, 4), signs=torch.ones(8))


def test_every_protocol_can_be_checked_while_tests_run() -> None:
    package = Path(__file__).parent.parent / "qtool"
    missing = [
        f"{path.name}: {node.name}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).partition("[")[0] == "Protocol" for base in node.bases)
        and "runtime_checkable" not in map(ast.unparse, node.decorator_list)
    ]
    assert not missing, "beartype refuses a protocol without @runtime_checkable in an annotation"
