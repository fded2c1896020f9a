"""`layerskip adapt`: make a finished model stop early without touching it. Tested by tests/contract/test_adapt.py."""

from pathlib import Path
from typing import Any

from app.cli.adapt_settings import AdaptSettings
from app.cli.adaptation import Adaptation
from app.cli.tables import print_table


def adapt(*, model: str, output_dir: str, work_dir: str | None = None, **options: Any) -> None:
    """Give a finished model an exit of its own that drafts for it, in hours, and leave the model itself untouched.

    The model writes text, its states over that text and your corpus are cached, and an exit block learns from them.
    Drafts are tuned, and measured on prompts that were held out; the result says whether they pay. A call that was cut
    off goes on where it was.

    Args:
        model: Hugging Face directory, hub id, .gguf file or checkpoint of a run.
        output_dir: Directory to write: the model as it was, and its exit block beside it.
        work_dir: Folder for everything on the way; by default output_dir with .work behind it.
        options: See AdaptSettings.
    """
    settings = AdaptSettings(**options)
    folder = Path(work_dir or f"{output_dir.rstrip('/')}.work")
    adaptation = Adaptation.begin(model, output_dir, folder, settings)
    adaptation.write_own_text()
    adaptation.train()
    adaptation.export()
    adaptation.tune()
    print_table(adaptation.result(adaptation.measure()))
