"""vLLM on a CPU executes what the table of consumers says: log-probabilities of a prompt, layout by layout.

vLLM computes in bfloat16 here, and so does qtool for comparison: how far that alone is from float32 is the measure.
Nearly all checkpoints are read in one process, which says what kernels each of them has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import Answer, answer
from qtool.engine.cache import CacheRounding
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.numerics.operators import Operator
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.schemes import read_scheme
from qtool.steps.subjects import open_subject
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.workspace import Workspace
from tests.builtin.layouts.vllm_environment import NoVLLMError, vllm_python
from tests.builtin.reader_process import ReaderProcess

pytestmark = [pytest.mark.slow, pytest.mark.network]
SCRIPT = Path(__file__).with_name("read_with_vllm.py")
TEXT = Path(__file__).parents[3] / "LICENSE"
SIGNED = "int4-sym-g64-signed_full"
MIXED = f"{SIGNED},down_proj=int4-sym-g32"
HALF = "int8-sym-token-sfp32-half"
ATTENTION = "queries=fp8-tensor-static,keys=fp8-tensor-static,values=fp8-tensor-static"
CT, INTEGERS = "compressed-tensors", "CPUWNA16LinearKernel"
BYTES, FLOATS = "CPUInt8ScaledMMLinearKernel", "ChannelWiseTorchFP8ScaledMMLinearKernel"
# The first tokens of the text that `tiny` is evaluated on
PROMPT = (
    39, 290, 310, 77, 265, 268, 260, 338, 265, 358, 284, 406, 290, 310, 77, 265, 268, 260, 637, 291,
    315, 268, 597, 524, 564, 266, 837, 26, 199, 199, 41, 84, 326, 344, 274, 413, 355, 73, 288, 271,
    266, 279, 70, 65, 500, 318, 327, 507, 360, 260, 221, 22, 445, 479, 268, 260,
)  # fmt: skip


class Scheme(NamedTuple):
    weights: str
    activations: str
    kv: str
    to: str
    plan: str = ""  # what transforms the model first
    outputs: str = ""


class Result(NamedTuple):
    """Log-probabilities, the kernels of linears, and what refused."""

    values: list[float]
    kernels: list[str]
    message: str


Packed = Callable[..., tuple[Subject, Path]]
Read = Callable[..., Mapping[str, Result]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Packed:
    plugins = Plugins.discover()
    workspace = Workspace(plugins, tmp_path_factory.mktemp("home"), cache)

    @lru_cache
    def calibrated(model: str, gather: tuple[str, ...]) -> str:
        asked = CalibrateRequest(model, "sotu", num_samples=8, seq_len=128, gather=gather, dtype="float32")
        return str(calibrate(asked, workspace)[0].path)

    def made(scheme: Scheme, model: str = "tiny") -> tuple[Subject, Path]:
        parts = {name: getattr(scheme, name) for name in ("weights", "activations", "kv", "outputs")}
        whole, source = read_scheme("", parts, plugins), model
        if scheme.plan:
            plan, _ = transform(TransformRequest(model, scheme.plan, scheme=whole), workspace)
            source = str(plan.path)
        if scheme.outputs == "nvfp4" or any(part.endswith("-static") for part in parts.values()):
            source = calibrated(model, ("absmax",) if scheme.activations.endswith("-static") else ())
        artifact, _ = mitigate(MitigateRequest(source, "rtn", whole, {}, dtype="float32"), workspace)
        checkpoint, _ = pack(PackRequest(str(artifact.path), scheme.to), workspace)
        return open_subject(str(artifact.path), workspace).subject, checkpoint.path

    return made


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """Read folders with vLLM; without an environment for it the tests are skipped, never passed."""
    base = tmp_path_factory.getbasetemp()
    try:
        python = vllm_python(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    except NoVLLMError as error:
        pytest.skip(f"vLLM was not run: {error}")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    of_vllm = {
        "TORCHDYNAMO_DISABLE": "1",  # only the counting of ranks is compiled, for ten seconds a checkpoint
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }

    reader = ReaderProcess((python, SCRIPT), kept | of_vllm, tmp_path_factory.mktemp("vllm") / "log.txt")

    def results(folders: list[Path], prompt: Sequence[int] = PROMPT, *, alone: bool = False) -> Mapping[str, Result]:
        names = [str(folder) for folder in folders]
        if alone:
            reader.close()
        answers = reader.ask([prompt, names], seconds=900)
        if alone:
            reader.close()
        return {name: Result(*answer) for name, answer in zip(names, answers, strict=True)}

    yield results
    reader.close()


def ours(subject: Subject, dtype: torch.dtype, prompt: Sequence[int] = PROMPT) -> Tensor:
    """Log-probabilities of the prompt in qtool's own forward pass."""
    tokens = torch.tensor([prompt])
    executable = BlockExecutable(subject, device=torch.device("cpu"), dtype=dtype, batch=1)
    ((_, logits),) = executable.forward_windows(tokens)
    return logits.double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]


