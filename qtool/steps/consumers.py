"""doctor CHECKPOINT: what loads a checkpoint, and whether that executes what its config says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qtool.consumers.agreement import require_agreement
from qtool.consumers.case import Case
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import ANY, VERDICTS, Answer, answer, consumers, devices_of
from qtool.errors import ConsumerError, UsageError
from qtool.plugins import Plugins
from qtool.steps.description import Description, Table

CPU = "cpu"
_CAPABILITIES = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
"""Compute capabilities of NVIDIA's devices from Maxwell on."""
_COLUMNS = ("consumer", "device", "verdict", "executes", "kernel", "message", "version", "known")


def examine_checkpoint(
    path: Path, plugins: Plugins, *, consumer: str = "", device: str = ""
) -> tuple[Description, Answer | None]:
    """Describe what consumers do with a checkpoint.

    Args:
        path: A folder with ``config.json`` and weights, made by qtool or by others, or a GGUF file.
        plugins: What is on offer; the formats of an artifact are looked up in it.
        consumer: Only this one; empty for all of them, on all devices.
        device: ``cpu`` or a compute capability as ``sm90``; empty for what this machine has.

    Returns:
        The description, and the one answer where a consumer is named.

    Raises:
        ArtifactError: There is no checkpoint, it cannot be understood, or its files do not hold what its config says.
        UsageError: There is no such consumer or device.
    """
    where = _checked(device or _device_here())
    known = devices_of(consumer) if consumer else ()
    cases = read_checkpoint(path, _bits(plugins))
    require_agreement(path, plugins.every("families"))
    named = [_of_device(cases, consumer, where, known)] if consumer else []
    answers = named or [answer(cases, name, on) for name in consumers() for on in devices_of(name)]
    facts = {"checkpoint": str(path), "holds": _holds(cases)}
    rows = [
        (
            found.consumer,
            found.device,
            found.verdict,
            found.says,
            found.kernel,
            found.message,
            found.version,
            found.known,
        )
        for found in answers
    ]
    return Description(facts, {"consumers": Table(_COLUMNS, rows)}), named[0] if named else None


def require_as_meant(path: Path, found: Answer) -> None:
    """Refuse a checkpoint that a consumer does not execute as its config says.

    Raises:
        ConsumerError: It will not load, executes something else, or no rule of the table knows.
    """
    if found.verdict == "loads":
        return
    place = "" if found.device == ANY else f" on {found.device}"
    facts: tuple[tuple[str, object], ...] = (("executes" if found.verdict == "executes-other" else "why", found.says),)
    facts += (("message", found.message),) if found.message else ()
    facts += ((found.consumer, f"{found.version}, {found.known}"),) if found.version else ()
    hint = f"qtool doctor {path} shows all consumers"
    raise ConsumerError(f"{found.consumer}{place}: {VERDICTS[found.verdict]}", facts=facts, hint=hint)


def _of_device(cases: Sequence[Case], consumer: str, device: str, known: Sequence[str]) -> Answer:
    """Return the answer for a device; a compute capability between two known ones is taken for the lower."""
    if ANY in known:
        return answer(cases, consumer, ANY)
    lower = [one for one in known if one != CPU and device != CPU and _capability(one) <= _capability(device)]
    on = device if device in known else (lower[-1] if lower else "")
    if not on:
        return Answer(consumer, device, "unknown", f"unknown: no rule speaks of {consumer} on {device}")
    return replace(answer(cases, consumer, on), device=device)


def _device_here() -> str:
    if not torch.cuda.is_available():
        return CPU
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _checked(device: str) -> str:
    """Refuse what is no device."""
    device = device.lower()
    known = (CPU, *(f"sm{number}" for number in _CAPABILITIES))
    if device in known:
        return device
    number = device.removeprefix("sm")
    near = min(_CAPABILITIES, key=lambda one: abs(one - int(number))) if number.isdecimal() else 90
    raise UsageError(
        f"there is no device called `{device}`",
        facts=(("known", ", ".join(known)),),
        hint=f"--on sm{near}",
    )


def _capability(device: str) -> int:
    return int(device.removeprefix("sm"))


def _bits(plugins: Plugins) -> Callable[[str], int]:
    return lambda name: plugins.format(name).bits


def _holds(cases: Sequence[Case]) -> str:
    """Say what kinds of linears there are."""
    kinds = (
        " ".join(dict.fromkeys((case.method, case.layout))) + f", W{case.bits}A{case.input_bits}" for case in cases
    )
    return "; ".join(dict.fromkeys(kinds))
