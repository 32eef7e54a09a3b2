"""Groups of a compressed-tensors config that are the name of a preset with its linears, written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import ArtifactError


def named_presets(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the groups of a ``quantization_config`` that are presets: ``{"W4A16": ["Linear"]}``.

    Raises:
        ArtifactError: It has something else than groups.
    """
    groups = (config or {}).get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ArtifactError(
            "cannot understand `config_groups`",
            facts=(("expected", "groups by name"), ("received", groups)),
            hint="pack again, or report it with the config",
        )
    return tuple(name for name, group in groups.items() if not isinstance(group, Mapping))


def with_presets(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a ``quantization_config`` whose presets are what compressed-tensors' own table says.

    Args:
        config: The config. Not modified.

    Raises:
        ArtifactError: A group is neither a scheme nor a preset that the library knows with the names of its linears,
            or there is something else than groups.
    """
    named = named_presets(config)
    if not named:
        return config
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    groups = dict(config["config_groups"])
    for name in named:
        targets = groups[name]
        listed = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        if name.upper() not in PRESET_SCHEMES or not listed:
            raise ArtifactError(
                f"the group `{name}` of `config_groups` is no scheme, and no preset with the names of its linears",
                facts=(("presets", ", ".join(PRESET_SCHEMES)), ("received", targets)),
                hint="pack again, or report it with the config",
            )
        groups[name] = preset_name_to_scheme(name, targets).model_dump(mode="json")
    return {**config, "config_groups": groups}
