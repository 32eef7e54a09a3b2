"""Where a step works: plugins, folders, device and progress, handed to every step instead of living in globals."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

import qtool
from qtool.artifacts.manifest import Input, Manifest, require_kind
from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import ArtifactError, ModelError, ResourceError, UsageError
from qtool.model.card import read_card
from qtool.model.source import Model, open_model
from qtool.plugins import Plugins

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Shows how far a long step is; the default shows nothing."""

    def __call__(self, items: Iterable[T], *, total: int, label: str) -> Iterable[T]:
        """Yield the items, counting them."""


def silent(items: Iterable[T], *, total: int, label: str) -> Iterable[T]:
    """Yield the items and show nothing."""
    del total, label
    return items


@dataclass(frozen=True)
class Workspace:
    """Everything around a step that is not its request.

    Attributes:
        plugins: What is on offer.
        home: Folder of default outputs.
        cache: Folder of fetched models and digests.
        data: Folder of local datasets, or None.
        device: Where the mathematics runs.
        inputs: Paths that users gave for inputs by role, before looking anywhere else.
        progress: Shows how far a step is.
        warn: Tells the user something on standard error.
        trust_remote_code: Whether code beside a model's weights may run.
    """

    plugins: Plugins
    home: Path
    cache: Path
    data: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inputs: Mapping[str, Path] = field(default_factory=dict)
    progress: Progress = silent
    warn: Callable[[str], None] = lambda message: None
    trust_remote_code: bool = False

    def model(self, reference: str) -> Model:
        """Find a model: a folder, a GGUF file, a name that a plugin offers, or a hub id.

        Raises:
            ModelError: There is no such model.
            ResourceError: It would have to be fetched and the network cannot be reached.
        """
        families = self.plugins.every("families")
        return open_model(self._folder(reference), families, cache=self.cache, trust_remote_code=self.trust_remote_code)

    def _folder(self, reference: str) -> Path:
        path = Path(reference).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.is_file() and path.suffix == ".gguf":
            return self._converted(path)
        if reference in self.plugins.offers["models"]:
            folder: Path = self.plugins.load("models", reference).fetch(self.cache)
            return folder
        if path.exists() or reference.count("/") != 1 or reference.startswith((".", "/", "~")):
            raise ModelError(
                f"no such model `{reference}`",
                facts=(("names", ", ".join(sorted(self.plugins.offers["models"]))),),
                hint="give a folder, a .gguf file, a hub id such as org/model, or one of the names",
            )
        return _from_hub(reference)

    def _converted(self, path: Path) -> Path:
        """Return the folder that a GGUF file was dequantised to, making it once."""
        from qtool.artifacts.identity import digest_file
        from qtool.model.gguf import convert_gguf

        folder = self.cache / "gguf" / digest_file(path)[:16]
        if not (folder / "config.json").is_file():
            convert_gguf(path, folder)
        if footnote := read_card(folder).footnote:
            self.warn(f"`{path}`: {footnote}")
        return folder

    def artifact(self, reference: str | Path, *kinds: str) -> Artifact:
        """Open an artifact and check its kind."""
        path = Path(reference)
        artifact = open_artifact(path)
        require_kind(artifact.manifest, *kinds, path=str(path))  # type: ignore[arg-type]
        return artifact

    def input_of(self, artifact: Artifact, role: str) -> Artifact:
        """Find an artifact that went into another, by its id: where users said, beside it, or in the home folder.

        Raises:
            ArtifactError: It is nowhere; names it and says how to point at it.
        """
        wanted = artifact.manifest.inputs[role]
        for path in self._candidates(artifact, role, wanted):
            try:
                found = open_artifact(path)
            except ArtifactError:
                continue
            if found.manifest.id == wanted.id:
                return found
        raise _missing(artifact, role, wanted)

    def model_of(self, artifact: Artifact) -> Model:
        """Open the model that an artifact speaks of and check that it is that model.

        Raises:
            ArtifactError: The model is gone, or is another one.
        """
        wanted = artifact.manifest.inputs["model"]
        reference = str(self.inputs.get("model", wanted.path))
        try:
            model = self.model(reference)
        except ModelError as error:
            raise _missing(artifact, "model", wanted) from error
        if model.id != wanted.id:
            raise ArtifactError(
                f"`{artifact.path.name}` is about another model",
                facts=(("expected", wanted.id[:12]), (f"`{reference}`", model.id[:12])),
                hint="--input model=PATH of the model that it was made from",
            )
        return model

    @staticmethod
    def named(artifact: Artifact) -> Input:
        """Return how a manifest names an artifact that went into another."""
        return Input(artifact.manifest.id, str(artifact.path.resolve()))

    def _candidates(self, artifact: Artifact, role: str, wanted: Input) -> Iterator[Path]:
        if role in self.inputs:
            yield self.inputs[role]
            return
        yield Path(wanted.path)
        yield artifact.path.parent / Path(wanted.path).name
        for folder in dict.fromkeys((artifact.path.parent, self.home)):
            yield from sorted(folder.glob("*.safetensors"))

    def output(self, manifest: Manifest, chosen: Path | None) -> Path:
        """Return where an artifact goes: the chosen path, or a name that follows from its key.

        Raises:
            UsageError: The chosen name does not end in ``.safetensors``.
        """
        if chosen is not None:
            if chosen.suffix != ".safetensors":
                raise UsageError(
                    f"`{chosen}` does not end in .safetensors", hint=f"-o {chosen.with_suffix('.safetensors')}"
                )
            return chosen.resolve()
        method = manifest.step.method.replace("+", "-") or manifest.kind
        return (self.home / f"{manifest.step.name}-{method}-{manifest.key[:12]}.safetensors").resolve()


def _missing(artifact: Artifact, role: str, wanted: Input) -> ArtifactError:
    return ArtifactError(
        f"the {role} behind `{artifact.path.name}` cannot be found",
        facts=(("id", wanted.id[:12]), ("last seen", wanted.path)),
        hint=f"--input {role}=PATH",
    )


def _from_hub(reference: str) -> Path:
    """Download a model from the hub, or take it from the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model `{reference}`", hint="check the spelling, or give a local folder"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"cannot reach the hub for `{reference}`",
            facts=(("reason", type(error).__name__),),
            hint="give a local folder instead: qtool calibrate /path/to/model",
        ) from error


def _program(path: Path) -> str:
    """Return how the program that runs is typed; `python -m qtool` is `qtool`."""
    return qtool.__name__ if path == Path(qtool.__file__).with_name("__main__.py") else path.name


@contextmanager
def measured(about: dict[str, object], device: torch.device) -> Iterator[None]:
    """Fill ``about`` with when, where, how long and how much memory a step took.

    The host's peak is that of the whole process so far: what `qtool run` did before counts as well.
    """
    start = time.perf_counter()
    about |= {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": [_program(Path(sys.argv[0])), *sys.argv[1:]],
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
        | {"qtool": qtool.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores",
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    about |= {"seconds": round(time.perf_counter() - start, 3), "process_peak_memory_bytes": peak}
    if device.type == "cuda":
        about["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
