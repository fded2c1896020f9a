"""What a user chooses for `layerskip adapt`. Tested by tests/contract/test_adapt.py."""

from dataclasses import dataclass

from app.errors import ConfigError, check_range
from datamodules.readers.sources import SourceKind


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """What a user chooses about the adaptation of a model.

    Args:
        corpus: Folder or file of texts like those that the model will write.
        corpus_kind: How the corpus is read; see datamodules/README.md. stdlib_code and stdlib_text need no corpus.
        glob: Pattern of the corpus's files.
        prompts: JSON lines file of prompts instead of a corpus; a quarter of them are held out.
        hours: Time to spend, over all calls of the same command. Where a step takes longer than its share, those after
            it get less, but at least half of theirs.
        exit_layer: Blocks that run before the exit's own; by default a fifteenth of the model's, at least 1.
        num_exit_blocks: Blocks of the exit's own.
        own_share: Share of training tokens that the model writes itself; the rest is the corpus.
        max_new_tokens: New tokens of each text that the model writes, and of each measurement.
        recipe: Config of the training, for `layerskip fit`.
    """

    corpus: str | None = None
    corpus_kind: SourceKind = "files"
    glob: str | None = None
    prompts: str | None = None
    hours: float = 2.0
    exit_layer: int | None = None
    num_exit_blocks: int = 1
    own_share: float = 0.75
    max_new_tokens: int = 128
    recipe: str = "configs/exit_blocks.yaml"

    def __post_init__(self) -> None:
        check_range("hours", self.hours, low=0.01)
        check_range("own_share", self.own_share, low=0.05, high=1.0)
        check_range("max_new_tokens", self.max_new_tokens, low=2)
        check_prompts_or_corpus(self.prompts, has_corpus=self.has_corpus)

    @property
    def has_corpus(self) -> bool:
        return names_corpus(self.corpus, self.corpus_kind)


def names_corpus(corpus: str | None, kind: SourceKind) -> bool:
    """Whether there is a corpus: one that is named, or one that every machine has."""
    return corpus is not None or kind.startswith("stdlib")


def check_prompts_or_corpus(prompts: str | None, *, has_corpus: bool) -> None:
    """Raise ConfigError unless there are either prompts or a corpus."""
    if (prompts is not None) == has_corpus:
        got = "both" if has_corpus else "neither"
        raise ConfigError("prompts", got=got, allowed="exactly one of prompts and corpus")
