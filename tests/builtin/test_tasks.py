"""Tasks on made-up data: what is read, what is scored, and that the executed model generates as the plain one does."""

from __future__ import annotations

import gzip
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qtool.artifacts.store import Artifact
from qtool.builtin.metrics.harness import Harness, quiet
from qtool.builtin.metrics.tasks import Tasks
from qtool.builtin.transforms.quarot import QuaRot, QuaRotConfig
from qtool.engine.execute import BlockExecutable
from qtool.engine.linear import SiteInput
from qtool.engine.metric import Evaluation, Measured
from qtool.engine.subject import Subject
from qtool.errors import DataError, ModelError, PluginError, ResourceError, UsageError
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.eval import EvalRequest, evaluate
from qtool.testing import TinyModel, double_precision, plan_of, tiny_model

CPU = torch.device("cpu")
WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath"]


def write(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def arc_row(i: int) -> dict[str, Any]:
    texts = [WORDS[(i + j) % 8] * (1 + j % 2) for j in range(4)]
    choices = {"text": texts, "label": list("ABCD")}
    return {"id": str(i), "question": f"Which {WORDS[i]}?", "choices": choices, "answerKey": "ABCD"[i % 4]}


def mmlu_row(subject: str, i: int) -> dict[str, Any]:
    return {"question": f"{subject} {WORDS[i]}?", "subject": subject, "choices": WORDS[i : i + 4], "answer": i % 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "arc_easy/test.jsonl", [arc_row(i) for i in range(6)])
    piqa = [{"goal": f"To {w}", "sol1": w, "sol2": w[::-1] * 2, "label": i % 2} for i, w in enumerate(WORDS[:5])]
    write(root / "piqa/validation.jsonl", piqa)
    endings = [[WORDS[(i + j) % 8] + " [substeps] go" for j in range(4)] for i in range(4)]
    hellaswag = [
        {"activity_label": "Walk", "ctx_a": "One walks.", "ctx_b": f"then {WORDS[i]}", "endings": e, "label": str(i)}
        for i, e in enumerate(endings)
    ]
    write(root / "hellaswag/validation.jsonl.gz", hellaswag)
    write(root / "lambada_openai/test.jsonl", [{"text": f"one {w} two {w}"} for w in WORDS[:5]])
    gsm8k = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
    write(root / "gsm8k/test.jsonl", gsm8k[:2])
    write(root / "gsm8k/train.jsonl", gsm8k)
    return root


@pytest.fixture(scope="module")
def tiny() -> Iterator[TinyModel]:
    with tiny_model("llama", max_position_embeddings=1024) as tiny:
        tokenizer = AutoTokenizer.from_pretrained(tiny.path)
        tokenizer.add_special_tokens({"eos_token": "<eos>"})
        tokenizer.save_pretrained(tiny.path)
        yield tiny


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float64, attn_implementation="sdpa")
    return model.eval()


def executable(tiny: TinyModel, subject: Subject | None = None) -> BlockExecutable:
    subject = subject or Subject(tiny.workspace.model(str(tiny.path)), tiny.workspace.plugins)
    return BlockExecutable(subject, device=CPU, dtype=torch.float64)


def evaluation(tiny: TinyModel, *tasks: str, subject: Subject | None = None, **options: object) -> Evaluation:
    subject = subject or Subject(tiny.workspace.model(str(tiny.path)), tiny.workspace.plugins)
    asked = {"tasks": tasks, "limit": None, "task_data": None, **options}
    reference = partial(executable, tiny)
    return Evaluation(executable(tiny, subject), reference, {}.__getitem__, subject.model.tokenizer(), asked)


def measure(tiny: TinyModel, *tasks: str, **options: object) -> Measured:
    return Tasks().measure(evaluation(tiny, *tasks, **options))


SCORED = ("arc_easy", "piqa", "hellaswag", "lambada_openai")


