"""Compares what a model wrote with right answers: exact match after a task's normalisation, and ROUGE-2.

All figures are between 0 and 1, where 1 is right. Where an answer has several references, the best one counts.
"""

import re
import string
from collections.abc import Callable, Sequence

from torchmetrics.functional.text.rouge import rouge_score

Normalise = Callable[[str], str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_TRIVIAQA_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + "\u2018\u2019\u00b4`"), " ")
_FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def exact_match(answer: str, references: Sequence[str], normalise: Normalise = str) -> float:
    """1.0 if the normalised answer is one of the normalised references, else 0.0."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """The F1 of the word pairs that answer and reference share, lower case, punctuation apart, without stemming.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004). Stemming would need NLTK.
    """
    scores = rouge_score(answer, [[*references]], accumulate="best", rouge_keys="rouge2")
    return float(scores["rouge2_fmeasure"])


def question_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces.

    Source: Rajpurkar et al., "SQuAD" (2016), section 6.1; Lee et al. (2019) take it over for NaturalQuestions-open.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def trivia_answer(text: str) -> str:
    """Do as `question_answer`, with a space for each punctuation mark, of which typographic quotes are some.

    Source: Joshi et al., "TriviaQA" (2017), as in the evaluation script of its release.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_TRIVIAQA_PUNCTUATION)).split())


def final_number(text: str) -> str:
    """The number after the first "####", without commas and a full stop at its end; "" if there is none.

    Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021), whose solutions end so; filter
    strict-match of GSM8K in lm-evaluation-harness.
    """
    return _plain_number(found[1]) if (found := _FINAL_NUMBER.search(text)) else ""


def last_number(text: str) -> str:
    """The last number of a text, without "$", commas and a full stop at its end; "" if there is none.

    Source: filter flexible-extract of GSM8K in lm-evaluation-harness.
    """
    return _plain_number(found[-1]) if (found := _NUMBER.findall(text)) else ""


def _plain_number(text: str) -> str:
    return text.replace(",", "").replace("$", "").removesuffix(".")
