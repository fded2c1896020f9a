"""Normalisations and ROUGE-2 against tables made by hand from their sources."""

import pytest

from app.evaluation.scores import exact_match, final_number, last_number, question_answer, rouge_2, trivia_answer


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        (" The Beatles.", "beatles"),
        ("the  cat and  a hat", "cat and hat"),
        ("Theodore Anderson", "theodore anderson"),  # articles are whole words
        ("rock-n-roll", "rocknroll"),
        ("14 December 1972 UTC", "14 december 1972 utc"),
        ("U.S.", "us"),
        ("the", ""),
    ],
)
def test_answers_to_natural_questions_are_compared_as_squad_does(text: str, normalised: str) -> None:
    assert question_answer(text) == normalised


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Beatles.", "beatles"),
        ("rock-n-roll", "rock n roll"),
        ("rock_n_roll", "rock n roll"),
        ("\u2018Tis a pity", "tis pity"),
        ("U.S.", "u s"),
    ],
)
def test_answers_to_trivia_are_compared_as_their_release_does(text: str, normalised: str) -> None:
    assert trivia_answer(text) == normalised


@pytest.mark.parametrize(
    ("text", "final", "last"),
    [
        ("He has 3 * 6 = <<3*6=18>>18 eggs.\n#### 18", "18", "18"),
        ("#### 1,250.", "1250", "1250"),
        ("It costs $1,250.", "", "1250"),
        ("#### -7\nQuestion: 8", "-7", "8"),
        ("#### $18", "", "18"),  # the strict form has digits alone
        ("a profit of 0.5", "", "0.5"),
        ("no idea", "", ""),
        ("####18", "", "18"),
    ],
)
def test_numbers_are_found_where_gsm8k_expects_them(text: str, final: str, last: str) -> None:
    assert (final_number(text), last_number(text)) == (final, last)


def test_one_of_several_references_is_enough() -> None:
    assert exact_match("The King", ["queen", "king!"], question_answer) == 1.0
    assert exact_match("The Kings", ["queen", "king!"], question_answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "references", "f1"),
    [
        ("the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        ("The cat, sat: on the MAT!", ["the cat sat on the mat"], 1.0),
        ("the cat sat", ["the cat ran off"], 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),  # 1 of 2 pairs, 1 of 3
        ("a b a b", ["a b"], 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a repeated pair counts as often as the reference has it
        ("cats sat", ["cat sat"], 0.0),  # without stemming
        ("a b c", ["x y", "a b z"], 0.5),  # the best reference counts
        ("", ["the cat sat"], 0.0),
        ("cat", ["the cat"], 0.0),
    ],
)
def test_rouge_2_is_the_f1_of_shared_word_pairs(answer: str, references: list[str], f1: float) -> None:
    assert rouge_2(answer, references) == pytest.approx(f1)
