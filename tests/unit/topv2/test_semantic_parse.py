from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.topv2.semantic_parse import (
    TARGET_FORMATS,
    Node,
    ParseError,
    TargetFormat,
    frame,
    from_json,
    normalise,
    read_parse,
    to_json,
    write_parse,
)

NESTED = "[IN:GET_EVENT what is [SL:DATE_TIME [IN:GET_TIME at [SL:NAME the gig ] ] ] in [SL:LOCATION são paulo ] ? ]"
NESTED_JSON = (
    '{"IN:GET_EVENT":["what is",{"SL:DATE_TIME":[{"IN:GET_TIME":["at",{"SL:NAME":"the gig"}]}]},'
    '"in",{"SL:LOCATION":"são paulo"},"?"]}'
)
PARSES = {
    NESTED: NESTED_JSON,
    "[IN:GET_WEATHER weather in [SL:LOCATION boston ] ]": '{"IN:GET_WEATHER":["weather in",{"SL:LOCATION":"boston"}]}',
    "[IN:STOP_MUSIC ]": '{"IN:STOP_MUSIC":""}',
    "[IN:PLAY_MUSIC play [SL:TITLE { { X } } \" \\ ' ] ]": (
        '{"IN:PLAY_MUSIC":["play",{"SL:TITLE":"{ { X } } \\" \\\\ \'"}]}'
    ),
    "[IN:A [SL:B ] [SL:B 7 ] ]": '{"IN:A":[{"SL:B":""},{"SL:B":"7"}]}',
}

labels = st.from_regex(r"(IN|SL):[A-Z0-9_]{1,4}", fullmatch=True)
words = st.text(min_size=1, max_size=4).filter(lambda text: text.split() == [text] and not set(text) & set("[]"))
trees = st.recursive(
    st.builds(lambda label, children: Node(label, tuple(children)), labels, st.lists(words, max_size=3)),
    lambda below: st.builds(
        lambda label, parts: Node(label, tuple(parts)), labels, st.lists(words | below, max_size=4)
    ),
    max_leaves=6,
).map(lambda node: Node(f"IN:{node.label[3:]}", node.children))


def test_a_parse_is_a_tree_of_labels_and_words() -> None:
    assert read_parse("[IN:GET_WEATHER weather in [SL:LOCATION boston ] ]") == Node(
        "IN:GET_WEATHER", ("weather", "in", Node("SL:LOCATION", ("boston",)))
    )
    assert read_parse(NESTED).depth == 4


@pytest.mark.parametrize("parse", PARSES)
def test_what_is_read_is_written_in_the_same_words(parse: str) -> None:
    assert write_parse(read_parse(parse)) == normalise(parse) == parse


@pytest.mark.parametrize(("parse", "json"), PARSES.items())
def test_the_json_form_is_as_documented(parse: str, json: str) -> None:
    assert to_json(read_parse(parse)) == json
    assert write_parse(from_json(json)) == parse


@given(trees)
def test_both_spellings_give_every_tree_back(tree: Node) -> None:
    assert read_parse(write_parse(tree)) == tree
    assert from_json(to_json(tree)) == tree


@given(trees, trees)
def test_trees_are_equal_where_normalised_texts_are_and_only_there(one: Node, other: Node) -> None:
    assert (normalise(write_parse(one)) == normalise(write_parse(other))) == (one == other)
    assert (to_json(one) == to_json(other)) == (one == other)


@pytest.mark.parametrize("text", ["[IN:A b [SL:C d]]", "  [ IN:A\tb[SL:C\n d ]  ]", "[IN:A b [SL:C d ] ]"])
def test_whitespace_says_nothing(text: str) -> None:
    assert normalise(text) == "[IN:A b [SL:C d ] ]"
    assert read_parse(text) == read_parse("[IN:A b [SL:C d ] ]")
    assert read_parse("[IN:A b[SL:C dd ] ]") != read_parse(text)


