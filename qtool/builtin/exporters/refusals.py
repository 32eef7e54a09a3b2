"""What a checkpoint of codes and scales has no place for, refused before any work in the name of its layout."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from qtool.builtin.exporters.checkpoint import refuse_compensation
from qtool.builtin.exporters.mixed import groups_of
from qtool.engine.outputs import calibrated_outputs
from qtool.engine.static_scales import needs_of_range
from qtool.engine.stored import INPUT_GLOBAL_SCALE, INPUT_ZERO_POINT, OUTLIERS
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.model.graph import OUTPUT, LinearSite
from qtool.scheme import TensorScheme
from qtool.scheme_parts import RuledPart, one_level


def quantized_weights(subject: Subject) -> TensorScheme:
    """Return the scheme of most weights of a quantized subject.

    Raises:
        UsageError: It is not quantized.
    """
    weights = groups_of(subject)[0][0].weights
    if weights is None:
        raise TypeError(weights)
    return weights


def refuse_all_but_codes(subject: Subject, layout: str, *, online: bool = False) -> None:
    """Refuse what goes beyond one code a weight and one set of scales a linear.

    Args:
        subject: A quantized subject.
        layout: What the layout is called.
        online: Whether it may hold operators in the forward pass; then they are not refused here.

    Raises:
        SchemeError: Zero points that are real numbers, offsets in their place, or scales that are codes.
        UsageError: One tensor of all experts, channels set apart, operators in the forward pass, something added to the
            outputs of blocks, low-rank corrections, outliers, or scales of two levels; names the first.
    """
    refuse_real(subject, layout)
    refuse_scale_codes(subject, layout)
    _refuse_stacked(subject, layout)
    _refuse_segments(subject, layout)
    if not online:
        _refuse_online(subject)
    refuse_compensation(subject)
    _refuse_adapters(subject, layout)
    _refuse_outliers(subject, layout)
    _refuse_other_parameters(subject, layout)


def refuse_ends(subject: Subject, layout: str) -> None:
    """Refuse a quantized head or embedding in the name of a layout that is written with both in 16 bits.

    Raises:
        SchemeError: Names the exporters that write its codes, or decode them.
    """
    if names := [end.name for end in subject.coded_ends]:
        raise SchemeError(
            f"{layout} is written with head and embedding in 16 bits",
            facts=tuple((name, subject.scheme.of(name).weights) for name in names),
            hint="qtool pack SOURCE --to compressed-tensors, or --to hf, which decodes; "
            f"or qtool mitigate without {', '.join(f'{name}=SCHEME' for name in names)}",
        )


def check_global_scales(subject: Subject) -> None:
    """Refuse siblings with different multipliers, which fused layers would share, and inputs and outputs without one.

    Raises:
        UsageError: Names the first.
    """
    known: dict[tuple[str, str], Tensor] = {}
    for linear in subject.coded:
        if subject.weight_grid(linear).parts[0].has_global_scale:
            scale = _multiplier(subject, f"{linear.name}.global_scale")
            if scale is None or not torch.equal(known.setdefault(linear.fused_with, scale), scale):
                raise UsageError(
                    "linears that read one input have different global scales, and consumers fuse them",
                    facts=(("input", linear.reads), ("linear", linear.name)),
                    hint="use a mitigator that keeps the global scale it is given",
                )
        outputs = calibrated_outputs(subject, [linear]).get(linear)
        if outputs is not None and output_multiplier(subject, linear) is None:
            raise UsageError(
                "the outputs were not calibrated, and these need a scale for each",
                facts=(("linear", linear.name), ("outputs", outputs.parts[0].scheme)),
                hint="qtool mitigate again, with --propagate quantized",
            )
        inputs = subject.input_grid(linear)
        if inputs is None or not any(part.has_global_scale for part in inputs.parts):
            continue
        ends = needs_of_range(inputs)
        zeros = len(ends) > 1
        if input_multiplier(subject, linear) is None or (zeros and input_zero_point(subject, linear) is None):
            needed = "a scale and a zero point" if zeros else "a scale"
            raise UsageError(
                f"the activations were not calibrated, and these need {needed} for each input",
                facts=(("input", linear.reads),),
                hint=f"qtool calibrate MODEL --gather hessian,{','.join(ends)},sample, then mitigate again",
            )


def output_multiplier(subject: Subject, linear: LinearSite) -> Tensor | None:
    """Return what was calibrated of what a linear puts out: a static scale, or what multiplies scales; or None."""
    if subject.output_grid(linear) is None:
        return None
    return _multiplier(subject, f"layers.{linear.layer}.{linear.puts_out}{INPUT_GLOBAL_SCALE}")


def output_zero_point(subject: Subject, linear: LinearSite) -> Tensor | None:
    """Return the code that stands for zero in what a linear puts out, None where it is none that was calibrated."""
    if subject.output_grid(linear) is None:
        return None
    return _multiplier(subject, f"layers.{linear.layer}.{linear.puts_out}{INPUT_ZERO_POINT}")


def input_multiplier(subject: Subject, linear: LinearSite) -> Tensor | None:
    """Return the calibrated tensor-level multiplier of what a linear reads, None where it has none or reads 16 bits."""
    if subject.scheme.of(linear.name).activations is None:
        return None
    return _multiplier(subject, f"{linear.reads}{INPUT_GLOBAL_SCALE}")


def input_zero_point(subject: Subject, linear: LinearSite) -> Tensor | None:
    """Return the code that stands for zero in what a linear reads, None where it is none that was calibrated."""
    if subject.scheme.of(linear.name).activations is None:
        return None
    return _multiplier(subject, f"{linear.reads}{INPUT_ZERO_POINT}")


def refuse_real(subject: Subject, layout: str) -> None:
    """Refuse zero points that are real numbers, and offsets, before a scheme near this one is named that has them too.

    Raises:
        SchemeError: Names the scheme with zero points that are codes.
    """
    for name in get_args(RuledPart):
        for part in (one for one in subject.scheme.every(name) if one.real or one.offset):
            raise SchemeError(
                f"the zero points of {layout} are whole numbers",
                facts=((name, part),),
                hint=f"nearest that fits: --{name} {replace(part, real=False, offset=False)}",
            )


def refuse_scale_codes(subject: Subject, layout: str) -> None:
    """Refuse scales that are codes, before a scheme near this one is named that has them too.

    Raises:
        SchemeError: Names the scheme with one level of scales.
    """
    coded = next((part for part in subject.scheme.every("weights") if part.scale_bits is not None), None)
    if coded is not None:
        raise SchemeError(
            f"{layout} has no scales that are codes themselves",
            facts=(("weights", coded),),
            hint=f"nearest that fits: --weights {one_level(coded)}, or qtool pack SOURCE --to hf, which decodes them",
        )


def _refuse_stacked(subject: Subject, layout: str) -> None:
    stacked = next((place.name for place in subject.model.places.values() if place.expert is not None), None)
    if stacked is not None:
        raise UsageError(
            f"{layout} has no layout for one tensor of all experts, which the loaders of this family look for",
            facts=(("first", stacked), ("family", subject.model.family.name)),
            hint="qtool pack SOURCE --to hf, which stacks the dequantized experts again",
        )


def _refuse_segments(subject: Subject, layout: str) -> None:
    apart = next((site for site, plan in subject.plan.sites.items() if plan.segments), None)
    if apart is not None:
        formats = ", ".join(segment.format for segment in subject.plan.at(apart).segments)
        raise UsageError(
            f"the plan sets channels apart, and {layout} has one format for all inputs of a linear",
            facts=(("first", f"{apart} ({formats})"),),
            hint="qtool pack SOURCE --to hf, which writes dense weights",
        )


def _refuse_online(subject: Subject) -> None:
    sites = ((subject.model.graph.site(site_id), plan) for site_id, plan in subject.plan.sites.items())
    online = {
        (site.kind, operator.kind)
        for site, plan in sites
        for operator in (plan.operators if site.kind == OUTPUT else plan.online)
    }
    if online:
        raise UsageError(
            "the plan runs operators in the forward pass, which these checkpoints do not carry",
            facts=tuple(sorted(online)),
            hint="qtool transform STATISTICS --method quarot --set r4=false --set r3=off, or pack --to hf",
        )


def _refuse_adapters(subject: Subject, layout: str) -> None:
    slots = subject.quantized.header.slots if subject.quantized is not None else ()
    found = next((name for name in slots if ".adapter." in name), None)
    if found is not None:
        raise UsageError(
            f"{layout} has no low-rank corrections",
            facts=(("first", found.partition(".adapter.")[0]),),
            hint="qtool mitigate without the low-rank method, or qtool pack SOURCE --to hf, which merges them",
        )


def _refuse_outliers(subject: Subject, layout: str) -> None:
    slots = subject.quantized.header.slots if subject.quantized is not None else ()
    found = next((name for name in slots if f"{OUTLIERS}." in name), None)
    if found is not None:
        raise UsageError(
            f"{layout} has no outliers in front of its codes",
            facts=(("first", found.partition(f"{OUTLIERS}.")[0]),),
            hint="qtool mitigate with another method, or qtool pack SOURCE --to hf, which writes dense weights",
        )


def _refuse_other_parameters(subject: Subject, layout: str) -> None:
    """Refuse scales and zero points that are codes of a second level, and zero points that are no codes."""
    slots = subject.quantized.header.slots if subject.quantized is not None else {}
    for name, slot in slots.items():
        real = name.endswith(".zero_point") and slot.dtype != "U8"
        if real or name.endswith((".scale.codes", ".zero_point.codes")):
            raise UsageError(
                f"{layout} has no scales of two levels, and its zero points are whole numbers",
                facts=(("first", name),),
                hint="qtool mitigate with another method, or qtool pack SOURCE --to hf, which writes dense weights",
            )


def _multiplier(subject: Subject, name: str) -> Tensor | None:
    """Read a tensor-level multiplier, or a zero point, by its name in the artifact, None without one."""
    if subject.quantized is None or name not in subject.quantized.header.slots:
        return None
    return subject.quantized.tensor(name)
