"""A report as one HTML page that needs no other file and no network. Knows the tables, the charts and a template."""

from __future__ import annotations

from pathlib import Path

from ..errors import MissingDependencyError
from .charts import draw_charts
from .compare import Comparison
from .schema import Report
from .tables import report_tables, summary_lines

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


def render_html(report: Report, comparison: Comparison | None = None) -> str:
    """The page.

    Raises:
        MissingDependencyError: Jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingDependencyError(
            "the HTML report needs Jinja2, which is not installed; run: pip install 'rsvlm-infer[report]'"
        ) from None
    # StrictUndefined: a misspelt name must be an error, not an empty cell
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = jinja.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tables = report_tables(report, comparison)
    headline = sum(1 for table in tables if table.title in ("SingleStream", "Offline"))
    page: str = template.render(
        schema=report.schema,
        summary=[(name, value.strip("`")) for name, value in summary_lines(report)],
        warnings=report.warnings,
        violations=comparison.violations if comparison is not None else (),
        headline=tables[:headline],
        charts=draw_charts(report),
        tables=tables[headline:],
    )
    return page
