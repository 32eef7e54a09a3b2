"""Checkpoints that other tools wrote: they decode as those tools decode them, and are laid out again or refused.

They lie in ``checkpoints/``, each with what the tool's own library decodes, beside the scripts that made them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from qtool.builtin.exporters.packed_source import open_packed
from qtool.consumers.checkpoint import read_checkpoint
from qtool.consumers.table import answer
from qtool.errors import ModelError, QtoolError
from qtool.plugins import Plugins
from qtool.steps.pack import PackRequest, pack
from qtool.steps.subjects import open_subject
from qtool.steps.workspace import Workspace
from tests.builtin.checkpoints.model import digest, tensors_of

HOME = Path(__file__).with_name("checkpoints")
MADE = sorted(str(found.parent.relative_to(HOME)) for found in HOME.glob("*/*/expected.json"))
