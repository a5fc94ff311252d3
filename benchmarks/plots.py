"""Plots as PNG files that are the same for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Matplotlib without a display; imported only where something is drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Writes and closes a figure; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's version.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot().close(figure)
