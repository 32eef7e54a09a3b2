"""Benchmark data in a local folder, in place of the hub's: one folder a data set, one JSONL file a split.

A task of the lm-evaluation-harness names the data set, the splits and the fields that it reads. Here each data set is
given its folder; the task's own configuration is included and only told to read ``<folder>/<split>.jsonl`` (or
``.jsonl.gz``), so prompts, choices and metrics stay the harness's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.artifacts.identity import digest_file, digest_json
from qtool.errors import DataError

FOLDERS = {
    ("ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("ai2_arc", "ARC-Easy"): "arc_easy",
    ("glue", "sst2"): "sst2",
    ("gsm8k", "main"): "gsm8k",
    ("hellaswag", None): "hellaswag",
    ("lambada_openai", "default"): "lambada_openai",
    ("math_qa", None): "mathqa",
    ("piqa", None): "piqa",
    ("super_glue", "boolq"): "boolq",
    ("truthful_qa", "multiple_choice"): "truthfulqa_mc",
    ("winogrande", "winogrande_xl"): "winogrande",
}
"""Folder of each data set, by its name on the hub without the owner and by its configuration."""

SUFFIXES = (".jsonl", ".jsonl.gz")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


@dataclass(frozen=True)
class LocalData:
    """What a task reads from a local folder.

    Attributes:
        folder: The data set's folder, relative to the one that users name.
        files: Split to file; every split that the task needs, and those it may use that are there.
        splits: The task's split options with the ones that are absent taken out.
    """

    folder: str
    files: Mapping[str, Path]
    splits: Mapping[str, str | None]

    @property
    def source(self) -> str:
        """Say what was read, by name and content."""
        digest = digest_json({split: digest_file(path) for split, path in self.files.items()})
        return f"{self.folder} ({', '.join(self.files)}) sha256:{digest}"

    def write_config(self, original: Path, path: Path, *, cache: Path) -> None:
        """Write a task configuration that includes the original and reads these files.

        Args:
            original: The harness's configuration of the task.
            path: Where the new one goes.
            cache: Folder for the tables that are made of the files.
        """
        data_files = {split: str(file) for split, file in self.files.items()}
        config = {
            "include": str(original),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files, "cache_dir": str(cache)},
            **self.splits,
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


def redirect(index: Mapping[str, Any], names: Sequence[str], folder: Path, scratch: Path) -> dict[str, str]:
    """Point every task behind some names at local files.

    Args:
        index: The harness's tasks, groups and tags by name; the entries of the tasks are changed.
        names: Tasks, groups and tags.
        folder: Folder that holds the data sets.
        scratch: Folder for configurations and tables; needed as long as the tasks are.

    Returns:
        What each task reads.

    Raises:
        DataError: A task's data is not in the folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder `{folder}`", hint="--task-data FOLDER")
    sources: dict[str, str] = {}
    for task in dict.fromkeys(task for name in names for task in _tasks_of(index, name)):
        entry, config = index[task], scratch / f"{len(sources)}.yaml"
        local = find_local(task, entry.cfg, folder)
        local.write_config(entry.yaml_path, config, cache=scratch / "tables")
        entry.yaml_path = config
        sources[task] = local.source
    return sources


def _tasks_of(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the tasks behind a task, group or tag."""
    entry = index.get(name)
    kind = None if entry is None else entry.kind.name
    if entry is None or kind == "PY_TASK":
        raise DataError(f"task `{name}` cannot read local data", hint="leave out --task-data to read it from the hub")
    if kind == "TASK":
        yield name
        return
    members = sorted(entry.tags) if kind == "TAG" else entry.cfg["task"]
    for member in members:
        yield from _tasks_of(index, member if isinstance(member, str) else member.get("group") or member["task"])


def find_local(task: str, config: Mapping[str, Any], root: Path) -> LocalData:
    """Find the files that a task reads.

    The split that is scored must be there, and the one that examples in the prompt come from if the task has any.

    Args:
        task: Name of the task.
        config: Its configuration.
        root: Folder that holds the data sets.

    Raises:
        DataError: The layout has no place for the task's data set, or a needed file is missing.
    """
    folder = _folder(task, config)
    wanted = {option: config.get(option) for option in SPLITS}
    found = {split: _file(root / folder, split) for split in wanted.values() if split}
    scored = wanted["test_split"] or wanted["validation_split"]
    needed = [scored]
    if config.get("num_fewshot"):
        needed.append(wanted["fewshot_split"] or wanted["training_split"] or wanted["validation_split"])
    for split in needed:
        if split is None or found[split] is None:
            raise DataError(
                f"the data of task `{task}` is not in the folder of local data",
                facts=(("missing", f"{folder}/{split}{SUFFIXES[0]}"), ("folder", root)),
                hint=f"put {folder}/{split}{SUFFIXES[0]} there, or leave out --task-data to read it from the hub",
            )
    files = {split: path for split, path in sorted(found.items()) if path is not None}
    splits = {option: split if split in files else None for option, split in wanted.items() if split}
    return LocalData(folder, files, splits)


def _folder(task: str, config: Mapping[str, Any]) -> str:
    data_set, name = str(config.get("dataset_path")).rpartition("/")[2], config.get("dataset_name")
    if data_set == "mmlu" and name:
        return f"mmlu/{name}"
    if (data_set, name) not in FOLDERS:
        known = (*FOLDERS.values(), "mmlu/<subject>")
        raise DataError(
            f"a folder of local data has no place for the data set of task `{task}`",
            facts=(("data set", f"{config.get('dataset_path')} {name or ''}".strip()), ("places", ", ".join(known))),
            hint="leave out --task-data to read it from the hub",
        )
    return FOLDERS[data_set, name]


def _file(folder: Path, split: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()), None)
