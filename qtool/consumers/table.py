"""The table of rules on consumers, which lies in ``rules/``, and what it answers.

What no rule speaks of is unknown; of one part of one checkpoint on one device one rule speaks, or none. ``linears`` is
the part that every answer begins with. ``outputs``, ``experts``, ``cache``, ``turned``, ``online``, ``groups``,
``head``, ``embedding`` and ``adapter`` are needed where a checkpoint has those: without a rule on them nothing is
known. ``scales``, ``range`` and ``inputs`` (what scales of inputs are not rounded to) are remarks, and ``kernel`` is a
name; none of the four is needed. What a rule says beside ``linears`` begins with a semicolon and is added, or stands in
place of everything.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qtool.consumers.case import GGUF_FILE, Case
from qtool.errors import UsageError

Verdict: TypeAlias = Literal["loads", "executes-other", "refuses", "unknown"]
VERDICTS: Mapping[Verdict, str] = {
    "loads": "loads",
    "executes-other": "loads, but executes something else",
    "unknown": "unknown",
    "refuses": "will not load",
}
"""Verdicts in words, from the best to the worst."""

ANY = "any"
PARTS = (
    *("linears", "range", "inputs", "outputs", "scales", "cache", "turned", "online", "experts", "groups"),
    *("head", "embedding", "adapter"),
)
"""Parts in the order of what is said of them."""

_FOLDER = Path(__file__).with_name("rules")
_FILES = (
    "transformers",
    *("vllm", "vllm_fp4", "vllm_experts", "vllm_other", "vllm_cpu", "vllm_cpu_other"),
    *("sglang", "sglang_other", "sglang_cpu"),
    *("llama_cpp", "tensorrt_llm"),
)
_QUIET = ("tensorrt-llm",)  # named only where something is known of it
_PRECISION = re.compile(r"W\d+A\d+")


@dataclass(frozen=True)
class Source:
    """How something is known of a consumer.

    Attributes:
        consumer: Its name.
        version: Its version.
        known: ``run`` and on what, or ``code read``.
        words: The same in one phrase.
        devices: Devices that it is known of: ``cpu``, compute capabilities as ``sm90``, or ``any``.
    """

    consumer: str
    version: str
    known: str
    words: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        source: How it is known.
        part: What of a checkpoint it speaks of.
        devices: Where it holds.
        when: Field of a ``Case`` to the values that it must have one of.
        unless: Conditions that must not hold, each like ``when``.
        verdict: Empty for remarks and names of kernels.
        says: What is executed, or why nothing is; fields of the case in braces.
        message: What the consumer prints as it refuses.
        kernel: What it names the code that runs.
    """

    source: Source
    part: str
    devices: tuple[str, ...]
    when: Mapping[str, Sequence[Any]]
    unless: tuple[Mapping[str, Sequence[Any]], ...]
    verdict: Verdict | Literal[""] = ""
    says: str = ""
    message: str = ""
    kernel: str = ""

    def holds(self, facts: Mapping[str, Any], device: str) -> bool:
        """Say whether this rule speaks of a case with these facts on a device."""
        fits = device in self.devices and _fits(self.when, facts)
        return fits and not any(_fits(condition, facts) for condition in self.unless)


@dataclass(frozen=True)
class Answer:
    """What one consumer does with a checkpoint on one device."""

    consumer: str
    device: str
    verdict: Verdict
    says: str
    kernel: str = ""
    message: str = ""
    version: str = ""
    known: str = ""
    words: str = ""


