"""What was measured, one value each, with everything that a fair table must know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qtool.artifacts.identity import digest_json
from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact
from qtool.steps.intervals import standard_error
from qtool.steps.labels import FULL

EMULATED = ("fake-quantized", "16 bits")
_BETTER: Mapping[str, Literal["lower", "higher"]] = {
    "perplexity": "lower",
    "word_perplexity": "lower",
    "kl": "lower",
    "top1": "higher",
    "acc": "higher",
    "acc_norm": "higher",
    "exact_match": "higher",
}
_LOSSES = {"perplexity": "nll", "reference_perplexity": "reference_nll"}


@dataclass(frozen=True)
class Measurement:
    """One value of one metrics artifact.

    Attributes:
        metric: Name such as ``perplexity/wikitext2``.
        value: What was measured.
        stderr: Standard error over the windows or items behind the value; None where it is not known.
        samples: How many windows or items these are.
        labels: What was measured; see ``qtool.steps.labels``.
        protocol: How it was measured; values that differ here must not be compared.
        bits: Stored bits per weight, of the linears and of the whole model.
        reference: Whether nothing is quantized, so that the value belongs to every scheme.
        subject: Digest of what was executed: two measurements of one subject differ in their protocol only.
        path: The artifact's file.
        id: The artifact's id.
    """

    metric: str
    value: float
    stderr: float | None = None
    samples: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    protocol: Mapping[str, str] = field(default_factory=dict)
    bits: Mapping[str, float] = field(default_factory=dict)
    reference: bool = False
    subject: str = ""
    path: str = ""
    id: str = ""

    def label(self, name: str) -> str:
        """Return a label, or a fact of the protocol; empty where it has none of this name."""
        return self.labels.get(name, self.protocol.get(name, ""))

    @property
    def executed(self) -> str:
        """What a consumer of a checkpoint executed, in words; empty where qtool emulated exactly the scheme."""
        text = self.label("executed")
        return "" if text.startswith(EMULATED) else text


def better(metric: str) -> Literal["lower", "higher", ""]:
    """Return which values of a metric are better, or nothing where that is not known."""
    return _BETTER.get(metric.partition("/")[0].partition(",")[0], "")


def rank(metric: str) -> tuple[int, str]:
    """Return where a metric stands among others: those that this module knows in its order, then all others by name."""
    kind = metric.partition("/")[0].partition(",")[0]
    return (list(_BETTER).index(kind) if kind in _BETTER else len(_BETTER), metric)


def measurements_of(artifact: Artifact) -> Iterator[Measurement]:
    """Yield every value of a metrics artifact."""
    manifest = artifact.manifest
    labels = {name: str(text) for name, text in manifest.details["labels"].items()}
    for metric, value in manifest.details["values"].items():
        stderr, samples = _spread(artifact, metric, value)
        yield Measurement(
            metric=metric,
            value=value,
            stderr=stderr,
            samples=samples,
            labels=labels,
            protocol=protocol_of(metric, manifest),
            bits=manifest.details["bits"],
            reference=labels.get("mitigator") == FULL,
            subject=digest_json({role: one.id for role, one in manifest.inputs.items()}),
            path=str(artifact.path),
            id=manifest.id,
        )


def protocol_of(metric: str, manifest: Manifest) -> dict[str, str]:
    """Return how a value was measured, as text by name; the text's digest stands for its content and its cutting."""
    config, data = manifest.step.config, metric.partition("/")[2]
    if data in config["texts"]:
        text = config["texts"][data]
        facts = {"windows": text["windows"], "seq_len": config["seq_len"], "text": text["tokens_digest"][:12]}
    else:
        facts = {"limit": config["limit"] or "none"}
    version = config["metrics"].get("perplexity" if data in config["texts"] else "tasks", 0)
    return {name: str(fact) for name, fact in {**facts, "dtype": config["dtype"], "metric_version": version}.items()}


def _spread(artifact: Artifact, metric: str, value: float) -> tuple[float | None, int]:
    """Return the standard error over windows or items, and their number, from the values that the artifact keeps.

    Perplexity is the exponential of a mean, so its error is that of the mean times the perplexity.
    """
    kind, slash, data = metric.partition("/")
    name = f"{_LOSSES.get(kind, kind)}{slash}{data}"
    if name not in artifact.header.slots:
        return None, 0
    values = artifact.tensor(name).double()
    means = values.flatten(1).mean(1) if values.ndim > 1 else values.flatten()
    if len(means) < 2:
        return None, len(means)
    error = standard_error(means.tolist())
    return (error * value if kind in _LOSSES else error), len(means)
