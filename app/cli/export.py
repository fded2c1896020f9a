"""`layerskip export`: any model we can read, as a Hugging Face directory."""

from __future__ import annotations

import sys

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # in its __all__ by computation

from app.cli.models import DTYPES, Dtype
from app.cli.parsing import VerbParser
from app.errors import ConfigError
from app.model.checkpoint import load_for_decoding
from app.model.export import check_output_dir, write_pretrained


def export(
    *,
    output_dir: str,
    model: str | None = None,
    ckpt_path: str | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Write a model as a Hugging Face directory, which plain transformers loads: config, safetensors, tokenizer.

    Args:
        output_dir: Directory to make; it must be new or empty.
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        ckpt_path: The same by another name; exactly one of the two is given.
        dtype: Of the weights; auto keeps those of the checkpoint (float32 for .gguf).
    """
    field, path = ("model", model) if ckpt_path is None else ("ckpt_path", ckpt_path)
    if path is None or (model is not None and ckpt_path is not None):
        got = "neither" if path is None else "both"
        raise ConfigError("model", got=got, allowed="exactly one of model and ckpt_path, two names for the same")
    directory = check_output_dir(output_dir)
    weights, tokenizer = load_for_decoding(path, dtype=DTYPES[dtype], field=field)
    write_pretrained(weights, tokenizer, directory)
    size = sum(parameter.numel() for parameter in weights.parameters())
    print(f"{directory}: {type(weights).__name__}, {size:,} parameters, {str(weights.dtype).removeprefix('torch.')}")


def run() -> None:
    """Parse and run the verb."""
    parser = VerbParser(prog="layerskip export", description=(export.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    parser.add_function_arguments(export, as_group=False)
    options = parser.parse_args(sys.argv[2:]).as_dict()
    options.pop("config")
    export(**options)
