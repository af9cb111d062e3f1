"""The function that follows a layer, as far as it is known: by its values at seven points."""

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.reading.calls import ACTIVATION_POINTS, Layer

USUAL = (
    F.relu, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.relu6, F.hardswish,
    F.hardtanh, torch.tanh, torch.sigmoid,
)  # fmt: skip
ALIKE = 0.01


class Activation:
    """What follows a layer, element by element: a usual function if it has the values of one, or else straight lines
    between the known points and beyond them.

    It `is_linear`, or `is_odd` about its centre: then a direction and its opposite say the same; or it
    `is_flatter_below`, as a rectifier. A norm that follows is
    taken to be followed by a rectifier, as it mostly is.
    """

    def __init__(self, layer: Layer):
        points = torch.tensor(ACTIVATION_POINTS)
        values = points if layer.activation is None else torch.tensor(layer.activation)
        if layer.activation is None and layer.normalised:
            values = points.clamp(min=0)
        usual = (function for function in USUAL if (function(points) - values).abs().max() < ALIKE)
        self.function = next(usual, self.interpolated)
        self.values, self.slopes = values.tolist(), (values.diff() / points.diff()).tolist()
        self.is_flatter_below = abs(self.slopes[0]) < self.slopes[-1] / 2
        self.is_linear = max(self.slopes) - min(self.slopes) < 0.05
        self.is_odd = all(abs(values[3 + i] + values[3 - i] - 2 * values[3]) < 0.05 for i in (1, 2, 3))

    def __call__(self, responses: Tensor) -> Tensor:
        return self.function(responses)

    def slope(self, responses: Tensor) -> Tensor:
        return (self.function(responses + 0.01) - self.function(responses - 0.01)) / 0.02

    def interpolated(self, responses: Tensor) -> Tensor:
        result = self.values[0] + self.slopes[0] * (responses - ACTIVATION_POINTS[0])
        for point, before, after in zip(ACTIVATION_POINTS[1:], self.slopes, self.slopes[1:], strict=False):
            if after != before:
                result = result + (after - before) * (responses - point).clamp(min=0)
        return result