def told(directory: Path) -> Answer:
    return answer(read_checkpoint(directory, lambda name: Plugins.discover().format(name).bits), "vllm", "cpu")


EXECUTED = {
    INTEGERS: {
        Scheme(SIGNED, "", "", CT): "loads",
        Scheme("int4-asym-g64", "", "", CT): "loads",
        **dict.fromkeys((Scheme(f"int4-sym-{size}", "", "", CT) for size in ("channel", "g128")), "loads"),
        **dict.fromkeys((Scheme(f"int4-asym-{size}", "", "", CT) for size in ("channel", "g32", "g16")), "loads"),
        **dict.fromkeys((Scheme(f"int4-sym-{size}", "", "", "gptq") for size in ("g32", "g128")), "loads"),
        **dict.fromkeys((Scheme(f"int4-asym-{size}", "", "", "awq") for size in ("g32", "g16")), "loads"),
        Scheme("int4-sym-channel", "", "", "gptq-v2"): "loads",
        Scheme("int4-sym-channel", HALF, "", CT): "executes-other",
        Scheme("int4-sym-g64", "int4-sym-g64-sfp32-half", "", CT): "executes-other",
        Scheme(SIGNED, "", "", "gptq"): "loads",
        Scheme(SIGNED, "", "", "gptq-v2"): "loads",
        Scheme("int4-asym-g64", "", "", "awq"): "loads",
        Scheme(SIGNED, "", "", "awq"): "loads",
        Scheme(SIGNED, "int8-sym-token", "", CT): "executes-other",
        Scheme(SIGNED, "", "fp8-tensor", CT): "executes-other",
        Scheme("int4-sym-g128", "int4-sym-token-sfp32-half", "", CT): "executes-other",  # W4A4_SYM
        Scheme(MIXED, "", "", CT): "loads",
        Scheme(MIXED, "", "", "gptq"): "loads",
        Scheme(f"{SIGNED},down_proj=none", "", "", "gptq"): "loads",
        Scheme("int4-sym-channel", "", "", "gptq"): "loads",
        Scheme("int4-asym-channel", "", "", "awq"): "loads",
        Scheme(f"{SIGNED},lm_head=int4-sym-channel", "", "", CT): "loads",
    },
    f"{BYTES}, {INTEGERS}": {
        Scheme(f"{SIGNED},down_proj=int8-sym-channel", f"none,down_proj={HALF}", "", CT): "loads",
    },
    BYTES: {
        Scheme("int8-sym-channel", HALF, "", CT): "loads",
        Scheme("int8-sym-tensor", HALF, "", CT): "loads",
        Scheme("int8-sym-channel", "int8-asym-token-sfp32", "", CT): "loads",
        Scheme("int8-sym-channel,lm_head=int8-sym-channel", f"{HALF},lm_head={HALF}", "", CT): "loads",
        Scheme("int8-sym-channel", "int8-asym-tensor-c0.02-static", "", CT): "loads",
    },
    FLOATS: {
        Scheme("fp8-channel", "fp8-token", "", CT): "loads",
        Scheme("fp8-channel,lm_head=fp8-channel", "fp8-token,lm_head=fp8-token", "", CT): "loads",
        Scheme("fp8-channel", "fp8-token", "", "modelopt"): "loads",
    },
}


