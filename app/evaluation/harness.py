"""A model and its exits as an `LM` of lm-evaluation-harness, the extra `eval`: any of its tasks runs from any exit.

The harness finds it by the entry point `lm_eval.models`, but only its releases after 0.4.13 look there. With 0.4.13,
`python -m app.evaluation.harness` is its command line with this model in it.

Tested by tests/integration/test_harness.py.

Shape legend: `B` prompts, `T` tokens of the longest prompt, padded on the left, `S` tokens of prompt and output.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from app.decoding.stopping import StopStrings
from app.decoding.strategies import STRATEGIES, is_lossless
from app.errors import ConfigError, UserError, check_choice
from app.generation.defaults import choose_decoding
from app.generation.loaded_model import DraftLoadOptions, load_draft_decoder
from app.generation.options import DraftOptions, GenerationOptions
from app.generation.request import Request
from app.model.exit_model import exit_model

_NAME = "layerskip"
_NUMBERS = ("exit_layer", "num_draft_tokens", "n_gram_match", "n_gram_max_drafts", "seed", "threads")
_DECODING = (*(field.name for field in fields(DraftOptions)), "seed")
_LOADING = tuple(field.name for field in fields(DraftLoadOptions))
_OF_HARNESS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype", "add_bos_token"),
    *("prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args"),
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LayerSkipLM(HFLM):  # type: ignore[misc]  # the extra is not always there to be checked against
    """A model for the harness, as a whole or from an exit.

    Likelihoods are those of the blocks whose output generation gives: of the first E with strategy early_exit, else of
    all. So a lossless strategy changes no score, only the time that generating takes.

    Args:
        pretrained: Hugging Face directory, hub id, .gguf file or Lightning checkpoint of a run.
        settings: `strategy` and the other options of `layerskip generate` that say how tokens are drafted, where the
            strategy is early_exit if an `exit_layer` is given, else autoregressive; its `engine`, `seed`, `dtype`,
            `device`, `threads`, `quantization` and `draft_vocabulary`; and the settings of the harness's own class
            about batches, lengths and tokens.

    Attributes:
        exit_layer: Number of blocks that likelihoods are measured on; the number of all for the full model.

    Raises:
        ConfigError: A setting is unknown or does not fit the model.
        CheckpointError: A file is damaged or incomplete.
    """

    def __init__(self, pretrained: str | None = None, **settings: Any) -> None:
        if not isinstance(pretrained, str):
            raise ConfigError("pretrained", got=pretrained, allowed="a Hugging Face directory, hub id, .gguf or .ckpt")
        known = ("pretrained", *_DECODING, *_LOADING, *_OF_HARNESS)
        if unknown := sorted(settings.keys() - {*known}):
            raise ConfigError("model_args", got=unknown[0], allowed=" | ".join(known))
        for name in _NUMBERS:
            if name in settings and type(settings[name]) is not int:
                raise ConfigError(name, got=settings[name], allowed="an integer")
        options = _options({name: value for name, value in settings.items() if name in _DECODING})
        loading = {name: value for name, value in settings.items() if name in _LOADING and value is not None}
        if loading.get("device") in ("cuda", "cuda:0"):  # the harness's command line says so without a GPU, too
            del loading["device"]
        loaded = DraftLoadOptions(**loading).load(pretrained, field="pretrained")
        batch_size = settings.get("batch_size", 1)
        strategy, chosen = choose_decoding(
            options.strategy,
            options.settings(),
            loaded,
            batch_size=batch_size if isinstance(batch_size, int) else 1,
            n_grams=options.n_gram_match != 0,
        )
        self.loaded, self.strategy, self.options = loaded, strategy, options
        self.chosen = replace(
            chosen,
            eos_token_ids=loaded.eos_token_ids,
            draft_decoder=load_draft_decoder(options.draft_model, loaded, strategies=[strategy]),
        )
        self.num_generated = 0
        num_layers, model = loaded.decoder.num_layers, loaded.model
        self.is_lossless = is_lossless(strategy, exit_layer=chosen.exit_layer, num_layers=num_layers)
        self.exit_layer = num_layers if self.is_lossless else chosen.exit_layer or num_layers
        if not self.is_lossless:
            model = exit_model(model, self.exit_layer, loaded.decoder.exit_blocks.get(self.exit_layer))
        of_harness = {name: value for name, value in settings.items() if name in _OF_HARNESS}
        with _unwarned():
            super().__init__(pretrained=model, tokenizer=loaded.tokenizer, **of_harness)
        self.pretrained = pretrained

    def _model_generate(
        self, context: Tensor, max_length: int, stop: Sequence[str], attention_mask: Tensor, **sampling: Any
    ) -> Tensor:
        """Continue prompts [B, T] by the strategy: token ids [B, S], padded on the right.

        `max_length` counts the padding of the prompts, too. Sampling takes from the task alone how it samples.
        """
        tokens = [
            row[mask.bool()].tolist() or [self.prefix_token_id]
            for row, mask in zip(context, attention_mask, strict=True)
        ]
        strings = [string for string in stop if string]
        settings = replace(
            self.chosen,
            max_new_tokens=max_length - context.shape[1],
            stop=StopStrings(self.tokenizer, strings) if strings else None,
            sampling=_sampled(self.options, sampling).settings().sampling,
        )
        seed = self.options.seed + self.num_generated
        request = Request(
            loaded=self.loaded, texts=(), tokens=tokens, strategy=self.strategy, settings=settings, seed=seed
        )
        results = request.decode(range(len(tokens)))
        self.num_generated += len(tokens)
        columns = zip_longest(*(result.tokens for result in results), fillvalue=self.tokenizer.pad_token_id)
        new = torch.tensor([*zip(*columns, strict=True)] or [[]] * len(tokens), dtype=torch.long)
        return torch.cat([context, new.to(context.device)], dim=1)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the model, its exit and how it generates."""
        info: dict[str, Any] = super().get_model_info()
        drafts = {name: getattr(self.chosen, name) for name in ("num_draft_tokens", "n_gram_match")}
        exits = {"exit_layer": self.exit_layer, "num_layers": self.loaded.decoder.num_layers}
        return {**info, **exits, "strategy": self.strategy, "lossless": self.is_lossless, **drafts}


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep the harness from saying that settings may be ignored beside a loaded model: here each is used or refused."""
    log = logging.getLogger(HFLM.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _options(settings: dict[str, Any]) -> GenerationOptions:
    """The options of decoding; ConfigError if one has no effect on any score."""
    exit_layer = settings.get("exit_layer")
    strategy = settings.setdefault("strategy", "autoregressive" if exit_layer is None else "early_exit")
    check_choice("strategy", strategy, STRATEGIES)
    takes_exit = [name for name, entry in STRATEGIES.items() if "exit_layer" in entry.needs]
    if exit_layer is not None and strategy not in takes_exit:
        raise ConfigError("exit_layer", got=exit_layer, allowed=f"only with strategy {' | '.join(takes_exit)}")
    if exit_layer is None and strategy == "early_exit":
        raise ConfigError("exit_layer", got=None, allowed="a number of blocks, with strategy early_exit")
    return GenerationOptions(**settings)


def _sampled(options: GenerationOptions, of_task: dict[str, Any]) -> GenerationOptions:
    """The options with a task's `generation_kwargs`, as the harness hands them on."""
    samples = of_task.pop("do_sample", False)
    if (num_beams := of_task.pop("num_beams", 1)) != 1:
        raise ConfigError("generation_kwargs.num_beams", got=num_beams, allowed="1")
    if unknown := sorted(of_task.keys() - {*_SAMPLING}):
        raise ConfigError("generation_kwargs", got=unknown[0], allowed=" | ".join(("do_sample", *_SAMPLING)))
    if not samples:
        of_task = {name: value for name, value in of_task.items() if name == "repetition_penalty"}
    return replace(options, **of_task)


def main() -> int:
    """Run the harness's own command line, which knows the model `layerskip`.

    Returns:
        The exit status: 0, or 2 after an error that the user can mend, whose message is on stderr.
    """
    if _NAME not in model_registry:
        model_registry.register(_NAME, target="app.evaluation.harness:LayerSkipLM")
    try:
        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
