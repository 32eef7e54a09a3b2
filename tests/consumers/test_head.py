"""Quantized heads and embeddings: who is told of them by the config, and who has a place for them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtool.consumers.case import EMBEDDINGS, HEADS
from qtool.consumers.checkpoint import read_checkpoint
from qtool.model.family import Family
from qtool.model.naming import stored_name
from qtool.plugins import Plugins
from tests.consumers.known import FP8_BLOCK, GPTQ, Config, asked, compressed

W4A16 = compressed("pack-quantized", "int4-sym-group64-static")
NAMED = "refused: the head is quantized, and it takes a head for quantized only where a group has `lm_head`"
GPUS = ("sm80", "sm90", "sm100")


def naming(config: Config, *names: str, ignore: tuple[str, ...] = ()) -> Config:
    changed = deepcopy(config)
    changed["config_groups"]["group_0"]["targets"] += names
    return {**changed, "ignore": list(ignore)}


@pytest.mark.parametrize(
    ("consumer", "devices", "verdict"),
    [("vllm", ("cpu", *GPUS), "refuses"), ("sglang", GPUS, "unknown"), ("transformers", ("any",), "loads")],
)
def test_engines_take_a_head_for_quantized_where_the_config_names_it(
    consumer: str, devices: tuple[str, ...], verdict: str
) -> None:
    for device in devices:
        named, plain = asked(naming(W4A16, "lm_head"), consumer, device), asked(W4A16, consumer, device)
        assert (named.verdict, named.says, named.kernel) == (plain.verdict, plain.says, plain.kernel)
        unnamed = asked(W4A16, consumer, device, head="unnamed")
        assert unnamed.verdict == verdict
        if verdict == "refuses":
            assert unnamed.says.startswith(NAMED)
            assert unnamed.message.startswith("There is no module or parameter named 'lm_head.")


def test_a_head_in_blocks_is_refused_by_engines() -> None:
    config = naming(FP8_BLOCK, "lm_head")
    for consumer in ("vllm", "sglang"):
        assert asked(config, consumer, "sm90").says.startswith("refused: scales of a head are of all of it, of rows")
    assert asked(config, "transformers", "any").verdict == asked(FP8_BLOCK, "transformers", "any").verdict


def test_a_head_that_is_ignored_is_none_of_the_linears() -> None:
    config = naming(W4A16, "lm_head", ignore=("lm_head",))
    assert asked(config, "vllm", "sm90") == asked(W4A16, "vllm", "sm90")


def test_of_a_head_in_other_layouts_nothing_is_known() -> None:
    assert "no rule speaks of head" in asked(GPTQ, "vllm", "sm90", head="unnamed").says


@pytest.mark.parametrize(
    ("targets", "stored", "head"),
    [
        (["Linear"], "lm_head.weight_packed", "unnamed"),
        (["lm_head", "Linear"], "lm_head.weight_packed", "named"),
        (["re:.*lm_head$", "Linear"], "lm_head.weight_packed", "named"),
        (["Linear"], "lm_head.weight", ""),
        (["Linear"], "embed_out.weight_packed", "unnamed"),
        (["embed_out", "Linear"], "embed_out.weight_packed", "named"),
        (["re:.*embed_out$", "Linear"], "embed_out.weight_packed", "named"),
    ],
)
def test_files_tell_whether_the_head_is_quantized(tmp_path: Path, targets: list[str], stored: str, head: str) -> None:
    config = deepcopy(W4A16)
    config["config_groups"]["group_0"]["targets"] = targets
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    names = (stored, "model.layers.0.mlp.up_proj.weight_packed")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    assert [case.head for case in read_checkpoint(tmp_path, lambda _: 4)] == [head]


@pytest.mark.parametrize(
    ("weights", "consumer", "device", "verdict", "says"),
    [
        ("int4-sym-group64-static", "vllm", "sm90", "loads", "W4A16"),
        ("int3-sym-group64-static", "vllm", "sm90", "executes-other", "cannot be read: it takes codes of an embedding"),
        ("int4-asym-group64-static", "vllm", "sm90", "refuses", "refused: its embeddings have no zero points"),
        ("int4-sym-group64-static", "vllm", "cpu", "refuses", "refused: it looks embeddings up by Triton"),
        ("int4-sym-group64-static", "sglang", "sm90", "refuses", "refused: it has embeddings in 16 bits only"),
        ("int4-sym-group64-static", "transformers", "any", "refuses", "refused: it fills the weight of an embedding"),
    ],
)
def test_packed_embeddings(weights: str, consumer: str, device: str, verdict: str, says: str) -> None:
    found = asked(naming(compressed("pack-quantized", weights), "Embedding"), consumer, device)
    assert found.verdict == verdict
    assert found.says.startswith(says)
    by_name = asked(naming(compressed("pack-quantized", weights), "model.embed_tokens"), consumer, device)
    assert by_name.verdict == (verdict if consumer != "vllm" else "unknown")


def test_floats_of_an_embedding_are_read_by_transformers_alone() -> None:
    config = naming(compressed("float-quantized", "float8-sym-channel-static"), "Embedding")
    assert asked(config, "transformers", "any").verdict == "loads"
    assert asked(config, "vllm", "sm90").says.startswith("refused: its embeddings are integers")


def test_files_tell_of_an_embedding_that_the_config_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": W4A16}))
    names = ("model.embed_tokens.weight_packed", "model.layers.0.mlp.up_proj.weight_packed")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    assert [case.embedding for case in read_checkpoint(tmp_path, lambda _: 4)] == ["named"]


def test_the_ends_of_every_family_are_known_by_their_names() -> None:
    plugins = Plugins.discover()
    families: list[Family] = [plugins.load("families", name) for name in plugins.offers["families"]]
    for family in families:
        for known, name in ((HEADS, family.head), (EMBEDDINGS, family.embedding)):
            names = {name, stored_name(f"{name}.weight", family).removesuffix(".weight")}
            assert {one.rpartition(".")[2] for one in names} <= {*known}, family.name
