from __future__ import annotations

import torch
from torch import Tensor

from qtool.engine.linear import SiteInput


def test_remembered_inputs_are_never_stale() -> None:
    site, calls = SiteInput(), list[Tensor]()
    site.observer, site.readers = calls.append, 3
    x = torch.ones(2, 3)
    assert site(x) is site(x)
    assert len(calls) == 1
    site(torch.ones(2, 3))
    assert len(calls) == 2, "equal values in another tensor are another input"
    site(x)
    x.mul_(2)
    site(x)
    assert len(calls) == 4, "a tensor that was written to is another input"
    assert calls[-1].equal(torch.full((2, 3), 2.0))
    with torch.inference_mode():
        x = torch.ones(2, 3)
        site(x)
        x.mul_(2)
        site(x)
    assert len(calls) == 6, "writes cannot be seen in inference mode"
