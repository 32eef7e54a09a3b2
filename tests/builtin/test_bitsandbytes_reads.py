"""bitsandbytes, whose NF4 it is, reads and writes the same codes and scales.

It is installed into a folder of its own: where transformers finds it, every command imports it.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from qtool.builtin.formats.nf4 import VALUES
from qtool.numerics.groups import from_groups
from qtool.scheme import GroupParameters
from tests.builtin.format_cases import fit, read, values_of

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def functional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return its module of functions."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    command = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        folder,
        "bitsandbytes==0.50.2",
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(folder)
        yield import_module("bitsandbytes.functional")


def bytes_of(codes: torch.Tensor) -> torch.Tensor:
    """Lay codes out as it does, with the first of two in the high nibble."""
    high, low = codes.reshape(-1, 2).T
    return (high << 4 | low).unsqueeze(-1)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_values_have_the_same_scales_and_bytes(functional: Any, size: int) -> None:  # noqa: ANN401 - it has no types
    x = values_of(32, 256)
    form, groups, parameters = fit(f"nf4-g{size}", x)
    stored, state = functional.quantize_4bit(x, quant_type="nf4", blocksize=size)
    assert torch.equal(state.absmax, parameters.scale.flatten())
    assert torch.equal(stored, bytes_of(form.encode(groups, parameters)))
    assert torch.equal(functional.dequantize_4bit(stored, state), from_groups(form.round(groups, parameters), x.shape))


def test_every_code_decodes_to_the_same_value(functional: Any) -> None:  # noqa: ANN401 - as above
    form, _ = read("nf4")
    scale = torch.logspace(-30, 30, 61)
    codes = torch.stack([torch.arange(64).to(torch.uint8).roll(i) % 16 for i in range(len(scale))])
    _, state = functional.quantize_4bit(torch.ones(codes.shape), quant_type="nf4", blocksize=64)
    assert torch.equal(state.code, torch.tensor(VALUES))
    state.absmax = scale
    theirs = functional.dequantize_4bit(bytes_of(codes), state)
    assert torch.equal(theirs, form.decode(codes, GroupParameters(scale)))
