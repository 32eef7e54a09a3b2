"""Tiny random models of every family, executed so that 1e-9 means something."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, no_type_check

import torch
import transformers
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedTokenizerFast

from qtool.artifacts.store import Artifact
from qtool.engine.execute import BlockExecutable
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.family import Family
from qtool.plugins import Plugins
from qtool.steps.calibrate import EVERYTHING, CalibrateRequest, calibrate
from qtool.steps.workspace import Workspace

SIZES: Mapping[str, object] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 64,
}
"""Grouped queries, a head size that is not hidden / heads, and orders of Hadamard matrices that are no power of two."""
TEXT = "text_config"
DECODED = 4
"""Tokens that are fed one by one where a cache is tried."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny random model in a folder, opened in a workspace of its own.

    Attributes:
        path: The model's folder.
        workspace: Finds the model, writes beside it.
        statistics: Everything calibrate gathers, on random bytes.
    """

    path: Path
    workspace: Workspace
    statistics: Artifact

    @property
    def subject(self) -> Subject:
        """The model as it is, to be executed."""
        return Subject(self.workspace.model(str(self.path)), self.workspace.plugins)


def tiny_config(model_type: str, **changes: Any) -> Any:  # noqa: ANN401 - each family has its own config class
    """Return a small config of a family: two blocks, and the sizes above (of the text tower where there are more)."""
    common = {"tie_word_embeddings": False, **({} if TEXT in changes else SIZES)}
    towers = {TEXT: {**SIZES, **changes[TEXT]}} if TEXT in changes else {}
    return AutoConfig.for_model(model_type, **{**common, **changes, **towers})


def save_tiny_model(
    folder: Path,
    config: Any,  # noqa: ANN401 - see tiny_config
    *,
    seed: int = 0,
    loader: str = "AutoModelForCausalLM",
) -> None:
    """Save a random model in float64 with a byte tokenizer; nothing in it is left at a default value."""
    torch.manual_seed(seed)
    model = getattr(transformers, loader).from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    kept = model.state_dict(keep_vars=True)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias") and name in kept}
    for name, tensor in {**dict(model.named_parameters()), **biases}.items():
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            tensor.data = 0.5 + noise
        elif name.endswith("bias"):
            tensor.data = noise - 0.5
        else:
            tensor.data = (noise - 0.5) * 0.4
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


@contextmanager
def tiny_model(model_type: str = "llama", *, plugins: Plugins | None = None, **changes: Any) -> Iterator[TinyModel]:  # noqa: ANN401 - values of a config
    """Make a tiny random model of a family, calibrated on random text; everything is removed at the end."""
    found = plugins or Plugins.discover()
    family = _family(model_type, found)
    config = tiny_config(model_type, **{**family.tiny[0], **changes})
    with tiny_model_of(config, found, loader=family.loader) as tiny:
        yield tiny


@contextmanager
def tiny_model_of(
    config: Any,  # noqa: ANN401 - see tiny_config
    plugins: Plugins,
    *,
    loader: str = "AutoModelForCausalLM",
    gather: tuple[str, ...] = EVERYTHING,
) -> Iterator[TinyModel]:
    """Make a random model of a config as ``tiny_model`` does, with statistics by name."""
    with tempfile.TemporaryDirectory() as root:
        folder, text = Path(root) / "model", Path(root) / "text.txt"
        save_tiny_model(folder, config, loader=loader)
        generator = torch.Generator().manual_seed(1)
        letters = torch.randint(97, 123, (2000,), generator=generator)
        text.write_bytes(bytes(letters.tolist()))
        workspace = Workspace(plugins, Path(root) / "home", Path(root) / "cache")
        request = CalibrateRequest(
            str(folder), data=str(text), num_samples=6, seq_len=32, gather=gather, token_weight="uniform"
        )
        with double_precision():
            statistics, _ = calibrate(request, workspace)
        yield TinyModel(folder, workspace, statistics)


def _family(model_type: str, plugins: Plugins) -> Family:
    """Return the first family that speaks of a model type; those that share one differ in what ``tiny`` changes.

    Raises:
        UsageError: None does.
    """
    families: list[Family] = list(plugins.every("families").values())
    found = next((family for family in families if model_type in family.model_types), None)
    if found is None:
        known = sorted({name for family in families for name in family.model_types})
        raise UsageError(f"no family knows the model type `{model_type}`", facts=(("known", ", ".join(known)),))
    return found


@contextmanager
def double_precision() -> Iterator[None]:
    """Let the modules of transformers compute in float64 where their input is.

    Norms, softmax, routers and rotary positions round to float32 on the way, in every family in words of its own:
    ``x.float()``, ``x.to(torch.float32)``, ``softmax(x, dtype=torch.float32)``. What they ask for is replaced.
    """
    if _DoublePrecision.active:
        yield
        return
    _DoublePrecision.active = True
    try:
        with _DoublePrecision():
            yield
    finally:
        _DoublePrecision.active = False


@no_type_check  # tests that check types at run time would spend most of theirs here: torch's every operation passes
class _DoublePrecision(TorchFunctionMode):
    """Replaces float32 in what transformers' code asks of a float64 tensor."""

    active = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        del types
        kwargs = kwargs or {}
        narrows = (
            func is Tensor.float or kwargs.get("dtype") is torch.float32 or any(one is torch.float32 for one in args)
        )
        if narrows and isinstance(args[0], Tensor) and args[0].dtype == torch.float64 and _asked_by_transformers():
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _asked_by_transformers() -> bool:
    """Say whether transformers' code is nearer than qtool's on the stack, this module's left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("transformers"):
            return True
        if name.startswith("qtool.") and name != __name__:
            return False
        frame = frame.f_back
    return False


def exact_logits(subject: Subject, *, seed: int = 2, tokens: int = 24) -> Float[Tensor, "windows tokens vocab"]:
    """Return a subject's logits in float64 on random tokens; use inside ``double_precision``."""
    runs = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64)
    return torch.cat([logits for _, logits in runs.forward_windows(random_windows(seed=seed, tokens=tokens))])


def decoded_logits(subject: Subject, *, seed: int = 2, tokens: int = 24) -> Float[Tensor, "windows tokens vocab"]:
    """Return what ``exact_logits`` does, but with a cache: the last tokens are fed one by one behind the others."""
    module = BlockExecutable(subject, device=torch.device("cpu"), dtype=torch.float64).whole()
    windows = random_windows(seed=seed, tokens=tokens)
    found: list[Tensor] = []
    cache: Any = None
    for step in (windows[:, :-DECODED], *torch.split(windows[:, -DECODED:], 1, dim=1)):
        with torch.no_grad():
            result = module(step, past_key_values=cache, use_cache=True)
        found.append(result.logits)
        cache = result.past_key_values
    return torch.cat(found, dim=1)


def random_windows(*, seed: int = 2, tokens: int = 24) -> Tensor:
    """Return two windows of random tokens."""
    return torch.randint(0, 256, (2, tokens), generator=torch.Generator().manual_seed(seed))
