"""Opens models: Hugging Face directories and hub ids, .gguf files, checkpoints of ours, and new ones."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from app.checkpoints.integrity import check_finite
from app.checkpoints.weights import TOKENIZER_KEY, is_trained_weights, open_trained_weights
from app.errors import CheckpointError, ConfigError, check_range, shortened
from app.model.config_check import check_plain_head, check_sizes, refused_as_config
from app.model_files.generation_config import stored_generation_config, trained_generation_config
from app.model_files.gguf import read_gguf_config, read_gguf_tokenizer, read_gguf_weights
from app.model_files.loading import conversion, fill_model, from_checkpoint, from_safetensors, is_pickle
from app.model_files.paths import SOURCES, TOKENIZERS, check_exists
from app.text.tokenizer_files import check_fits, check_knows_tokens, load_tokenizer

_OWN_CODE = (
    "it brings Python code of its own (auto_map in config.json), which could do anything and is never run: "
    "take a model of an architecture that transformers has itself"
)
_NOWHERE = "no such directory here, nor on the hub"
_WRONG_TYPE = (  # words of the hub's library, by which transformers checks the types in a config
    r"Field '(?P<name>\w+)' with value (?P<got>.*) doesn't match any type in \((?P<types>.*?)\)\.",
    r"Field '(?P<name>\w+)' expected (?P<types>\w+), got \w+ \(value: (?P<got>.*)\)",
)
_MOST_LABELS = 2**20
_log = logging.getLogger(__name__)


class ModelSource(NamedTuple):
    """A model that was found and checked as far as that is possible without its weights."""

    config: PreTrainedConfig
    tokenizer: Callable[[], Any]
    weights: Callable[[torch.dtype | None, bool], PreTrainedModel]  # given a dtype, and whether each is to be a copy


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """Build a causal LM in float32 whose random weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with refused_as_config(config):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def load_config(path: str, *, field: str = "pretrained") -> PreTrainedConfig:
    """The architecture of a model that `load_pretrained` can load; errors are the same, and name `field`."""
    return open_source(path, field=field).config


