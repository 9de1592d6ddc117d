"""Fully connected conditioners of vectors."""

from torch import Tensor, nn

from flowtrain.nets.convolution import ReLU


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, and draws no random numbers."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class DenseNet(nn.Module):
    """ReLU layers of one width, then a zero linear layer (NICE, section 5.1)."""

    def __init__(self, in_features: int, out_features: int, width: int, hidden_layers: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(hidden_layers):
            layers += [nn.Linear(in_features if i == 0 else width, width), ReLU()]
        last = ZeroLinear(width if hidden_layers else in_features, out_features)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.layers(x)
        return parameters
