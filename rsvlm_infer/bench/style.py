"""How charts look, and the way into matplotlib, which is imported only when a chart is drawn. Knows no result."""

from __future__ import annotations

import io
from typing import Any

from ..errors import MissingDependencyError

INK, QUIET = "#1f2933", "#6b7785"


def load_figure() -> tuple[Any, Any]:
    """matplotlib and its Figure class, without a display.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "charts need matplotlib, which is not installed; run: pip install 'rsvlm-infer[report]'"
        ) from None
    return mpl, Figure


def chart_style() -> dict[Any, Any]:
    """Settings of all charts, for matplotlib's rc_context."""
    return {
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "xtick.color": QUIET,
        "ytick.color": INK, "axes.edgecolor": QUIET, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "ytick.left": False, "axes.axisbelow": True, "grid.color": "#e3e7eb", "svg.hashsalt": "rsvlm-bench",
    }  # fmt: skip


def svg_text(figure: Any, title: str) -> str:
    """SVG without XML prolog, scalable to the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
