import pytest
import torch

from app.generation.loaded_model import load_decoder
from app.lens.lens import look
from app.lens.report import lens_as_json
from tests.support.saved_models import save_model

TEXTS = ["x = 1 </script><b>", "the $end$ of the"]


@pytest.fixture(scope="package")
def told(tmp_path_factory):
    """What two tiny models did with two prompts."""
    folder, lenses = tmp_path_factory.mktemp("models"), []
    for seed in (1, 2):
        loaded = load_decoder(str(save_model(folder / str(seed), seed=seed)), dtype="auto", device="cpu")
        tokens = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
        with torch.inference_mode():
            lenses.append(look(loaded, tokens, name=f"model {seed}", path=str(folder / str(seed)), max_new_tokens=35))
    return lens_as_json(lenses, TEXTS, tokens, loaded.tokenizer)
