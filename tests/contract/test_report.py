"""`layerskip report` in this process, on folders that look like those of runs."""

import pytest

from tests.support.run_folders import make_run
from tests.support.runs import cli


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run the verb in a folder with two runs; its standard streams."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", steps=(20,))

    def run(*arguments, status=0):
        capsys.readouterr()
        assert cli(monkeypatch, "report", *arguments) == status
        return capsys.readouterr()

    return run


def test_folders_come_before_or_after_the_options_and_may_have_labels(report, tmp_path):
    assert report("one", "two", "--output", "a.html").out == "report: a.html\n"
    report("--output", "b.html", "first=one", "two")
    assert '<th scope="col">first</th>' in (tmp_path / "b.html").read_text()
    assert "stopped at step 20 of 40" in (tmp_path / "a.html").read_text()


def test_markdown_has_its_pictures_beside_it(report, tmp_path):
    report("one", "--output", "a.md")
    assert "](a-train-loss.svg)" in (tmp_path / "a.md").read_text()
    assert (tmp_path / "a-train-loss.svg").read_text().startswith("<svg")


def test_what_is_there_is_replaced_only_if_asked_for(report, tmp_path):
    (tmp_path / "a-val-loss.svg").write_text("mine")
    said = report("one", "--output", "a.md", status=2).err
    assert "output: got 'a.md', allowed a new file; --overwrite true replaces a-val-loss.svg" in said
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a-val-loss.svg"]
    report("one", "--output", "a.md", "--overwrite", "true")
    assert (tmp_path / "a-val-loss.svg").read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.html"], "run_dirs"),
        (["one", "--output", "a.pdf"], "output: got 'a.pdf', allowed a .html file"),
        (["one", "--output", "absent/a.md"], "output: got 'absent/a.md', allowed a .md file in a folder that exists"),
        (["absent", "--output", "a.html"], "run_dirs: got 'absent', allowed the folder of a run"),
        (["one", "--output", "a.html", "--files", "absent.json"], "files: got 'absent.json', allowed files that layer"),
        (["one", "--outptu", "a.html"], "outptu"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(arguments, message, report, tmp_path):
    said = report(*arguments, status=2).err
    assert message in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not [*tmp_path.glob("a.*")]


def test_logs_that_cannot_be_read_are_told(report, tmp_path):
    (tmp_path / "one" / "events.out.tfevents.1").symlink_to("absent")
    said = report("one", "--output", "a.html", status=2).err
    assert "run_dirs: got ['one'], allowed files that can be read; [Errno 2]" in said
