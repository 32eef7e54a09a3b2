"""Reading a checkpoint back: its tensors by module, and whether they are those that its consumer's model asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.artifacts.layout import read_header
from qtool.errors import ArtifactError
from qtool.model.source import tensor_files


def empty_model(config: Any, *, trust_remote_code: bool) -> nn.Module:  # noqa: ANN401 - each family has its config
    """Build the model of a config without its weights."""
    with init_empty_weights(include_buffers=False):
        module: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    return module


class CheckpointReader:
    """Reads the tensors of a checkpoint by the module that they belong to.

    Args:
        directory: The checkpoint.

    Raises:
        ArtifactError: It holds no weights, or damaged ones.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = tensor_files(directory)
        self._leaves: dict[str, list[str]] = {}
        for name in self.files:
            module, _, leaf = name.rpartition(".")
            self._leaves.setdefault(module, []).append(leaf)

    def module(self, name: str) -> dict[str, Tensor]:
        """Return a module's own tensors, keyed by the last part of their names."""
        tensors = {}
        for leaf in self._leaves.get(name, ()):
            with safe_open(str(self.files[f"{name}.{leaf}"]), framework="pt") as file:
                tensors[leaf] = file.get_tensor(f"{name}.{leaf}")
        return tensors

    def compare(self, module: nn.Module, *, any_shape: str = "") -> None:
        """Compare names and shapes with those that a model asks for.

        Args:
            module: The model as its consumer builds it, without weights.
            any_shape: Ending of names whose shapes are not compared.

        Raises:
            ArtifactError: A tensor is missing, too many, or of another shape.
        """
        shared = getattr(module, "_tied_weights_keys", None) or ()
        tied = set(shared if getattr(module.config, "tie_word_embeddings", False) else ())
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in tied}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            shapes |= {name: slot.shape for name, slot in read_header(file).slots.items()}
        for name in sorted(wanted.keys() | shapes.keys()):
            free = bool(any_shape) and name.endswith(any_shape) and name in wanted and name in shapes
            if wanted.get(name) != shapes.get(name) and not free:
                raise ArtifactError(
                    f"the checkpoint does not fit the model that transformers builds: `{name}`",
                    facts=(("shape asked for", wanted.get(name, "none")), ("shape written", shapes.get(name, "none"))),
                )
