"""Features of images, which the figures of sample quality compare.

Each network maps uint8 images `(B, C, H, W)` with 256 levels to float32 features `(B, F)`.
`inception` has the weights of the usual FID. `mnist-cnn` and `cifar-cnn` are small classifiers,
trained by `benchmarks/features.py`, whose figures are comparable with each other alone.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn

from flowtrain.datasets.base import reading
from flowtrain.errors import UserError, short
from flowtrain.system.console import silent
from flowtrain.system.files import read_regular
from flowtrain.system.packages import required
from flowtrain.types import Shape

FOLDER = Path(__file__).parent
INCEPTION = "inception"
HASH = "6726825d"  # the beginning of the SHA-256 of Inception's weights
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    f"weights-inception-2015-12-05-{HASH}.pth"
)
SHAPES: dict[str, Shape] = {"mnist-cnn": (1, 28, 28), "cifar-cnn": (3, 32, 32)}
AT_A_TIME = 100

Network: TypeAlias = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """Four convolutions, the mean over all places, and a linear layer to ten classes."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, size, stride in (
            (channels, width // 2, 4, 2),
            (width // 2, width, 3, 1),
            (width, width, 4, 2),
            (width, width, 3, 1),
        ):
            layers += [nn.Conv2d(inputs, outputs, size, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def features(self, x: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` to `(B, width)`."""
        mean: Tensor = self.body(x.float() / 255 - 0.5).mean(dim=(2, 3))
        return mean

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def torch_fidelity() -> Any:
    """The package of the extra `quality`. Raises `UserError` if it is missing."""
    return required("quality", "torch_fidelity", (0, 4), "quality")


def name_for(shape: Shape) -> str:
    """The features to take for images of a shape if none are named."""
    return next((name for name, own in SHAPES.items() if own == shape), INCEPTION)


def load(name: str, shape: Shape, device: torch.device) -> Network:
    """The network of a name, for images of a shape. Raises `UserError` if it does not take them,
    has no weights, or the extra `quality` is not installed.
    """
    fidelity = torch_fidelity()
    if name == INCEPTION:
        return _inception(fidelity, device)
    if name not in SHAPES:
        raise UserError(f"features {name}: expected {', '.join([INCEPTION, *SHAPES])}")
    if shape != SHAPES[name]:
        raise UserError(
            f"features {name} are of images of shape {SHAPES[name]}, not {shape}: --features "
            f"{INCEPTION} takes any"
        )
    net = Classifier(SHAPES[name][0])
    net.load_state_dict(safetensors.torch.load_file(FOLDER / f"{name}.safetensors"))
    return net.eval().to(device, torch.float32).features


def _inception(fidelity: Any, device: torch.device) -> Network:
    """The pool3 features of the usual FID, `(B, 2048)`, as torch-fidelity computes them."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), HASH, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--features {INCEPTION}: its weights cannot be downloaded ({short(error)}): put "
                f"the file {URL} at {file} (TORCH_HOME sets the folder)"
            ) from None
    with reading(f"{file} cannot be read", "remove it, and it is downloaded again"):
        data = read_regular(file, 2**28)
        torch.load(io.BytesIO(data), weights_only=True)  # torch-fidelity would unpickle anything
        net = fidelity.FeatureExtractorInceptionV3(INCEPTION, ["2048"], io.BytesIO(data))
        net.to(device)
    return lambda x: net(x.expand(-1, 3, -1, -1))[0]  # grey images as RGB


@torch.no_grad()
def features_of(
    images: Tensor,
    network: Network,
    device: torch.device,
    progress: Callable[[int, int], None] = silent,
) -> Tensor:
    """Features of uint8 images `(N, C, H, W)`, 256 levels: float64 `(N, F)` on the CPU. Raises
    `UserError` for images of another type.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"features are of uint8 images with values 0..255, not {images.dtype}")
    parts = []
    for part in images.split(AT_A_TIME):
        parts.append(network(part.to(device)).cpu().double())
        progress(AT_A_TIME * len(parts), len(images))
    return torch.cat(parts)
