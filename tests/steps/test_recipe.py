"""Recipes: what is read, what is refused, and which cells and tasks come of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.plugins import Plugins
from qtool.steps.cells import CellChoice, cells_of
from qtool.steps.recipe import CalibrateOptions, Choice, Match, Recipe, SchemeChoice, read_recipe
from qtool.steps.schemes import read_scheme
from qtool.steps.tasks import tasks_of

RECIPES = Path(__file__).parents[2] / "recipes"
SMALLEST = """
model: tiny
matrix: {mitigate: [rtn], scheme: [W4A4]}
eval: {perplexity: [speeches]}
"""
WHOLE = """
name: whole
model: tiny
dtype: float32
calibrate: {data: speeches, num_samples: 4, seq_len: 64, gather: [absmax], token_weight: uniform, sample_size: 8}
matrix:
  transform: [identity, {method: smoothquant, set: {alpha: 0.25}}]
  mitigate: [rtn, {method: gptq, set: {order: natural, dampening_frac: 1e-2}}]
  scheme: [W4A4, {name: mine, weights: int4-asym-g32, kv: int8-asym-token-head, outputs: fp8-token}]
  seed: [3, 4]
exclude: [{transform: smoothquant, mitigate: rtn}, {scheme: mine, seed: 4}]
include: [{mitigate: rtn, scheme: NVFP4}]
full_precision: false
mitigate: {preset: survey, propagate: none}
eval: {perplexity: [speeches], seq_len: 64, max_windows: 2, kl: true}
report: {rows: [mitigator], columns: [], error: ci, bits: [model], to: latex, footnotes: [a, b]}
"""


def recipe_of(text: str, folder: Path) -> Recipe:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def cell(transform: str, mitigate: str, scheme: str, token_weight: str = "", seed: int = 0) -> CellChoice:
    return CellChoice(Choice(transform), Choice(mitigate), SchemeChoice(scheme), token_weight, seed)


def test_defaults_and_the_name_of_the_file(tmp_path: Path) -> None:
    recipe = recipe_of(SMALLEST, tmp_path)
    assert (recipe.name, recipe.calibrate, recipe.full_precision, recipe.dtype) == ("my", None, True, "auto")
    assert recipe.matrix.transform == (Choice("identity"),)
    assert recipe.matrix.seed == (0,)
    assert cells_of(recipe) == [cell("identity", "rtn", "W4A4")]


def test_every_key_is_read(tmp_path: Path) -> None:
    recipe = recipe_of(WHOLE, tmp_path)
    assert recipe.calibrate == CalibrateOptions("speeches", 4, 64, None, ("absmax",), "uniform", 8)
    assert recipe.matrix.transform == (Choice("identity"), Choice("smoothquant", {"alpha": "0.25"}))
    assert recipe.matrix.mitigate[1] == Choice("gptq", {"order": "natural", "dampening_frac": "1e-2"})
    assert recipe.matrix.scheme[1] == SchemeChoice(
        weights="int4-asym-g32", kv="int8-asym-token-head", outputs="fp8-token", name="mine"
    )
    assert str(replace(recipe.matrix.scheme[1], name="")).endswith("kv int8-asym-token-head, outputs fp8-token")
    assert recipe.exclude[1] == Match(scheme=SchemeChoice("mine"), seed=4)
    assert (recipe.mitigate.preset, recipe.mitigate.propagate) == ("survey", "none")
    assert (recipe.eval.max_windows, recipe.eval.kl, recipe.eval.limit) == (2, True, None)
    assert recipe.report.footnotes == ("a", "b")


def test_cells_are_the_matrix_less_what_is_excluded_plus_what_is_included(tmp_path: Path) -> None:
    cells = [f"{one.transform} {one.mitigate} {one.scheme} {one.seed}" for one in cells_of(recipe_of(WHOLE, tmp_path))]
    gptq = "gptq(order=natural,dampening_frac=1e-2)"
    assert cells == [
        "identity rtn W4A4 3",
        "identity rtn W4A4 4",
        "identity rtn mine 3",
        f"identity {gptq} W4A4 3",
        f"identity {gptq} W4A4 4",
        f"identity {gptq} mine 3",
        f"smoothquant(alpha=0.25) {gptq} W4A4 3",
        f"smoothquant(alpha=0.25) {gptq} W4A4 4",
        f"smoothquant(alpha=0.25) {gptq} mine 3",
        "identity rtn NVFP4 3",
        "identity rtn NVFP4 4",
    ]


def test_token_weights_are_an_axis(tmp_path: Path) -> None:
    text = SMALLEST.replace("scheme: [W4A4]", "scheme: [W4A4], token_weight: [uniform, clip:2]")
    text += "include: [{mitigate: gptq, scheme: W4A4}, {mitigate: obq, scheme: W4A4, token_weight: gradient}]\n"
    text += "exclude: [{mitigate: rtn, token_weight: uniform}]\n"
    recipe = recipe_of(text, tmp_path)
    assert cells_of(recipe) == [
        cell("identity", "rtn", "W4A4", "clip:2"),
        cell("identity", "gptq", "W4A4", "uniform"),
        cell("identity", "gptq", "W4A4", "clip:2"),
        cell("identity", "obq", "W4A4", "gradient"),
    ]
    assert cells_of(recipe, ("token_weight=uniform",)) == [cell("identity", "gptq", "W4A4", "uniform")]
    plain = recipe_of(SMALLEST + "mitigate: {token_weight: clip}\n", tmp_path)
    assert cells_of(plain) == [cell("identity", "rtn", "W4A4", "clip")]
    with pytest.raises(UsageError, match="gives token weights twice"):
        cells_of(recipe_of(text + "mitigate: {token_weight: clip}\n", tmp_path))


@pytest.mark.parametrize(
    ("only", "left"),
    [
        (("mitigate=gptq", "seed=4"), 2),
        (("scheme=mine",), 3),
        (("scheme=mine", "scheme=NVFP4"), 5),
        (("transform=smoothquant(alpha=0.25)", "seed=3"), 2),
    ],
)
def test_only_chooses_cells(tmp_path: Path, only: tuple[str, ...], left: int) -> None:
    assert len(cells_of(recipe_of(WHOLE, tmp_path), only)) == left


@pytest.mark.parametrize("only", ["mitigate=gtpq", "method=gptq", "gptq"])
def test_only_must_leave_something(tmp_path: Path, only: str) -> None:
    with pytest.raises(UsageError, match=r"no cell of the recipe|cannot read the condition"):
        cells_of(recipe_of(SMALLEST, tmp_path), (only,))


@pytest.mark.parametrize(
    ("only", "facts", "hint"),
    [
        (("mitigate=gtpq", "seed=3"), ("only", "mitigate", "seed"), "--only mitigate=gptq"),
        (("mitigate=gptq", "scheme=NVFP", "seed=3"), ("only", "mitigate", "scheme", "seed"), "--only scheme=NVFP4"),
        (("mitigate=awq",), ("only", "mitigate"), "--only mitigate=rtn"),
        (("scheme=NVFP4", "seed=9"), ("only", "scheme", "seed"), "--only seed=3"),
        (("scheme=mine", "seed=4"), ("only", "scheme", "seed"), "--only scheme=mine"),  # each is there, not both
    ],
)
def test_what_left_nothing_is_told(tmp_path: Path, only: tuple[str, ...], facts: tuple[str, ...], hint: str) -> None:
    with pytest.raises(UsageError, match="no cell of the recipe") as refused:
        cells_of(recipe_of(WHOLE, tmp_path), only)
    assert tuple(name for name, _ in refused.value.facts) == facts
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: tiny", "modell: tiny", "unknown key `modell` in .*my.yaml(?s:.*)did you mean `model`"),
        ("model: tiny", "", "`model` in .* is missing"),
        ("model: tiny", "model: 3", "`model` in .* does not fit(?s:.*)expected +text(?s:.*)received +3"),
        ("model: tiny", "model: tiny\nmodel: tiny", "the key `model` is given twice"),
        ("model: tiny", "model: tiny\nname: ../up", "`name` in .* is no name for a folder"),
        ("model: tiny", "model: tiny\nfull_precision: 1", "`full_precision` .*\n.*true or false"),
        ("scheme: [W4A4]", "schema: [W4A4]", "unknown key `matrix.schema`(?s:.*)did you mean `scheme`"),
        ("scheme: [W4A4]", "scheme: W4A4", "`matrix.scheme` (?s:.*)expected +a list"),
        ("scheme: [W4A4]", "scheme: [W4A4], seed: [true]", "`matrix.seed.0` (?s:.*)a whole number"),
        ("scheme: [W4A4]", "scheme: [{weihgts: int4}]", "unknown key `matrix.scheme.0.weihgts`(?s:.*)`weights`"),
        ("[rtn]", "[{method: rtn, set: 3}]", "`matrix.mitigate.0.set` (?s:.*)a mapping"),
        ("[rtn]", "[{method: rtn, set: {clip: [1]}}]", "`matrix.mitigate.0.set.clip` in .* does not fit"),
        ("[rtn]", "[{set: {clip: x}}]", "`matrix.mitigate.0.method` in .* is missing"),
        ("eval: {", "eval: {max-windows: 3, ", "unknown key `eval.max-windows`(?s:.*)did you mean `max_windows`"),
        ("eval: {perplexity: [speeches]}", "eval: 3", "`eval` (?s:.*)a mapping"),
        ("model: tiny", "model: [", "no valid YAML"),
        ("model: tiny", "model: !!python/name:os.system", "no valid YAML"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        recipe_of(SMALLEST.replace(old, new), tmp_path)
    assert "my.yaml" in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the recipe(?s:.*)No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[rtn]", "[gtpq]", "no mitigator is called `gtpq`"),
        ("[rtn]", "[{method: rtn, set: {clpi: search}}]", "`rtn` has no option `clpi`"),
        ("[W4A4]", "[W5A5]", "unknown scheme `W5A5`"),
        ("[W4A4]", "[W4A4], transform: [quarrot]", "no transform is called `quarrot`"),
        ("[speeches]", "[speech]", "no dataset is called `speech`"),
        ("perplexity: [speeches]", "kl: true", "measures nothing"),
        ("model: tiny", "model: tiny\ncalibrate: {data: wikitxt2}", "no dataset is called `wikitxt2`"),
        ("model: tiny", "model: tiny\ninclude: [{mitigate: rtn}]", "no whole cell"),
        ("model: tiny", "model: tiny\nmitigate: {preset: surwey}", "unknown preset `surwey`"),
    ],
)
def test_what_is_not_on_offer_is_refused_before_any_work(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tasks_of(recipe_of(SMALLEST.replace(old, new), tmp_path), Plugins.discover())


def test_tasks_are_shared_and_follow_their_inputs(tmp_path: Path) -> None:
    text = WHOLE.replace("transform: [identity, ", "transform: [identity, quarot, ").replace(
        "precision: false", "precision: true"
    )
    tasks = tasks_of(recipe_of(text, tmp_path), Plugins.discover())
    titles = [task.title for task in tasks]
    assert len(set(titles)) == len(titles)
    assert titles[:3] == ["eval full precision", "calibrate speeches seed 3", "mitigate identity rtn W4A4 seed 3"]
    assert [title for title in titles if title.startswith("calibrate")] == [
        f"calibrate speeches seed {n}" for n in (3, 4)
    ]
    plans = [title for title in titles if title.startswith("transform quarot")]
    assert plans == [f"transform quarot {scheme} seed {n}" for scheme, n in (("W4A4", 3), ("W4A4", 4), ("mine", 3))]
    for index, task in enumerate(tasks):
        assert task.source is None or task.source in tasks[:index]


def test_schemes_of_one_name_are_different_tasks(tmp_path: Path) -> None:
    text = SMALLEST.replace("[W4A4]", "[{name: x, weights: int4-g32}, {name: x, weights: int4-g64}]")
    assert len(tasks_of(recipe_of(text, tmp_path), Plugins.discover())) == 5


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_can_be_run(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert tasks_of(recipe, Plugins.discover())


@pytest.mark.parametrize("name", ["quickstart", "tiny"])
def test_the_first_recipes_measure_seven_times_with_a_plan_for_each_scheme(name: str) -> None:
    tasks = tasks_of(read_recipe(RECIPES / f"{name}.yaml"), Plugins.discover())
    assert tasks[0].title == "eval full precision"
    assert sum(task.measures for task in tasks) == 7
    assert [task.title for task in tasks if task.title.startswith("transform")] == [
        "transform quarot W4A4",
        "transform quarot NVFP4",
    ]


def test_the_recipe_of_transforms_has_every_transform_of_qtool() -> None:
    recipe, plugins = read_recipe(RECIPES / "transforms.yaml"), Plugins.discover()
    offered = {n for n, one in plugins.offers["transforms"].items() if str(one.provider).startswith("qtool ")}
    assert {one.method for one in recipe.matrix.transform} == {*offered, "smoothquant+quarot"}
    assert len(cells_of(recipe)) == 17 * 2 * 3


def test_the_recipe_of_formats_has_every_column_of_the_tables() -> None:
    """Tables XIII (8 columns of 4 mitigations), XIV (4 of 3 for 2 transforms), XV (4 more of 4), and 7 of our own."""
    recipe, plugins = read_recipe(RECIPES / "formats.yaml"), Plugins.discover()
    cells = cells_of(recipe)
    by_transform = Counter(str(cell.transform) for cell in cells)
    assert by_transform == {"identity": (8 + 4) * 4 + 3, "smoothquant": 4 * 3, "quarot": 4 * 3, "llm-fp4": 4}
    behind = {str(cell.scheme) for cell in cells if str(cell.transform) == "quarot"}
    assert behind == {"INT4 channel", "FP4 channel", "MXFP4", "NVFP4"}
    schemes = [
        read_scheme(one.scheme, {"weights": one.weights, "activations": one.activations}, plugins)
        for one in recipe.matrix.scheme
    ]
    columns = {(str(scheme.weights), str(scheme.activations)) for scheme in schemes}
    symmetric = {
        (text, text)
        for text in (
            "int4-sym-g16-sfp32",
            "fp4-sym-g16-sfp32",
            "mxfp4-sym-g32-se8m0",
            "fp4-sym-g32-se4m3",
            "fp4-sym-g16-se8m0",
            "nvfp4-sym-g16-se4m3",
            "fp4-sym-g16-se2m1",
            "fp4-sym-g16-sint4",
        )
    }
    assert columns == symmetric | {
        ("int4-sym-channel-sfp32", "int4-asym-token-sfp32"),
        ("fp4-sym-channel-sfp32", "fp4-asym-token-sfp32"),
        ("fp4-sym-g16-se2m1", "fp4-sym-g16-se4m3"),
        ("fp4-sym-g16-sint4", "fp4-sym-g16-se4m3"),
    }
    measures = sum(task.measures for task in tasks_of(recipe, plugins))
    assert measures == len(cells) + recipe.full_precision


def test_the_example_in_the_recipes_readme_can_be_run(tmp_path: Path) -> None:
    example = (RECIPES / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    recipe = recipe_of(example, tmp_path)
    assert recipe.name == "example"
    assert len(cells_of(recipe)) == 2 * (3 * 3 * 3 - 3 + 1)
    assert tasks_of(recipe, Plugins.discover())
