"""What was done to a graph, for people: reports of the last graphs, one log line each, notices."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import settings

_KEPT = 64  # reports; a training step of a model without graph breaks makes two


@dataclass
class Report:
    """One compiled graph.

    Attributes:
        kind: ``inference``, ``forward`` (of a training step) or ``backward``.
        replaced: convolution nodes that became ops of this package, counted by kind of op.
        found: nodes that were ops of this package before, as those of a converted model.
        fused: what went into each fused convolution, as ``bias + relu``.
        removed, inserted: layout conversions taken out of the graph and put into it; ``inserted`` says where:
            ``weight``, ``entering`` (of graph inputs and what other ops return contiguous), ``leaving`` (graph outputs),
            ``inside`` (between two convolutions), ``reshape`` (a view that has to copy now), ``NODE's operand`` (which is given
            back the strides that it had).
        left: what was not improved, and why.
        nodes: the final graph as text.
    """

    kind: str
    replaced: dict[str, int] = field(default_factory=dict)
    found: int = 0
    fused: list[str] = field(default_factory=list)
    removed: int = 0
    inserted: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    nodes: str = ""

    def count(self, counts: str, name: str) -> None:
        counts = getattr(self, counts)
        counts[name] = counts.get(name, 0) + 1

    def __str__(self) -> str:
        """One line: ``forward: conv3d 20; fused bias + relu 20; conversions removed 3, inserted entering 1``."""
        fused = {what: self.fused.count(what) for what in self.fused}
        parts = [f"replaced {_listed(self.replaced)}" + (f" beside {self.found} that were ours" if self.found else "")]
        if fused:
            parts.append(f"fused {_listed(fused)}")
        parts.append(f"conversions removed {self.removed}, inserted {_listed(self.inserted)}")
        if self.left:
            parts.append(f"left: {', '.join(self.left)}")
        return f"{self.kind}: {'; '.join(parts)}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "0"


_reports: deque[Report] = deque(maxlen=_KEPT)
_collect: deque | list = _reports
_noticed: set = set()


def reports() -> list[Report]:
    """Reports of the last graphs of this process, the newest last. A graph that Inductor takes from its cache has none."""
    return list(_reports)


@contextmanager
def collected() -> Iterator[list[Report]]:
    """The reports made inside of the block, which are not among :func:`reports` then."""
    global _collect
    found: list[Report] = []
    outer, _collect = _collect, found
    try:
        yield found
    finally:
        _collect = outer


def remember(made: Iterable[Report]) -> None:
    _collect.extend(made)


def keep(report: Report) -> None:
    """Remember a report, and show it where the setting ``log`` asks for plans."""
    remember([report])
    if settings.current().log == "plan":
        settings.show("%s", report)


def notice(key: object, message: str, *args: object) -> None:
    """One warning line for each key."""
    if key not in _noticed:
        _noticed.add(key)
        settings.logger.warning(message, *args)


def failed(what: str, error: Exception) -> None:
    """One warning line for each kind of failure, behind which a graph runs as it was."""
    why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    notice((what, why), "%s left as it is: %s", what, why)
