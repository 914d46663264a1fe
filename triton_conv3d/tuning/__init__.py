"""Choosing a plan for a problem, and keeping it."""

from .measure import budget
from .plan import Plan
from .select import forget, run, select

__all__ = ["Plan", "budget", "forget", "run", "select"]
