"""What the tests of exporters do with them."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from qtool.engine.exporter import Exported, Exporter
from qtool.engine.packed import PackedLinear
from qtool.engine.subject import Subject
from qtool.numerics.packing import pack_codes
from qtool.scheme import GroupParameters


def packed(codes: UInt8[Tensor, "out in"], parameters: GroupParameters, bits: int) -> PackedLinear:
    """Return a linear as exporters are given it."""
    return PackedLinear(pack_codes(codes, bits), bits, codes.shape[1], parameters)


def written(exporter: Exporter, subject: Subject, directory: Path) -> Exported:
    """Do what the step does, without the manifest."""
    directory.mkdir()
    exporter.check(subject)
    exported = exporter.write(subject, directory)
    exporter.verify(subject, directory)
    return exported
