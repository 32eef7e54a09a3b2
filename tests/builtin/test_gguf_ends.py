"""Quantized heads and embeddings in GGUF files: once where llama.cpp may use one tensor for both, twice elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoConfig

from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.gguf import FILE, GGUF, GGUFHalf
from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import said
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.plugins import Plugins
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.schemes import read_scheme
from qtool.steps.storage import written_storage
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from qtool.testing.tiny_models import save_tiny_model
from tests.builtin.layouts.conftest import changed
from tests.builtin.packed import written
from tests.builtin.test_gguf import HALF, Q4_0, Q4_1, SIZES, altered, read, words

Make = Callable[..., Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Make:
    """Make a subject rounded to nearest, of a model whose head is tied to its embedding, or not."""
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def folder(family: str, changes: tuple[tuple[str, Any], ...], *, tied: bool) -> Path:
        path = tmp_path_factory.mktemp(family)
        config = {**SIZES, "tie_word_embeddings": tied, **dict(changes)}
        save_tiny_model(path, AutoConfig.for_model(family, **config))
        words().save_pretrained(path)
        return path

    @lru_cache
    def made(
        weights: str, family: str = "llama", changes: tuple[tuple[str, Any], ...] = (), *, tied: bool = False
    ) -> Subject:
        scheme = read_scheme("", {"weights": weights}, plugins)
        request = MitigateRequest(str(folder(family, changes, tied=tied)), "rtn", scheme, {}, dtype="float32")
        return open_subject(str(mitigate(request, workspace)[0].path), workspace).subject

    return made


def of_both(head: str, embedding: str, rest: str = Q4_0) -> str:
    return f"{rest},lm_head={head},embed_tokens={embedding}"


def dense(subject: Subject, end: LinearSite) -> np.ndarray:
    return subject.linear(end).weight(subject.weight_grid(end)).numpy()


def values(directory: Path, name: str) -> np.ndarray:
    tensor = read(directory)[name]
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weights", "head", "embedding"),
    [
        (f"{Q4_0},lm_head={HALF}", "Q8_0", ""),
        (f"{Q4_0},embed_tokens=int8-sym-channel-sfp16", "", "Q8_0"),
        (of_both("mxfp4", Q4_1, HALF), "MXFP4", "Q4_1"),
        (of_both("nvfp4", HALF), "NVFP4", "Q8_0"),
        (f"none,lm_head={Q4_0}", "Q4_0", ""),
    ],
)
def test_a_file_holds_their_codes_as_they_are(
    make: Make, tmp_path: Path, weights: str, head: str, embedding: str, *, tied: bool
) -> None:
    subject = make(weights, tied=tied)
    exported = written(GGUF(), subject, tmp_path / "out")
    tensors, graph = read(tmp_path / "out"), subject.model.graph
    kinds = [tensors[name].tensor_type.name for name in ("output.weight", "token_embd.weight")]
    assert kinds == [head or "F16", embedding or "F16"]
    for kind, name, end in ((head, "output", graph.head), (embedding, "token_embd", graph.embedding)):
        scale = float(tensors[f"{name}.scale"].data[0]) if kind == "NVFP4" else 1.0
        expected = dense(subject, end) if kind else subject.stored(f"{end.name}.weight").half().float().numpy()
        rtol = 3e-7 if kind == "NVFP4" else 0
        np.testing.assert_allclose(values(tmp_path / "out", f"{name}.weight") * scale, expected, rtol=rtol, atol=0)
    sizes = exported.details["bytes"]
    of_ends = [name for kind, name in ((head, "output"), (embedding, "token_embd")) if kind]
    assert sum(sizes["ends"].values()) == sum(
        tensor.n_bytes for name, tensor in tensors.items() if name.partition(".")[0] in of_ends
    )
    assert sizes["model"] == sum(tensor.n_bytes for tensor in tensors.values())
    assert sum(written_storage(subject.model, sizes).model.values()) == sizes["model"]
    stored = " and ".join(dict.fromkeys((embedding or "float16", head or "float16")))
    assert f"embedding and head in {stored}" in exported.consumers["llama.cpp"]
    cases = read_checkpoint(tmp_path / "out", lambda name: subject.plugins.format(name).bits)
    assert f"embedding and head in {stored}" in said(cases)["llama.cpp"]
    file_type = gguf.GGUFReader(tmp_path / "out" / FILE).fields["general.file_type"].contents()
    most = weights.partition(",")[0]
    expected_type = {"none": "MOSTLY_F16", HALF: "MOSTLY_Q8_0", Q4_0: "MOSTLY_Q4_0"}[most]
    assert gguf.LlamaFileType(file_type).name == expected_type


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_same_codes_are_written_once(make: Make, tmp_path: Path, family: str) -> None:
    subject = make(of_both(HALF, HALF), family, tied=True)
    exported = written(GGUF(), subject, tmp_path / "out")
    tensors = read(tmp_path / "out")
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert sum(exported.details["bytes"]["ends"].values()) == tensors["token_embd.weight"].n_bytes
    assert "embedding and head in Q8_0" in exported.consumers["llama.cpp"]
    for end in subject.model.graph.ends:
        assert np.array_equal(values(tmp_path / "out", "token_embd.weight"), dense(subject, end))
    written(GGUFHalf(), subject, tmp_path / "half")
    assert "output.weight" not in read(tmp_path / "half")


@pytest.mark.parametrize("exporter", [GGUF(), GGUFHalf()])
@pytest.mark.parametrize("leaf", ["codes", "scale"])
def test_codes_or_scales_that_differ_are_two_tensors_or_none(
    make: Make, tmp_path: Path, leaf: str, exporter: GGUF | GGUFHalf
) -> None:
    for family in ("llama", "gemma"):
        plain = make(of_both(HALF, HALF), family, tied=True)
        assert plain.quantized is not None
        first = plain.quantized.tensor(f"lm_head.{leaf}").clone()
        first[-1, -1] = first[-1, -1] * 2 if leaf == "scale" else first[-1, -1] ^ 1
        subject = changed(plain, tmp_path / family, **{f"lm_head.{leaf}": first})
        if family == "gemma":
            with pytest.raises(UsageError, match="does not run a head beside the embedding"):
                exporter.check(subject)
            continue
        written(exporter, subject, tmp_path / "out")
        assert {"output.weight", "token_embd.weight"} <= read(tmp_path / "out").keys()


def test_a_head_alone_is_refused_where_the_embedding_stands_for_it(make: Make) -> None:
    for weights in (f"{Q4_0},lm_head={HALF}", f"{Q4_0},embed_tokens={HALF}", of_both(HALF, Q4_0)):
        with pytest.raises(UsageError, match="does not run a head beside the embedding"):
            GGUF().check(make(weights, "gemma", tied=True))


@pytest.mark.parametrize("tied", [False, True])
def test_float16_has_them_decoded(make: Make, tmp_path: Path, *, tied: bool) -> None:
    subject = make("int3-asym-g32,lm_head=fp8-channel,embed_tokens=int5-sym-g16", tied=tied)
    exported = written(GGUFHalf(), subject, tmp_path / "out")
    graph = subject.model.graph
    for name, end in (("output.weight", graph.head), ("token_embd.weight", graph.embedding)):
        assert read(tmp_path / "out")[name].tensor_type.name == "F16"
        assert np.array_equal(values(tmp_path / "out", name), dense(subject, end).astype("float16").astype("float32"))
    assert "embedding and head in float16" in exported.consumers["llama.cpp"]


@pytest.mark.parametrize("name", ["output.weight", "token_embd.weight"])
def test_a_bit_that_differs_is_noticed(make: Make, tmp_path: Path, name: str) -> None:
    subject = make(of_both(HALF, Q4_0))
    written(GGUF(), subject, tmp_path / "out")
    for place in (0, -1, 777):
        altered(tmp_path / "out", name, lambda own, at=place: own.__setitem__(at, own[at] ^ 1))  # type: ignore[misc]
        with pytest.raises(ArtifactError, match=f"`{name}` that was written is not what was quantized"):
            GGUF().verify(subject, tmp_path / "out")
        altered(tmp_path / "out", name, lambda own, at=place: own.__setitem__(at, own[at] ^ 1))  # type: ignore[misc]
    GGUF().verify(subject, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_those_of_a_packed_checkpoint_go_over_too(make: Make, tmp_path: Path, cache: Path, *, tied: bool) -> None:
    subject = make(of_both("int8-sym-g32-sbf16", "int8-sym-g32-sbf16", "int4-sym-g32-sbf16"), tied=tied)
    written(CompressedTensors(), subject, tmp_path / "ct")
    back = open_packed(tmp_path / "ct", subject.plugins, cache=cache)
    for source, name in ((subject, "one"), (back, "other")):
        written(GGUF(), source, tmp_path / name)
    one, other = (read(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert ("output.weight" in one) != tied
    coded = [name for name, tensor in one.items() if tensor.data.dtype == np.uint8 and len(tensor.shape) > 1]
    assert {"token_embd.weight", "blk.1.ffn_up.weight"} <= set(coded)
    assert all(np.array_equal(one[name].data, other[name].data) for name in coded)


def test_types_that_llama_cpp_would_decode_as_something_else_are_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="no scale of the embedding as a whole") as refused:
        GGUF().check(make(of_both(HALF, "nvfp4")))
    assert "embed_tokens=mxfp4" in refused.value.hint
    GGUF().check(make(of_both(HALF, "mxfp4")))
    with pytest.raises(UsageError, match="NVFP4 of `qwen2`"):
        GGUF().check(make(f"{Q4_0},lm_head=nvfp4", "qwen2", (("head_dim", 16),)))
    with pytest.raises(SchemeError, match="no type for `int6`"):
        GGUF().check(make(f"{Q4_0},lm_head=int6-sym-g32"))
    with pytest.raises(SchemeError, match="more digits") as caught:
        GGUF().check(make(f"{Q4_0},lm_head=int8-sym-g32-sfp32"))
    assert ("first", "lm_head") in caught.value.facts
