"""Lets the checks of all transforms share their tiny models, which are never changed, and what those compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from torch import Tensor

from qtool.engine.subject import Subject
from qtool.plugins import Plugins
from qtool.testing import TinyModel, exact_logits, transforms
from qtool.testing.tiny_models import tiny_model_of


@pytest.fixture(scope="session", autouse=True)
def made_once() -> Iterator[None]:
    """Let ``check_transform`` find a model of a config that was made before, and its logits without a transform."""
    made: dict[str, TinyModel] = {}
    logits: dict[str, Tensor] = {}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def kept(config: Any, plugins: Plugins, *, loader: str) -> Iterator[TinyModel]:  # noqa: ANN401 - see tiny_config
            key = f"{loader} {config.to_json_string(use_diff=False)}"
            if key not in made:
                made[key] = stack.enter_context(tiny_model_of(config, plugins, loader=loader))
            yield made[key]

        def exact(subject: Subject) -> Tensor:
            if not subject.plan.empty:
                return exact_logits(subject)
            if subject.model.id not in logits:
                logits[subject.model.id] = exact_logits(subject)
            return logits[subject.model.id]

        patch.setattr(transforms, "tiny_model_of", kept)
        patch.setattr(transforms, "exact_logits", exact)
        yield
