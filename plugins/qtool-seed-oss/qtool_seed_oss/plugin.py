"""What this plugin offers. qtool imports this module to list plugins, so it imports nothing heavy itself."""

from __future__ import annotations

from collections.abc import Sequence

from qtool import Entry, hookimpl


@hookimpl
def register_families() -> Sequence[Entry]:
    """Offer the family; its module is imported when a model is opened."""
    return [Entry("seed-oss", "qtool_seed_oss.seed_oss:SEED_OSS", "Seed-OSS")]
