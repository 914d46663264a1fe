"""report: what the other slices measured, as Markdown with pictures."""

from __future__ import annotations

import argparse
import functools
import importlib.util

from ..results import FAILED, OK
from . import Outcome, Setting, Step

NAME = "report"
WHAT = "pictures and report of what was measured"
WORKERS = 1


def unavailable() -> str | None:
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"


def steps(setting: Setting) -> list[Step]:
    """One, named after the amount of results, so that new ones are reported anew."""
    size = sum(path.stat().st_size for path in setting.out.glob("*.csv"))
    return [Step(f"report of {size} bytes", 20.0, functools.partial(_write, setting))]


def _write(setting: Setting, limit: float) -> Outcome:
    from .. import report

    parser = argparse.ArgumentParser()
    report.arguments(parser)
    status = report.main(parser.parse_args([str(setting.out)]))
    return Outcome(FAILED if status else OK, f"exit status {status}" if status else "", 1)
