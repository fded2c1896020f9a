"""A report as one HTML page, or as Markdown with pictures. Tested by tests/unit/reports/test_page.py."""

from functools import partial

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from app.reports.blocks import Charts, Report
from app.reports.charts import Chart, draw

_TEMPLATES = Environment(
    loader=PackageLoader("app.reports", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def as_html(report: Report) -> str:
    """The page. It loads nothing from anywhere."""
    return _TEMPLATES.get_template("report.html.jinja").render(report=report, svg=partial(_svg, alone=False))


def as_markdown(report: Report, *, stem: str) -> dict[str, str]:
    """The text of each file by its name; the first is the report itself, the others are its pictures."""
    charts = [
        chart
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
    ]
    files = {chart.name: f"{stem}-{chart.name}.svg" for chart in charts}
    text = _TEMPLATES.get_template("report.md.jinja").render(report=report, files=files, cell=_markdown_cell)
    return {f"{stem}.md": text} | {files[chart.name]: str(_svg(chart, alone=True)) for chart in charts}


def _svg(chart: Chart, *, alone: bool) -> Markup:
    template = _TEMPLATES.get_template("chart.svg.jinja")
    return Markup(template.render(drawing=draw(chart), alone=alone))  # noqa: S704  # escaped


def _markdown_cell(text: object) -> str:
    """A cell of a table, whose row is one line and whose cells end at bars."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _indented(text: str) -> Markup:
    """Text as it is: a block of code in Markdown, which nothing in it can end."""
    return Markup("\n".join(f"    {line}" for line in text.splitlines()))  # noqa: S704  # code is shown, not rendered


_TEMPLATES.filters["indented"] = _indented
