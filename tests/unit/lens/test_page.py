import json
import re
from html.parser import HTMLParser

from app.lens.page import lens_page

VOID = ("meta", "input")


class Outline(HTMLParser):
    """What a parser sees: that every element ends, all texts, and whatever loads something."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.loads = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_is_whole_and_needs_nothing_else(told):
    html = lens_page(told)
    outline = Outline(html)
    assert outline.open == []
    assert outline.loads == []
    assert not re.search(r"https?://|@import|url\(|import ", html)
    assert "default-src 'none'" in html


def test_texts_are_escaped_and_the_figures_come_back_as_they_were(told):
    html = lens_page(told)
    outline = Outline(html)
    style, *scripts = outline.texts["style"], *outline.texts["script"]
    assert len(style) == 1
    assert len(scripts) == 2  # no prompt ended a script
    assert json.loads(scripts[0]) == json.loads(json.dumps(told))
    assert "</script><b>" not in html
    assert "b" in outline.texts  # the figures' own
    assert any("</script><b>" in text for text in outline.texts["option"])
    assert ", " not in scripts[0][: scripts[0].index('"prompts"')], "compact"


def test_layers_needed_stand_side_by_side_with_their_difference(told):
    first, second = (model["needed"]["mean_saturation_layer"] for model in told["models"])
    difference = told["difference"]["mean_saturation_layer"]
    assert difference == second - first
    figures = Outline(lens_page(told)).texts["b"]
    sign = "+" if difference >= 0 else "\N{MINUS SIGN}"
    assert figures == [f"{first:.1f}", f"{second:.1f}", f"{sign}{abs(difference):.1f}"]
    assert f"<td>{sign}{abs(difference):.2f}</td></tr>\n      </tfoot>" in lens_page(told)
