"""Folders come from the environment, devices from their names; doctor and plugins describe what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qtool import __version__
from qtool.errors import ResourceError, UsageError
from qtool.plugins import KINDS, Plugins
from qtool.steps.description import Description, Table, describe_plugins
from qtool.steps.doctor import examine
from qtool.steps.environment import Folders, choose_device, open_workspace


def test_folders_have_defaults_and_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    defaults = Folders(Path("qtool-artifacts"), Path("/caches/qtool"), None)
    assert Folders.from_environment({}) == defaults
    assert Folders.from_environment({"QTOOL_HOME": "", "QTOOL_CACHE": "", "QTOOL_DATA": ""}) == defaults
    chosen = {"QTOOL_HOME": "~/runs", "QTOOL_CACHE": "c", "QTOOL_DATA": "d"}
    assert Folders.from_environment(chosen) == Folders(Path.home() / "runs", Path("c"), Path("d"))


def test_a_workspace_is_opened_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QTOOL_DATA", str(tmp_path))
    workspace = open_workspace(device="cpu", inputs={"model": tmp_path})
    assert (workspace.data, workspace.inputs, workspace.device) == (tmp_path, {"model": tmp_path}, torch.device("cpu"))


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:", "meta", "", "cuda:-1"])
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown device `{name}`"):
        choose_device(name)


@pytest.mark.parametrize(("count", "name", "there"), [(0, "cuda", False), (2, "cuda:1", True), (2, "cuda:2", False)])
def test_a_device_that_is_not_there_is_a_matter_of_resources(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if there:
        assert choose_device(name) == torch.device(name)
    else:
        with pytest.raises(ResourceError, match=f"no device `{name}`"):
            choose_device(name)


def test_auto_takes_cuda_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_doctor_tells_what_is_there_and_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("QTOOL_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("QTOOL_CACHE", str(blocked / "below"))
    monkeypatch.delenv("QTOOL_DATA", raising=False)
    plugins = Plugins(
        {kind: {} for kind in KINDS}, {}, {"faulty:plugin": "ImportError: no"}, Plugins.discover().manager
    )
    found = examine(plugins)
    assert (found.facts["qtool"], found.facts["torch"]) == (__version__, torch.__version__)
    folders = {row["variable"]: row for row in found.tables["folders"].to_json()}
    assert (folders["QTOOL_HOME"]["exists"], folders["QTOOL_HOME"]["writable"]) == (False, True)
    assert (folders["QTOOL_CACHE"]["exists"], folders["QTOOL_CACHE"]["writable"]) == (False, False)
    assert folders["QTOOL_DATA"]["path"] is None
    assert found.tables["broken_plugins"].rows == [("faulty:plugin", "ImportError: no")]
    optional = {row["package"]: row["version"] for row in found.tables["optional"].to_json()}
    assert optional["vllm"] is None or isinstance(optional["vllm"], str)


def test_plugins_are_described_by_kind_and_an_unknown_kind_is_refused() -> None:
    plugins = Plugins.discover()
    rows = describe_plugins(plugins).tables["offers"].to_json()
    assert len(rows) == sum(map(len, plugins.offers.values())) + len(plugins.presets)
    formats = describe_plugins(plugins, "formats").tables["offers"].to_json()
    assert [row["name"] for row in formats] == list(plugins.offers["formats"])
    assert {row["name"] for row in describe_plugins(plugins, "presets").tables["offers"].to_json()} >= {"W4A16"}
    with pytest.raises(UsageError, match="no kind of plugin called `format`") as error:
        describe_plugins(plugins, "format")
    assert error.value.hint == "did you mean `formats`?"


def test_names_of_papers_are_listed_with_what_to_type_for_them() -> None:
    plugins = Plugins.discover()
    others = describe_plugins(plugins).tables["called_otherwise_here"].to_json()
    assert {"babai", "cdquant", "llm-int8", "lqer", "lrec", "omniquant", "quantease"} <= {row["name"] for row in others}
    for row in others:
        assert row["name"] not in plugins.offers[row["kind"]]
        typed = re.search(r"--method ([\w+-]+)", str(row["type"]))
        assert typed is not None
        assert all(name in plugins.offers["mitigators"] for name in typed[1].split("+"))
    assert "called_otherwise_here" not in describe_plugins(plugins, "formats").tables
    assert describe_plugins(plugins, "mitigators").tables["called_otherwise_here"].to_json() == others


def test_a_description_becomes_one_object() -> None:
    description = Description({"kind": "model", "layers": 2}, {"rows": Table(("a", "b"), [(1, None), (2, "x")])})
    assert description.to_json() == {"kind": "model", "layers": 2, "rows": [{"a": 1, "b": None}, {"a": 2, "b": "x"}]}
