"""The hooks through which everything joins qtool: built-ins and strangers' plugins alike.

A plugin is a distribution with an entry point in the group ``qtool`` that names a module (or object) holding functions
marked with ``qtool.hookimpl``. Hooks are called once, when qtool first needs a name; they return cheap ``Entry``
records, and a record's target is imported only when it is used, so that ``qtool --help`` never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import typer

    from qtool.scheme import Preset

GROUP = "qtool"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True)
class Entry:
    """One thing that a plugin offers.

    Attributes:
        name: What users type, with dashes.
        target: ``package.module:Object``. A class is instantiated without arguments; anything else is used as it is.
        summary: One line for ``qtool plugins``.
        others: What is the same, or this with other options, under the names that papers give it, and what to type for
            it: users who type such a name are told.
    """

    name: str
    target: str
    summary: str
    others: Mapping[str, str] = field(default_factory=dict)


@hookspec
def register_transforms() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer transforms: objects with ``plan`` (see ``qtool.model.plan.Transform``)."""


@hookspec
def register_mitigators() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer mitigators: objects with ``quantize`` (see ``qtool.engine.problem.Mitigator``)."""


@hookspec
def register_formats() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer number formats (see ``qtool.scheme.Format``)."""


@hookspec
def register_presets() -> Sequence[Preset]:  # type: ignore[empty-body]
    """Offer names for model schemes, such as ``W4A16``; returned whole, since they are plain data."""


@hookspec
def register_exporters() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer exporters: quantized artifact to a checkpoint (see ``qtool.engine.exporter.Exporter``).

    One that reads checkpoints of its layout too is a ``PackedReader`` beside it.
    """


@hookspec
def register_metrics() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer metrics of an executable model (see ``qtool.engine.metric.Metric``)."""


@hookspec
def register_statistics() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer statistics of a site's input, gathered by calibrate (see ``qtool.engine.gather.Statistic``).

    Beside it there are ``GradientStatistic``, of the loss's gradients at the outputs of a linear, and what ``mitigate``
    gathers for methods that need it: ``GuidedStatistic`` of inputs weighed by them, and ``PairedStatistic`` of inputs
    beside those in full precision.
    """


@hookspec
def register_families() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer families of models, as data (see ``qtool.model.family.Family``)."""


@hookspec
def register_models() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer models that can be named and fetched (see ``qtool.model.source.NamedModel``)."""


@hookspec
def register_datasets() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer texts that can be named (see ``qtool.model.text.Dataset``)."""


@hookspec
def register_kernels() -> Sequence[Entry]:  # type: ignore[empty-body]
    """Offer fast implementations of numerics' operations (see ``qtool.kernels.kernel.Kernel``)."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add subcommands to the command line; called while the command line is built, so import nothing heavy.

    Args:
        app: The Typer application, with qtool's own commands already on it.
    """
