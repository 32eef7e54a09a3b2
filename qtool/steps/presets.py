"""Named settings of mitigate: the protocols of papers, as data that users' own options override one by one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qtool.errors import UsageError
from qtool.plugins import Plugins
from qtool.scheme import VECTORS, ModelScheme
from qtool.steps.schemes import read_scheme, with_default


@dataclass(frozen=True)
class MitigateSettings:
    """What mitigate does where users say nothing; the fields are those of ``MitigateRequest``.

    Attributes:
        scheme_name: What the scheme is called where none of its parts is replaced.
        weights: Written tensor scheme, or empty.
        scale_per_head: See ``ModelScheme``; holds for the scheme as it is written here, not for one of the user's.
        activations: The same, of the inputs of linears.
        kv: The same, of the KV cache.
        outputs: The same, of the outputs of linears.
        methods: Method to its options as text; those of methods that are not used count for nothing.
        propagate: See ``MitigateRequest``, as for the rest.
        true_sequential: Four passes a block; None for where a method compares the inputs of linears.
        round_activations: Whether propagated activations are quantized; None for where a method sees whole blocks.
        token_weight: Rule for the weight of a token; empty for a default.
        experts: Which tokens experts' statistics are of; empty takes the choice of the statistics.
        expert_share: Part of even routing below which an expert is starved; None for a default.
        seed: Seeds what is random.
    """

    scheme_name: str = ""
    weights: str = ""
    scale_per_head: bool = False
    activations: str = ""
    kv: str = ""
    outputs: str = ""
    methods: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    propagate: str = "quantized"
    true_sequential: bool | None = None
    round_activations: bool | None = None
    token_weight: str = ""
    experts: str = ""
    expert_share: float | None = None
    seed: int = 0

    def overridden(self, **given: object) -> MitigateSettings:
        """Return the settings with every value that is given, that is not None, in place of their own."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def scheme(self, preset: str, given: Mapping[str, str], plugins: Plugins) -> ModelScheme:
        """Return the scheme of a model.

        Args:
            preset: Name of a scheme such as ``W4A16``, which takes the place of all parts of these settings.
            given: Parts as users write them, as for ``read_scheme``; one that is empty is not given.
            plugins: Where formats and presets are found.

        Raises:
            SchemeError: A part or the preset's name cannot be read.
        """
        if preset:
            return read_scheme(preset, given, plugins)
        parts = {
            name: with_default(given.get(name) or "", getattr(self, name)) or getattr(self, name) for name in VECTORS
        }
        scheme = read_scheme("", parts, plugins)
        if any(given.values()):
            return scheme
        return replace(scheme, name=self.scheme_name, scale_per_head=self.scale_per_head)

    def options(self, composition: str, given: Mapping[str, str]) -> dict[str, str]:
        """Return the options of a composition's methods: those given, then these settings' where none is given.

        Args:
            composition: Names joined by ``+``.
            given: The user's options as text, by ``option`` or ``method.option``, with dashes or underscores.
        """
        spelled = {label.replace("-", "_") for label in given}
        ours = {
            f"{method}.{option}": value
            for method in (name.strip() for name in composition.split("+"))
            for option, value in self.methods.get(method, {}).items()
            if spelled.isdisjoint((option, f"{method.replace('-', '_')}.{option}"))
        }
        return {**ours, **given}


_SURVEY_CLIP = {"clip": "search", "clip_norm": "2.4", "clip_grid": "80", "clip_metric": "mse"}

PRESETS: Mapping[str, MitigateSettings] = MappingProxyType(
    {
        # arXiv:2507.17417 and its released code: RTN and GPTQ as in QuaRot, LoRC of rank 32.
        "survey": MitigateSettings(
            scheme_name="W4A4 (survey)",
            weights="int4-sym-channel-sfp32-full",
            activations="int4-asym-token-sfp32",
            scale_per_head=True,
            methods={
                "rtn": _SURVEY_CLIP,
                "gptq": {
                    **_SURVEY_CLIP,
                    "parameters": "stale",
                    "dampening_frac": "0.01",
                    "block_size": "128",
                    "order": "natural",
                },
                "lorc": {"rank": "32", "dtype": "bf16"},
            },
            true_sequential=True,
            round_activations=False,
            token_weight="uniform",
            seed=42,
        ),
    }
)


def mitigate_settings(preset: str) -> MitigateSettings:
    """Return the settings of a preset; qtool's own for an empty name.

    Raises:
        UsageError: No such preset.
    """
    if not preset:
        return MitigateSettings()
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        raise UsageError(
            f"unknown preset `{preset}`",
            facts=(("known", ", ".join(PRESETS)),),
            hint=f"did you mean `{near[0]}`?" if near else "--scheme names a scheme; --preset names a whole protocol",
        )
    return PRESETS[preset]
