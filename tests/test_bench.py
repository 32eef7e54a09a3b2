"""The benchmark of solvers runs every method that it names; how long one takes is no test."""

from __future__ import annotations

import pytest

from qtool.builtin.mitigators.rtn import loss_report, round_nearest
from qtool.engine.problem import Mitigator, Retargeter
from qtool.errors import UsageError
from qtool.plugins import Plugins
from tests.bench.solvers import FIRST, solver

PLUGINS = Plugins.discover()
SIZE = (128, 256)


@pytest.mark.parametrize("name", [FIRST, *sorted(PLUGINS.offers["mitigators"])])
def test_every_method_that_sees_one_layer_runs(name: str) -> None:
    method = PLUGINS.load("mitigators", name.partition(",")[0])
    if isinstance(method, Mitigator):
        report = solver(name, *SIZE)().report
        assert report["loss"] == report["loss_rtn"] if name == "rtn" else report["loss"] < report["loss_rtn"]
    elif isinstance(method, Retargeter):
        aimed = solver(name, *SIZE)()
        after = loss_report(aimed, round_nearest(aimed).weight(aimed.grid), None)["loss"]
        assert aimed.report["target_alpha"] > 0
        assert after < aimed.report["loss_before"]
    else:
        with pytest.raises(UsageError, match="sees more than a layer"):
            solver(name, *SIZE)