@pytest.fixture(scope="module")
def scored(tiny: TinyModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("out") / "m.safetensors"
    request = EvalRequest(str(tiny.path), tasks=SCORED, task_data=data, output=output)
    return evaluate(request, tiny.workspace)[0]


def items(artifact: Artifact, task: str, metric: str) -> Tensor:
    return artifact.tensor(f"items/{task}/{metric}")


def test_headlines_are_means_of_the_items(scored: Artifact) -> None:
    values = scored.manifest.details["values"]
    sizes = {"arc_easy": 6, "piqa": 5, "hellaswag": 4, "lambada_openai": 5}
    for task, metric in [("lambada_openai", "acc"), *((t, m) for t in SCORED[:3] for m in ("acc", "acc_norm"))]:
        found = items(scored, task, metric)
        assert found.dtype == torch.float32
        assert found.shape == (sizes[task],)
        assert values[f"{metric}/{task}"] == pytest.approx(float(found.double().mean()), abs=1e-12)
    assert 0 < values["acc_norm/arc_easy"] < 1, "the data must be able to tell items apart"
    chosen = [
        values[name] for name in ("acc_norm/arc_easy", "acc_norm/piqa", "acc_norm/hellaswag", "acc/lambada_openai")
    ]
    assert values["tasks/average"] == pytest.approx(sum(chosen) / 4)
    likelihoods = items(scored, "lambada_openai", "perplexity").double()
    assert values["perplexity/lambada_openai"] == pytest.approx(float((-likelihoods.mean()).exp()), rel=1e-5)


def test_details_say_what_was_read(scored: Artifact) -> None:
    details = scored.manifest.details["metrics"]["tasks"]
    assert details["limit"] is None
    assert details["truncated_inputs"] == 0
    assert details["average"] == dict(zip(SCORED, ("acc_norm", "acc_norm", "acc_norm", "acc"), strict=True))
    arc = details["tasks"]["arc_easy"]
    assert (arc["items"], arc["items_of_task"], arc["num_fewshot"]) == (6, 6, 0)
    assert arc["source"].startswith("arc_easy (test) sha256:")
    assert len(arc["items_digest"]) == 64


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Score a continuation byte by byte; the model's tokens are the alphabet of the byte-level encoding."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    start, ids = len(tokenizer(context).input_ids), tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))


def test_scores_equal_those_computed_by_hand(scored: Artifact, plain: PreTrainedModel) -> None:
    for i, word in enumerate(WORDS[:5]):
        expected = log_likelihood(plain, f"one {word} two", f" {word}")
        assert float(items(scored, "lambada_openai", "perplexity")[i]) == pytest.approx(expected, rel=1e-6)
    for i in range(6):
        row = arc_row(i)
        texts, gold = row["choices"]["text"], "ABCD".index(row["answerKey"])
        found = [log_likelihood(plain, f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
        per_letter = [value / len(text) for value, text in zip(found, texts, strict=True)]
        assert float(items(scored, "arc_easy", "acc")[i]) == (found.index(max(found)) == gold)
        assert float(items(scored, "arc_easy", "acc_norm")[i]) == (per_letter.index(max(per_letter)) == gold)


def test_limit_takes_the_first_documents_and_is_recorded(tiny: TinyModel, data: Path, scored: Artifact) -> None:
    found = measure(tiny, "arc_easy", task_data=data, limit=3)
    assert found.details["limit"] == 3
    facts = found.details["tasks"]["arc_easy"]
    assert (facts["items"], facts["items_of_task"]) == (3, 6)
    assert found.tensors["items/arc_easy/acc"].equal(items(scored, "arc_easy", "acc")[:3])
    assert facts["items_digest"] != scored.manifest.details["metrics"]["tasks"]["tasks"]["arc_easy"]["items_digest"]


def test_generation_draws_examples_and_extracts_answers(tiny: TinyModel, data: Path) -> None:
    found = measure(tiny, "gsm8k", task_data=data, limit=1)
    assert found.details["tasks"]["gsm8k"]["num_fewshot"] == 5
    assert found.details["average"] == {"gsm8k": "exact_match-strict-match"}
    assert set(found.tensors) == {f"items/gsm8k/exact_match-{way}" for way in ("strict-match", "flexible-extract")}


def subjects(tiny: TinyModel) -> dict[str, Subject]:
    subject, plan = plan_of(QuaRot(), QuaRotConfig(r3="on"), tiny)
    assert any(site.endswith("qk_post") for site in plan.sites)
    fmt = tiny.workspace.plugins.format
    rounded = ModelScheme(
        activations=parse_tensor_scheme("int8-asym-token", fmt), kv=parse_tensor_scheme("int8-asym-token", fmt)
    )
    return {
        "plain": subject,
        "quarot": replace(subject, plan=plan),
        "rounded": replace(subject, plan=plan, scheme=rounded),
    }


@pytest.mark.parametrize("name", ["plain", "quarot", "rounded"])
def test_greedy_decoding_with_a_cache_equals_full_passes(tiny: TinyModel, plain: PreTrainedModel, name: str) -> None:
    model: Any = executable(tiny, subjects(tiny)[name]).whole()
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), double_precision():
        cache, fed = None, ids
        for _ in range(8):
            step = model(fed, past_key_values=cache, use_cache=True)
            full = model(ids, use_cache=False).logits
            assert float((step.logits[:, -1] - full[:, -1]).abs().max()) < 1e-10
            if name != "rounded":
                assert float((full - plain(ids).logits).abs().max()) < 1e-9
            cache, fed = step.past_key_values, full[:, -1:].argmax(-1)
            ids = torch.cat([ids, fed], 1)
        start = ids[:, :20]
        made = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False, pad_token_id=256
        )
    assert made.equal(ids)


@pytest.mark.parametrize("name", ["quarot", "rounded"])
def test_padding_changes_no_prompt(tiny: TinyModel, name: str) -> None:
    model: Any = executable(tiny, subjects(tiny)[name]).whole()
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(4))
    other = torch.randint(0, 256, (1, 14), generator=torch.Generator().manual_seed(5))
    padding = torch.full((1, 5), 256)
    left, right = torch.cat([padding, ids], 1), torch.cat([ids, padding], 1)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    generate = partial(model.generate, max_new_tokens=6, do_sample=False, pad_token_id=256)
    with torch.no_grad(), double_precision():
        alone = model(ids).logits
        assert float((model(torch.cat([right, other])).logits[0, :9] - alone[0]).abs().max()) < 1e-10
        padded = model(torch.cat([left, other]), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert float((padded.logits[0, 5:] - alone[0]).abs().max()) < 1e-10
        together = generate(torch.cat([left, other]), attention_mask=mask)
        assert together[0, 14:].equal(generate(ids, attention_mask=torch.ones_like(ids))[0, 9:])
        assert together[1].equal(generate(other, attention_mask=torch.ones_like(other))[0])


def test_harness_generates_what_the_plain_model_does(tiny: TinyModel, plain: PreTrainedModel) -> None:
    from lm_eval.api.instance import Instance

    subject = subjects(tiny)["quarot"]
    asked = evaluation(tiny, subject=subject)
    request = Instance("generate_until", {}, ("amber birch", {"until": ["\n\n"], "max_gen_toks": 12}), 0)
    with quiet(), double_precision():
        text = Harness.load().wrap(asked).generate_until([request])[0]
        ids = asked.tokenizer("amber birch", return_tensors="pt").input_ids
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == asked.tokenizer.decode(ids[0, 11:], skip_special_tokens=True)


def test_no_activation_outlives_a_pass(tiny: TinyModel) -> None:
    model = executable(tiny).whole()
    with torch.no_grad():
        model(torch.arange(9)[None])
    sites = [module for module in model.modules() if isinstance(module, SiteInput)]
    assert {site.readers for site in sites} == {0, 1, 2, 3}  # no linear reads the places of keys and of values
    assert not any(site._seen for site in sites)


def test_nothing_is_written_or_left_behind(
    tiny: TinyModel, data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    capfd.readouterr()
    measure(tiny, "hellaswag", task_data=data, limit=1)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "datasets").exists()


def test_the_process_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]

    def state() -> tuple[object, ...]:
        return random.getstate(), [(one.level, one.propagate, list(one.handlers)) for one in loggers]

    before, generator, array = state(), torch.get_rng_state(), np.random.get_state()[1]
    with quiet():
        random.random(), np.random.rand(), torch.rand(1)
        sys.stdout.write("seen by nobody")
        warnings.warn("seen by nobody", stacklevel=1)
    assert state() == before
    assert torch.get_rng_state().equal(generator)
    assert np.array_equal(np.random.get_state()[1], array)
    assert capfd.readouterr() == ("", "")


