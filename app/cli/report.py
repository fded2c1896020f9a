"""`layerskip report`: one page about one or several runs. Tested by tests/contract/test_report.py."""

from functools import partial

from app.cli.parsing.several import SEVERAL_AT_A_TIME
from app.cli.parsing.verb_parser import call_verb
from app.errors import check_new, check_output_file
from app.reports.render import as_html, as_markdown
from app.reports.report import make_report
from app.whole_file import write_whole


def report(*, run_dirs: list[str], output: str, files: list[str] | None = None, overwrite: bool = False) -> None:
    """Write one page about runs: recipe, curves, exits, decoding, and how they differ.

    Args:
        output: File to write, .html for one page that loads nothing else, or .md for Markdown with its pictures beside.
        overwrite: Replace files of these names.
    """
    path = check_output_file(output, suffix=".md" if output.endswith(".md") else ".html")
    made = make_report(run_dirs, files or ())
    contents = as_markdown(made, stem=path.stem) if path.suffix == ".md" else {path.name: as_html(made)}
    if not overwrite:
        check_new(output, map(path.with_name, contents))
    for name, text in reversed(contents.items()):  # the report last, so that it never names a picture that is not there
        write_whole(path.with_name(name), text)
    for note in made.notes:
        print(f"note: {note}")
    print(f"report: {path}")


_HELP = {
    "run_dirs": "Folders of runs of layerskip fit, one to six: each FOLDER or LABEL=FOLDER.",
    "files": (
        "More files that layerskip benchmark, tune, evaluate or lens wrote. Those in the folders of the runs are found"
        " (*.json)."
    ),
}
run = partial(
    call_verb,
    report,
    by_hand={"files": SEVERAL_AT_A_TIME | {"help": _HELP["files"]}},
    positional={"run_dirs": {"type": str, "nargs": "+", "help": _HELP["run_dirs"]}},
)
