"""The layer of linear residuals: what least squares give, and its inverse."""

import copy

import pytest
import torch
from helpers import perturb, ready, seeded

from flowtrain.bijections import LinearResidual
from flowtrain.nets.prediction import LinearPrediction
from flowtrain.nets.window import Window


def layer(shape, above=1, beside=1):
    window = Window(above, beside, ahead=0)
    return LinearResidual(LinearPrediction(shape[0], shape[1:], window)).double()


def correlated(count, shape):
    """Images whose neighbours and channels are correlated, with a mean."""
    x = torch.randn(count, *shape, generator=seeded(), dtype=torch.float64)
    x[:, 1] += 0.7 * x[:, 0]
    for column in range(1, shape[2]):
        x[..., column] += 0.8 * x[..., column - 1]
    for row in range(1, shape[1]):
        x[..., row, :] += 0.5 * x[..., row - 1, :]
    return x + 2


def test_what_is_before_an_entry_says_nothing_linear_about_its_residual():
    residual, x = layer((2, 5, 6)), correlated(100, (2, 5, 6))
    residual.initialize(x)
    z = residual(x)[0].detach()
    window = residual.prediction.window
    before = torch.cat([window.seen(x.movedim(1, -1)), x[:, :1].movedim(1, -1)], dim=-1)
    centred = (before - before.mean(dim=(0, 1, 2))).flatten(0, 2)
    found = centred.T @ z[:, 1].flatten() / z[:, 1].numel()
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-3)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-9 and z.var() < 0.5 * x.var()


@pytest.mark.parametrize("above, beside", [(1, 1), (2, 3), (3, 1)])
def test_the_inverse_is_that_of_one_entry_after_the_other(above, beside):
    residual = ready(layer((2, 4, 5), above, beside))
    perturb(residual, 20)  # in units of 0.01
    z = torch.randn(3, 2, 4, 5, generator=seeded(), dtype=torch.float64)
    x = residual.inverse(z)[0].detach()
    values = torch.zeros(2, 3, dtype=torch.float64)
    by_token = residual.prediction.by_token(values)
    with torch.no_grad():
        for i in range(4):
            for j in range(5):
                by_token.start(i, j)
                for d in range(2):
                    values[d] = z[:, d, i, j] + by_token.mean(d)
                by_token.end(i, j)
                torch.testing.assert_close(x[:, :, i, j], values.T)


def test_it_is_initialized_once():
    residual, x = layer((2, 4, 4)), correlated(50, (2, 4, 4))
    for direction in (residual.forward, residual.inverse):
        with pytest.raises(RuntimeError, match="LinearResidual is not initialized"):
            direction(x)
    residual.initialize(x)
    state = copy.deepcopy(residual.state_dict())
    residual.initialize(x.flip(-1) ** 2)
    assert all(torch.equal(value, state[key]) for key, value in residual.state_dict().items())
