"""Help and the list of plugins answer at once: they import neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "accelerate", "compressed_tensors", "datasets", "gguf")
RUN = """
import json, sys
from qtool.cli.app import main
sys.argv = ["qtool", *{arguments!r}]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
sys.stderr.write(json.dumps({{"code": code or 0, "modules": sorted(m.partition(".")[0] for m in sys.modules)}}))
"""


def imported(*arguments: str) -> set[str]:
    """Run a command in a process of its own and return the top-level modules that it left imported."""
    script = RUN.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stderr.splitlines()[-1])
    assert answer["code"] == 0, done.stdout
    assert done.stdout
    return set(answer["modules"])


@pytest.mark.parametrize("command", ["--help", "plugins", "plugins --json", "calibrate --help", "run --help"])
def test_a_command_that_computes_nothing_imports_nothing_heavy(command: str) -> None:
    assert imported(*command.split()).isdisjoint(HEAVY)


def test_the_package_itself_imports_nothing_heavy() -> None:
    script = "import qtool, qtool.plugins, sys; qtool.plugins.Plugins.discover(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert {name.partition(".")[0] for name in done.stdout.split()}.isdisjoint(HEAVY)
