"""The function that follows a layer, as it is known: by its values at seven points."""

import torch
from torch import Tensor

from universal.reading.calls import ACTIVATION_POINTS, Layer


class Activation:
    """What follows a layer, element by element, between its known points straight and beyond them as between the last.

    It `is_linear`, or `is_odd` about its centre: then a direction and its opposite say the same. A norm that follows is
    taken to be followed by a rectifier, as it mostly is.
    """

    def __init__(self, layer: Layer):
        points = torch.tensor(ACTIVATION_POINTS)
        values = points if layer.activation is None else torch.tensor(layer.activation)
        if layer.activation is None and layer.normalised:
            values = points.clamp(min=0)
        self.start, slopes = values[0].item(), values.diff() / points.diff()
        self.slopes = slopes.tolist()
        opposite = values[[4, 5, 6]] + values[[2, 1, 0]] - 2 * values[3]
        self.is_odd = bool((opposite.abs() < 0.05).all())
        self.is_linear = self.is_odd and bool((slopes - slopes[0]).abs().max() < 0.05)

    def __call__(self, responses: Tensor) -> Tensor:
        result = self.start + self.slopes[0] * (responses - ACTIVATION_POINTS[0])
        for point, before, after in zip(ACTIVATION_POINTS[1:], self.slopes, self.slopes[1:], strict=False):
            if after != before:
                result = result + (after - before) * (responses - point).clamp(min=0)
        return result
