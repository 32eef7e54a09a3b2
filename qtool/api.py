"""qtool as a library: every step is a function from a request and a workspace to an artifact.

    workspace = open_workspace()
    statistics, _ = calibrate(CalibrateRequest("tiny", data="speeches"), workspace)
    plan, _ = transform(TransformRequest(str(statistics.path), "quarot"), workspace)

What is not in ``__all__`` may change without notice. Plugins need ``qtool.Entry`` and ``qtool.hookimpl`` besides.
"""

from qtool.artifacts.manifest import Input, Manifest, Step
from qtool.artifacts.store import Artifact, open_artifact
from qtool.errors import (
    ArtifactError,
    ConsumerError,
    DataError,
    ExitCode,
    GateError,
    ModelError,
    NumericalError,
    PluginError,
    QtoolError,
    ResourceError,
    SchemeError,
    ShapeError,
    UsageError,
)
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.calibrate import CalibrateRequest, calibrate
from qtool.steps.description import Description, Table
from qtool.steps.environment import open_workspace
from qtool.steps.eval import EvalRequest, evaluate
from qtool.steps.inspect import inspect
from qtool.steps.mitigate import MitigateRequest, mitigate
from qtool.steps.pack import PackRequest, pack
from qtool.steps.plot import PlotRequest, plot
from qtool.steps.report import ReportRequest, report
from qtool.steps.run import RunRequest, RunResult, run
from qtool.steps.schemes import read_scheme
from qtool.steps.transform import TransformRequest, transform
from qtool.steps.verify import VerifyRequest, verify
from qtool.steps.workspace import Workspace

__all__ = [
    "Artifact",
    "ArtifactError",
    "CalibrateRequest",
    "ConsumerError",
    "DataError",
    "Description",
    "EvalRequest",
    "ExitCode",
    "GateError",
    "Input",
    "Manifest",
    "MitigateRequest",
    "ModelError",
    "ModelScheme",
    "NumericalError",
    "PackRequest",
    "PlotRequest",
    "PluginError",
    "Plugins",
    "QtoolError",
    "ReportRequest",
    "ResourceError",
    "RunRequest",
    "RunResult",
    "SchemeError",
    "ShapeError",
    "Step",
    "Table",
    "TensorScheme",
    "TransformRequest",
    "UsageError",
    "VerifyRequest",
    "Workspace",
    "calibrate",
    "evaluate",
    "inspect",
    "mitigate",
    "open_artifact",
    "open_workspace",
    "pack",
    "plot",
    "read_scheme",
    "report",
    "run",
    "transform",
    "verify",
]
