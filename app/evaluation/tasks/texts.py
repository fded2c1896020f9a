"""Perplexity of texts by source: of WikiText-2, of books, and of any text files or JSON lines of a user.

Tested by tests/unit/evaluation/test_likelihood_tasks.py.
"""

from app.evaluation.task import HubRows, Row, TextExample, TextTask


def _document(row: Row) -> TextExample:
    """The column `text`; its source is the column `source`, or else the name of the file."""
    return TextExample(row.text("text"), row.text("source") if "source" in row else row.source)


def _page(row: Row) -> TextExample:
    return TextExample(row.text("page" if "page" in row else "text"), row.source or "wikitext2")


TEXT = TextTask(name="text", hub=None, example=_document)
GUTENBERG = TextTask(name="gutenberg", hub=None, example=_document)
WIKITEXT2 = TextTask(
    name="wikitext2",
    hub=HubRows(path="EleutherAI/wikitext_document_level", config="wikitext-2-raw-v1", split="test"),
    example=_page,
)