def test_a_cut_prompt_is_counted(tiny: TinyModel, tmp_path: Path) -> None:
    write(tmp_path / "lambada_openai/test.jsonl", [{"text": "word " * 300 + "end"}, {"text": "a short end"}])
    found = measure(tiny, "lambada_openai", task_data=tmp_path)
    assert found.details["truncated_inputs"] == 1


def test_an_unknown_task_gets_near_names(tiny: TinyModel, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    arc = Path(str(lm_eval.tasks.__file__)).parent / "arc"

    def manager(**options: object) -> TaskManager:
        return TaskManager(**(options or {"include_defaults": False, "include_path": arc}))

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    with pytest.raises(UsageError, match="no task `arc_eazy`") as caught:
        measure(tiny, "arc_eazy", task_data=data)
    assert caught.value.hint == "--tasks arc_easy"


@pytest.mark.slow
def test_a_tag_means_its_tasks_in_all_folders(tiny: TinyModel, data: Path, tmp_path: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        write(tmp_path / name / "test.jsonl", [arc_row(i) for i in range(4)])
    found = measure(tiny, "ai2_arc", task_data=tmp_path, limit=2)
    assert found.details["average"] == {"arc_challenge": "acc_norm", "arc_easy": "acc_norm"}
    with pytest.raises(UsageError, match="no task `hellaswagg`") as caught:
        measure(tiny, "hellaswagg", task_data=data)
    assert caught.value.hint == "--tasks hellaswag"


@pytest.mark.slow
def test_a_group_is_weighted_by_size_and_counts_once(tiny: TinyModel, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = Harness.load().find(["mmlu_humanities"])
    assert isinstance(manager, TaskManager)
    subjects = sorted(name.removeprefix("mmlu_") for name in manager.task_index["mmlu_humanities_tasks"].tags)
    for n, subject in enumerate(subjects):
        write(tmp_path / f"mmlu/{subject}/test.jsonl", [mmlu_row(subject, i) for i in range(1 + n % 4)])
        write(tmp_path / f"mmlu/{subject}/dev.jsonl", [mmlu_row(subject, 0)])
    write(tmp_path / "arc_easy/test.jsonl", [arc_row(i) for i in range(3)])
    found = measure(tiny, "mmlu_humanities", "arc_easy", task_data=tmp_path)
    pooled = torch.cat([found.tensors[f"items/mmlu_{subject}/acc"] for subject in subjects])
    group = found.values["acc/mmlu_humanities"]
    assert 0 < group < 1
    assert group == pytest.approx(float(pooled.mean()))
    assert found.values["tasks/average"] == pytest.approx((group + found.values["acc_norm/arc_easy"]) / 2)
    with pytest.raises(UsageError, match="asked for twice"):
        measure(tiny, "mmlu_humanities", "mmlu_philosophy", task_data=tmp_path)


def test_missing_data_is_named(tiny: TinyModel, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"winogrande/validation\.jsonl") as caught:
        measure(tiny, "winogrande", task_data=data)
    assert caught.value.hint.startswith("put winogrande/validation.jsonl there")
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "1?", "answer": "#### 1"}])
    with pytest.raises(DataError, match=r"gsm8k/train\.jsonl"):
        measure(tiny, "gsm8k", task_data=tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        measure(tiny, "piqa", task_data=tmp_path / "nowhere")
    with pytest.raises(DataError, match="no place for the data set of task `lambada_standard`"):
        measure(tiny, "lambada_standard", task_data=data)


def test_data_that_does_not_fit_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    write(tmp_path / "arc_easy/test.jsonl", [{"question": "Which?"}])
    with pytest.raises(DataError, match="the local data of task `arc_easy` does not fit it"):
        measure(tiny, "arc_easy", task_data=tmp_path)
    (tmp_path / "arc_easy/test.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="does not fit"):
        measure(tiny, "arc_easy", task_data=tmp_path)


def test_without_a_hub_local_data_is_suggested(tiny: TinyModel) -> None:
    with pytest.raises(ResourceError, match="cannot get the data of task `piqa` from the hub") as caught:
        measure(tiny, "piqa")
    assert caught.value.hint == "--task-data FOLDER"


def test_the_extra_is_named_where_it_is_missing(tiny: TinyModel, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(PluginError, match="not installed") as caught:
        measure(tiny, "piqa", task_data=data)
    assert caught.value.hint == "pip install 'qtool[eval]'"


def test_a_tokenizer_needs_an_end(tiny: TinyModel, data: Path) -> None:
    asked = evaluation(tiny, "piqa", task_data=data)
    asked.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a begin-of-text nor an end-of-text token"):
        Tasks().measure(asked)


@pytest.mark.parametrize(("flag", "message"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "not about text alone")])
def test_tasks_that_cannot_be_run_are_refused(flag: str, message: str) -> None:
    task = SimpleNamespace(task_name="odd", **{flag: True})
    loaded = {"tasks": {"odd": task}, "groups": {}}
    manager = SimpleNamespace(load=lambda _: loaded)
    with pytest.raises(UsageError, match=message):
        Harness.load().open(manager, ["odd"], local=True)
