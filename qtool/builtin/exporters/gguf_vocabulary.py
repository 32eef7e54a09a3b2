"""A tokenizer as keys of a GGUF file: tokens, merges or scores, special tokens, and how text is split into words.

Everything is read from the tokenizer that transformers loads, so a model whose files hold a SentencePiece model alone
is written as well. Splits are known by name in llama.cpp; one that has no name there is refused.

A vocabulary of pieces is read there as SentencePiece reads it, which puts a space in front of a text that begins with
spaces too. transformers' ``Metaspace(first)``, Llama's without ``legacy``, does not: such texts begin otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from qtool.errors import ModelError
from qtool.model.gguf import DIGITS_THEN_WORDS, WORDS
from qtool.model.source import Model

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[tuple[str, ...], str] = {
    ("digits", "words"): DIGITS_THEN_WORDS[0],
    ("words",): WORDS[0],
    (rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (rf"{_CONTRACTIONS}\p{{N}}{_REST}", "bytes"): "qwen2",
}
"""Steps of a byte-level pre-tokenizer to ``tokenizer.ggml.pre``."""
_IGNORES_MERGES = "llama-bpe"
_SPACE = "▁"


def add_vocabulary(writer: Any, model: Model) -> None:  # noqa: ANN401 - the package has no types
    """Write a model's tokenizer.

    Raises:
        ModelError: The model has none, or llama.cpp has no such tokenizer.
    """
    tokenizer: Any = model.tokenizer()
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}
    vocabulary = described["model"]
    if vocabulary["type"] != "BPE":
        raise _refusal(model, f"a tokenizer of the type `{vocabulary['type']}`, not BPE")
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in vocabulary["merges"]]
    if not merges:
        raise _refusal(model, "a tokenizer without merges, which it does not load")
    tokens, types = _tokens(model, described)
    if vocabulary.get("byte_fallback"):
        _check_pieces(model, described, merges)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(backend.encode("a", add_special_tokens=False).tokens[0].startswith(_SPACE))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(model, described))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def split_name(model: Model, described: Mapping[str, Any]) -> str:
    """Return what llama.cpp calls the split of a byte-level tokenizer into words.

    Args:
        model: For the message.
        described: ``tokenizer.json``.

    Raises:
        ModelError: It has no name there that qtool knows.
    """
    found = described["pre_tokenizer"] or {"type": "none"}
    steps = tuple(_step(one) for one in found.get("pretokenizers", [found]))
    name = SPLITS.get(steps)
    normalizer = (described.get("normalizer") or {"type": "NFC"})["type"]
    if name is None or normalizer != "NFC":
        raise _refusal(model, f"a split into words of its own: {', '.join(steps)} behind {normalizer}")
    if bool(described["model"].get("ignore_merges")) != (name == _IGNORES_MERGES):
        raise _refusal(model, f"merges that are read otherwise than those of `{name}`")
    return name


def _step(one: Mapping[str, Any]) -> str:
    """Return a step of a pre-tokenizer in one word, or its regular expression."""
    if one["type"] == "ByteLevel" and not one.get("add_prefix_space"):
        return "words" if one.get("use_regex", True) else "bytes"
    if one["type"] == "Digits" and one.get("individual_digits"):
        return "digits"
    if one["type"] == "Split" and one.get("behavior") == "Isolated" and not one.get("invert"):
        return str(one["pattern"].get("Regex", one["type"]))
    return str(one["type"])


def _tokens(model: Model, described: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return text and type of every token; rows of the embedding that have none are unused."""
    vocabulary, rows = described["model"], model.graph.dims.vocab
    kinds = gguf.TokenType
    added = {one["id"]: one for one in described["added_tokens"]}
    texts = {index: text for text, index in vocabulary["vocab"].items()}
    texts |= {index: one["content"] for index, one in added.items()}
    if max(texts) >= rows:
        raise ModelError(
            "the tokenizer has tokens that the embedding has no rows for",
            facts=(("tokens", max(texts) + 1), ("rows", rows)),
            hint="copy the model's own tokenizer files into its folder",
        )

    def kind(index: int) -> int:
        text = texts.get(index)
        if text is None:
            return int(kinds.UNUSED)
        if vocabulary.get("byte_fallback") and len(text) == len("<0x00>") and text.startswith("<0x"):
            return int(kinds.BYTE)
        if text == vocabulary.get("unk_token"):
            return int(kinds.UNKNOWN)
        if index in added:
            return int(kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED)
        return int(kinds.NORMAL)

    return [texts.get(index, f"[PAD{index}]") for index in range(rows)], [kind(index) for index in range(rows)]


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return scores by which the highest first gives the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _check_pieces(model: Model, described: Mapping[str, Any], merges: list[tuple[str, ...]]) -> None:
    """Refuse what SentencePiece does not do: steps in front of the merges, and merges that leave a token out."""
    named = (described.get("normalizer") or {}, described.get("pre_tokenizer") or {})
    parts = [one.get("normalizers", one.get("pretokenizers", [one] if one else [])) for one in named]
    odd = [str(one["type"]) for one in (*parts[0], *parts[1]) if not _only_spaces(one)]
    if odd:
        raise _refusal(model, f"pieces behind steps of its own: {', '.join(odd)}")
    vocabulary, added = described["model"]["vocab"], {one["content"] for one in described["added_tokens"]}
    halves = ((text[:at], text[at:]) for text in vocabulary if text not in added for at in range(1, len(text)))
    known = {*merges}
    lost = next((two for two in halves if two not in known and all(half in vocabulary for half in two)), None)
    if lost is not None:
        raise _refusal(model, f"pieces `{lost[0]}` and `{lost[1]}` that it does not merge, though both are one token")


def _only_spaces(one: Mapping[str, Any]) -> bool:
    """Say whether a step of a tokenizer of pieces does no more than write spaces as SentencePiece does."""
    whole = one["type"] == "Metaspace" and not one.get("split", True)
    return whole or one["type"] == "Prepend" or one.get("pattern") == {"String": " "}


def _add_special(writer: Any, tokenizer: Any) -> None:  # noqa: ANN401 - as above
    """Write the ids of special tokens, which of them are put around a text, and the template of chats."""
    for name in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            getattr(writer, f"add_{name}_token_id")(int(found))
    ids = tokenizer("a").input_ids
    for name, end in (("bos", ids[0]), ("eos", ids[-1])):
        found = getattr(tokenizer, f"{name}_token_id", None)
        getattr(writer, f"add_add_{name}_token")(found is not None and end == found)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _refusal(model: Model, what: str) -> ModelError:
    return ModelError(
        "llama.cpp cannot read text as this model does",
        facts=(("model", model.path), ("it has", what), ("splits known", ", ".join(SPLITS.values()))),
        hint="qtool pack SOURCE --to hf",
    )
