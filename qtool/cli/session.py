"""What commands share: their common options, the workspace made of them, and the one line at the end."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar, get_type_hints

import typer

from qtool.cli.output import Bars, kept_clean, say, say_values, warner, write_artifact, write_json
from qtool.errors import UsageError
from qtool.plugins import Plugins

if TYPE_CHECKING:
    from qtool.artifacts.store import Artifact
    from qtool.steps.workspace import Workspace

P = ParamSpec("P")
Request = TypeVar("Request")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE = 1 << 18
ROLES = ("model", "statistics", "plan", "quantized")
CALM = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of libraries that would otherwise write between a step's own messages."""
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DELAY": "1000000000"}
"""What hides libraries' own bars where there is no terminal; some overrule `TQDM_DISABLE`, none the seconds to wait."""

Source = Annotated[
    str | None,
    typer.Argument(metavar="SOURCE", help="Artifact or model; read from standard input if missing or `-`."),
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(metavar="SOURCE...", help="Artifacts; read from standard input if missing or `-`."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Where the result goes. [default: $QTOOL_HOME/<step>-<method>-<key>]",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Option of a method (repeatable), of those that `qtool plugins KIND METHOD` lists.",
    ),
]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16, float16 or float64.")]
Batch = Annotated[int, typer.Option(min=0, help="Windows that run at once; 0 chooses.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Do nothing but say where the result goes, and what memory and disk it takes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback on failure.")]


@dataclass(frozen=True)
class Common:
    """The options of every command that opens artifacts or models."""

    json: Json = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on standard error.")] = False
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto"
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="ROLE=PATH",
            help=f"Where an input lies that moved: {', '.join(ROLES)} (repeatable).",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let code beside a model's weights run."),
    ] = False
    debug: Debug = False


@dataclass(frozen=True)
class Session:
    """One run of a command.

    Attributes:
        common: Its common options.
        plugins: What is on offer.
    """

    common: Common
    plugins: Plugins

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Open the workspace; while it is open nothing but the result reaches standard output."""
        common = self.common
        inputs = read_inputs(common.inputs or ())
        with kept_clean(quiet=common.quiet):
            from qtool.steps.environment import open_workspace

            yield open_workspace(
                self.plugins,
                device=common.device,
                inputs=inputs,
                progress=Bars(quiet=common.quiet),
                warn=warner(quiet=common.quiet),
                trust_remote_code=common.trust_remote_code,
            )

    def run(self, step: Callable[[Request, Workspace], tuple[Artifact, bool]], request: Request) -> None:
        """Run a step and print its artifact."""
        with self.workspace() as workspace:
            artifact, reused = step(request, workspace)
        self.show(artifact, reused=reused, metrics=artifact.manifest.details.get("values", {}))

    def foresee(self, step: Callable[[Request, Workspace], tuple[Artifact, bool]], request: Request) -> None:
        """Print what a step would do and take."""
        from qtool.cli.tables import draw
        from qtool.steps.foresee import foresee

        with self.workspace() as workspace:
            description = foresee(step, request, workspace)
        if self.common.json:
            write_json(description.to_json())
        else:
            draw(description)

    def show(self, artifact: Artifact, *, reused: bool, metrics: dict[str, float]) -> None:
        """Print an artifact, and what was measured for people to read."""
        if not self.common.json and not self.common.quiet:
            say_values(metrics)
            for consumer, executes in sorted(artifact.manifest.details.get("consumers", {}).items()):
                say("note", f"{consumer}: {executes}")
            if read_back := artifact.manifest.details.get("read_back_with"):
                say("note", f"read back with {read_back}")
        write_artifact(artifact, as_json=self.common.json, reused=reused, metrics=metrics)


def command(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
    """Make a command of a function: the common options join its own, and it is given a ``Session`` of them."""
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(Common, include_extras=True)
    parameters = [
        *(
            Parameter(name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[name])
            for name, one in list(signature(function).parameters.items())[1:]
        ),
        *(
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=shared[f.name])
            for f in fields(Common)
        ),
    ]

    @wraps(function)
    def run(**arguments: Any) -> None:  # noqa: ANN401 - what Typer read
        common = Common(**{name: arguments.pop(name) for name in shared})
        calm_libraries(common)
        return_freed_memory()
        function(Session(common, Plugins.discover()), **arguments)  # type: ignore[call-arg]

    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def calm_libraries(common: Common) -> None:
    """Set the environment of libraries, which most of them read once, when they are imported: before any step is."""
    calm = ({} if common.debug else CALM) | ({} if Bars(quiet=common.quiet).shown else NO_BARS)
    os.environ.update({name: value for name, value in calm.items() if name not in os.environ})


def return_freed_memory() -> None:
    """Let glibc give memory back to the system as it is freed.

    By itself it raises the size from which it does so, and a process keeps several times what it needs of blocks that
    come and go: calibrating 135 blocks of 6 MiB peaked at 2224 MiB instead of 485 (2 x 32 tokens, CPU, 2026-11-22).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(_LARGE))  # of processes that this one starts


def read_inputs(pairs: Sequence[str]) -> dict[str, Path]:
    """Read ``ROLE=PATH`` words.

    Raises:
        UsageError: A word is not of this form, or the role is unknown.
    """
    inputs: dict[str, Path] = {}
    for pair in pairs:
        role, _, path = pair.partition("=")
        if role not in ROLES or not path:
            raise UsageError(
                f"cannot read the input `{pair}`",
                facts=(("roles", ", ".join(ROLES)),),
                hint="--input model=PATH",
            )
        inputs[role] = Path(path)
    return inputs


def read_list(text: str) -> tuple[str, ...]:
    """Read words joined by commas."""
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)
