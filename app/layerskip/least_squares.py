"""The affine map that comes closest to given pairs of vectors in the mean square.

Shape legend: `N` pairs, `D` width.
"""

import torch
from torch import Tensor


class AffineFit:
    """W and b that minimise sum |W x + b - y|^2 over pairs (x, y), which are added in any number of parts.

    It keeps the sums of the normal equations, (D + 1)(2 D + 1) numbers in float64 on the CPU, and none of the pairs.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self._gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self._cross = torch.zeros(width + 1, width, dtype=torch.float64)

    def add(self, inputs_ND: Tensor, outputs_ND: Tensor) -> None:
        """Take N more pairs, of any float type and on any device."""
        known_ND = inputs_ND.detach().to("cpu", torch.float64)
        known_NE = torch.cat([known_ND, known_ND.new_ones(len(known_ND), 1)], dim=1)
        self._gram.addmm_(known_NE.t(), known_NE)
        self._cross.addmm_(known_NE.t(), outputs_ND.detach().to("cpu", torch.float64))

    def solve(self) -> tuple[Tensor, Tensor]:
        """W [D, D] and b [D] in float64; of several that are equally close the smallest in units of the inputs."""
        sizes_E = self._gram.diagonal().sqrt()  # a few channels of a state may be a thousand times as large as others
        units_E = sizes_E.where(sizes_E > 0, 1.0)
        scaled_EE = self._gram / units_E / units_E[:, None]
        found_ED = torch.linalg.lstsq(scaled_EE, self._cross / units_E[:, None], driver="gelsd").solution
        map_ED = found_ED / units_E[:, None]
        return map_ED[:-1].t(), map_ED[-1]