def test_whitespace_in_json_says_nothing() -> None:
    assert from_json('{ "IN:A" : [ " b  c ", {"SL:D": "e\\tf"} ]\n}') == read_parse("[IN:A b c [SL:D e f ] ]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at the end: nothing was opened"),
        ("weather in boston", "at 1, 'weather': a parse begins with"),
        ("[IN:A b", "at the end: no ] for IN:A"),
        ("[IN:A [SL:B c ]", "at the end: no ] for IN:A"),
        ("[IN:A b ] ]", r"at 4, '\]': the parse has ended before it"),
        ("[IN:A ] [IN:B ]", r"at 3, '\[IN:B': the parse has ended before it"),
        ("[IN:A [SL:b c ] ]", r"at 2, '\[SL:b': 'SL:b' is no label"),
        ("[IN:A [ ] ]", "'' is no label"),
        ("[XX:A b ]", "'XX:A' is no label"),
        ("[SL:A b ]", "the root is SL:A, not an intent"),
        ("]", r"at 1, '\]': a parse begins with"),
    ],
)
def test_what_is_no_parse_is_told_with_the_word_that_shows_it(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        read_parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at character 0: no JSON"),
        ('{"IN:A":', "at character 8: no JSON"),
        ('{"IN:A":"b"} c', "no JSON: Extra data"),
        ('"IN:A"', "at the root: got str"),
        ("{}", "an object of keys"),
        ('{"IN:A":"b","IN:A":"c"}', "allowed exactly one"),  # which a dict would have swallowed
        ('{"IN:A":7}', "in IN:A: got float"),
        ('{"IN:A":null}', "in IN:A: got NoneType"),
        ('{"IN:A":' + "9" * 5000 + "}", "in IN:A: got float"),  # too long for int()
        ('{"IN:A":[["b"]]}', "in IN:A: got list"),
        ('{"IN:A":{"SL:B":"c"}}', "in IN:A: got Node"),  # a second spelling of a node in a list
        ('{"IN:A":"b]"}', "is no word"),
        ('{"a":"b"}', "'a' is no label"),
        ('{"SL:A":"b"}', "the root is SL:A"),
    ],
)
def test_json_that_is_no_parse_is_told(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        from_json(text)


@pytest.mark.parametrize("depth", [65, 20_000])
def test_a_model_that_opens_brackets_for_ever_does_not_exhaust_the_stack(depth: int) -> None:
    for text, read in (("[IN:A " * depth + "]" * depth, read_parse), ('{"IN:A":[' * depth + "]}" * depth, from_json)):
        with pytest.raises(ParseError, match="nested deeper than 64"):
            read(text)
    assert read_parse("[IN:A " * 64 + "]" * 64).depth == 64


@pytest.mark.parametrize(("label", "word"), [("in:a", "b"), ("IN:A", "b c"), ("IN:A", ""), ("IN:A", "[b")])
def test_a_node_that_could_not_be_written_cannot_be(label: str, word: str) -> None:
    with pytest.raises(ParseError):
        Node(label, (word,))


def test_a_frame_keeps_labels_and_the_words_of_leaf_slots() -> None:
    mixed = "[IN:A say [SL:TODO the [IN:B big [SL:C gig ] ] now ] [SL:D ] ]"
    assert write_parse(frame(read_parse(mixed))) == "[IN:A [SL:TODO [IN:B [SL:C gig ] ] ] [SL:D ] ]"


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("[IN:A hear me [SL:B c d ] [SL:E f ] ]", True),
        ("[IN:A [SL:B c d ] please [SL:E f ] ]", True),
        ("[IN:A say [SL:B c ] d [SL:E f ] ]", False),
        ("[IN:A say [SL:E f ] [SL:B c d ] ]", False),
        ("[IN:A say [SL:B c d ] [SL:G f ] ]", False),
        ("[IN:G say [SL:B c d ] [SL:E f ] ]", False),
        ("[IN:A say [SL:B c d ] ]", False),
    ],
)
def test_frames_differ_in_labels_slots_and_slot_words_alone(other: str, same: bool) -> None:
    assert (frame(read_parse("[IN:A say [SL:B c d ] [SL:E f ] ]")) == frame(read_parse(other))) is same


def test_every_format_gives_back_what_it_was_given() -> None:
    assert set(TARGET_FORMATS) == set(get_args(TargetFormat))
    spellings = {name: [entry.encode(parse) for parse in PARSES] for name, entry in TARGET_FORMATS.items()}
    for name, entry in TARGET_FORMATS.items():
        assert [entry.decode(text) for text in spellings[name]] == [read_parse(parse) for parse in PARSES]
        with pytest.raises(ParseError):
            entry.encode("no parse")
        with pytest.raises(ParseError):
            entry.decode("no parse")
    assert spellings["parse"] != spellings["json"]
