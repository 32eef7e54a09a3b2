"""What mitigate has to say of what it solved, and what it refuses: orders of methods, a head that none can round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from qtool.engine.block_problem import BlockMitigator
from qtool.engine.model_problem import ModelMitigator
from qtool.engine.outputs import calibrated_outputs
from qtool.engine.problem import Mitigator, Retargeter
from qtool.engine.propagate import compares_inputs
from qtool.engine.saliency import SALIENCY
from qtool.engine.solve import Method
from qtool.engine.starved import DEFAULT_SHARE
from qtool.engine.subject import Subject
from qtool.errors import NumericalError, UsageError
from qtool.model.graph import LinearSite
from qtool.numerics.losses import lasting
from qtool.plugins import Plugins
from qtool.steps.options import Configured


@dataclass
class Found:
    """What there is to say of a model.

    Attributes:
        reports: Of linears.
        blocks: Of blocks.
        model: Of the model.
        counters: What was not as usual.
        experts: What each block's experts went by.
        losses: What the losses in the reports are told in.
    """

    reports: dict[str, Mapping[str, float]] = field(default_factory=dict)
    blocks: dict[str, Mapping[str, float]] = field(default_factory=dict)
    model: Mapping[str, float] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    experts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    losses: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> Found:
        """Gather the notes of all blocks, and those of a method that saw the whole model, whose losses come last."""
        found = cls(model=whole.get("model", {}))
        for layer, notes in enumerate(blocks):
            found.reports |= notes["reports"]
            found.counters.update(notes["counters"])
            if notes.get("block"):
                found.blocks[str(layer)] = notes["block"]
            if notes.get("experts"):
                found.experts[str(layer)] = notes["experts"]
        for name, losses in whole.get("reports", {}).items():
            earlier = found.reports[name]
            measured = {key: loss for key, loss in losses.items() if key == "loss" or key in earlier}
            before = {f"{key}_before": earlier[key] for key in measured if key in earlier}
            found.reports[name] = {**lasting(earlier), **before, **measured}
        return found

    @property
    def details(self) -> dict[str, Any]:
        """What goes into the manifest."""
        told = {"blocks": self.blocks, "model": self.model, "experts": self.experts, "losses": self.losses}
        return {"layers": self.reports, **{name: value for name, value in told.items() if value}}


def check_order(methods: Sequence[Configured], written: str, plugins: Plugins) -> None:
    """Refuse compositions that round nothing, undo what they did, or go on behind what sees the whole model.

    Args:
        methods: Left to right.
        written: How the user wrote them.
        plugins: Where the statistics are found that they read.

    Raises:
        UsageError: The composition means nothing.
    """
    last = methods[-1]
    if isinstance(last.method, Retargeter):
        raise UsageError(
            f"`{last.name}` says what the methods behind it aim at, and rounds nothing", hint=f"--method {written}+gptq"
        )
    whole = [one for one in methods if isinstance(one.method, ModelMitigator)]
    if whole and whole != [last]:
        others = [one.name for one in methods if one not in whole]
        raise UsageError(
            f"`{whole[0].name}` sees the whole model, and comes last and once",
            hint=f"--method {'+'.join((*others, whole[0].name))}",
        )
    if whole and all(isinstance(one.method, Retargeter) for one in methods[:-1]):
        before = "gptq" if methods[:-1] else "rtn"
        hint = "+".join((*(one.name for one in methods[:-1]), before, last.name))
        raise UsageError(f"`{last.name}` learns beside codes, and rounds nothing", hint=f"--method {hint}")
    _check_streams(methods, plugins)


def _check_streams(methods: Sequence[Configured], plugins: Plugins) -> None:
    """Refuse to correct the deviation of inputs twice, or to undo that.

    Methods that see both streams choose codes that are not near the weight, so one that aims at the weight undoes what
    they do. All that stands behind a ``Retargeter`` has its aim, which is not to be moved once more. What sees whole
    blocks aims at their outputs, and what is behind that is not looked at.
    """

    def sees_both(one: Configured) -> bool:
        return compares_inputs(
            {name: plugins.load("statistics", name) for name in Method(one.method, one.config).needs}
        )

    of_one = [*takewhile(lambda one: isinstance(one.method, Retargeter | Mitigator), methods)]
    first = next(filter(sees_both, of_one), None)
    if first is None:
        return
    moved = isinstance(first.method, Retargeter)
    behind = of_one[of_one.index(first) + 1 :]
    wrong = next((one for one in behind if not isinstance(one.method, Retargeter) and sees_both(one) == moved), None)
    if wrong is None:
        return
    if moved:
        why = f"`{wrong.name}` corrects the deviation of inputs, as `{first.name}` does already"
    else:
        why = f"`{wrong.name}` aims at the weight, and so undoes how `{first.name}` corrects the deviation of inputs"
    replaced, by = (wrong, "gptq") if moved else (first, "target+gptq")
    names = (by if one is replaced else one.name for one in methods)
    raise UsageError(why, hint=f"--method {'+'.join(names)}")


def check_head(head: LinearSite, methods: Sequence[Configured], propagate: str, needs: Sequence[str]) -> None:
    """Refuse a quantized head where no method rounds it, or what methods want to know of its input is nowhere.

    Args:
        head: The head.
        methods: Left to right.
        propagate: ``none`` without passes over the text.
        needs: Statistics that solving reads.

    Raises:
        UsageError: Names what to do.
    """
    of_one = [*takewhile(lambda one: not isinstance(one.method, BlockMitigator | ModelMitigator), methods)]
    if all(isinstance(one.method, Retargeter) for one in of_one):
        others = methods[len(of_one) :]
        nearest = any(getattr(one.method, "starts_nearest", False) for one in others)
        names = (*(one.name for one in of_one), "rtn" if nearest else "gptq", *(one.name for one in others))
        raise UsageError(
            f"`{others[0].name}` sees whole blocks, and `{head.name}`, which is to be quantized, is in none",
            hint=f"--method {'+'.join(names)}, or --weights without {head.name}=SCHEME",
        )
    if SALIENCY in needs:
        raise UsageError(
            f"nobody gathers gradients at the output of `{head.name}`, which is to be quantized",
            facts=(("needed by", "+".join(one.name for one in methods)),),
            hint="--method gptq, which weighs tokens in blocks by gradients all the same",
        )
    if propagate == "none" and needs:
        raise UsageError(
            f"statistics hold nothing of the input of `{head.name}`, which is to be quantized",
            facts=(("needed", ", ".join(needs)),),
            hint="--propagate quantized, which looks at it in passes over the text",
        )


def checked_share(share: float | None, experts: str) -> float:
    """Return the share of even routing below which experts are starved.

    Raises:
        UsageError: It is none, or would have no effect.
    """
    if share is None:
        return DEFAULT_SHARE
    if experts != "routed":
        raise UsageError("`expert_share` has an effect on statistics of routed tokens only", hint="--experts routed")
    if not 0 <= share <= 1:
        raise UsageError(f"`expert_share` is from 0 to 1, not {share:g}", hint=f"--expert-share {DEFAULT_SHARE}")
    return share


def check_counters(counters: Mapping[str, int], *, strict: bool) -> None:
    """Refuse what was not as usual if the user wants that; of an artifact that is reused as of a new one."""
    if strict and counters:
        facts = tuple(sorted(counters.items()))
        raise NumericalError(
            "something unusual happened and --strict was given",
            facts=facts,
            hint="without --strict the same command goes on from here, and qtool inspect says what each of these means",
        )


def check_passes(subject: Subject, propagate: str, experts: str) -> None:
    """Refuse scales that are found once, of a KV cache and of outputs, where nothing that they are found in is seen.

    Args:
        subject: What is going to be executed.
        propagate: ``none`` without passes.
        experts: Which tokens the statistics of experts are of.

    Raises:
        UsageError: There are no passes, or experts may be sent no tokens in them.
    """
    outputs, passes = calibrated_outputs(subject, subject.linears), "--propagate quantized"
    if propagate == "none" and subject.cache is not None and subject.cache.static:
        raise UsageError(
            "scales of a KV cache that are found once are found in passes over the text: no statistics hold keys",
            facts=(("kv", subject.scheme.kv),),
            hint=passes,
        )
    if propagate == "none" and outputs:
        raise UsageError(
            "scales of outputs that are found once are found in passes over the text: no statistics hold outputs",
            facts=(("outputs", subject.scheme.written("outputs")),),
            hint=passes,
        )
    if experts == "routed" and any(linear.expert is not None for linear in outputs):
        raise UsageError(
            "scales of outputs that are found once need tokens, and an expert may be sent none",
            facts=(("outputs", subject.scheme.written("outputs")),),
            hint="--experts all",
        )
