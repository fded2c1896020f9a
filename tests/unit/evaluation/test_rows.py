"""Rows of files become examples, and what is wrong with a file, a row or a column is named."""

import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import ConfigError, DataError
from app.evaluation.rows import read_items, spread
from app.evaluation.tasks import TASKS

BOOLQ = {"question": "is it", "passage": "It is.", "answer": True}
PIQA = {"goal": "To rest", "sol1": "sit", "sol2": "run", "label": 0}
MMLU = "What?,w,x,y,z,C\n"


def _write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "row", "context", "choices", "answer"),
    [
        ("boolq", BOOLQ, "It is.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1),
        ("piqa", PIQA | {"label": "1"}, "Question: To rest\nAnswer:", (" sit", " run"), 1),
        (
            "hellaswag",
            {"activity_label": "Rest", "ctx_a": "A man", "ctx_b": "he [substeps] sits", "ctx": "", "label": "2",
             "endings": ["runs [title] More", "x", "stands  up"]},
            "Rest: A man He sits", (" runs. More", " x", " stands up"), 2,
        ),
        ("arc_easy", {"question": "Why?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"},
         "Question: Why?\nAnswer:", (" p", " q"), 1),
        ("arc_challenge", {"question": "Why?", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "1"},
         "Question: Why?\nAnswer:", (" p", " q"), 0),
        ("openbookqa",
         {"question_stem": "Ice is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A"},
         "Ice is", (" cold", " hot"), 0),
        ("siqa", {"context": "Al fell.", "question": "How is Al?", "answerA": "sad", "answerB": "b", "answerC": "c",
                  "label": "3"}, "Q: Al fell. How is Al?\nA:", (" sad", " b", " c"), 2),
        ("copa", {"premise": "It rained.", "question": "effect", "choice1": "It got wet.", "choice2": "I left.",
                  "label": 0}, "It rained therefore", (" it got wet.", " i left."), 0),
        ("race", {"article": "Text.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "D"},
         "Article: Text.\n\nQuestion: Who?\nAnswer:", (" a", " b", " c", " d"), 3),
    ],
)  # fmt: skip
def test_each_task_asks_as_other_harnesses_do(tmp_path, name, row, context, choices, answer):
    _write(tmp_path, {"rows.jsonl": [row]})
    (item,) = read_items(TASKS[name], str(tmp_path / "rows.jsonl"))
    assert (item.example.context, item.example.choices, item.example.answer) == (context, choices, answer)


STEM = {"stem": "Why?", "choices": [{"text": "p", "label": "A"}, {"text": "q", "label": "B"}]}
SIQA = {"context": "Al fell.", "question": "How is Al?", "answerA": "a", "answerB": "b", "answerC": "c"}
COPA = """<?xml version="1.0"?><!DOCTYPE copa-corpus SYSTEM "copa.dtd"><copa-corpus version="1.0">
<item id="1" asks-for="cause" most-plausible-alternative="2"><p>It is wet.</p><a1>I left.</a1><a2>It rained.</a2></item>
</copa-corpus>"""
RACE = {"article": "A.", "questions": ["Who?", "Why?"], "options": [list("abcd")] * 2, "answers": ["A", "C"]}
TRIVIA = {"Data": [{"Question": "Who?", "Answer": {"Value": "Al", "Aliases": ["Alan"]}}]}


@pytest.mark.parametrize(
    ("name", "files", "context", "choices", "answer"),
    [
        ("arc_easy", {"ARC-Easy-Test.jsonl": [{"question": STEM, "answerKey": "B"}]},
         "Question: Why?\nAnswer:", (" p", " q"), 1),
        ("openbookqa", {"Main/test.jsonl": [{"question": STEM, "answerKey": "B"}]}, "Why?", (" p", " q"), 1),
        ("piqa", {"valid.jsonl": [{"goal": "To rest", "sol1": "sit", "sol2": "run"}], "valid-labels.lst": "\ufeff1\n"},
         "Question: To rest\nAnswer:", (" sit", " run"), 1),
        ("siqa", {"siqa-train-dev/dev.jsonl": [SIQA], "siqa-train-dev/dev-labels.lst": "3\n",
                  "siqa-train-dev/train.jsonl": [SIQA | {"question": "?", "label": 1}]},
         "Q: Al fell. How is Al?\nA:", (" a", " b", " c"), 2),
        ("copa", {"copa-dev.xml": COPA, "copa-test.xml": COPA * 2},
         "It is wet because", (" i left.", " it rained."), 1),
        ("race", {"test/high/1.txt": "\ufeff" + json.dumps(RACE)},
         "Article: A.\n\nQuestion: Why?\nAnswer:", (" a", " b", " c", " d"), 2),
        ("triviaqa", {"web-dev.json": json.dumps(TRIVIA)},
         "Question: Who?\nAnswer:", (" Al", " Alan"), ("\n", ".", ",")),
    ],
)  # fmt: skip
def test_files_are_read_as_their_authors_publish_them(tmp_path, name, files, context, choices, answer):
    _write(tmp_path, files)
    *_, item = read_items(TASKS[name], str(tmp_path), num_shots=0)
    assert item.example[:3] == (context, choices, answer)


def test_winogrande_scores_the_end_of_the_sentence_after_each_name(tmp_path):
    row = {"sentence": "Al met Bo and _ smiled.", "option1": "Al", "option2": "Bo", "answer": "2"}
    _write(tmp_path, {"rows.jsonl": [row]})
    ((_, _, _, example),) = read_items(TASKS["winogrande"], str(tmp_path))
    assert example == ("Al met Bo and", (" smiled.", " smiled."), 1, (" Al", " Bo"))
    assert example.solved == "Al met Bo and Bo smiled."


def test_mmlu_shows_five_worked_examples_of_the_subject_from_dev(tmp_path):
    dev = {
        f"dev/{name}_dev.csv": "".join(f'"{name} {n}?, so",p,q,r,s,B\n' for n in range(6)) for name in ("art", "law")
    }
    _write(tmp_path, dev | {"test/art_test.csv": MMLU * 2, "test/law_test.csv": MMLU * 4})
    items = read_items(TASKS["mmlu"], str(tmp_path), limit=4)
    assert [item.group for item in items] == ["art", "art", "law", "law"]  # as many of each
    shots = [f"law {n}?, so\nA. p\nB. q\nC. r\nD. s\nAnswer: B\n\n" for n in range(5)]
    begin = "The following are multiple choice questions (with answers) about law.\n\n"
    asked = "What?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert items[2].example == (begin + "".join(shots) + asked, (" A", " B", " C", " D"), 2, ())
    (plain, *_) = read_items(TASKS["mmlu"], str(tmp_path), num_shots=0)
    assert plain.example.context == begin.replace("law", "art") + asked
    hub = {"question": "What?", "subject": "art", "choices": ["w", "x", "y", "z"], "answer": 2}
    _write(tmp_path, {"rows.jsonl": [hub]})
    (of_hub,) = read_items(TASKS["mmlu"], str(tmp_path / "rows.jsonl"), num_shots=0)
    assert of_hub.example == plain.example


def test_a_folder_gives_the_files_of_the_split_and_of_any_format(tmp_path):
    _write(tmp_path, {"train.jsonl": [PIQA] * 3, "a/valid.jsonl": [PIQA], "b/val.json": json.dumps([PIQA, PIQA])})
    _write(
        tmp_path, {"c_dev.csv": "goal,sol1,sol2,label\ng,s,t,1\n", "d_dev.tsv": 'goal\tsol1\tsol2\tlabel\n"g\ts\tt\t1'}
    )
    pq.write_table(pa.Table.from_pylist([PIQA]), tmp_path / "eval.parquet")
    items = read_items(TASKS["piqa"], str(tmp_path))
    assert [item.row for item in items] == [0, 1, 2, 3, 4, 5]
    assert items[4].example.context == 'Question: "g\nAnswer:'  # tab-separated files have no quotes
    (shot, *_) = read_items(TASKS["piqa"], str(tmp_path), num_shots=1)
    assert shot.example.context == "Question: To rest\nAnswer: sit\n\nQuestion: To rest\nAnswer:"


def test_texts_belong_to_the_source_that_their_row_or_file_names(tmp_path):
    _write(
        tmp_path, {"emma.txt": "\ufeffIt is a truth.\n", "rest.jsonl": [{"text": "a"}, {"text": "b", "source": "wiki"}]}
    )
    items = read_items(TASKS["text"], str(tmp_path), limit=1, num_shots=5)  # which count nothing here
    assert [item.example for item in items] == [("It is a truth.\n", "emma"), ("a", "rest"), ("b", "wiki")]


def test_rows_of_the_hub_are_asked_for_by_dataset_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return [{"question": "What?", "subject": "art", "choices": ["w", "x", "y", "z"], "answer": 2}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (item,) = read_items(TASKS["mmlu"], None, num_shots=1)
    assert asked == [(("cais/mmlu", "all"), "test"), (("cais/mmlu", "all"), "dev")]
    assert item.location == "cais/mmlu[test], row 1"

    def fails(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(
        DataError, match=r"dataset cais/mmlu\[test\] cannot be opened: ConnectionError: no route; .*mmlu="
    ):
        read_items(TASKS["mmlu"], None)


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("boolq", "r.jsonl", [BOOLQ, {"question": "q", "answer": True}],
         r"r\.jsonl, row 2: there is no column 'passage', only question, answer"),
        ("boolq", "r.jsonl", [BOOLQ | {"answer": "yes"}], r"row 1, column 'answer': got 'yes', allowed true or false"),
        ("boolq", "r.jsonl", [BOOLQ | {"passage": 3}], r"row 1, column 'passage': got 3, allowed a text"),
        ("piqa", "r.jsonl", [PIQA, PIQA, PIQA | {"label": 2}], r"row 3, column 'label': got 2, allowed 0\.\.1"),
        ("piqa", "r.jsonl", [PIQA | {"label": "x"}], r"row 1, column 'label': got 'x', allowed 0\.\.1"),
        ("piqa", "r.jsonl", [PIQA | {"label": -1}], r"row 1, column 'label': got -1, allowed 0\.\.1"),
        ("siqa", "r.jsonl", [{"context": "", "question": "", "answerA": "a", "answerB": "b", "answerC": "c",
                              "label": 0}], r"column 'label': got 0, allowed 1\.\.3"),
        ("race", "r.jsonl", [{"article": "", "question": "", "options": list("abcd"), "answer": "E"}],
         r"column 'answer': got 'E', allowed one of the letters ABCD"),
        ("race", "r.jsonl", [{"article": "", "question": "", "options": ["a"], "answer": "A"}],
         r"column 'options': got \['a'\], allowed a list of texts, at least 4"),
        ("copa", "r.jsonl", [{"question": "why"}], r"column 'question': got 'why', allowed cause \| effect"),
        ("arc_easy", "r.jsonl", [{"question": "q", "choices": {"text": ["a"], "label": []}, "answerKey": "A"}],
         r"column 'choices': got .*, allowed an object of two lists"),
        ("arc_easy", "r.jsonl", [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                                  "answerKey": "C"}], r"column 'answerKey': got 'C', allowed one of the labels A, B"),
        ("arc_easy", "r.jsonl", [{"question": "q", "choices": [{"text": 1, "label": "A"}] * 2, "answerKey": "A"}],
         r"row 1, column 'choices': got .*, allowed a text for each choice"),
        ("arc_easy", "r.jsonl", [{"question": {"stem": "q", "choices": ["a", "b"]}, "answerKey": "A"}],
         r"column 'choices': got .*, allowed an object of two lists"),
        ("copa", "r.xml", "<a><b></a>", r"r\.xml cannot be read: mismatched tag"),
        ("copa", "r.xml", '<?xml version="1.0" encoding="no"?><a/>', r"r\.xml cannot be read: unknown encoding: no"),
        ("arc_easy", "r.json", "[" * 100_000, r"r\.json cannot be read: maximum recursion depth"),
        ("race", "r.txt", "no", r"r\.txt, row 1: not JSON"),
        ("race", "r.txt", "[1]", r"r\.txt, row 1: got list, allowed an object with columns"),
        ("race", "r.txt", json.dumps(RACE | {"answers": ["A"]}), r"column 'questions': .*allowed a list as long"),
        ("race", "r.txt", json.dumps(RACE | {"answers": ["A", "E"]}), r"row 1, question 2, column 'answer': got 'E'"),
        ("winogrande", "r.jsonl", [{"sentence": "no gap"}], r"column 'sentence': got 'no gap', allowed a sentence"),
        ("mmlu", "r.csv", "What?,w,x,y\n", r"r\.csv, row 1: got 4 columns, allowed 6: question, A, B, C, D, answer"),
        ("piqa", "r.jsonl", '{"goal": 1}\n{"go', r"r\.jsonl, line 2: not JSON"),
        ("piqa", "r.jsonl", "[1]\n", r"r\.jsonl, row 1: got list, allowed an object with columns"),
        ("piqa", "r.jsonl", [PIQA | {"sol1": ""}], "r.jsonl, row 1: got a choice without a text, allowed"),
        ("piqa", "r.jsonl", [PIQA | {"sol1": "\ud800"}], r"r\.jsonl, row 1: a text is not Unicode \(surrogates"),
        ("text", "r.jsonl", [{"text": "\ud800"}], r"r\.jsonl, row 1: a text is not Unicode \(surrogates"),
        ("piqa", "r.jsonl", "", r"task piqa: .*r\.jsonl holds no row"),
        ("piqa", "r.xml", "<a/>", r"task piqa: .*r\.xml is a '\.xml' file, allowed \.jsonl \| "),
        ("piqa", "r.parquet", "no", r"r\.parquet cannot be read"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, task, name, content, message):
    _write(tmp_path, {name: content})
    with pytest.raises(DataError, match=message):
        read_items(TASKS[task], str(tmp_path / name), num_shots=0)


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"task piqa: .*absent does not exist; write NAME=PATH"):
        read_items(TASKS["piqa"], str(tmp_path / "absent"))
    _write(tmp_path, {"valid.jsonl": [PIQA], "train.jsonl": [PIQA]})
    with pytest.raises(ConfigError, match=r"num_shots: got 2, allowed 0\.\.1 with task piqa: .*; give a folder with"):
        read_items(TASKS["piqa"], str(tmp_path), num_shots=2)
    _write(tmp_path / "alone", {"valid.jsonl": [PIQA]})
    with pytest.raises(ConfigError, match=r"num_shots: got 1, allowed 0\.\.0 with"):  # what is scored is never shown
        read_items(TASKS["piqa"], str(tmp_path / "alone"), num_shots=1)
    with pytest.raises(DataError, match="task text has no dataset of its own; write text=PATH"):
        read_items(TASKS["text"], None)
    _write(tmp_path / "labels", {"valid.jsonl": [PIQA], "valid-labels.lst": "0\n1\n"})
    with pytest.raises(DataError, match=r"valid-labels\.lst: got 2 labels, allowed 1: one for each row of valid\."):
        read_items(TASKS["piqa"], str(tmp_path / "labels"))


def test_a_limit_takes_as_many_of_each_group_from_all_over_it_and_a_higher_one_adds_to_them():
    groups = ["a"] * 400 + ["b"] * 2 + ["c"] * 1
    chosen = spread(groups, 43)
    assert chosen == sorted({*chosen}) == spread(groups, 43)
    assert [groups[index] for index in chosen] == ["a"] * 40 + ["b"] * 2 + ["c"]
    assert {*chosen} < {*spread(groups, 60)}
    of_a = [index for index in chosen if index < 400]
    assert 10 < sum(index < 200 for index in of_a) < 30  # files may be ordered by answer
    assert spread(list("aab"), None) == spread(list("aab"), 9) == [0, 1, 2]
