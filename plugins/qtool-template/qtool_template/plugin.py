"""What this plugin offers. qtool imports this module to list plugins, so it imports nothing heavy itself."""

from __future__ import annotations

from collections.abc import Sequence

from qtool import Entry, hookimpl


@hookimpl
def register_transforms() -> Sequence[Entry]:
    """Offer the transform; its module is imported when somebody uses it."""
    return [
        Entry(
            name="channel-balance",
            target="qtool_template.channel_balance:ChannelBalance",
            summary="even out the magnitudes of down_proj's input channels, folded into up_proj",
        )
    ]
