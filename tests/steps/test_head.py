"""A quantized head: exceptions name it, it is solved behind the blocks, and bits count it in the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifacts.store import Artifact
from qtool.builtin.mitigators.gptq import GPTQ
from qtool.engine.execute import BlockExecutable
from qtool.engine.network import Network
from qtool.engine.problem import LayerProblem
from qtool.errors import QtoolError, SchemeError, UsageError
from qtool.model.graph import HEAD_IN
from qtool.steps.calibrate import WINDOWS
from qtool.steps.demand import demand_of
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import storage_of
from qtool.steps.subjects import Opened, open_subject
from qtool.testing import save_tiny_model, tiny_config
from tests.steps.conftest import Desk

GROUPS = "int4-sym-g8-sbf16"
BOTH = f"{GROUPS},lm_head=int8-sym-channel-sbf16"
GATHERED = ("hessian", "absmax", "saliency")


def made(
    desk: Desk,
    weights: str,
    method: str = "gptq",
    activations: str = "",
    token_weight: str = "uniform",
    **options: Any,  # noqa: ANN401
) -> Artifact:
    scheme = read_scheme("", {"weights": weights, "activations": activations}, desk.workspace.plugins)
    source = str(desk.calibrate(gather=GATHERED).path)
    request = MitigateRequest(source, method, scheme, dtype="float32", token_weight=token_weight, **options)
    return mitigate(request, desk.workspace)[0]


def opened(desk: Desk, artifact: Artifact) -> Opened:
    return open_subject(str(artifact.path), desk.workspace)


@pytest.mark.parametrize("weight", ["uniform", "gradient"])  # gradients are known of the blocks' linears only
def test_it_is_solved_from_what_the_quantized_blocks_put_out(desk: Desk, weight: str) -> None:
    with_head, without = (made(desk, weights, token_weight=weight) for weights in (BOTH, GROUPS))
    for name in without.header.slots:
        assert torch.equal(with_head.tensor(name), without.tensor(name)), name
    subject = opened(desk, with_head).subject
    network = Network(opened(desk, without).subject, device=torch.device("cpu"), dtype=torch.float32)
    seen: list[Tensor] = []
    network.load_all().get_submodule("lm_head").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    windows = desk.calibrate(gather=GATHERED).tensor(WINDOWS).long()
    network.module(windows, use_cache=False)
    x = torch.cat(seen).flatten(0, 1)
    head = subject.model.graph.head
    problem = LayerProblem(
        "lm_head", subject.stored("lm_head.weight").float(), subject.weight_grid(head), x.T @ x / len(x)
    )
    ours, oracle = subject.linear(head), GPTQ().quantize(problem, GPTQ.Config())
    assert (ours.codes == oracle.codes).float().mean() > 0.999
    nearest = opened(desk, made(desk, BOTH, "rtn")).subject.linear(head)
    assert (nearest.codes != ours.codes).float().mean() > 0.01


def test_its_input_is_rounded_as_the_scheme_says(desk: Desk) -> None:
    given = "int8-sym-token,lm_head=int4-sym-token-sfp32-full"
    subject = opened(desk, made(desk, BOTH, "rtn", given)).subject
    network = Network(subject, device=torch.device("cpu"), dtype=torch.float32)
    module, tokens = network.load_all(), torch.arange(12)[None]
    seen: list[Tensor] = []
    module.get_submodule("model.norm").register_forward_hook(lambda _m, _g, out: seen.append(out))
    logits = module(tokens, use_cache=False).logits
    grid, head = subject.input_grid(subject.model.graph.head), subject.linear(subject.model.graph.head)
    assert grid is not None
    x = seen[0][0]
    step = x.abs().amax(-1, keepdim=True) / 7
    rounded = (x / step).round().clamp(-8, 7) * step
    expected = rounded @ head.weight(subject.weight_grid(subject.model.graph.head)).T
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=2e-5)
    with network.exact(len(network.blocks)):
        plain = module(tokens, use_cache=False).logits
    torch.testing.assert_close(plain[0], x @ head.weight(subject.weight_grid(subject.model.graph.head)).T)
    assert network.sites[-1][HEAD_IN].rounding is not None


@pytest.mark.parametrize("method", ["gptq+lorc", "rtn+e2e-qp", "gptq+autoround", "target+gptq", "rtn+lwc"])
def test_methods_of_all_kinds_leave_it_quantized(desk: Desk, method: str) -> None:
    artifact = made(desk, BOTH, method, settings={"rank": "4"} if "lorc" in method else {})
    subject = opened(desk, artifact).subject
    found = subject.linear(subject.model.graph.head)
    assert (found.adapter is not None) == ("lorc" in method)
    network = Network(subject, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.arange(12)[None]
    seen: list[Tensor] = []
    network.load_all().get_submodule("model.norm").register_forward_hook(lambda _m, _g, out: seen.append(out))
    weight = found.weight(subject.weight_grid(subject.model.graph.head))
    weight = weight if found.adapter is None else weight + found.adapter.product()
    logits = network.module(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, seen[0] @ weight.T, rtol=0, atol=2e-5)
    assert "lm_head" in artifact.manifest.details["layers"]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("autoround", {}, "`autoround` sees whole blocks, and `lm_head`, which is to be quantized, is in none"),
        ("lwc", {}, "`lwc` sees whole blocks, .*\nhint: --method rtn\\+lwc, or"),
        ("target+qwt", {}, "`qwt` sees whole blocks, .*\nhint: --method target\\+gptq\\+qwt, or"),
        ("guidedquant", {}, "nobody gathers gradients at the output of `lm_head`"),
        ("gptq", {"propagate": "none"}, "statistics hold nothing of the input of `lm_head`"),
    ],
)
def test_what_cannot_round_it_is_refused_before_work(
    desk: Desk, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        made(desk, BOTH, method, **options)


def test_only_exceptions_that_name_it_are_for_it(desk: Desk) -> None:
    def scheme(weights: str) -> Any:  # noqa: ANN401
        return read_scheme("", {"weights": weights}, desk.workspace.plugins)

    assert scheme("int8").of("lm_head").weights is None
    assert scheme("int4,down_proj=int8,layers.0=int8").of("lm_head").weights is None
    assert scheme("int8,lm_head=int8").of("lm_head").weights == scheme("int8").weights
    assert scheme("int8,lm_head=none") == scheme("int8")
    for alone in ("model.*", "*"):  # for blocks as well as for an end
        assert scheme(f"int8,{alone}=none,lm_head=int8").of("model.layers.0.mlp.up_proj").weights is None
    assert scheme("int8,lm_head=int4").of("model.layers.0.mlp.up_proj").weights == scheme("int8").weights
    with pytest.raises(SchemeError, match="group size 16 does not divide the input of `lm_head`"):
        made(desk, f"{GROUPS},lm_head=int4-sym-g16")


@pytest.mark.parametrize("tied", [False, True])
def test_bits_count_it_in_the_model_and_not_in_the_linears_of_blocks(desk: Desk, tmp_path: Path, *, tied: bool) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    save_tiny_model(tmp_path / "model", config)
    own = replace(desk, model=tmp_path / "model")
    plain, found = opened(own, made(own, GROUPS, "rtn")), opened(own, made(own, BOTH, "rtn"))
    before, after = storage_of(plain), storage_of(found)
    assert before is not None
    assert after is not None
    assert after.bits["linears"] == before.bits["linears"]
    rows, columns = found.subject.shape(found.model.graph.head)
    shared = 0 if tied else 2 * rows * columns  # what the head took in 16 bits, if it was there
    assert sum(after.model.values()) == sum(before.model.values()) + rows * columns + 2 * rows - shared
    assert found.artifact is not None
    manifest = found.artifact.manifest
    demand = demand_of(manifest, found.model, own.workspace.plugins)
    assert demand is not None
    assert demand.disk == sum(slot.nbytes for slot in found.artifact.header.slots.values())


def test_an_interrupted_run_goes_on_behind_its_blocks(desk: Desk) -> None:
    workspace, _ = desk.watched(stop_after=1)
    scheme = read_scheme("", {"weights": BOTH}, desk.workspace.plugins)
    request = MitigateRequest(str(desk.calibrate().path), "gptq", scheme, dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        mitigate(request, workspace)
    again, _ = mitigate(request, desk.workspace)
    own = replace(request, output=desk.workspace.home / "whole.safetensors")
    assert again.manifest.id == mitigate(own, desk.workspace)[0].manifest.id


def test_evaluation_runs_it(desk: Desk) -> None:
    artifact = made(desk, "none,lm_head=int2-sym-channel-sbf16", "rtn")
    subject = opened(desk, artifact).subject
    whole = replace(subject, scheme=type(subject.scheme)(), quantized=None)
    tokens = torch.arange(12)[None]

    def logits(one: Any) -> Tensor:  # noqa: ANN401
        ((_, found),) = BlockExecutable(one, device=torch.device("cpu"), dtype=torch.float32, batch=1).forward_windows(
            tokens
        )
        return found

    assert (logits(subject) - logits(whole)).abs().max() > 1e-3
    with pytest.raises(QtoolError, match="no linear that is quantized"):
        made(desk, f"{GROUPS},lm_hed=int8")


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_blocks_see_the_embedding_as_it_is_quantized(desk: Desk, tmp_path: Path, method: str) -> None:
    """They are what they would be behind an embedding that has those values from the start."""
    coded = made(desk, f"{GROUPS},embed_tokens=int3-sym-channel-sbf16", method)
    subject = opened(desk, coded).subject
    embedding = subject.model.graph.embedding
    rounded = subject.linear(embedding).weight(subject.weight_grid(embedding))
    original = subject.stored("model.embed_tokens.weight")
    step = original.float().abs().amax(1, keepdim=True) / 4
    assert ((rounded - original).abs() <= step * 1.01).all()
    assert (rounded != original).float().mean() > 0.5

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = rounded.to(tensors["model.embed_tokens.weight"].dtype)

    plain = made(desk, GROUPS, method)
    behind = made(replace(desk, model=desk.copied(tmp_path / "changed", change)), GROUPS, method)
    alike = [name for name in plain.header.slots if name.endswith("codes")]
    same = [float((coded.tensor(name) == plain.tensor(name)).float().mean()) for name in alike]
    assert min(same) < 0.999
    if method == "gptq":  # the others compare with full precision, whose embedding is the original one
        assert all(torch.equal(coded.tensor(name), behind.tensor(name)) for name in alike)


def test_an_embedding_reads_tokens(desk: Desk) -> None:
    with pytest.raises(SchemeError, match="reads tokens, which are not rounded"):
        made(desk, f"{GROUPS},embed_tokens=int8", "rtn", "int8-token,embed_tokens=int8-token")
    with pytest.raises(SchemeError, match="reads tokens, which are not rounded"):
        made(desk, GROUPS, "rtn", "int8-token,embed_tokens=int8-token")


def test_exceptions_of_activations_without_effect_are_refused(desk: Desk) -> None:
    with pytest.raises(SchemeError, match="the input of `lm_head` is not rounded where its weights stay in 16 bits"):
        made(desk, GROUPS, "rtn", "int8-token,lm_head=int4-token")
    made(desk, BOTH, "rtn", "int8-token,lm_head=int4-token")
    made(desk, GROUPS, "rtn", "int8-token,*=int4-token")


@pytest.mark.parametrize("tied", [False, True])
def test_bits_count_an_embedding(desk: Desk, tmp_path: Path, *, tied: bool) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    save_tiny_model(tmp_path / "model", config)
    own = replace(desk, model=tmp_path / "model")
    plain = opened(own, made(own, GROUPS, "rtn"))
    found = opened(own, made(own, f"{GROUPS},embed_tokens=int8-sym-channel-sbf16", "rtn"))
    before, after = storage_of(plain), storage_of(found)
    assert before is not None
    assert after is not None
    assert after.bits["linears"] == before.bits["linears"]
    rows, columns = found.subject.shape(found.model.graph.embedding)
    shared = 0 if tied else 2 * rows * columns  # a tied head keeps the 16 bits that both had
    assert sum(after.model.values()) == sum(before.model.values()) + rows * columns + 2 * rows - shared


def test_a_dry_run_counts_no_correction_of_an_embedding(desk: Desk) -> None:
    artifact = made(desk, f"{BOTH},embed_tokens=int8-sym-channel-sbf16", "gptq+lorc", settings={"rank": "2"})
    demand = demand_of(artifact.manifest, opened(desk, artifact).model, desk.workspace.plugins)
    assert demand is not None
    assert demand.disk == sum(slot.nbytes for slot in artifact.header.slots.values())
