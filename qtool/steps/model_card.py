"""The README.md of a checkpoint: what it is, what made it, what was measured of it, and who executes what."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tabulate import tabulate

from qtool.artifacts.manifest import Manifest
from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import ArtifactError
from qtool.steps.measurement import Measurement, measurements_of
from qtool.steps.workspace import Workspace

CARD = "README.md"
_RECIPE = ("transform", "mitigator", "weights", "activations", "kv", "calibration", "token_weight", "seed", "settings")


def model_card(checkpoint: Manifest, makers: Sequence[Manifest], measured: Iterable[Measurement]) -> str:
    """Return the text of the card, which the hub understands.

    Args:
        checkpoint: The finished checkpoint.
        makers: What it was made from, the first step first.
        measured: What was measured of the artifact that was packed.
    """
    labels, bits = checkpoint.details["labels"], checkpoint.details["bits"]
    name, scheme = labels["model"], labels["scheme"]
    size = f"{bits['linears']:.3f} bits a weight in the linears of its blocks, {bits['model']:.3f} in the whole model"
    made = {label: labels[label] for label in _RECIPE if labels.get(label)}
    sections = [
        f"---\ntags: [qtool, {checkpoint.step.method}]\n---",
        f"# {name}, quantized to {scheme}\n\n{size}, as stored.",
        _table("What was done", ("", ""), made.items()),
        _table("What executes it", ("with", "runs as"), checkpoint.details["consumers"].items()),
        _measured(measured),
        f"## How it was made\n\nBy {checkpoint.step.provider}; in a pipeline, where a command names no input.",
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


def _measured(measured: Iterable[Measurement]) -> str:
    rows = []
    for one in measured:
        error = "" if one.stderr is None else f" ± {one.stderr:.2g}"
        rows.append((one.metric, f"{one.value:.4g}{error}", _written(one.protocol)))
    if not rows:
        return "## What was measured\n\nNothing: no evaluation of it was found beside it."
    note = "By qtool, on the fake-quantized model that this checkpoint was packed from; ± is the standard error."
    return f"{_table('What was measured', ('metric', 'value', 'protocol'), rows)}\n\n{note}"


def _written(protocol: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {fact}" for name, fact in protocol.items())


def _table(title: str, headers: Sequence[str], rows: Iterable[tuple[object, ...]]) -> str:
    return f"## {title}\n\n{tabulate(list(rows), headers=headers, tablefmt='github', disable_numparse=True)}"


def _commands(made: Iterable[Manifest]) -> Iterator[str]:
    """Yield the command of each step; of what a recipe ran its command, of what was no command what it was."""
    recipes = set[str]()
    for manifest in made:
        argv = [str(word) for word in manifest.about.get("argv", ())]
        if argv and argv[0] == "qtool" and argv[1:2] == [manifest.step.name]:
            yield shlex.join(argv)
        elif argv[:2] == ["qtool", "run"]:
            if (command := shlex.join(argv)) not in recipes:
                yield command
            recipes.add(command)
        else:
            yield f"# {manifest.step.name} {manifest.step.method}, from Python"
