"""What goes wrong while selecting."""

from __future__ import annotations


class SelectionError(RuntimeError):
    """A prompt's tokens cannot be selected; the message names layer and cause."""
