"""The lm-evaluation-harness as qtool uses it: imported late, kept silent, its mistakes told in one sentence."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qtool.engine.metric import Evaluation
from qtool.errors import DataError, ModelError, PluginError, ResourceError, UsageError

BATCH = 1
RANDOM_SEED, SEED = 0, 1234  # the harness's own, so that drawn examples are those of other reports
LOGGERS = ("datasets", "evaluate", "huggingface_hub", "transformers")
USUAL = (
    *("arc", "glue/sst2", "gsm8k", "hellaswag", "lambada", "mathqa", "mmlu/default", "piqa", "super_glue/boolq"),
    *("truthfulqa", "winogrande"),
)
"""Folders of the harness that are searched first: to read all of its 14,000 configurations takes many seconds."""


class Heard(logging.Handler):
    """Hears the harness's warnings and counts the inputs that it cut because they exceed the model's context."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a warning that speaks of truncation."""
        self.truncated += "truncat" in record.getMessage().lower()


@contextmanager
def quiet() -> Iterator[Heard]:
    """Seed the generators of the process, keep libraries silent, and put everything back at the end.

    Nothing reaches standard output. Progress bars reach standard error where it is a terminal.
    """
    heard, harness = Heard(), logging.getLogger("lm_eval")
    others = [logging.getLogger(name) for name in LOGGERS]
    before = harness.propagate, [logger.level for logger in others], random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        warnings.simplefilter("ignore")
        harness.propagate = False
        harness.addHandler(heard)
        for logger in others:
            logger.setLevel(logging.ERROR)
        random.seed(RANDOM_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield heard
        finally:
            harness.removeHandler(heard)
            harness.propagate, levels, state, np_state = before
            for logger, level in zip(others, levels, strict=True):
                logger.setLevel(level)
            random.setstate(state)
            np.random.set_state(np_state)


@dataclass(frozen=True)
class Harness:
    """The modules of the lm-evaluation-harness, imported when tasks are asked for."""

    top: ModuleType
    tasks: ModuleType
    models: ModuleType

    @classmethod
    def load(cls) -> Harness:
        """Import the harness.

        Raises:
            PluginError: It is not installed.
        """
        try:
            return cls(*map(importlib.import_module, ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")))
        except ImportError as error:
            raise PluginError(
                "the lm-evaluation-harness is not installed",
                facts=(("reason", error),),
                hint="pip install 'qtool[eval]'",
            ) from error

    def find(self, names: Sequence[str]) -> Any:  # noqa: ANN401 - the harness's TaskManager
        """Return a task manager that knows all the names.

        Raises:
            UsageError: There is no such task; names the nearest ones.
        """
        root = Path(str(self.tasks.__file__)).parent
        manager = self.tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in USUAL])
        index = manager.task_index
        # A tag gathers tasks from every folder, so it is looked up in all of them.
        if all(name in index and index[name].kind.name != "TAG" for name in names):
            return manager
        manager = self.tasks.TaskManager()
        for name in names:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, n=5)
                raise UsageError(
                    f"the lm-evaluation-harness {version('lm_eval')} has no task `{name}`",
                    facts=(("nearest", ", ".join(near)),) if near else (),
                    hint=f"--tasks {near[0]}" if near else "lm-eval ls tasks",
                )
        return manager

    def open(self, manager: Any, names: Sequence[str], *, local: bool) -> Any:  # noqa: ANN401 - the harness's TaskDict
        """Load the tasks' data.

        Raises:
            UsageError: Two of the names hold the same task, or one cannot be run here.
            DataError: Data cannot be had, or does not fit the task.
            ResourceError: The hub that has the data cannot be reached.
            PluginError: A task needs a package that is not installed.
        """
        errors = importlib.import_module("datasets.exceptions").DatasetsError
        template_errors = importlib.import_module("jinja2").TemplateError
        parts: list[Any] = []
        for name in names:
            try:
                found = manager.load([name])
            except ImportError as error:
                reason = (("reason", error),)
                raise PluginError(f"task `{name}` needs a package that is not installed", facts=reason) from error
            except (OSError, ValueError, LookupError, TypeError, AttributeError, errors, template_errors) as error:
                raise _unusable(name, error, local=local) from error
            parts.extend([found["groups"][name]] if name in found["groups"] else found["tasks"].values())
        try:
            loaded = manager.load(parts)
        except ValueError as error:
            raise UsageError("a task is asked for twice", facts=(("reason", error),)) from error
        for name, task in loaded["tasks"].items():
            _refuse(name, task)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def wrap(self, evaluation: Evaluation) -> Any:  # noqa: ANN401 - the harness's HFLM
        """Return the model as the harness runs it.

        Raises:
            ModelError: The tokenizer has neither a first nor a last token.
        """
        tokenizer = deepcopy(evaluation.tokenizer)  # the harness adds a padding token
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has neither a begin-of-text nor an end-of-text token, and tasks need one",
                hint="set eos_token in the model's tokenizer_config.json",
            )
        whole = evaluation.subject.whole()
        return self.models.HFLM(pretrained=whole, backend="causal", tokenizer=tokenizer, batch_size=BATCH)

    def run(self, model: Any, loaded: Any, limit: int | None) -> Mapping[str, Any]:  # noqa: ANN401 - the harness's types
        """Run every request and score every document."""
        results: Mapping[str, Any] = self.top.evaluate(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True
        )
        return results


def _unusable(name: str, error: Exception, *, local: bool) -> DataError | ResourceError:
    facts = (("reason", f"{type(error).__name__}: {str(error).strip()[:300]}"),)
    if local:
        return DataError(f"the local data of task `{name}` does not fit it", facts=facts, hint="--task-data FOLDER")
    kind = ResourceError if isinstance(error, ConnectionError) else DataError
    return kind(f"cannot get the data of task `{name}` from the hub", facts=facts, hint="--task-data FOLDER")


def _refuse(name: str, task: Any) -> None:  # noqa: ANN401 - the harness's Task
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task `{name}` runs code that the model wrote, which qtool does not")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task `{name}` is not about text alone")
