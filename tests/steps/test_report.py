"""From metrics artifacts on disk to the text of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifacts.manifest import Input, Manifest, Step
from qtool.artifacts.store import Artifact, ArtifactWriter
from qtool.errors import ArtifactError, UsageError
from qtool.plugins import Plugins
from qtool.steps.measurement import measurements_of, protocol_of
from qtool.steps.report import ReportRequest, report
from qtool.steps.workspace import Workspace

NLL = torch.tensor([[2.0, 3.0], [2.5, 2.9], [1.0, 1.4]])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(Plugins.discover(), tmp_path / "home", tmp_path / "cache")


def write(folder: Path, labels: dict[str, str], *, shift: float = 0.0, **changes: object) -> str:
    """Write a metrics artifact as eval does, and return its path."""
    nll = NLL + shift
    config = {
        "texts": {"speeches": {"tokens_digest": "0123456789abcdef", "windows": 3}},
        "seq_len": 3,
        "kl": True,
        "tasks": [],
        "limit": None,
        "dtype": "float32",
        "metrics": {"perplexity": 1},
    }
    full = labels["mitigator"] == "full precision"
    values = {"perplexity/speeches": float(nll.double().mean().exp()), "kl/speeches": shift}
    manifest = Manifest(
        kind="metrics",
        step=Step("eval", "quantized", 1, "qtool", {**config, **changes}),
        inputs={"model": Input("m", "m"), **({} if full else {"quantized": Input(f"{labels}{shift}", "q")})},
        subject="m",
        family="llama",
        details={
            "labels": {
                "model": "tiny",
                "transform": "identity",
                "scheme": "W4A4",
                "executed": "fake-quantized: x",
                **labels,
            },
            "bits": {"linears": 4.0, "model": 5.0},
            "values": dict(list(values.items())[:1]) if full else {**values, "reference_perplexity/speeches": 7.0},
        },
    )
    writer = ArtifactWriter(folder / f"{manifest.key[:12]}.safetensors", manifest)
    writer.begin()
    writer.add("metrics", {"nll/speeches": nll, "kl/speeches": nll * shift})
    return str(writer.finish(manifest).path)


def test_errors_over_windows_come_from_the_stored_losses(tmp_path: Path, workspace: Workspace) -> None:
    artifact: Artifact = workspace.artifact(write(tmp_path, {"mitigator": "rtn"}, shift=0.5), "metrics")
    found = {one.metric: one for one in measurements_of(artifact)}
    windows = (NLL + 0.5).double().mean(1)
    error = float(windows.std() / 3**0.5)
    perplexity, kl = found["perplexity/speeches"], found["kl/speeches"]
    assert perplexity.stderr == pytest.approx(error * float((NLL + 0.5).double().mean().exp()), rel=1e-9)
    assert kl.stderr == pytest.approx(0.5 * error, rel=1e-6)
    assert perplexity.samples == kl.samples == 3
    assert found["reference_perplexity/speeches"].stderr is None


def test_what_decides_a_comparison_is_in_the_protocol(tmp_path: Path, workspace: Workspace) -> None:
    manifest = workspace.artifact(write(tmp_path, {"mitigator": "rtn"}, limit=100), "metrics").manifest
    assert protocol_of("perplexity/speeches", manifest) == {
        "windows": "3",
        "seq_len": "3",
        "text": "0123456789ab",
        "dtype": "float32",
        "metric_version": "1",
    }
    assert protocol_of("acc/piqa", manifest) == {"limit": "100", "dtype": "float32", "metric_version": "0"}


def test_a_report_shows_what_all_quantized_sources_share(tmp_path: Path, workspace: Workspace) -> None:
    sources = (
        write(tmp_path, {"mitigator": "full precision", "scheme": "16 bits", "executed": "16 bits"}),
        write(tmp_path, {"mitigator": "rtn", "footnote": "of Q4_1"}, shift=0.5),
        write(tmp_path, {"mitigator": "gptq", "footnote": "of Q4_1"}, shift=0.25),
    )
    text = report(ReportRequest(sources, error="none", footnotes=("mine",)), workspace)
    assert text.splitlines()[:5] == [
        "| transform   | mitigator      |   W4A4 perplexity/speeches ↓ |   W4A4 kl/speeches ↓ |   W4A4 bits |",
        "|-------------|----------------|------------------------------|----------------------|-------------|",
        "| identity    | full precision |                         8.44 |                    – |        4.00 |",
        "| identity    | rtn            |                        13.92 |               0.5000 |        4.00 |",
        "| identity    | gptq           |                    **10.84** |           **0.2500** |        4.00 |",
    ]
    assert text.count("tiny: of Q4_1") == 1
    assert text.endswith("- mine\n")


def test_a_report_goes_to_a_file_as_well(tmp_path: Path, workspace: Workspace) -> None:
    request = ReportRequest((write(tmp_path, {"mitigator": "rtn"}),), to="json", output=tmp_path / "table.json")
    text = report(request, workspace)
    assert (tmp_path / "table.json").read_text() == text
    assert json.loads(text)["cells"][0]["protocol"]["seq_len"] == "3"


def test_a_source_given_twice_counts_once(tmp_path: Path, workspace: Workspace) -> None:
    source = write(tmp_path, {"mitigator": "rtn"})
    assert report(ReportRequest((source, source)), workspace) == report(ReportRequest((source,)), workspace)


def test_protocols_are_not_mixed(tmp_path: Path, workspace: Workspace) -> None:
    sources = (write(tmp_path, {"mitigator": "rtn"}), write(tmp_path, {"mitigator": "gptq"}, dtype="bfloat16"))
    with pytest.raises(UsageError, match="dtype float32"):
        report(ReportRequest(sources, rows=("transform", "mitigator")), workspace)
    assert "| dtype " in report(ReportRequest(sources), workspace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "latx"}, "no format `latx`.*\n.*\n.*`latex`"),
        ({"error": "sd"}, "no error `sd`"),
        ({"bits": ("linear",)}, "no bits `linear`.*\n.*\n.*`linears`"),
        ({"rows": ("transfrom",)}, "no label `transfrom`.*\n.*\n.*`transform`"),
        ({"columns": ("seqlen",)}, "no label `seqlen`.*\n.*\n.*`seq_len`"),
        ({"values": ("perplexity/speech",)}, "no metric `perplexity/speech`.*\n.*\n.*`perplexity/speeches`"),
        ({"sources": ()}, "nothing to report"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, workspace: Workspace, changes: dict[str, Any], message: str
) -> None:
    request = ReportRequest(**{"sources": (write(tmp_path, {"mitigator": "rtn"}),), **changes})
    with pytest.raises(UsageError, match=message):
        report(request, workspace)


def test_sources_must_be_metrics(tmp_path: Path, workspace: Workspace) -> None:
    manifest = Manifest("plan", Step("transform", "identity", 1, "qtool"), {}, "m", "llama")
    writer = ArtifactWriter(tmp_path / "plan.safetensors", manifest)
    writer.begin()
    writer.add("plan", {"x": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="wrong kind"):
        report(ReportRequest((str(writer.finish(manifest).path),)), workspace)
