"""Strangers' plugins, installed by pip into a fresh environment, join qtool without a line changed in qtool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "plugins", "tests", "qtool-artifacts")
TEMPLATE = ROOT / "plugins" / "qtool-template"
FAMILY = ROOT / "plugins" / "qtool-seed-oss"

pytestmark = [pytest.mark.slow, pytest.mark.network]


def run(*command: str | Path, cwd: Path) -> str:
    # Python's own variables could let the environments see each other; qtool's belong to the test.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with qtool and two plugins, all really built and installed by pip.

    What qtool depends on (gigabytes of torch among it) is not installed again: a `.pth` file lets the environment see
    the packages that run this test. qtool and the plugins come first, in the environment's own site-packages, and
    pip builds each from a copy of its folder, with the build backend from the package index.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    for name, source in (("qtool", ROOT), ("template", TEMPLATE), ("family", FAMILY)):
        shutil.copytree(source, folder / name, ignore=IGNORED)
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(*pip, "install", "--quiet", "--no-deps", folder / name, cwd=folder)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_transform_is_listed_with_its_provider(environment: Path, tmp_path: Path) -> None:
    qtool = environment.with_name("qtool")
    text = run(qtool, "plugins", "--json", cwd=tmp_path)
    assert json.loads(text)
    assert "channel-balance" in text
    assert "qtool-template" in text
    assert "channel-balance" in run(qtool, "plugins", "transforms", cwd=tmp_path)


def test_qtool_itself_came_from_the_built_wheel(environment: Path, tmp_path: Path) -> None:
    script = "import qtool, qtool_template; print(qtool.__file__, qtool_template.__file__)"
    files = run(environment, "-c", script, cwd=tmp_path).split()
    assert len(files) == 2
    assert all(file.startswith(str(environment.parent.parent)) for file in files)


def test_the_family_is_listed_with_its_provider(environment: Path, tmp_path: Path) -> None:
    text = run(environment.with_name("qtool"), "plugins", "families", "--json", cwd=tmp_path)
    assert "seed-oss" in text
    assert "qtool-seed-oss" in text


def test_a_family_takes_few_lines_of_data() -> None:
    lines = (FAMILY / "qtool_seed_oss" / "seed_oss.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30


@pytest.mark.parametrize("plugin", [TEMPLATE, FAMILY], ids=lambda plugin: plugin.name)
def test_a_plugins_own_tests_pass(environment: Path, plugin: Path) -> None:
    tests = shutil.copytree(plugin / "tests", environment.parent.parent / f"{plugin.name}-tests", dirs_exist_ok=True)
    output = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=tests)
    assert " passed" in output


def test_the_installed_transform_quantizes_from_the_command_line(environment: Path, tmp_path: Path) -> None:
    qtool = environment.with_name("qtool")
    windows = ("--num-samples", "4", "--seq-len", "64")
    statistics = run(qtool, "calibrate", "tiny", "--data", "speeches", *windows, cwd=tmp_path).strip()
    method = ("--method", "channel-balance", "--set", "strength=0.7")
    plan = run(qtool, "transform", statistics, *method, cwd=tmp_path).strip()
    manifest = json.loads(run(qtool, "inspect", plan, "--json", cwd=tmp_path))
    assert "qtool-template" in json.dumps(manifest)
