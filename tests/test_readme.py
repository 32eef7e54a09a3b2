"""The README's commands, executed as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
RUNNABLE = [block for block in BLOCKS if block.lstrip().startswith(("qtool", "stats="))]


def test_the_readme_has_its_pipelines() -> None:
    assert len(RUNNABLE) == 3
    assert sum(block.count("qtool") for block in RUNNABLE) == 12


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=["pipe", "variables", "recipe"])
def test_runs_as_written(block: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "QTOOL_HOME": str(tmp_path / "artifacts"),
    }
    command = ["bash", "-euo", "pipefail", "-c", block]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "perplexity/speeches" in ran.stdout
    assert "gptq" in ran.stdout