def load_pretrained(path: str, *, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """Load a causal LM to train, with every weight in memory of its own, so that its files may change.

    Args:
        path: Hugging Face directory or hub id (safetensors only, no code of its own), `.gguf` file, or checkpoint of
            ours, of which only the weights are taken.
        dtype: Type of the weights; None keeps that of the files (float32 for GGUF).

    Raises:
        ConfigError: There is no such model, its weights are pickled, or its head does more than multiply.
        CheckpointError: Its weights are damaged, incomplete or not finite.
    """
    model = open_source(path, field="pretrained").weights(dtype, True)
    check_finite(path, dict(model.named_parameters()))
    return model


def map_pretrained(path: str) -> PreTrainedModel:
    """Map a model's weights from their files, as they are there, to look at; GGUF's are unpacked into memory."""
    return open_source(path, field="model").weights(None, False)


def load_for_decoding(path: str, *, dtype: torch.dtype | None, field: str = "model") -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode and its tokenizer, which are checked before the weights are read.

    Weights that need no conversion are maps of their files, which take memory as the model runs. Errors are those of
    `load_pretrained`, and name `field`; a tokenizer that does not fit the model is a ConfigError too.
    """
    source = open_source(path, field=field)
    tokenizer = source.tokenizer()
    check_fits(tokenizer, vocab_size=source.config.get_text_config().vocab_size, field=field, got=path)
    model = source.weights(dtype, False).eval()
    check_finite(path, dict(model.named_parameters()))
    return model, tokenizer


def open_tokenizer(path: str, *, field: str) -> Any:
    """The tokenizer that comes with a model, or the one in a directory that holds nothing else.

    It is a ConfigError if none can be read, and a CheckpointError if a checkpoint is damaged or holds none.
    """
    if is_trained_weights(path) or (path.endswith(".gguf") and Path(path).is_file()):
        tokenizer = open_source(path, field=field).tokenizer()
    else:
        check_exists(path, field=field, allowed=TOKENIZERS)
        tokenizer = load_tokenizer(path, field=field)
    tokenizer.name_or_path = path
    return tokenizer


def check_tokenizer_of(pretrained: str, tokenizer: Any, *, got: str) -> None:
    """Raise ConfigError, for `tokenizer` with the value `got`, if it has another id for a token of the model, or none.

    Nothing is compared, and a warning says so, where the model comes without a tokenizer that can be read.
    """
    if tokenizer.name_or_path == pretrained:  # reading that of a GGUF file again takes seconds
        return
    try:
        own = open_tokenizer(pretrained, field="pretrained")
    except (ConfigError, CheckpointError) as error:
        _log.warning("whether the tokenizer is the model's own cannot be told: %s", error)
        return
    check_knows_tokens(tokenizer, own, got=got, model=pretrained)


def open_source(path: str, *, field: str) -> ModelSource:
    """Find a model and check all but its weights; errors are those of `load_pretrained`, and name `field`."""
    if is_trained_weights(path):
        source = _open_checkpoint(Path(path), field=field)
    elif path.endswith(".gguf") and Path(path).is_file():
        source = _open_gguf(Path(path), field=field)
    else:
        source = _open_pretrained(path, field=field)
    if type(source.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(field, got=type(source.config).__name__, allowed="a causal LM")
    try:
        text = source.config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise ConfigError("text_config", got=text, allowed="the settings of a text model")
        check_sizes(text)
    except ConfigError as error:
        fix = f"{CONFIG_NAME}: {error}"
        raise ConfigError(field, got=path, allowed="a model that can be built", fix=fix) from error
    check_plain_head(source.config, field=field)
    if getattr(source.config, "quantization_config", None) is not None:
        fix = "dequantize it with transformers and save_pretrained it first"
        raise ConfigError(field, got=path, allowed="a model whose weights are not quantized", fix=fix)
    return source


def _open_checkpoint(path: Path, *, field: str) -> ModelSource:
    trained = open_trained_weights(path)

    def tokenizer() -> Any:
        if trained.tokenizer is None:
            lack = f"holds no tokenizer ({TOKENIZER_KEY!r}), so it cannot read a prompt"
            raise CheckpointError(f"checkpoint {path}: {lack}")
        return trained.tokenizer

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:
        stored, generation = from_checkpoint(trained), trained_generation_config(trained)
        return fill_model(trained.config, stored, dtype=dtype, own=own, field=field, generation_config=generation)

    return ModelSource(trained.config, tokenizer, weights)


def _open_gguf(path: Path, *, field: str) -> ModelSource:
    config = read_gguf_config(path, field=field)

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:  # noqa: ARG001  # unpacked into its own
        return read_gguf_weights(path, config, dtype=dtype, field=field)

    return ModelSource(config, lambda: read_gguf_tokenizer(path), weights)


def _open_pretrained(path: str, *, field: str) -> ModelSource:
    _check_path(path, field=field)
    config = _read_config(path, field=field)

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:
        directory = Path(path) if Path(path).is_dir() else _download(path, field=field)
        stored = from_safetensors(directory, field=field)
        generation = stored_generation_config(directory, config)
        return fill_model(config, stored, dtype=dtype, own=own, field=field, generation_config=generation)

    return ModelSource(config, lambda: load_tokenizer(path, field=field), weights)


def _check_path(path: str, *, field: str) -> None:
    """Refuse files and directories that are known to be no Hugging Face model."""
    given = Path(path)
    if not given.exists():
        check_exists(path, field=field)
        return
    if given.is_dir():
        if not (given / CONFIG_NAME).is_file():
            fix = "there is no config.json in this directory"
        elif (given / ADAPTER_CONFIG_NAME).is_file():
            fix = "merge the adapter into its model first: peft's merge_and_unload, then save_pretrained"
        else:
            return
    elif is_pickle(given):
        fix = f"pickled weights can run code; {conversion(given.parent)}"
    elif given.suffix == ".safetensors":
        fix = f"give its directory, where config.json is: {given.parent}"
    else:
        kind = f"ending in {given.suffix!r}" if given.suffix else "without an ending"
        fix = f"files {kind} are not known"
    raise ConfigError(field, got=path, allowed=SOURCES, fix=fix)


def _read_config(path: str, *, field: str) -> PreTrainedConfig:
    is_local = Path(path).is_dir()
    try:
        if is_local:
            _check_object(Path(path) / CONFIG_NAME)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the file may hold anything, and the network may fail
        allowed, where = ("a model that can be built", CONFIG_NAME) if is_local else (SOURCES, _NOWHERE)
        reason = _OWN_CODE if "trust_remote_code" in str(error) else _reason(error)
        raise ConfigError(field, got=path, allowed=allowed, fix=f"{where}: {reason}") from error


def _check_object(file: Path) -> None:
    """Raise an error unless the file is a JSON object of which transformers can soon make a configuration."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a valid JSON file ({error})") from error
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    if type(labels := content.get("num_labels")) is int:  # transformers makes a name for each
        check_range("num_labels", labels, low=0, high=_MOST_LABELS)


def _reason(error: Exception) -> str:
    """What was got and is allowed, if a setting has another type; else the message, without the hub's advice."""
    for pattern in _WRONG_TYPE:
        if found := re.search(pattern, str(error), re.DOTALL):
            types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found["types"]).replace(", ", " | ")
            return shortened(f"{found['name']}: got {found['got']}, allowed {types.replace('NoneType', 'null')}")
    return shortened(str(error).partition("\nCheck your internet connection")[0])


def _download(hub_id: str, *, field: str) -> Path:
    """Put a model's safetensors and generation config into the hub's local cache, where they are not there yet."""
    patterns = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*.safetensors", GENERATION_CONFIG_NAME]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # of the network, or of the hub
        fix = f"it cannot be downloaded: {_reason(error)}"
        raise ConfigError(field, got=hub_id, allowed=SOURCES, fix=fix) from error
