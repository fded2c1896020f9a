"""`layerskip lens`: what every layer would have said, token by token. Tested by tests/contract/test_lens.py."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.benchmark.report import environment
from app.cli.parsing.several import SEVERAL_TIMES
from app.cli.parsing.verb_parser import call_verb
from app.cli.tables import print_table
from app.errors import ConfigError, check_choice, check_exits, check_new, check_output_file, check_range
from app.generation.loaded_model import LoadOptions
from app.generation.prompts import encode_prompts, given_texts
from app.lens.figure import lens_figure
from app.lens.lens import check_comparable, look
from app.lens.page import lens_page
from app.lens.report import lens_as_json, needed_table
from app.lens.token_texts import short_names
from app.whole_file import write_figure, write_whole
from app.words import counted

_log = logging.getLogger(__name__)
_OUTPUTS = (".html", ".json", ".png")
_DOTS_PER_INCH = 110


def lens(
    *,
    model: list[str],
    output: str,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    limit: int = 16,
    max_new_tokens: int = 60,
    exit_layers: list[int] | None = None,
    overwrite: bool = False,
    loading: LoadOptions,
) -> None:
    """Show what every layer would have said at each token that a model generates, and how many layers it needed.

    The model continues each prompt greedily. Every layer's state is then unembedded through the final norm and head. A
    token's saturation layer is the first from which on all layers choose it; its first hit is the first that does.

    Args:
        output: File to write. A .html file is a page to look around in, a .png file shows the first prompt and all
            counts, a .json file has every figure.
        prompts: JSON lines file of prompts instead; each line is an object with a string "prompt".
        limit: Use this many prompts from the start of the file.
        max_new_tokens: Most tokens that are generated for each prompt.
        exit_layers: Exits to show, from 1 to the number of blocks, by default all. All are counted.
        overwrite: Replace a file of this name.
        loading: See LoadOptions.
    """
    check_choice("output", suffix := Path(output).suffix, _OUTPUTS)
    path = check_output_file(output, suffix=suffix)
    if not overwrite:
        check_new(output, [path])
    check_range("max_new_tokens", max_new_tokens, low=1)
    if not 1 <= len(model) <= 2:
        raise ConfigError("model", got=model, allowed="one model, or two to compare")
    texts = given_texts(prompt, prompts, limit=limit)
    loaded = [loading.load(each) for each in model]
    for second in loaded[1:]:
        check_comparable(loaded[0], second, got=model[1])
    if exit_layers is not None:
        check_exits(exit_layers, num_layers=loaded[0].decoder.num_layers)
    max_length = min(each.decoder.max_length for each in loaded)
    location = "prompt" if prompts is None else f"{prompts}: prompt"
    tokens = encode_prompts(texts, loaded[0].tokenizer, max_length=max_length, location=location)
    with torch.inference_mode():
        lenses = [
            look(each, tokens, name=name, path=given, max_new_tokens=max_new_tokens)
            for each, name, given in zip(loaded, short_names(model), model, strict=True)
        ]
    for each in lenses:
        if each.num_rounded:
            what = f"{each.name}: one pass over the text chose {counted(each.num_rounded, 'token')} otherwise"
            fix = "; --dtype float32 does not" if loading.quantization == "none" else ""
            _log.warning("%s, since %s rounds%s", what, each.dtype, fix)
    told = lens_as_json(lenses, texts, tokens, loaded[0].tokenizer, exit_layers=exit_layers)
    told["environment"] = environment(device=loaded[0].decoder.device, dtype=loaded[0].weights_type)
    of_file = {"prompts": prompts, "limit": None if prompts is None else limit}
    told["settings"] = of_file | {"max_new_tokens": max_new_tokens, "exit_layers": exit_layers}
    _write(path, told)
    print_table(needed_table(lenses, texts))
    print(f"{suffix[1:]}: {path}")


def _write(path: Path, told: dict[str, Any]) -> None:
    match path.suffix:
        case ".json":
            write_whole(path, json.dumps(told, separators=(",", ":")))
        case ".html":
            write_whole(path, lens_page(told))
        case _:
            write_figure(path, lens_figure(told), dpi=_DOTS_PER_INCH)


_MODEL_HELP = (
    "Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file. Given twice, two models of as many"
    " blocks and the same tokenizer are compared."
)
_BY_HAND = {
    "model": SEVERAL_TIMES | {"required": True, "help": _MODEL_HELP},
    "prompt": SEVERAL_TIMES | {"help": "Text to continue; given several times, several texts."},
}
run = partial(call_verb, lens, by_hand=_BY_HAND)
