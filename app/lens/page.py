"""The page of a lens: one HTML file that needs nothing else, with its style, script and figures inside.

Tested by tests/unit/lens/test_page.py, and in a browser by tests/contract/test_lens_in_browser.py.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from app.lens.token_texts import visible


def lens_page(told: Mapping[str, Any]) -> str:
    """Return the HTML of what `app.lens.report.lens_as_json` told.

    Texts are escaped. The figures are JSON in which no character can end the script element that holds them.
    """
    templates = Environment(loader=PackageLoader("app.lens", "page_parts"), autoescape=True, undefined=StrictUndefined)
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    templates.filters |= {"visible": visible, "signed": _signed}
    return templates.get_template("page.html.jinja").render(told=told)


def _signed(number: float, digits: int) -> str:
    return f"{number:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
