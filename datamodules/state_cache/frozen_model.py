"""The states that a model's blocks leave, in a forward that changes nothing in the model.

Shape legend: `B` rows, `T` tokens a row, `S` states a token, `D` model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


class FrozenModel:
    """Gives the states of a model for rows of a corpus, on `device`, with products in `compute_dtype`."""

    def __init__(
        self, model: PreTrainedModel, *, exit_layers: Sequence[int], device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self._decoder = model.get_decoder().to(device).eval()
        self._exit_layers, self._device, self._compute_dtype = exit_layers, device, compute_dtype

    @torch.inference_mode()
    def states(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """[B, T, S, D], on the CPU: for each exit E the state leaving block E - 1, then the state after the final norm.

        Position ids restart at 0 with each document, and attention does not cross a restart.
        """
        left: list[Tensor] = []
        hooks = [
            self._decoder.layers[exit_layer - 1].register_forward_hook(lambda *call: left.append(call[-1]))
            for exit_layer in self._exit_layers
        ]
        lower = self._compute_dtype is not torch.float32
        try:
            with torch.autocast(self._device.type, dtype=self._compute_dtype, enabled=lower):
                # Only without cache and mask does transformers see the documents in position_ids.
                out = self._decoder(
                    input_ids=input_ids_BT.to(self._device),
                    position_ids=position_ids_BT.to(self._device),
                    attention_mask=None,
                    use_cache=False,
                )
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([*left, out.last_hidden_state], dim=2).cpu()