def test_vllm_executes_what_the_table_says(packed: Packed, read: Read) -> None:
    cases = [(scheme, kernel, verdict) for kernel, own in EXECUTED.items() for scheme, verdict in own.items()]
    made = {scheme: packed(scheme) for scheme, _, _ in cases}
    found = read([directory for _, directory in made.values()])
    for scheme, kernel, verdict in cases:
        subject, directory = made[scheme]
        said, result = told(directory), found[str(directory)]
        assert (said.verdict, said.known) == (verdict, "run on a CPU"), scheme
        assert not result.message, scheme
        assert result.kernels == sorted(said.kernel.split(", ")) == kernel.split(", "), scheme
        assert_executed(subject, scheme, verdict, result.values)


def _with_less(scale: Tensor) -> Tensor:
    """Return scales of which that of the last head, if there are several, is too small for most values."""
    if scale.numel() == 1:
        return scale
    return torch.cat((scale[:-1], scale[-1:] / 16))


class TowardZero(CacheRounding):
    """A cache in FP8 with the scales that were found, of which each value is the next one nearer to zero.

    All heads of a block have the largest of theirs; ``_with_less`` has been there before.
    """

    shared: ClassVar[bool] = True

    def by_token(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x, rounding in ((key, self.keys), (value, self.values)):
            assert rounding is not None
            (scale,) = rounding.global_scales
            assert scale is not None
            scale = _with_less(scale).amax() if self.shared else _with_less(scale)
            steps = (x.float() / scale).clamp(-448, 448)
            unit = 2.0 ** (steps.abs().clamp_min(2.0**-6).log2().floor() - 3)  # 2**-9 below the least normal number
            found.append(((steps / unit).trunc() * unit * scale).to(x.dtype))
        return found[0], found[1]


class EachTowardZero(TowardZero):
    """What it would be with the scale of each head."""

    shared = False


class CachedTowardZero(Subject):
    kind: ClassVar[type[TowardZero]] = TowardZero

    def kv_path(self, layer: int, device: torch.device) -> tuple[tuple[Operator, ...], CacheRounding | None]:
        operators, cache = super().kv_path(layer, device)
        assert cache is not None
        return operators, self.kind(cache.keys, cache.values)


class CachedEachTowardZero(CachedTowardZero):
    kind = EachTowardZero


@pytest.mark.parametrize(
    ("scheme", "kernel", "scales"),
    [
        (Scheme(SIGNED, "", "fp8-tensor-static", CT), INTEGERS, "the scales that are stored"),
        (Scheme("fp8-channel", "fp8-token", "fp8-tensor-static", "modelopt"), FLOATS, "the scales that are stored"),
        (Scheme(SIGNED, "", "fp8-head-static", CT), INTEGERS, "the largest of the scales of a block's heads for all"),
        (Scheme(SIGNED, "", ATTENTION, CT), INTEGERS, "the scales that are stored"),
    ],
)
def test_vllm_reads_the_scales_of_a_cache_and_rounds_toward_zero(
    packed: Packed, read: Read, scheme: Scheme, kernel: str, scales: str
) -> None:
    subject, directory = packed(scheme)
    (file,) = directory.glob("*.safetensors")
    held = {
        name: _with_less(one) if name.endswith(("k_scale", "v_scale")) else one for name, one in load_file(file).items()
    }
    save_file(held, file, {"format": "pt"})
    said, result = told(directory), read([directory])[str(directory)]
    assert (said.verdict, said.known) == ("executes-other", "run on a CPU")
    left = "; queries are NOT quantized" if scheme.kv == ATTENTION else ""
    assert said.says.endswith(f"; FP8 KV cache with {scales}, but rounded toward zero{left}")
    assert (result.kernels, result.message) == ([kernel], "")
    parts = (subject.model, subject.plugins, subject.plan, subject.scheme, subject.quantized)
    cut = CachedTowardZero(*parts)
    exact, half = ours(cut, torch.float32), ours(cut, torch.bfloat16)
    theirs = torch.tensor(result.values, dtype=torch.float64)
    others = {
        "nearest": ours(subject, torch.float32),
        "none": ours(replace(subject, scheme=replace(subject.scheme, kv=None)), torch.float32),
    }
    if "head" in scheme.kv:
        others["each"] = ours(CachedEachTowardZero(*parts), torch.float32)
    apart, noise = (float((x - exact).abs().mean()) for x in (theirs, half))
    far = {name: float((theirs - other).abs().mean()) for name, other in others.items()}
    print(f"{scheme}: {apart:.4f}, bfloat16 {noise:.4f}, of others {far}")  # noqa: T201
    assert apart < 1.5 * noise
    assert all(other > 1.1 * apart for other in far.values())


def test_vllm_serves_a_real_model(packed: Packed, read: Read) -> None:
    scheme = Scheme(SIGNED, "", "", CT)
    subject, directory = packed(scheme, "smollm2-135m")
    prompt = subject.model.tokenizer()(TEXT.read_text())["input_ids"][: len(PROMPT)]
    result = read([directory], prompt)[str(directory)]
    assert (result.kernels, result.message) == ([INTEGERS], "")
    assert_executed(subject, scheme, "loads", result.values, prompt)


def assert_executed(
    subject: Subject, scheme: Scheme, verdict: str, values: list[float], prompt: Sequence[int] = PROMPT
) -> None:
    """Say that log-probabilities are qtool's, as far as bfloat16 goes, of what is meant to be executed."""
    theirs = torch.tensor(values, dtype=torch.float64)
    rules = tuple(rule for rule in subject.scheme.rules if rule.part == "weights")
    bare = replace(subject, scheme=replace(subject.scheme, activations=None, kv=None, rules=rules))
    meant = bare if verdict == "executes-other" else subject
    exact, half = ours(meant, torch.float32, prompt), ours(meant, torch.bfloat16, prompt)
    whole = ours(replace(subject, scheme=ModelScheme(), quantized=None), torch.float32, prompt)
    apart, noise, effect = (float((x - exact).abs().mean()) for x in (theirs, half, whole))
    lost = float((ours(subject, torch.float32, prompt) - exact).abs().mean())
    print(f"{scheme}: {apart:.4f}, bfloat16 {noise:.4f}, effect {effect:.4f}, of what is lost {lost:.4f}")  # noqa: T201
    if scheme.kv:  # a cache in FP8, and not with the scale that was measured
        assert 2 * noise < apart < 0.5 * effect, scheme
        return
    assert apart < 1.5 * noise, scheme
    if meant.scheme.activations is None:
        assert apart < 0.25 * effect, scheme
    if verdict == "executes-other":
        assert apart < 0.25 * lost, scheme


REFUSED = {
    Scheme(SIGNED, "", "", CT, "quarot"): "'HadamardTransform' object has no attribute 'cpu_linear'",
    Scheme(SIGNED, "", "", CT, "block-hadamard"): "'_OpNamespace' '_C' object has no attribute 'hadacore_transform'",
    Scheme(f"{SIGNED},down_proj=int8-sym-g64", "", "", "gptq"): "Marlin does not support weight_bits = uint8b128",
    Scheme("fp8-tensor", "fp8-tensor", "", "modelopt"): "_C::static_scaled_fp8_quant() expected at most 0 argument(s)",
    Scheme(f"{SIGNED},embed_tokens=int4-sym-g64", "", "", CT): "module 'triton' has no attribute 'next_power_of_2'",
    Scheme(f"{SIGNED},embed_tokens=int4-asym-g64", "", "", CT): "There is no module or parameter named",
    Scheme(SIGNED, "", "int8-tensor-static", CT): "Currently supported kv cache quantization is num_bits=8, type=float",
    Scheme("int8-sym-channel", "", "", CT): "Failed to find a kernel that can implement the WNA16 linear layer",
    Scheme("int3-sym-g64", "", "", CT): "Failed to find a kernel that can implement the WNA16 linear layer",
    Scheme("int2-sym-g64", "", "", CT): "Failed to find a kernel that can implement the WNA16 linear layer",
    Scheme("int3-asym-g64", "", "", CT): "Failed to find a kernel that can implement the WNA16 linear layer",
    Scheme("int4-sym-channel", "int4-asym-token", "", CT): "No compressed-tensors compatible scheme was found",
    Scheme("int8-sym-channel", "int8-sym-tensor", "", CT): "No compressed-tensors compatible scheme was found",
    Scheme("fp8-channel", "", "", CT): "Failed to find a kernel that can implement the ScaledMM linear layer",
    Scheme("fp8-tensor", "fp8-tensor", "", CT): "_C::static_scaled_fp8_quant() expected at most 0 argument(s)",
    Scheme("fp8-tensor", "fp8-token", "", CT): "_C::static_scaled_fp8_quant() expected at most 0 argument(s)",
    Scheme("fp8-channel", "fp8-tensor-static", "", CT): "narrow() cannot be applied to a 0-dim tensor",
    Scheme("fp8-g64", "", "", CT): "'NoneType' object has no attribute 'num_bits'",
    Scheme("fp8-g64", "fp8-token", "", CT): "No compressed-tensors compatible scheme was found",
    Scheme("mxfp4", "", "", CT): "Failed to find a kernel that can implement the MXFP4 linear layer",
    Scheme("mxfp4", "mxfp4", "", CT): "Failed to find a kernel that can implement the MXFP4 linear layer",
    Scheme("nvfp4", "", "", CT): "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported",
    Scheme("nvfp4", "", "", "modelopt"): "MarlinNvFp4LinearKernel is not supported",
    Scheme("int4-asym-g64", "", "", "gptq-v2"): "Unsupported quantization config: bits=4, sym=False",
    Scheme("int3-sym-g64", "", "", "gptq"): "Unsupported quantization config: bits=3, sym=True",
    Scheme("int8-sym-channel", "", "", "gptq"): "Marlin does not support weight_bits = uint8b128",
    Scheme("int4-sym-g16", "", "", "gptq"): "Marlin does not support group_size = 16",
}


def test_vllm_on_a_cpu_refuses_what_the_table_says_with_its_message(packed: Packed, read: Read) -> None:
    folders = {scheme: packed(scheme)[1] for scheme in REFUSED}
    found = read(list(folders.values()))
    for scheme, reason in REFUSED.items():
        result, said = found[str(folders[scheme])], told(folders[scheme])
        assert not result.values, scheme
        assert reason in result.message, scheme
        assert (said.verdict, said.known) == ("refuses", "run on a CPU"), scheme
        assert said.message, scheme
        assert said.message in result.message, scheme


def test_vllm_rounds_inputs_per_token_where_the_config_says_per_tensor(packed: Packed, read: Read) -> None:
    per_token, per_tensor = (packed(Scheme("fp8-channel", f"fp8-{how}", "", CT))[1] for how in ("token", "tensor"))
    found = read([per_token, per_tensor])
    assert (told(per_tensor).verdict, told(per_tensor).known) == ("executes-other", "run on a CPU")
    assert told(per_tensor).says.startswith("W8A8: dynamic FP8 activations per token")
    assert found[str(per_tensor)].values == found[str(per_token)].values != []
    assert found[str(per_tensor)].kernels == [told(per_tensor).kernel] == [FLOATS]


def test_vllm_rounds_outputs_that_have_a_stored_scale_beside_inputs_that_do(
    packed: Packed, read: Read, tmp_path: Path
) -> None:
    """Fused linears have room for one scale: that of the one which is loaded last."""
    static = "int8-tensor-static"
    plain = packed(Scheme("int4-sym-g32", "", "", CT))[1]
    dynamic = packed(Scheme("int4-sym-g32", "", "", CT, outputs="int8-sym-token-sfp32-half"))[1]
    both = packed(Scheme("int4-sym-g32", static, "", CT, outputs=static))[1]
    refused = {
        packed(Scheme(weights, activations, "", CT, outputs=outputs))[1]: reason
        for weights, activations, outputs, reason in (
            ("int4-sym-g32", "", static, "output_scale"),
            ("int4-sym-g32", "", "nvfp4", "output_global_scale"),
            ("int4-sym-g32", static, "int8-asym-tensor-static", "output_zero_point"),
            ("fp8-channel", "fp8-token", "fp8-tensor-static", "output_scale"),
            ("int8-sym-channel", static, static, "Failed to find a kernel"),
        )
    }
    scaled = {}
    for name in ("k_proj", "v_proj", "o_proj"):
        shutil.copytree(both, tmp_path / name)
        tensors = load_file(both / "model.safetensors")
        tensors |= {key: one * 30 for key, one in tensors.items() if key.endswith(f"{name}.output_scale")}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        scaled[name] = tmp_path / name
    found = read([plain, dynamic, both, *scaled.values(), *refused])
    assert (told(dynamic).verdict, told(both).verdict) == ("executes-other", "loads")
    assert told(both).known == told(dynamic).known == "run on a CPU"
    assert found[str(dynamic)].values == found[str(plain)].values != []
    assert found[str(both)].kernels == [told(both).kernel] == [INTEGERS]
    values = {name: found[str(folder)].values for name, folder in scaled.items()}
    assert values["k_proj"] == found[str(both)].values != []
    for name in ("v_proj", "o_proj"):
        assert (torch.tensor(values[name]) - torch.tensor(found[str(both)].values)).abs().mean() > 0.1
    for folder, reason in refused.items():
        result, said = found[str(folder)], told(folder)
        assert reason in result.message, folder
        assert (said.verdict, said.known, result.values) == ("refuses", "run on a CPU", []), folder
        assert said.message in result.message, (folder, result.message)


EXPERTS = (
    Scheme("int4-sym-g32", "", "", CT),
    Scheme("int4-sym-g32", HALF, "", CT),
    Scheme("int4-sym-g32", "int4-sym-token", "", CT),
    Scheme("int4-sym-g32", "", "", "gptq"),
    Scheme("int4-asym-g32", "", "", "awq"),
    Scheme("int8-sym-channel", HALF, "", CT),
    Scheme("fp8-channel", "fp8-token", "", CT),
)


def test_vllm_on_a_cpu_reads_experts_that_are_not_packed_only(packed: Packed, read: Read, tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 1024}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "experts")
    folders = {scheme: packed(scheme, str(tmp_path / "experts"))[1] for scheme in EXPERTS}
    subject, dense = packed(Scheme("int4-sym-g32", "", "", "hf"), str(tmp_path / "experts"))
    found = read([*folders.values(), dense], alone=True)  # how experts are spread is decided once a process
    for scheme, folder in folders.items():
        result, said = found[str(folder)], told(folder)
        assert (said.verdict, said.known, result.values) == ("refuses", "run on a CPU", []), scheme
        assert said.message, scheme
        assert said.message in result.message, (scheme, result.message)
    assert (told(dense).verdict, told(dense).known) == ("loads", "run on a CPU")
    theirs = torch.tensor(found[str(dense)].values, dtype=torch.float64)
    exact, half = ours(subject, torch.float32), ours(subject, torch.bfloat16)
    assert float((theirs - exact).abs().mean()) < 1.5 * float((half - exact).abs().mean())


def test_what_others_write_is_refused_as_the_table_says(packed: Packed, read: Read, tmp_path: Path) -> None:
    folders = {"desc_act": tmp_path / "ordered", "format": tmp_path / "without"}
    for (name, folder), to in zip(folders.items(), ("gptq", CT), strict=True):
        shutil.copytree(packed(Scheme(SIGNED, "", "", to))[1], folder)
        config = json.loads((folder / "config.json").read_text())
        own = config["quantization_config"]
        own.update({"desc_act": True} if name == "desc_act" else {"format": None})
        for group in own.get("config_groups", {}).values():
            group.pop("format", None)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "qtool.json").unlink(missing_ok=True)
    found = read(list(folders.values()))
    for folder in folders.values():
        result, said = found[str(folder)], told(folder)
        assert (said.verdict, said.known, result.values) == ("refuses", "run on a CPU", [])
        assert said.message
        assert said.message in result.message
