"""A manifest reads back as it was written, and refuses what was altered, unknown or newer."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from qtool.artifacts.identity import canonical_json, digest_json
from qtool.artifacts.manifest import KINDS, SCHEMA, Input, Manifest, read_manifest, require_kind
from qtool.errors import ArtifactError


def sealed(data: dict[str, Any]) -> str:
    """Return the text of a manifest whose checksum is right, whatever it says."""
    data.pop("checksum", None)
    return canonical_json(data | {"checksum": digest_json(data)})


def test_reads_back_what_was_written(manifest: Manifest) -> None:
    finished = manifest.with_tensors({"codes": "1" * 64})
    assert read_manifest(finished.to_text(), path="x") == finished
    assert read_manifest(finished.to_text(), path="x").to_text() == finished.to_text()


def test_reads_back_keys_and_values_that_json_spells_otherwise(manifest: Manifest) -> None:
    odd = replace(manifest, details={"bits": {2: 1, 10: 2}, "sizes": (1, 2)}, about={"argv": ["\udcff", "é"]})
    assert read_manifest(odd.to_text(), path="x").details == {"bits": {"2": 1, "10": 2}, "sizes": [1, 2]}


def test_the_text_states_key_and_id_for_other_programs(manifest: Manifest) -> None:
    data = json.loads(manifest.to_text())
    assert (data["key"], data["id"], data["schema"]) == (manifest.key, manifest.id, SCHEMA)
    assert data["step"]["config"]["dampening_frac"] == 0.01


def test_the_key_does_not_depend_on_paths_times_machines_and_who_provides_the_method(manifest: Manifest) -> None:
    elsewhere = replace(
        manifest,
        inputs={role: Input(i.id, f"/elsewhere/{role}") for role, i in manifest.inputs.items()},
        about={"created": "2030-01-01T00:00:00Z", "device": "another"},
        step=replace(manifest.step, provider="fork 9.9"),
        counters={},
    )
    assert elsewhere.key == manifest.key
    assert elsewhere.id == manifest.id


def test_the_key_depends_on_method_version_config_inputs_and_subject(manifest: Manifest) -> None:
    step = manifest.step
    others = [
        replace(manifest, step=replace(step, name="transform")),
        replace(manifest, step=replace(step, method="rtn")),
        replace(manifest, step=replace(step, version=4)),
        replace(manifest, step=replace(step, config={**step.config, "seed": 1})),
        replace(manifest, inputs=dict(manifest.inputs) | {"plan": Input("c" * 64, "runs/plan.safetensors")}),
        replace(manifest, subject="c" * 64),
    ]
    assert len({manifest.key, *(other.key for other in others)}) == 7


def test_the_id_depends_on_the_tensors_and_the_key_does_not(manifest: Manifest) -> None:
    finished = manifest.with_tensors({"codes": "1" * 64})
    assert finished.key == manifest.key
    assert finished.id != manifest.id
    assert finished.id != manifest.with_tensors({"codes": "2" * 64}).id


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "plan"),
        ("subject", "c" * 64),
        ("family", "qwen3"),
        ("schemes", {"weights": {"format": "int8"}}),
        ("details", {"folded": {"residual": 0}}),
        ("counters", {"dead_columns": 0}),
        ("about", {}),
        ("tensors", {"codes": "2" * 64}),
        ("key", "0" * 64),
        ("id", "0" * 64),
        ("checksum", "0" * 64),
    ],
)
def test_an_altered_field_is_noticed_whichever_it_is(manifest: Manifest, field: str, value: object) -> None:
    data = json.loads(manifest.with_tensors({"codes": "1" * 64}).to_text())
    with pytest.raises(ArtifactError, match="manifest of `x` was changed after it was written") as error:
        read_manifest(json.dumps(data | {field: value}), path="x")
    assert "make the artifact again" in error.value.hint


@pytest.mark.parametrize("name", ["key", "id"])
def test_a_stated_name_that_does_not_follow_is_refused_even_with_a_right_checksum(
    manifest: Manifest, name: str
) -> None:
    with pytest.raises(ArtifactError, match=f"{name} that it states +0000"):
        read_manifest(sealed(json.loads(manifest.to_text()) | {name: "0" * 64}), path="x")


def test_a_newer_schema_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(ArtifactError, match="written by a newer qtool") as error:
        read_manifest('{"schema": 99, "stuff": []}', path="x")
    assert error.value.facts == (("schema read by this version", SCHEMA), ("schema of the artifact", 99))


def test_an_unknown_kind_is_refused_with_the_known_ones(manifest: Manifest) -> None:
    data = json.loads(manifest.to_text()) | {"kind": "recipe"}
    with pytest.raises(ArtifactError, match="unknown kind") as error:
        read_manifest(sealed(data), path="x")
    assert error.value.facts == (("known", ", ".join(KINDS)), ("found", "recipe"))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", '"text"', "null", "{}", '{"schema": "new"}', '{"schema": 1}', "[" * 100_000],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_no_manifest_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ArtifactError, match="`x` has a manifest that cannot be read"):
        read_manifest(text, path="x")


@pytest.mark.parametrize(
    "damage", [{"step": []}, {"inputs": 5}, {"tensors": [1]}, {"step": {"name": "a"}}, {"more": 1}]
)
def test_a_field_of_the_wrong_type_is_refused(manifest: Manifest, damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        read_manifest(sealed(json.loads(manifest.to_text()) | damage), path="x")


def test_a_config_that_is_not_a_number_is_refused(manifest: Manifest) -> None:
    text = manifest.to_text().replace("0.01", "NaN")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(text, path="x")


def test_the_wrong_kind_is_refused_with_the_step_that_makes_the_right_one(manifest: Manifest) -> None:
    require_kind(manifest, "plan", "quantized", path="x")
    with pytest.raises(ArtifactError) as error:
        require_kind(manifest, "plan", "statistics", path="x")
    assert str(error.value) == (
        "`x` is of the wrong kind\n  expected  plan or statistics\n  received  quantized\nhint: qtool transform --help"
    )


def test_a_manifest_is_never_changed_in_place(manifest: Manifest) -> None:
    before = asdict(manifest)
    manifest.with_tensors({"codes": "1" * 64}).to_text()
    assert asdict(manifest) == before