@cache
def table() -> tuple[Rule, ...]:
    """Read the rules."""
    held = [tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8")) for name in _FILES]
    written = {name: one for file in held for name, one in file.get("source", {}).items()}
    sources = {name: Source(**one | {"devices": tuple(one["devices"])}) for name, one in written.items()}
    rules = []
    for row in (row for file in held for row in file["rule"]):
        source = sources[row.pop("source")]
        unless = row.pop("unless", [])
        conditions = (unless,) if isinstance(unless, Mapping) else tuple(unless)
        rules.append(
            Rule(
                source,
                devices=tuple(row.pop("on", source.devices)),
                when=_lists(row.pop("when", {})),
                unless=tuple(_lists(condition) for condition in conditions),
                **row,
            )
        )
    return tuple(rules)


def devices_of(consumer: str) -> tuple[str, ...]:
    """Return the devices on which something is known of a consumer.

    Raises:
        UsageError: No consumer has this name; the hint has the nearest that is one.
    """
    known = list(dict.fromkeys(rule.source.consumer for rule in table()))
    if consumer not in known:
        near = difflib.get_close_matches(consumer.lower(), known, n=1, cutoff=0.4)
        raise UsageError(
            f"there is no consumer called `{consumer}`",
            facts=(("known", ", ".join(known)),),
            hint=f"--for {near[0] if near else known[0]}",
        )
    sources = (rule.source for rule in table() if rule.source.consumer == consumer)
    return tuple(dict.fromkeys(device for source in sources for device in source.devices))


def consumers() -> tuple[str, ...]:
    """Return the names of all consumers."""
    return tuple(dict.fromkeys(rule.source.consumer for rule in table()))


def answer(cases: Iterable[Case], consumer: str, device: str) -> Answer:
    """Return what a consumer does with a checkpoint: of several kinds of linears, the worst that it does with any.

    What it executes is told of all kinds that it treats so.

    Args:
        cases: Kinds of linears of the checkpoint.
        consumer: Name of the consumer.
        device: One of ``devices_of(consumer)``.
    """
    order, found = list(VERDICTS), [_of_case(case, consumer, device) for case in cases]
    worst = max(found, key=lambda one: order.index(one.verdict))
    alike = [one for one in found if one.verdict == worst.verdict]
    kernels = dict.fromkeys(one.kernel for one in alike if one.kernel)
    return replace(worst, says="; ".join(dict.fromkeys(one.says for one in alike)), kernel=", ".join(kernels))


def said(cases: Sequence[Case]) -> dict[str, str]:
    """Return what each consumer of this kind of checkpoint executes, in words; CPUs apart from other devices."""
    of_file = any(case.method == GGUF_FILE for case in cases)
    texts = {}
    for consumer in consumers():
        if of_file != (consumer == "llama.cpp"):
            continue
        answers = [answer(cases, consumer, device) for device in devices_of(consumer)]
        if consumer in _QUIET and all(one.verdict == "unknown" for one in answers):
            continue
        on_cpu = [one for one in answers if one.device == "cpu"]
        if elsewhere := [one for one in answers if one.device != "cpu"]:
            texts[consumer] = _summary(elsewhere)
        for one in on_cpu:
            kernel = f"; kernel {one.kernel}" if one.kernel else ""
            texts[f"{consumer} on a CPU"] = f"{one.says}{kernel} ({one.words})" if one.words else one.says
    return texts


def _of_case(case: Case, consumer: str, device: str) -> Answer:
    """Return what a consumer does with linears of one kind."""
    facts = case.facts()
    found = {rule.part: rule for rule in table() if rule.source.consumer == consumer and rule.holds(facts, device)}
    linears = found.get("linears")
    if linears is None:
        what = " ".join(dict.fromkeys((case.method, case.layout)))
        return Answer(consumer, device, "unknown", f"unknown: no rule speaks of these linears in {what}")
    parts = [linears]
    if linears.verdict != "refuses":
        missing = [part for part, there in _needed(case).items() if there and part not in found]
        if missing or case.unread:
            what = ", ".join([*missing, *([f"`{case.unread}`"] if case.unread else [])])
            return Answer(consumer, device, "unknown", f"unknown: no rule speaks of {what}")
        parts = [found[part] for part in PARTS if part in found]
    order = list(VERDICTS)
    worst = max(parts, key=lambda rule: order.index(rule.verdict or "loads"))
    alone = [rule for rule in parts if rule is not linears and rule.says and not rule.says.startswith(";")]
    told = alone[-1:] or parts
    source, runs = told[0].source, worst.verdict != "refuses"
    return Answer(
        consumer,
        device,
        worst.verdict or "loads",
        "".join(rule.says for rule in told).format(**facts),
        kernel=found["kernel"].kernel if runs and "kernel" in found else "",
        message=worst.message.format(**facts),
        version=source.version,
        known=source.known,
        words=source.words,
    )


def _needed(case: Case) -> dict[str, bool]:
    rotated = {"turned": bool(case.turned), "online": bool(case.online)}
    ends = {"head": bool(case.head), "embedding": bool(case.embedding), "adapter": case.adapter}
    groups = case.apart or case.beside
    beside = {"outputs": case.outputs != "none", "cache": case.cache != "none"}
    return {**beside, "experts": case.experts, **rotated, "groups": groups, **ends}


def _summary(answers: Sequence[Answer]) -> str:
    """Return one text for all devices: what the newest that run it do first, each with where it begins."""
    groups = [(text, list(same)) for text, same in groupby(reversed(answers), key=lambda one: one.says)]
    words = next((one.words for one in answers if one.words), "")
    refuse = [same[0].verdict == "refuses" for _, same in groups]
    refused = groups.pop(0) if refuse[0] and not all(refuse) else None
    told = [_since(text, same[-1].device) for text, same in groups[:-1]] + [groups[-1][0]]
    later = f"; {_since(refused[0], refused[1][-1].device)}" if refused is not None else ""
    return "; before it ".join(told) + later + (f" ({words})" if words else "")


def _since(text: str, device: str) -> str:
    """Return ``W8A8 from SM89 on: …`` for ``W8A8: …``."""
    since = f"from {device.upper()} on"
    precision = _PRECISION.match(text)
    return f"{since} {text}" if precision is None else f"{precision[0]} {since}{text[precision.end() :]}"


def _fits(condition: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> bool:
    return all(facts[name] in values for name, values in condition.items())


def _lists(condition: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    return {name: values if isinstance(values, list) else [values] for name, values in condition.items()}
