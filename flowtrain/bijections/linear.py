"""A linear prediction of entries from those before them, as an invertible layer."""

from torch import Tensor

from flowtrain.bijections.base import Direction, SetFromData
from flowtrain.bijections.ordinal import Prediction
from flowtrain.bijections.precision import full_precision


class LinearResidual(SetFromData):
    """`z = x - p(x)`, where p predicts each entry linearly from entries before it.

    The Jacobian is triangular with ones on its diagonal, so the log-determinant is 0. The inverse
    is a linear recursion over the rows. `initialize` sets p by least squares. The residuals then
    have neither mean nor linear relations to entries before them, but different variances.
    """

    initialization_images = 200  # so few determine the prediction well enough

    def __init__(self, prediction: Prediction):
        super().__init__()
        self.prediction = prediction

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        if not self.initialized:
            self.prediction.fit(x)
            self.initialized.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        with full_precision(x):
            return x - self.prediction(x), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        with full_precision(z):
            return self.prediction.undo(z), z.new_zeros(z.shape[0])

    def loops(self) -> list[Direction]:
        return ["inverse"]
