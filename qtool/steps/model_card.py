"""The README.md of a checkpoint: what it is, what made it, what was measured of it, and who executes what."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import ArtifactError
from qtool.scheme import VECTORS
from qtool.steps.measurement import Measurement, measurements_of
from qtool.steps.workspace import Workspace

CARD = "README.md"
_MEASURED = "## What was measured"
_RECIPE = ("transform", "mitigator", *VECTORS, "calibration", "token_weight", "seed", "settings")


def model_card(checkpoint: Manifest, makers: Sequence[Manifest], measured: str) -> str:
    """Return the text of the card, which the hub understands.

    Args:
        checkpoint: The finished checkpoint.
        makers: What it was made from, the first step first.
        measured: The section of what was measured.
    """
    labels, bits = checkpoint.details["labels"], checkpoint.details["bits"]
    name, scheme = labels["model"], labels["scheme"]
    size = f"{bits['linears']:.3f} bits a weight in the linears of its blocks, {bits['model']:.3f} in the whole model"
    made = {label: labels[label] for label in _RECIPE if labels.get(label)}
    sections = [
        f"---\ntags: [qtool, {checkpoint.step.method}]\n---",
        f"# {name}, quantized to {scheme}\n\n{size}, as stored. Read back with {checkpoint.details['read_back_with']}.",
        _table("What was done", ("", ""), made.items()),
        _table("What executes it", ("with", "runs as"), checkpoint.details["consumers"].items()),
        measured,
        f"## How it was made\n\nBy {checkpoint.step.provider}; in a pipeline, where a command names no input. "
        "Of absolute paths the last name is left.",
        "```\n" + "\n".join(_commands([*makers, checkpoint])) + "\n```",
    ]
    if "footnote" in labels:
        sections.append(labels["footnote"])
    return "\n\n".join(section for section in sections if section) + "\n"


def measurements_about(artifact: Artifact, workspace: Workspace) -> list[Measurement]:
    """Return what was measured of an artifact, as far as it lies beside it or in the home folder."""
    found: dict[str, list[Measurement]] = {}
    for folder in dict.fromkeys((artifact.path.parent, workspace.home)):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                other = open_artifact(path)
            except ArtifactError:
                continue
            about = {one.id for one in other.manifest.inputs.values()}
            if other.manifest.kind == "metrics" and artifact.manifest.id in about:
                found[other.manifest.id] = list(measurements_of(other))
    return [one for measured in found.values() for one in measured]


def measured_section(source: Artifact | None, checkpoint: Artifact, workspace: Workspace) -> str:
    """Return the section of the card on what was measured, of what was packed and of the checkpoint itself.

    Args:
        source: What was packed; None for a checkpoint of another tool.
        checkpoint: The finished checkpoint.
        workspace: Where evaluations are looked for, beside the folders of both.
    """
    subjects = (("what was packed", source), ("the checkpoint", checkpoint))
    rows = [
        (one.metric, _value(one), subject, _written(one.protocol))
        for subject, artifact in subjects
        if artifact is not None
        for one in measurements_about(artifact, workspace)
    ]
    if not rows:
        return f"{_MEASURED}\n\nNothing: no evaluation of it was found beside it."
    table = tabulate(rows, headers=("metric", "value", "of", "protocol"), tablefmt="github", disable_numparse=True)
    note = (
        "By qtool; what was packed is fake-quantized, the checkpoint loaded by transformers. ± is the standard error."
    )
    return f"{_MEASURED}\n\n{table}\n\n{note}"


def with_measured(card: str, section: str) -> str:
    """Return a card in which this section stands in place of its own; one that has none stays as it is."""
    before, heading, rest = card.partition(_MEASURED)
    _, following, after = rest.partition("\n\n## ")
    return f"{before}{section}{following}{after}" if heading and following else card


def _value(one: Measurement) -> str:
    return f"{one.value:.4g}" + ("" if one.stderr is None else f" ± {one.stderr:.2g}")


def _written(protocol: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {fact}" for name, fact in protocol.items())


def _table(title: str, headers: Sequence[str], rows: Iterable[tuple[object, ...]]) -> str:
    return f"## {title}\n\n{tabulate(list(rows), headers=headers, tablefmt='github', disable_numparse=True)}"


def _commands(made: Iterable[Manifest]) -> Iterator[str]:
    """Yield the command of each step; of what a recipe ran its command, of what was no command what it was."""
    recipes = set[str]()
    for manifest in made:
        argv = [_named(str(word)) for word in manifest.about.get("argv", ())]
        if argv and argv[0] == "qtool" and argv[1:2] == [manifest.step.name]:
            yield shlex.join(argv)
        elif argv[:2] == ["qtool", "run"]:
            if (command := shlex.join(argv)) not in recipes:
                yield command
            recipes.add(command)
        else:
            yield f"# {manifest.step.name} {manifest.step.method}, from Python"


def _named(word: str) -> str:
    """Return a word of a command with the last name of a path that begins at the root: folders tell of people."""
    option, sign, path = word.rpartition("=")
    return f"{option}{sign}{Path(path).name}" if path.startswith("/") else word
