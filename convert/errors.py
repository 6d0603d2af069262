"""What can be wrong with a checkpoint folder."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder that cannot be converted: says what was expected, what was found and what to do."""
