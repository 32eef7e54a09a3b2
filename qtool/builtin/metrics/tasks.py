"""Tasks of the lm-evaluation-harness (EleutherAI, the extra ``eval``), run in memory on whatever can be executed.

The protocol is that of the survey and of QuaRot: as many examples in the prompt as a task's own configuration says
(none where it says nothing), and one request at a time, so that no padding reaches a dynamic activation scale. The
average is the plain mean over the tasks that were asked for, a group counting once, of ``acc_norm`` where a task has
it. Left out: tasks that run code that the model wrote, and tasks with images or sound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifacts.identity import digest_bytes
from qtool.builtin.metrics.harness import BATCH, Harness, quiet
from qtool.builtin.metrics.task_data import redirect
from qtool.engine.metric import Evaluation, Measured

PREFERRED = ("acc_norm", "acc", "exact_match")


class Tasks:
    """Measures ``<metric>/<task>`` for tasks and groups, and ``tasks/average``.

    A metric of a task with several ways to extract the answer is called ``<metric>-<way>``. Tensors are
    ``items/<task>/<metric>``, one value for each document in their order, where the metric is a number.
    """

    version = 1

    def measure(self, evaluation: Evaluation) -> Measured:
        """Run the tasks on the whole model.

        Raises:
            UsageError: A task is unknown, asked for twice or cannot be run here.
            DataError: A task's data is neither local nor to be had from the hub.
            ModelError: The tokenizer lacks a token that the harness needs.
            PluginError: The harness, or a package that a task needs, is not installed.
        """
        names, limit = tuple(dict.fromkeys(evaluation.options["tasks"])), evaluation.options.get("limit")
        folder: Path | None = evaluation.options.get("task_data")
        with tempfile.TemporaryDirectory() as scratch, quiet() as heard:
            harness = Harness.load()
            manager = harness.find(names)
            sources = redirect(manager.task_index, names, folder, Path(scratch)) if folder is not None else {}
            loaded = harness.open(manager, names, local=folder is not None)
            model = harness.wrap(evaluation)
            results = harness.run(model, loaded, limit)
        return _measured(names, loaded, results, sources, {"limit": limit, "truncated_inputs": heard.truncated})


def _measured(
    names: Sequence[str],
    loaded: Mapping[str, Any],
    results: Mapping[str, Any],
    sources: Mapping[str, str],
    details: Mapping[str, Any],
) -> Measured:
    """Gather headline values, per-item values and facts from what the harness returned."""
    scores = {name: _scores(metrics) for name, metrics in results["results"].items()}
    values = {f"{metric}/{name}": value for name, found in scores.items() for metric, value in found.items()}
    average = {name: chosen for name in _counted(names, loaded, scores) if (chosen := _preferred(scores[name]))}
    if average:
        values["tasks/average"] = sum(scores[name][metric] for name, metric in average.items()) / len(average)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, samples in results["samples"].items():
        tensors |= {f"items/{name}/{metric}": items for metric, items in _items(samples).items()}
        config = loaded["tasks"][name].config
        facts[name] = {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"][name],
            "items": results["n-samples"][name]["effective"],
            "items_of_task": results["n-samples"][name]["original"],
            "source": sources.get(name, f"hub:{config.dataset_path} {config.dataset_name or ''}".strip()),
            "items_digest": _digest(samples),
        }
    details = {**details, "lm_eval": version("lm_eval"), "batch_size": BATCH, "average": average, "tasks": facts}
    return Measured(values, tensors, details)


def _spelled(metric: str, way: str) -> str:
    return metric if way == "none" else f"{metric}-{way}"


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return a task's or group's scores; the harness's keys are ``<metric>,<way to extract the answer>``."""
    scores = {}
    for key, value in metrics.items():
        metric, comma, way = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            scores[_spelled(metric, way)] = float(value)
    return scores


def _counted(names: Sequence[str], loaded: Mapping[str, Any], scores: Mapping[str, Any]) -> list[str]:
    """Return what the average runs over: groups that have a score of their own, and the tasks of no such group."""
    groups = [name for name in names if name in loaded["groups"] and scores.get(name)]
    inside = {task.task_name for name in groups for task in loaded["groups"][name].get_all_tasks()}
    return [*groups, *(name for name in loaded["tasks"] if name not in inside)]


def _preferred(scores: Mapping[str, float]) -> str | None:
    """Return the metric that stands for a task in the average: its first of the kind that is preferred most."""
    return next((name for kind in PREFERRED for name in scores if name == kind or name.startswith(f"{kind}-")), None)


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the values of each document by metric, leaving out metrics whose items are not numbers."""
    items: dict[str, list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            items.setdefault(_spelled(metric, sample["filter"]), []).append(sample[metric])
    return {
        name: torch.tensor([float(value) for value in found], dtype=torch.float32)
        for name, found in items.items()
        if all(isinstance(value, Real) for value in found)
    }


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of every document with its prompt and answer: equal ones make two results comparable."""
    ordered = sorted(samples, key=lambda sample: (str(sample["filter"]), int(sample["doc_id"])))
    hashes = (f"{sample['doc_hash']}{sample['prompt_hash']}{sample['target_hash']}" for sample in ordered)
    return digest_bytes(text.encode() for text in hashes)
