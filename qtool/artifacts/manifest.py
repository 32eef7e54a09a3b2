"""The manifest: what an artifact is, what it was made from and by what, as canonical JSON beside its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from qtool.artifacts.identity import artifact_id, canonical_json, digest_json, step_key
from qtool.errors import ArtifactError

SCHEMA = 1
Kind = Literal["statistics", "plan", "quantized", "checkpoint", "metrics"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Step:
    """The step that made an artifact: ``name`` is the subcommand, ``provider`` the distribution of the method."""

    name: str
    method: str
    version: int
    provider: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """An artifact or model that went into another: its id, and where it was last seen."""

    id: str
    path: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        kind: What the tensors are.
        step: What made them.
        inputs: Role (``model``, ``statistics``, ``plan``, ``quantized``, …) to the input.
        subject: Id of the original model that the artifact speaks of.
        family: Name of the model's family.
        schemes: ``ModelScheme`` as JSON, empty where nothing is quantized.
        details: What only this kind has (a plan's operators, a metric's protocol); part of the key only through
            the step's config.
        counters: What was not as usual: fallbacks, raised dampings, dead columns, tokens to an expert.
        about: When, where and how: never part of the identity.
        tensors: SHA-256 of every tensor by name; filled in when the artifact is written.
        key: What was asked. Follows from step, inputs and subject.
        id: What came out. Follows from key and tensors.
    """

    kind: Kind
    step: Step
    inputs: Mapping[str, Input]
    subject: str
    family: str
    schemes: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        """What was asked: 64 hex digits, known before the work starts."""
        step = {k: v for k, v in asdict(self.step).items() if k != "provider"}
        return step_key(step, {role: i.id for role, i in self.inputs.items()}, self.subject)

    @property
    def id(self) -> str:
        """What came out: 64 hex digits."""
        return artifact_id(self.key, self.tensors)

    def with_tensors(self, tensors: Mapping[str, str]) -> Manifest:
        """Return the manifest of a finished artifact with these tensor digests."""
        return replace(self, tensors=dict(tensors))

    def to_text(self) -> str:
        """Return the canonical JSON text: every field, key and id, and a checksum of them all."""
        content = json.loads(canonical_json(asdict(self) | {"key": self.key, "id": self.id}))
        return canonical_json(content | {"checksum": digest_json(content)})


def read_manifest(text: str, *, path: str) -> Manifest:
    """Read and check a manifest.

    Args:
        text: What ``Manifest.to_text`` wrote.
        path: Where it was found, for messages.

    Returns:
        The manifest; its stored checksum, key and id agree with its content.

    Raises:
        ArtifactError: The text is no manifest, is of a newer schema or an unknown kind, or was altered.
    """
    try:
        data = json.loads(text)
        schema = int(data["schema"])
        if schema > SCHEMA:
            raise ArtifactError(
                f"`{path}` was written by a newer qtool",
                facts=(("schema read by this version", SCHEMA), ("schema of the artifact", schema)),
                hint="pip install --upgrade qtool",
            )
        if data["kind"] not in KINDS:
            raise ArtifactError(
                f"`{path}` is of an unknown kind",
                facts=(("known", ", ".join(KINDS)), ("found", data["kind"])),
                hint="pip install --upgrade qtool",
            )
        stated = {name: data.pop(name) for name in ("checksum", "key", "id")}
        checksum = digest_json(data | {"key": stated["key"], "id": stated["id"]})
        data["step"] = Step(**data["step"])
        data["inputs"] = {role: Input(**value) for role, value in data["inputs"].items()}
        manifest = Manifest(**data)
        found = {"checksum": checksum, "key": manifest.key, "id": manifest.id}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"`{path}` has a manifest that cannot be read",
            facts=(("reason", error),),
            hint="make the artifact again with the step that wrote it",
        ) from error
    for name, value in found.items():
        if value != stated[name]:
            raise ArtifactError(
                f"the manifest of `{path}` was changed after it was written",
                facts=((f"{name} that its content gives", value), (f"{name} that it states", stated[name])),
                hint="make the artifact again with the step that wrote it",
            )
    return manifest


def require_kind(manifest: Manifest, *kinds: Kind, path: str) -> None:
    """Refuse an artifact of another kind than a step takes.

    Raises:
        ArtifactError: ``manifest.kind`` is none of ``kinds``.
    """
    if manifest.kind not in kinds:
        makers = {"statistics": "calibrate", "plan": "transform", "quantized": "mitigate", "checkpoint": "pack"}
        maker = makers.get(kinds[0], "eval")
        raise ArtifactError(
            f"`{path}` is of the wrong kind",
            facts=(("expected", " or ".join(kinds)), ("received", manifest.kind)),
            hint=f"qtool {maker} --help",
        )
