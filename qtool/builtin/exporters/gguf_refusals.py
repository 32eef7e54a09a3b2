"""What a GGUF file has no place for, or llama.cpp does not run, refused before any work."""

from __future__ import annotations

from qtool.engine.stored import OUTLIERS
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.model.graph import OUTPUT

_FOLDED = "qtool transform STATISTICS --method quarot --set r4=false --set r3=off, or qtool pack SOURCE --to gguf-f16"


def refuse_cache(subject: Subject) -> None:
    """Refuse a quantized KV cache, of which a file does not tell.

    Raises:
        SchemeError: There is one.
    """
    kv = subject.scheme.kv
    if kv is not None:
        raise SchemeError(
            "a GGUF file does not say how its KV cache is quantized: that is an option of llama.cpp",
            facts=(("kv", kv),),
            hint="qtool mitigate without --kv, and llama.cpp with --cache-type-k and --cache-type-v",
        )


def refuse_online(subject: Subject) -> None:
    """Refuse operators in the forward pass.

    Raises:
        UsageError: Names the kinds of their sites.
    """
    sites = ((subject.model.graph.site(site_id), plan) for site_id, plan in subject.plan.sites.items())
    online = sorted({site.kind for site, plan in sites if plan.online or (site.kind == OUTPUT and plan.operators)})
    if online:
        raise UsageError(
            "the plan runs operators in the forward pass, which llama.cpp does not",
            facts=(("sites", ", ".join(online)),),
            hint=_FOLDED,
        )


def refuse_segments(subject: Subject) -> None:
    """Refuse channels in formats of their own.

    Raises:
        UsageError: Names the first site.
    """
    apart = next((site for site, plan in subject.plan.sites.items() if plan.segments), None)
    if apart is not None:
        raise UsageError(
            "the plan sets channels apart, and a tensor of GGUF has one type",
            facts=(("first", apart),),
            hint="qtool pack SOURCE --to gguf-f16",
        )


def refuse_beside_codes(subject: Subject) -> None:
    """Refuse adapters and outliers, which lie beside the codes of a linear.

    Raises:
        UsageError: Names the first.
    """
    slots = subject.quantized.header.slots if subject.quantized is not None else ()
    for mark, what in ((".adapter.", "low-rank corrections"), (f"{OUTLIERS}.", "outliers in front of codes")):
        found = next((name for name in slots if mark in name), None)
        if found is not None:
            raise UsageError(
                f"a GGUF model has no {what}",
                facts=(("first", found.partition(mark)[0]),),
                hint="qtool mitigate with another method, or qtool pack SOURCE --to gguf-f16, which merges them",
            )
