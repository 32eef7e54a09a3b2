"""What a table must not mix without saying so: protocols in one column, and unlike things in one cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import UsageError
from qtool.steps.measurement import Measurement

SILENT = ("seed", "footnote", "executed")
"""Labels that may differ inside a cell: it is a mean over seeds, and what was executed is part of the row's name."""
FIRST = ("model", "mitigator", "transform", "scheme", "settings", "propagate", "token_weight", "calibration")
"""Labels that tell things apart, the most telling first; then come all others, and facts of the protocol."""

PROTOCOL = ("model", "dtype", "seq_len", "windows", "limit", "metric_version", "text")
"""What is equal in a column, that which explains the rest first."""


@dataclass(frozen=True)
class Mixture:
    """Measurements that stand in one place of a table although these labels of theirs differ."""

    place: str
    labels: tuple[str, ...]
    members: tuple[Measurement, ...]

    def refusal(self, rows: Sequence[str]) -> UsageError:
        """Return the error that tells users how to keep them apart."""
        if not self.labels:
            return UsageError(
                f"{self.place} would hold measurements that no label tells apart",
                facts=tuple((f"{one.label('seed') or 'no'} seed", Path(one.path).name) for one in self.members[:2]),
                hint="give only one of them",
            )
        one, other = next(
            (self.members[0], other)
            for other in self.members
            if other.label(self.labels[0]) != self.members[0].label(self.labels[0])
        )
        facts = tuple(
            (Path(member.path).name, ", ".join(f"{name} {member.label(name) or 'none'}" for name in self.labels))
            for member in (one, other)
        )
        hint = f"--rows {','.join((*rows, self.labels[0]))}"
        return UsageError(f"{self.place} would compare what is not alike", facts=facts, hint=hint)


def unlike(members: Sequence[Measurement], shown: Iterable[str]) -> tuple[str, ...]:
    """Return the labels in which the members of a cell differ, other than seeds, the most telling first."""
    names = dict.fromkeys(name for one in members for name in one.labels)
    ignored = {*SILENT, *shown}
    found = [name for name in names if name not in ignored and len({one.label(name) for one in members}) > 1]
    rank = {name: place for place, name in enumerate(FIRST)}
    return tuple(sorted(found, key=lambda name: (rank.get(name, len(rank)), name)))


def protocols(members: Sequence[Measurement], shown: Iterable[str]) -> tuple[str, ...]:
    """Return the facts of the protocol, and the model, in which members of a column differ without showing it.

    What differs between members that show different facts anyway (another length of windows makes another text) is
    in plain sight.
    """
    names = dict.fromkeys((*PROTOCOL, *(name for one in members for name in one.protocol)))
    seen = [name for name in shown if name in names]
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for one in members:
        groups.setdefault(tuple(one.label(name) for name in seen), []).append(one)
    return tuple(n for n in names if any(len({one.label(n) for one in group}) > 1 for group in groups.values()))


def distinct(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Drop what was measured twice: the same metric of the same subject by the same protocol."""
    found: dict[object, Measurement] = {}
    for one in measurements:
        found.setdefault((one.metric, one.subject or one.id, tuple(sorted(one.protocol.items()))), one)
    return list(found.values())
