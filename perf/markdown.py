"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

_MOST = 200  # characters of a cell


def cell(value: object) -> str:
    """Text on one line, not a long one, that cannot break a table; None is a dash."""
    text = "-" if value is None else " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= _MOST else text[: _MOST - 3].rstrip("\\") + "..."


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A table with the columns of ``"layer | pass | time:"``; those that end in a colon are set flush right."""
    names = [name.strip() for name in header.split("|")]
    rules = ["---:" if name.endswith(":") else "---" for name in names]
    lines = [[name.removesuffix(":") for name in names], rules, *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
