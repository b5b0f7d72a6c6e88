"""What is imported only when needed, and how its absence is told."""

from __future__ import annotations


class MissingPackage(ImportError):
    """An optional package is not installed."""
