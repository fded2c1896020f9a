"""What was seen, as a table and as JSON, which is also what the page draws. Tested by tests/contract/test_lens.py."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from app.exits.layers_needed import LayersNeeded
from app.lens.lens import Lens
from app.lens.token_grid import GridRow, TokenGrid
from app.lens.token_texts import token_texts, visible
from app.tables import Table
from app.text.text_stream import continuation

_MEANS = ("mean_saturation_layer", "mean_first_hit")
_SHOWN_PROMPT = 32  # characters of a prompt in the table


def needed_table(lenses: Sequence[Lens], texts: Sequence[str]) -> Table:
    """Return the mean layers that each prompt and all tokens needed, and the second model's less the first's."""
    num_layers = lenses[0].needed.num_layers
    rows = []
    for index, text in enumerate(texts):
        needed = [lens.grids[index].needed for lens in lenses]
        rows.append((f"{index + 1}: {visible(text[:_SHOWN_PROMPT])}", *_means(needed)))
    rows.append(("all tokens", *_means([lens.needed for lens in lenses])))
    names = [f"{lens.name}: " if len(lenses) > 1 else "" for lens in lenses]
    columns = [f"{name}{what}" for name in names for what in ("saturation layer", "first hit")]
    if len(lenses) > 1:
        columns.append("difference")
    counts = " and ".join(str(len(lens.needed.saturation)) for lens in lenses)
    return Table(f"Layers needed of {num_layers}, by {counts} tokens", ("prompt", *columns), rows)


def _means(needed: Sequence[LayersNeeded]) -> tuple[str, ...]:
    cells = []
    for each in needed:
        cells += [f"{each.mean_saturation_layer:.2f}", f"{each.mean_first_hit:.2f}"]
    if len(needed) > 1:
        cells.append(f"{needed[1].mean_saturation_layer - needed[0].mean_saturation_layer:+.2f}")
    return tuple(cells)


def lens_as_json(
    lenses: Sequence[Lens],
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    exit_layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return everything that was measured, in plain types.

    `models` has each model's totals and rows, `prompts` each text with what every model generated, and `token_texts`
    the visible text of each id. Of a run, `top_ids` and `top_probs` are [row][token][5], `entropy` and `kl` (nats)
    [row][token], and `lines` has for each token the ids that were on top of some row and their probabilities by row.

    Args:
        texts: The prompts.
        prompts: Their token ids.
        exit_layers: Exits whose rows are told, by default all. What is counted does not depend on it.
    """
    models = [
        {
            "name": lens.name,
            "path": lens.path,
            "dtype": lens.dtype,
            "num_layers": lens.needed.num_layers,
            "rows": [
                {
                    "label": row.label,
                    "exit_layer": row.exit_layer,
                    "own_blocks": row.num_own_blocks,
                }
                for row in _shown(lens.grids[0], exit_layers).values()
            ],
            "seconds": round(lens.seconds, 2),
            "tokens_rounded_otherwise": lens.num_rounded,
            "needed": lens.needed.as_dict(),
        }
        for lens in lenses
    ]
    told: list[dict[str, Any]] = [
        {
            "prompt": text,
            "runs": [_run(lens.grids[index], ids, tokenizer, exit_layers) for lens in lenses],
        }
        for index, (text, ids) in enumerate(zip(texts, prompts, strict=True))
    ]
    seen = {token for prompt in told for run in prompt["runs"] for token in _ids(run)}
    result: dict[str, Any] = {
        "models": models,
        "prompts": told,
        "token_texts": token_texts(tokenizer, prompts[0], seen),
    }
    if len(lenses) > 1:
        first, second = (lens.needed for lens in lenses)
        result["difference"] = {name: getattr(second, name) - getattr(first, name) for name in _MEANS}
    return result


def _run(grid: TokenGrid, prompt: Sequence[int], tokenizer: Any, exit_layers: Sequence[int] | None) -> dict[str, Any]:
    shown = [*_shown(grid, exit_layers)]
    return {
        "text": continuation(tokenizer, prompt, grid.tokens),
        "tokens": [*grid.tokens],
        "needed": grid.needed.as_dict(),
        "saturation": [*grid.needed.saturation],
        "first_hit": [*grid.needed.hits],
        "top_ids": grid.top_ids_RNK[shown].tolist(),
        "top_probs": _rounded(grid.top_probs_RNK[shown]),
        "entropy": _rounded(grid.entropy_RN[shown]),
        "kl": _rounded(grid.kl_RN[shown]),
        "lines": [
            {"ids": lines.ids, "probs": [[round(probs[row], 4) for row in shown] for probs in lines.probs]}
            for lines in grid.lines
        ],
    }


def _shown(grid: TokenGrid, exit_layers: Sequence[int] | None) -> dict[int, GridRow]:
    """Return the rows to tell, by their index."""
    return {index: row for index, row in enumerate(grid.rows) if exit_layers is None or row.exit_layer in exit_layers}


def _ids(run: dict[str, Any]) -> set[int]:
    tops = {token for row in run["top_ids"] for top in row for token in top}
    return tops.union(run["tokens"], *(lines["ids"] for lines in run["lines"]))


def _rounded(values: Tensor) -> Any:
    return (values.double() * 1e4).round().div(1e4).tolist()
