"""Lines and tables for people, on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(line: str = "") -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        say(f"| {' | '.join(row)} |")
