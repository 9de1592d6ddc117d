"""Linear predictions of the entries of tokens, solved by least squares."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.ordinal import Prediction
from flowtrain.nets.window import Window, WindowByToken
from flowtrain.system import capacity


class LinearPrediction(Prediction):
    """The best linear prediction of an entry from a causal window and from its token's entries.

    `fit` solves it by least squares, in full precision. Its weights are trained. They are stored in
    units of `UNIT`, because steps of Adam that suit a network would spoil the solution.
    """

    UNIT = 0.01

    def __init__(self, entries: int, size: tuple[int, int], window: Window):
        super().__init__()
        self.size = size
        self.window = window
        self.of_window = nn.Parameter(torch.zeros(entries, window.taps * entries))
        self.within = nn.Parameter(torch.zeros(entries, entries))  # strictly lower triangular
        self.bias = nn.Parameter(torch.zeros(entries))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of the window, those within the token, and the bias."""
        return self.of_window * self.UNIT, self.within.tril(-1) * self.UNIT, self.bias * self.UNIT

    def forward(self, x: Tensor) -> Tensor:
        of_window, within, bias = self.weights()
        rows = x.movedim(1, -1).contiguous()
        predicted = self.window.convolve(rows, of_window, bias) + F.linear(rows, within)
        return predicted.movedim(-1, 1)

    @torch.no_grad()
    def fit(self, x: Tensor, ridge: float = 1e-4) -> Tensor:
        """See `Prediction`. Raises `UserError` if memory is short.

        The inverse of the Cholesky factor of the covariance of window and token turns the entries
        into residuals of variance 1.
        """
        entries, count = x.shape[1], x[:, 0].numel()
        size = (self.window.taps + 1) * entries
        # The covariance, its factor, the inverse, and what it is solved from.
        capacity.require(
            4 * 8 * size**2, f"model.window: a linear prediction from {size:,} values needs"
        )
        mean = torch.zeros(size, dtype=torch.float64)
        covariance = torch.zeros(size, size, dtype=torch.float64)
        # One image at a time, because the windows of all would not fit into memory.
        for rows in x.movedim(1, -1).cpu().double().split(1):
            seen = torch.cat([self.window.seen(rows), rows], dim=-1).flatten(0, 2)
            mean += seen.sum(dim=0) / count
            covariance += seen.T @ seen / count
        covariance -= mean.outer(mean)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
        whitening = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(size, dtype=mean.dtype), upper=False
        )[-entries:]
        deviation: Tensor = 1 / whitening[:, -entries:].diagonal()
        weights = -whitening * deviation[:, None]
        weights[:, -entries:].diagonal().zero_()
        self.of_window.copy_(weights[:, :-entries] / self.UNIT)
        self.within.copy_(weights[:, -entries:] / self.UNIT)
        self.bias.copy_((mean[-entries:] - weights @ mean) / self.UNIT)
        return deviation

    def by_token(self, values: Tensor) -> "_PredictionByToken":
        return _PredictionByToken(self, values)


class _PredictionByToken:
    def __init__(self, prediction: LinearPrediction, values: Tensor):
        self.values = values
        weight, within, bias = prediction.weights()
        size = values.shape[1], prediction.size[1]
        self.window = WindowByToken(prediction.window, weight, bias, *size)
        self.within = within[:, None]

    def start(self, i: int, j: int) -> None:
        self.window.start(j)
        self.of_window = self.window.column(j)

    def mean(self, d: int) -> Tensor:
        return torch.addmm(self.of_window[d : d + 1], self.within[d], self.values)[0]

    def end(self, i: int, j: int) -> None:
        self.window.write(j, self.values)
