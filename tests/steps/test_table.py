"""The table's logic, on measurements made up here."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from qtool.errors import UsageError
from qtool.steps.fairness import distinct
from qtool.steps.measurement import Measurement
from qtool.steps.notes import notes_of
from qtool.steps.rendering import comma_separated, json_object, latex, markdown
from qtool.steps.table import Cell, Layout, Spread, Table, arrange

METRIC = "perplexity/wiki_text"
T2, T7 = 4.302652729749, 2.364624251593  # Student's 97.5 % quantiles
LAYOUT = Layout(metrics=(METRIC,))
PROTOCOL = {"windows": "8", "seq_len": "1024", "text": "abc", "dtype": "bfloat16", "metric_version": "1"}


def measured(value: float, transform: str, mitigator: str, scheme: str = "W4A4", **labels: str) -> Measurement:
    """Return a quantized measurement; labels that are facts of the protocol go there."""
    protocol = {name: labels.pop(name, fact) for name, fact in PROTOCOL.items()}
    known = {
        "model": "llama",
        "transform": transform,
        "mitigator": mitigator,
        "scheme": scheme,
        "executed": f"fake-quantized: {scheme}",
        "seed": "0",
        **labels,
    }
    identity = f"{value} {sorted(known.items())} {sorted(protocol.items())}"
    return Measurement(
        metric=METRIC,
        value=value,
        stderr=0.5,
        samples=8,
        labels=known,
        protocol=protocol,
        bits={"linears": 4.25 if scheme == "W4A4" else 4.5, "model": 6.0},
        subject=identity,
        path=f"runs/{transform}-{mitigator}-{scheme}-{value}.safetensors",
        id=identity,
    )


def full_precision(value: float = 10.0, **labels: str) -> Measurement:
    one = measured(value, "identity", "full precision", "16 bits", **labels)
    kept = {name: text for name, text in one.labels.items() if name != "seed"}
    return replace(one, labels={**kept, "executed": "16 bits"}, bits={"linears": 16.0, "model": 16.0}, reference=True)


MATRIX = [
    measured(30.0, "identity", "rtn"),
    measured(15.0, "identity", "rtn", "NVFP4"),
    measured(20.0, "identity", "gptq"),
    measured(14.0, "identity", "gptq", "NVFP4"),
    measured(12.0, "quarot", "gptq"),
    measured(14.5, "quarot", "gptq", "NVFP4"),
    full_precision(),
]


def cell(table: Table, row: tuple[str, ...], column: tuple[str, ...]) -> Cell:
    return table.cells[row, column, METRIC]


def test_rows_and_columns_keep_their_order_and_full_precision_stands_first_in_every_column() -> None:
    table = arrange(MATRIX, LAYOUT)
    assert table.layout.rows == ("transform", "mitigator")
    assert table.rows == (("identity", "full precision"), ("identity", "rtn"), ("identity", "gptq"), ("quarot", "gptq"))
    assert table.columns == (("W4A4",), ("NVFP4",))
    assert [cell(table, ("identity", "full precision"), column).value for column in table.columns] == [10.0, 10.0]
    assert cell(table, ("quarot", "gptq"), ("NVFP4",)).value == 14.5


def test_rows_of_one_transform_stand_together_in_whatever_order_they_come() -> None:
    scrambled = [MATRIX[index] for index in (2, 4, 0, 6, 3, 1, 5)]
    assert arrange(scrambled, LAYOUT).rows == (
        ("identity", "full precision"),
        ("identity", "gptq"),
        ("identity", "rtn"),
        ("quarot", "gptq"),
    )


def test_the_best_of_each_column_is_marked_and_full_precision_does_not_compete() -> None:
    table = arrange(MATRIX, LAYOUT)
    assert [place for place, one in table.cells.items() if one.best] == [
        (("identity", "gptq"), ("NVFP4",), METRIC),
        (("quarot", "gptq"), ("W4A4",), METRIC),
    ]


@pytest.mark.parametrize(("metric", "best"), [("kl/x", [0.1]), ("acc/x", [0.3]), ("top1/x", [0.3]), ("odd/x", [])])
def test_the_best_is_the_lowest_or_the_highest_as_the_metric_says(metric: str, best: list[float]) -> None:
    found = [replace(measured(v, "identity", f"m{v}"), metric=metric, value=v) for v in (0.2, 0.1, 0.3)]
    table = arrange(found, Layout(metrics=(metric,)))
    assert [one.value for one in table.cells.values() if one.best] == best


def test_nothing_is_best_where_there_is_nothing_to_compare() -> None:
    table = arrange([MATRIX[0], full_precision()], LAYOUT)
    assert not any(one.best for one in table.cells.values())


def test_models_in_rows_do_not_compete_with_each_other() -> None:
    other = [replace(one, labels={**one.labels, "model": "qwen"}, value=one.value / 2) for one in MATRIX[:3:2]]
    table = arrange([MATRIX[0], MATRIX[2], *other], LAYOUT)
    assert table.layout.rows == ("model", "transform", "mitigator")
    assert [place[0] for place, one in table.cells.items() if one.best] == [
        ("llama", "identity", "gptq"),
        ("qwen", "identity", "gptq"),
    ]


SEEDS = [3.0, 4.0, 8.0]


@pytest.mark.parametrize(("spread", "factor"), [("ci", T2), ("auto", T2), ("stderr", 1.0)])
def test_seeds_are_one_cell_with_their_mean_and_interval(spread: Spread, factor: float) -> None:
    found = [measured(value, "identity", "gptq", seed=str(seed)) for seed, value in enumerate(SEEDS)]
    one = cell(arrange(found, replace(LAYOUT, spread=spread)), ("identity", "gptq"), ("W4A4",))
    assert one.value == 5.0
    assert len(one.members) == 3
    # s² = (4 + 1 + 9) / 2 = 7
    assert one.error == pytest.approx(factor * (7 / 3) ** 0.5, rel=1e-10)


@pytest.mark.parametrize(("spread", "error"), [("auto", 0.5), ("stderr", 0.5), ("ci", 0.5 * T7)])
def test_one_run_has_the_error_of_its_windows(spread: Spread, error: float) -> None:
    table = arrange(MATRIX, replace(LAYOUT, spread=spread))
    assert cell(table, ("identity", "rtn"), ("W4A4",)).error == pytest.approx(error)


def test_no_error_where_none_is_wanted_or_known() -> None:
    table = arrange(MATRIX, replace(LAYOUT, spread="none"))
    assert cell(table, ("identity", "rtn"), ("W4A4",)).error is None
    unknown = arrange([replace(MATRIX[0], stderr=None)], LAYOUT)
    assert cell(unknown, ("identity", "rtn"), ("W4A4",)).error is None


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"seq_len": "512", "windows": "16", "text": "def"}, "seq_len"),
        ({"windows": "4", "text": "def"}, "windows"),
        ({"text": "def"}, "text"),
        ({"metric_version": "2"}, "metric_version"),
        ({"model": "qwen"}, "model"),
    ],
)
def test_a_column_of_two_protocols_is_refused_or_shows_them(facts: dict[str, str], label: str) -> None:
    found = [MATRIX[0], measured(20.0, "identity", "gptq", **facts)]
    explicit = replace(LAYOUT, rows=("transform", "mitigator"))
    with pytest.raises(
        UsageError, match="column `W4A4 perplexity/wiki_text` would compare what is not alike"
    ) as caught:
        arrange(found, explicit)
    assert caught.value.hint == f"--rows transform,mitigator,{label}"
    assert all(text in str(caught.value) for text in facts.values())
    assert label in arrange(found, LAYOUT).layout.rows
    assert len(arrange(found, replace(LAYOUT, columns=("scheme", label))).columns) == 2


def test_full_precision_by_another_protocol_is_refused_too() -> None:
    with pytest.raises(UsageError, match="not alike"):
        arrange([*MATRIX[:2], full_precision(dtype="float32")], replace(LAYOUT, rows=("transform", "mitigator")))


def test_options_tell_rows_apart() -> None:
    found = [measured(2.0, "identity", "gptq"), measured(3.0, "identity", "gptq", settings="gptq.dampening_frac=0.1")]
    with pytest.raises(UsageError, match="the cell `identity, gptq, W4A4` would compare") as caught:
        arrange(found, replace(LAYOUT, rows=("transform", "mitigator")))
    assert caught.value.hint == "--rows transform,mitigator,settings"
    assert arrange(found, LAYOUT).rows == (("identity", "gptq", ""), ("identity", "gptq", "gptq.dampening_frac=0.1"))


def test_one_seed_twice_in_a_cell_is_refused() -> None:
    with pytest.raises(UsageError, match="no label tells apart") as caught:
        arrange([measured(2.0, "identity", "gptq"), measured(3.0, "identity", "gptq")], LAYOUT)
    assert "identity-gptq-W4A4-2.0.safetensors" in str(caught.value)


def test_what_was_measured_twice_counts_once() -> None:
    other = replace(MATRIX[0], path="elsewhere.safetensors", id="measured with kl as well")
    assert distinct([*MATRIX, other]) == MATRIX
    assert len(distinct([MATRIX[0], replace(MATRIX[0], protocol={**PROTOCOL, "dtype": "float32"})])) == 2


def test_what_a_consumer_executed_is_part_of_the_row() -> None:
    executed = "W4A16: weights only, activations are NOT quantized"
    table = arrange([*MATRIX, measured(11.0, "identity", "rtn", executed=executed)], LAYOUT)
    assert ("identity", "rtn (executed: W4A16)") in table.rows
    assert f"executed: {executed}" in notes_of(table)
    assert cell(table, ("identity", "rtn"), ("W4A4",)).value == 30.0


def test_notes_say_how_it_was_measured_and_made() -> None:
    made = {"token_weight": "uniform", "propagate": "quantized", "calibration": "c4, 8 x 64 tokens"}
    footnote = "dequantized from Q4_1"
    found = [
        measured(30.0, "identity", "rtn", propagate="none", token_weight="", footnote=footnote),
        measured(20.0, "identity", "gptq", footnote=footnote, **made),
        measured(12.0, "quarot", "gptq", footnote=footnote, **{**made, "propagate": "none"}),
    ]
    assert notes_of(arrange(found, LAYOUT)) == (
        "perplexity/wiki_text: windows 8, seq_len 1024, text abc, dtype bfloat16, metric_version 1",
        "made from: calibration c4, 8 x 64 tokens, token_weight uniform",
        "propagate quantized: identity gptq",
        "propagate none: quarot gptq",
        "± of one run: standard error over windows or items, the same ones in every row",
        "bits: stored bits per weight of the linears, with scales, zero points, adapters and online operators",
        "bold: the best of its column",
        "llama: dequantized from Q4_1",
    )


SMALL = [
    MATRIX[2],
    measured(12.0, "quarot|x", "gptq_2"),
    measured(23456.0, "identity", "rtn", seed="1"),
    full_precision(),
]


def test_markdown() -> None:
    text = markdown(arrange(SMALL, replace(LAYOUT, bits=("linears", "model"))), ("first", "second"))
    assert text.splitlines() == [
        "| transform   | mitigator      |   W4A4 perplexity/wiki_text ↓ |   W4A4 bits |   W4A4 bits (model) |",
        "|-------------|----------------|-------------------------------|-------------|---------------------|",
        "| identity    | full precision |                  10.00 ± 0.50 |       16.00 |               16.00 |",
        "| identity    | gptq           |                  20.00 ± 0.50 |        4.25 |                6.00 |",
        "| identity    | rtn            |               2.35e+04 ± 0.50 |        4.25 |                6.00 |",
        "| quarot\\|x   | gptq_2         |              **12.00** ± 0.50 |        4.25 |                6.00 |",
        "",
        "- first",
        "- second",
    ]


def test_markdown_without_notes_ends_after_the_table() -> None:
    assert markdown(arrange(SMALL, LAYOUT), ()).endswith(" 4.25 |\n")


def test_latex() -> None:
    text = latex(arrange(SMALL, LAYOUT), ("50 % of a_b",))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "\\begin{tabular}{llrr}",
        "\\toprule",
        "transform & mitigator & W4A4 perplexity/wiki\\_text $\\downarrow$ & W4A4 bits \\\\",
        "\\midrule",
        "identity & full precision & 10.00 $\\pm$ 0.50 & 16.00 \\\\",
        "identity & gptq & 20.00 $\\pm$ 0.50 & 4.25 \\\\",
        "identity & rtn & 2.35e+04 $\\pm$ 0.50 & 4.25 \\\\",
        "quarot|x & gptq\\_2 & \\textbf{12.00} $\\pm$ 0.50 & 4.25 \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "",
        "\\par{\\footnotesize 50 \\% of a\\_b\\par}",
    ]


def test_csv_has_full_precision_and_empty_places() -> None:
    third = measured(1 / 3, "a,b", "gptq", "NVFP4")
    rows = list(csv.reader(io.StringIO(comma_separated(arrange([SMALL[0], third], LAYOUT), ("unseen",)))))
    metric = "perplexity/wiki_text"
    assert rows == [
        ["transform", "mitigator"]
        + [f"{scheme} {name}" for scheme in ("W4A4", "NVFP4") for name in (metric, f"{metric} ±", "bits")],
        ["identity", "gptq", "20.0", "0.5", "4.25", "", "", ""],
        ["a,b", "gptq", "", "", "", str(1 / 3), "0.5", "4.5"],
    ]


def test_json_has_every_measurement_behind_a_cell() -> None:
    found = [measured(value, "identity", "gptq", seed=str(seed)) for seed, value in enumerate(SEEDS)]
    value: dict[str, Any] = json.loads(json_object(arrange([*found, *SMALL[1:2]], LAYOUT), ("note",)))
    first = value["cells"][0]
    assert {name: first[name] for name in ("row", "column", "metric", "value", "n", "best", "bits")} == {
        "row": {"transform": "identity", "mitigator": "gptq"},
        "column": {"scheme": "W4A4"},
        "metric": METRIC,
        "value": 5.0,
        "n": 3,
        "best": True,
        "bits": {"linears": 4.25, "model": 6.0},
    }
    assert [one["labels"]["seed"] for one in first["measurements"]] == ["0", "1", "2"]
    assert [one["path"] for one in first["measurements"]] == [one.path for one in found]
    assert value["notes"] == ["note"]
