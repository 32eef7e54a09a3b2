"""Exceptions for linears by name: each linear is what it would be alone, and whoever asks is told the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.artifacts.store import Artifact
from qtool.builtin.transforms.atom import scale_groups
from qtool.builtin.transforms.block_hadamard import scale_group
from qtool.engine.execute import BlockExecutable
from qtool.engine.grid import Grid
from qtool.engine.linear import Rounding
from qtool.errors import SchemeError, UsageError
from qtool.scheme import ModelScheme, TensorScheme
from qtool.scheme_parts import Rule
from qtool.steps.foresee import foresee
from qtool.steps.inspect_quantized import describe_quantized
from qtool.steps.labels import labels_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.presets import MitigateSettings
from qtool.steps.schemes import check_scheme, read_scheme
from qtool.steps.storage import stored_bits
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, context_of, transform
from qtool.steps.workspace import Workspace
from qtool.testing import tiny_model
from tests.steps.conftest import Desk

MIXED = "int4-sym-g8-sbf16,down_proj=int8-sbf16,layers.1=int3-asym-g4,o_proj=none,layers.1.*.v_proj=int2-g8"
OWN = {
    "self_attn.q_proj": ("int4-sym-g8-sbf16", "int3-asym-g4"),
    "self_attn.k_proj": ("int4-sym-g8-sbf16", "int3-asym-g4"),
    "self_attn.v_proj": ("int4-sym-g8-sbf16", "int2-g8"),
    "self_attn.o_proj": ("", ""),
    "mlp.gate_proj": ("int4-sym-g8-sbf16", "int3-asym-g4"),
    "mlp.up_proj": ("int4-sym-g8-sbf16", "int3-asym-g4"),
    "mlp.down_proj": ("int8-sbf16", "int3-asym-g4"),
}
"""What MIXED says of each linear of both blocks, by hand."""
BITS = {"int4-sym-g8-sbf16": 4 + 16 / 8, "int2-g8": 2 + 16 / 8, "": 16.0}


def read(workspace: Workspace, preset: str = "", **parts: str) -> ModelScheme:
    return read_scheme(preset, parts, workspace.plugins)


def made(desk: Desk, scheme: ModelScheme, method: str = "rtn", **options: Any) -> Artifact:  # noqa: ANN401 - of a request
    source = str(desk.model) if method == "rtn" else str(desk.calibrate().path)
    return mitigate(MitigateRequest(source, method, scheme, **options), desk.workspace)[0]


def of_linear(artifact: Artifact, linear: str) -> dict[str, Tensor]:
    return artifact.tensors(f"{linear}.")


class TestIdentity:
    def test_a_scheme_without_exceptions_is_stored_as_it_always_was(self, desk: Desk) -> None:
        part = {
            "format": "int4",
            "symmetric": True,
            "strategy": "channel",
            "group_size": None,
            "scale": "bf16",
            "range_rule": "tight",
            "exponent_rule": "even",
            "clip": 1.0,
            "outlier_threshold": None,
            "real": False,
        }
        scheme = read(desk.workspace, weights="int4-sym-channel-sbf16")
        stored = {"weights": part, "activations": None, "kv": None, "name": "", "scale_per_head": False}
        assert json.dumps(scheme.to_json()) == json.dumps(stored)

    def test_exceptions_are_read_back(self, desk: Desk) -> None:
        scheme = read(desk.workspace, "W4A4", weights=MIXED, activations="int4-asym-token,down_proj=int8-sym-token")
        assert ModelScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
        assert [rule.part for rule in scheme.rules] == ["weights"] * 4 + ["activations"]

    @pytest.mark.parametrize(
        ("text", "plain"),
        [("int4,down_proj=int4", "int4"), ("int4, down_proj=int8 ,down_proj=int4", "int4"), ("none", "none")],
    )
    def test_what_says_nothing_is_not_remembered(self, desk: Desk, text: str, plain: str) -> None:
        assert read(desk.workspace, weights=text) == read(desk.workspace, weights=plain)

    def test_what_takes_an_exception_back_is_remembered(self, desk: Desk) -> None:
        scheme = read(desk.workspace, weights="int4,layers.0=int8,down_proj=int4")
        assert len(scheme.rules) == 2
        assert scheme.of("model.layers.0.mlp.down_proj").weights == scheme.weights

    def test_another_exception_has_another_key(self, desk: Desk) -> None:
        texts = ("int4", "int4,down_proj=int8", "int4,up_proj=int8", "int4,down_proj=none")
        keys = {made(desk, read(desk.workspace, weights=text)).manifest.key for text in texts}
        assert len(keys) == len(texts)


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "matched"),
        [
            ("down_proj", True),
            ("mlp.down_proj", True),
            ("model.layers.1.mlp.down_proj", True),
            ("model.layers.1.*", True),
            ("layers.1", True),
            ("layers.0-1", True),
            ("layers.1-12.*.*_proj", True),
            ("[cd]own_proj", True),
            ("layers.0", False),
            ("layers.2-9", False),
            ("layers.11", False),
            ("down", False),
            ("own_proj", False),
            ("layers.mlp", False),
            ("mlp.down_proj.weight", False),
            ("model.layers.1.mlp.down_proj.*", False),
        ],
    )
    def test_a_pattern_is_some_neighbouring_parts_of_a_name(self, pattern: str, matched: bool) -> None:
        assert Rule("weights", pattern, None).matches("model.layers.1.mlp.down_proj") == matched

    def test_the_last_of_several_holds(self, desk: Desk) -> None:
        first = read(desk.workspace, weights="int4,layers.0=none,down_proj=int8")
        assert first.of("model.layers.0.mlp.down_proj").weights == read(desk.workspace, weights="int8").weights
        assert first.of("model.layers.0.mlp.up_proj").weights is None
        last = read(desk.workspace, weights="int4,down_proj=int8,layers.0=none")
        assert last.of("model.layers.0.mlp.down_proj").weights is None
        assert last.of("model.layers.1.mlp.down_proj").weights == first.of("model.layers.1.mlp.down_proj").weights

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("int4,dwn_proj=int8", "--weights SCHEME,down_proj=int8"),
            ("int4,layers.2=none", r"--weights SCHEME,layers\.[01]=none"),
            ("int4,mlp.gate_prj=none", "--weights SCHEME,mlp.gate_proj=none"),
            ("int4,lm_hed=int8", "--weights SCHEME,lm_head=int8"),
        ],
    )
    def test_one_that_is_for_no_linear_names_the_nearest(self, desk: Desk, text: str, hint: str) -> None:
        scheme = read(desk.workspace, weights=text)
        with pytest.raises(SchemeError, match=f"no linear that is quantized(.|\n)*layers.0-1(.|\n)*hint.*{hint}"):
            made(desk, scheme)
        with pytest.raises(SchemeError, match="no linear that is quantized"):
            transform(TransformRequest(str(desk.model), "identity", scheme=scheme), desk.workspace)

    @pytest.mark.parametrize("text", ["int4,down_proj", "int4,=int8", "int4,down_proj=", "int4,mlp..up_proj=int8"])
    def test_what_cannot_be_read_is_refused(self, desk: Desk, text: str) -> None:
        with pytest.raises(SchemeError, match="cannot read the exception"):
            read(desk.workspace, weights=text)

    def test_a_part_that_means_nothing_where_it_stands_is_refused_in_exceptions_too(self, desk: Desk) -> None:
        with pytest.raises(SchemeError, match="means nothing for weights"):
            read(desk.workspace, weights="int4,down_proj=int8-token")
        with pytest.raises(SchemeError, match="cannot read the scheme of a cache"):
            read(desk.workspace, weights="int4", kv="int8-asym-token,layers.0=none")

    def test_a_group_that_does_not_divide_the_input_of_an_exception_is_refused(self, desk: Desk) -> None:
        with pytest.raises(SchemeError, match=r"group size 7 .*o_proj"):
            made(desk, read(desk.workspace, weights="int4,o_proj=int4-g7"))

    @pytest.mark.parametrize("text", ["none", "none,down_proj=none", "int4,layers=none"])
    def test_nothing_to_quantize_is_refused(self, desk: Desk, text: str) -> None:
        with pytest.raises(UsageError, match="leaves the weights as they are"):
            made(desk, read(desk.workspace, weights=text))

    def test_inputs_that_linears_share_are_rounded_in_one_way(self, desk: Desk) -> None:
        scheme = read(desk.workspace, weights="int4", activations="int8-sym-token,q_proj=int4-sym-token")
        with pytest.raises(SchemeError, match=r"k_proj` and `.*q_proj` read one input"):
            made(desk, scheme)
        subject = open_subject(str(desk.model), desk.workspace).subject
        check_scheme(read(desk.workspace, weights="int4", activations="int8,[qkv]_proj=int4"), subject)


class TestNames:
    def test_exceptions_alone_leave_what_a_preset_says(self, desk: Desk) -> None:
        scheme = read(desk.workspace, "W4A4", weights="down_proj=int8,layers.0=none", activations="down_proj=int8")
        plain = read(desk.workspace, "W4A4")
        assert replace(scheme, rules=(), name="W4A4") == plain
        assert scheme.name == "W4A4 (down_proj W8A8, layers.0 W16)"
        assert read(desk.workspace, "W4A4", weights="int4,down_proj=int8").name == ""

    def test_they_leave_what_a_protocol_says(self, desk: Desk) -> None:
        settings = MitigateSettings(scheme_name="ours", weights="int4-sym-g8", activations="int4-asym-token")
        given = settings.scheme("", {"weights": "down_proj=int8"}, desk.workspace.plugins)
        assert given.weights == read(desk.workspace, weights="int4-sym-g8").weights
        assert given.of("a.down_proj").weights == read(desk.workspace, weights="int8").weights
        assert given.activations == read(desk.workspace, activations="int4-asym-token").activations

    def test_labels_and_inspect_say_them(self, desk: Desk) -> None:
        artifact = made(desk, read(desk.workspace, "W4A16-g8", weights="down_proj=int8,layers.0=none"))
        opened = open_subject(str(artifact.path), desk.workspace)
        found = labels_of(opened, desk.workspace)
        assert found["scheme"] == "W4A16-g8 (down_proj W8, layers.0 W16)"
        assert found["weights"].endswith("(down_proj int8-sym-channel-sbf16; layers.0 16 bits)")
        assert found["weights"] in found["executed"]
        facts, tables = describe_quantized(artifact, opened)
        assert facts["weights"] == found["weights"]
        assert {row[0] for row in tables["losses"].rows} == {f"model.layers.1.{module}" for module in OWN}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_each_linear_is_that_of_its_own_uniform_artifact(desk: Desk, method: str) -> None:
    scheme = read(desk.workspace, weights=MIXED)
    artifact = made(desk, scheme, method, propagate="none")
    texts = {text for own in OWN.values() for text in own if text}
    uniform = {text: made(desk, read(desk.workspace, weights=text), method, propagate="none") for text in texts}
    for layer in range(2):
        for module, own in OWN.items():
            name = f"model.layers.{layer}.{module}"
            ours = of_linear(artifact, name)
            theirs = of_linear(uniform[own[layer]], name) if own[layer] else {}
            assert ours.keys() == theirs.keys(), name
            assert all(torch.equal(ours[part], theirs[part]) for part in ours), name


def test_bits_are_those_of_each_linear(desk: Desk) -> None:
    text = "int4-sym-g8-sbf16,v_proj=int2-g8-sbf16,o_proj=none,layers.1.mlp=none"
    artifact = made(desk, read(desk.workspace, weights=text))
    opened = open_subject(str(artifact.path), desk.workspace)
    bits = count = 0.0
    for linear in opened.model.graph.linears:
        size = opened.model.places[f"{linear.name}.weight"].shape
        kept = linear.name.endswith("o_proj") or "1.mlp" in linear.name
        own = "" if kept else "int2-g8" if linear.name.endswith("v_proj") else "int4-sym-g8-sbf16"
        bits += BITS[own] * size[0] * size[1]
        count += size[0] * size[1]
    assert stored_bits(opened)["linears"] == pytest.approx(bits / count, rel=1e-12)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_dry_run_foretells_it(desk: Desk, method: str) -> None:
    scheme = read(desk.workspace, weights=MIXED, activations="int8-sym-token")
    request = MitigateRequest(str(desk.calibrate().path), method, scheme, true_sequential=True)
    told = json.loads(json.dumps(foresee(mitigate, request, desk.workspace).to_json()))
    artifact, _ = mitigate(request, desk.workspace)
    assert told["disk_bytes_at_least"] == sum(slot.nbytes for slot in artifact.header.slots.values())
    rows = {(row["module"], row["format"]): row for row in told["linears"]}
    assert {fmt for module, fmt in rows if module == "o_proj"} == {"16 bits"}
    assert rows["o_proj", "16 bits"]["linears"] == 2
    assert rows["o_proj", "16 bits"]["stored_bytes"] == 2 * 2 * 24 * 24
    assert rows["down_proj", "int8-sym-channel-sbf16"]["linears"] == 1
    assert sum(row["linears"] for row in rows.values()) == 14


def rounded_by_hand(desk: Desk, artifact: Artifact, wanted: Mapping[str, TensorScheme | None]) -> Tensor:
    """Logits of transformers with our weights and with inputs of linears rounded by the ending of their names."""
    subject = open_subject(str(artifact.path), desk.workspace).subject
    model = AutoModelForCausalLM.from_pretrained(desk.model, dtype=torch.float32).eval()
    for linear in subject.model.graph.linears:
        module = model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        if f"{linear.name}.codes" in artifact.header.slots:
            module.weight.data = subject.linear(linear).weight(subject.weight_grid(linear))
        scheme = next(own for ending, own in wanted.items() if linear.name.endswith(ending))
        if scheme is not None:
            rounding = Rounding(Grid.of(scheme, desk.workspace.plugins.format(scheme.format)))
            module.register_forward_pre_hook(lambda _, given, rounding=rounding: (rounding(given[0]),))
    with torch.no_grad():
        logits: Tensor = model(tokens()).logits
    return logits


def tokens() -> Tensor:
    return torch.randint(97, 123, (2, 12), generator=torch.Generator().manual_seed(3))


def test_activations_are_rounded_as_the_scheme_says_of_each_linear(desk: Desk) -> None:
    scheme = read(
        desk.workspace,
        weights="int4-g8,q_proj=none,o_proj=none",
        activations="int4-asym-token-sfp32,down_proj=int8-sym-token-sfp32,layers.1.mlp.[gu]*=none",
    )
    artifact = made(desk, scheme)
    four, eight = (
        read(desk.workspace, activations=f"int{text}-token-sfp32").activations for text in ("4-asym", "8-sym")
    )
    wanted = {
        "q_proj": None,  # its weights stay in 16 bits, so it reads what k_proj and v_proj read rounded as it is
        "o_proj": None,
        "down_proj": eight,
        "1.mlp.gate_proj": None,
        "1.mlp.up_proj": None,
        "": four,
    }
    subject = open_subject(str(artifact.path), desk.workspace).subject
    runs = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32)
    ours = torch.cat([logits for _, logits in runs.forward_windows(tokens())])
    torch.testing.assert_close(ours, rounded_by_hand(desk, artifact, wanted), rtol=0, atol=1e-5)
    for other in ({"q_proj": four}, {"down_proj": four}, {"1.mlp.up_proj": four}, {"o_proj": four}):
        assert (ours - rounded_by_hand(desk, artifact, other | wanted | other)).abs().max() > 1e-3, other


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {}),
        ("gptaq", {}),
        ("rtn+autoround", {"steps": "2", "batch": "1", "judged": "1"}),
        ("lwc", {"steps": "2", "batch": "1", "judged": "1"}),
        ("gptq+qwt", {"form": "affine"}),
        ("gptq+lorc", {"rank": "2"}),
    ],
)
def test_methods_solve_each_linear_on_its_own_grid(desk: Desk, method: str, settings: dict[str, str]) -> None:
    text = "int2-g8,down_proj=int8,k_proj=int4-asym-channel,o_proj=none,layers.1=none,layers.1.*.up_proj=int3"
    scheme = read(desk.workspace, weights=text, activations="int8-sym-token")
    artifact = made(desk, scheme, method, settings=settings)
    subject = open_subject(str(artifact.path), desk.workspace).subject
    found = {name.removesuffix(".codes") for name in artifact.header.slots if name.endswith(".codes")}
    kept = {"self_attn.o_proj"}
    assert found == {
        "model.layers.1.mlp.up_proj",
        *(f"model.layers.0.{module}" for module in OWN if module not in kept),
    }
    assert set(artifact.manifest.details["layers"]) == found
    for linear in subject.linears:
        weight = subject.folded(linear.layer)[f"{linear.spec.module}.weight"].double()
        solved = subject.linear(linear)
        stands = solved.weight(subject.weight_grid(linear)).double()
        if solved.adapter is not None:
            stands += solved.adapter.product(torch.float64)
        bound = {"down_proj": 0.03, "k_proj": 0.05, "up_proj": 0.8}.get(linear.name.rpartition(".")[2], 0.8)
        assert float((weight - stands).square().sum() / weight.square().sum()) < bound, linear.name


def test_a_block_that_stays_in_16_bits_is_no_trouble(desk: Desk) -> None:
    for method, settings in (("gptq", {}), ("gptq+qwt", {"form": "affine"})):
        scheme = read(desk.workspace, weights="int3-g8,layers.0=none", activations="int8-sym-token")
        artifact = made(desk, scheme, method, settings=settings)
        assert not [name for name in artifact.names() if "layers.0." in name]
        subject = open_subject(str(artifact.path), desk.workspace).subject
        runs = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float32)
        assert all(torch.isfinite(logits).all() for _, logits in runs.forward_windows(tokens()))


def test_static_scales_are_those_of_the_inputs_that_are_rounded(desk: Desk) -> None:
    scheme = read(desk.workspace, weights="fp4-g8-se4m3,down_proj=none,q_proj=none", activations="fp4-g8-se4m3")
    artifact = mitigate(MitigateRequest(str(desk.calibrate().path), "rtn", scheme), desk.workspace)[0]
    calibrated = {name.removesuffix(".input_global_scale") for name in artifact.names() if "input_global" in name}
    assert calibrated == {f"layers.{layer}.{site}" for layer in range(2) for site in ("attn_in", "o_in", "mlp_in")}


class TestExperts:
    def test_experts_have_a_scheme_and_routers_have_none(self) -> None:
        with tiny_model("mixtral") as tiny:
            mixed = read(tiny.workspace, weights="int4,experts=int8,experts.1=none", activations="int8-sym-token")
            source = str(tiny.path)
            artifact, _ = mitigate(MitigateRequest(source, "rtn", mixed), tiny.workspace)
            uniform, _ = mitigate(MitigateRequest(source, "rtn", read(tiny.workspace, weights="int8")), tiny.workspace)
            opened = open_subject(str(artifact.path), tiny.workspace)
            linears = [linear for linear in opened.model.graph.linears if linear.expert is not None]
            for linear in linears:
                ours, theirs = of_linear(artifact, linear.name), of_linear(uniform, linear.name)
                assert (ours.keys() == theirs.keys()) == (linear.expert != 1)
                assert all(torch.equal(ours[part], theirs[part]) for part in ours)
            assert not [name for name in artifact.names() if ".gate." in name or "router" in name]
            device, subject = torch.device("cpu"), opened.subject
            shared = linears[0].spec.reads
            assert subject.rounding(0, f"experts.1.{shared}", device) is None
            assert subject.rounding(0, f"experts.0.{shared}", device) is not None
            runs = BlockExecutable(subject, device=device, dtype=torch.float32)
            assert all(torch.isfinite(logits).all() for _, logits in runs.forward_windows(tokens()))


class TestTransforms:
    def test_trials_round_what_is_going_to_be_rounded(self, desk: Desk) -> None:
        """A site whose readers all stay in 16 bits shows no error; others show that of the scheme they have."""

        def errors(weights: str, activations: str = "") -> dict[str, float]:
            scheme = read(desk.workspace, weights=weights, activations=activations)
            subject, statistics = open_subject(str(desk.model), desk.workspace).subject, desk.calibrate()
            trials = context_of(subject, statistics, scheme=scheme).trials
            assert trials is not None
            trial = next(iter(trials(64)))
            return {site: trial.error({f"layers.0.{site}": []}) for site in ("attn_in", "o_in", "mlp_in", "up_down")}

        four, eight = errors("int4", "int4-asym-token"), errors("int8", "int4-asym-token")
        mixed = errors("int4,down_proj=int8,o_proj=none", "int4-asym-token")
        assert mixed == {"attn_in": four["attn_in"], "o_in": 0.0, "mlp_in": four["mlp_in"], "up_down": eight["up_down"]}
        assert 0 < eight["up_down"] < four["up_down"]
        apart = errors("int4,q_proj=none", "int4-asym-token")
        assert 0 < apart["attn_in"] != four["attn_in"]

    def test_blocks_are_the_groups_of_what_reads_a_site(self, desk: Desk) -> None:
        scheme = read(desk.workspace, weights="int4-g8,down_proj=int4-g4,o_proj=none", activations="int4-g2")
        subject = open_subject(str(desk.model), desk.workspace).subject
        context = context_of(subject, None, scheme=scheme)
        sizes = {
            kind: scale_group(context, subject.model.graph.site(f"layers.0.{kind}")) for kind in ("o_in", "up_down")
        }
        assert sizes == {"o_in": 128, "up_down": 4}
        assert scale_groups(context, subject.model.graph.site("layers.0.up_down")) == 4
        assert scale_groups(context, subject.model.graph.site("layers.0.mlp_in")) == 8

    def test_a_plan_for_other_exceptions_is_spoken_of(self, desk: Desk) -> None:
        scheme = read(desk.workspace, weights="int4,down_proj=int8")
        plan, _ = transform(TransformRequest(str(desk.model), "identity", scheme=scheme), desk.workspace)
        mitigate(MitigateRequest(str(plan.path), "rtn", scheme), desk.workspace)
        assert not desk.told
        mitigate(MitigateRequest(str(plan.path), "rtn", read(desk.workspace, weights="int4")), desk.workspace)
        assert "down_proj int8" in desk.told[0]
