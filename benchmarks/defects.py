"""Known defects in test images: how well scores and heat maps find them, beside PCA.

    python benchmarks/defects.py MODEL --root DIR [--num-images 500] [--out FOLDER]

DIR has MNIST. A model of CIFAR-10 also needs DIR/cifar10.npz. Each test image gets a patch of
noise, a square of one colour, a scratch, or a foreign digit. The table has the AUROC by pixel (the
defect against the rest of the image) and by image (with a defect against other test images). PCA's
heat is the squared residual of 50 components (100 for colours), smoothed in the same way.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch.nn.functional import avg_pool2d
from torchvision.datasets import MNIST

import flowtrain
from flowtrain.evaluation.heat import HeatMaps, picture
from flowtrain.pictures.grid import png
from flowtrain.tools.ood.auroc import auroc
from flowtrain.tools.ood.images import Collection
from flowtrain.tools.ood.scores import scored

KINDS = ("noise", "square", "scratch", "foreign digit")
SHOWN = 6  # images of each kind in a picture


def with_defects(x: np.ndarray, kind: str, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `(N, C, H, W)` with a defect each, and where it is, bool `(N, H, W)`."""
    random = np.random.default_rng(KINDS.index(kind))
    y, (_, channels, height, width) = x.copy(), x.shape
    masks = np.zeros((len(x), height, width), bool)
    side = height * 2 // 5 if kind == "foreign digit" else height // 4
    for i, image in enumerate(y):
        top, left = random.integers(0, (height - side + 1, width - side + 1))
        rows, columns = slice(top, top + side), slice(left, left + side)
        if kind == "noise":
            image[:, rows, columns] = random.integers(0, 256, (channels, side, side))
        elif kind == "square":
            image[:, rows, columns] = random.integers(0, 256, (channels, 1, 1))
        elif kind == "scratch":
            angle, middle = (
                random.uniform(0, np.pi),
                random.uniform(0.25, 0.75, 2) * (height, width),
            )
            along = np.linspace(-height / 4, height / 4, 4 * height)
            places = middle[:, None] + along * np.array([[np.sin(angle)], [np.cos(angle)]])
            rows, columns = places.round().astype(int).clip(0, height - 1)
            image[:, rows, columns] = 255
        else:
            crop = Image.fromarray(digits[random.integers(len(digits)), 4:24, 4:24])
            digit = np.asarray(crop.resize((side, side)))
            image[:, rows, columns] = np.maximum(image[:, rows, columns], digit)
            masks[i] = (image != x[i]).any(axis=0)
            continue
        masks[i, rows, columns] = True
    return y, masks


def smoothed(maps: np.ndarray) -> np.ndarray:
    heat = torch.from_numpy(maps)[:, None]
    for _ in range(2):
        heat = avg_pool2d(heat, 3, stride=1, padding=1, count_include_pad=False)
    return heat[:, 0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    flow, count = flowtrain.load(args.model), args.num_images
    levels = flow.kind.require_bins(f"{args.model}: the defects are of images")
    digits = MNIST(args.root, train=False).data.numpy()
    if flow.shape[0] == 3:
        arrays = np.load(args.root / "cifar10.npz")
        train, test = (arrays[f"x_{part}"].transpose(0, 3, 1, 2) for part in ("train", "test"))
    else:
        train, test = MNIST(args.root).data.numpy()[:, None], digits[:, None]
    random = np.random.default_rng(0)
    train, test = random.permutation(train), random.permutation(test)
    heat_maps = HeatMaps(flow, train[:count])
    pca = PCA(50 if flow.shape[0] == 1 else 100, svd_solver="randomized", random_state=0)
    pca.fit(train[:5000].reshape(5000, -1).astype(np.float32))

    def residual(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1).astype(np.float32)
        squared = (flat - pca.inverse_transform(pca.transform(flat))) ** 2
        return smoothed(squared.reshape(x.shape).sum(axis=1))

    def found(x: np.ndarray):
        return scored(flow, Collection("", x, np.arange(len(x))), entropy, heat_maps=heat_maps)

    good, entropy = test[:count], None
    usual = found(good)
    entropy, usual_residual = usual.entropy, residual(good)
    names = [*usual.scores]
    print(f"{'defect':14s} pixel: heat   PCA   image: " + "  ".join(names) + "  PCA")
    for kind in KINDS:
        x, masks = with_defects(test[count : 2 * count], kind, digits)
        bad, bad_residual = found(x), residual(x)
        by_pixel = [auroc(h[~masks], h[masks]).auroc for h in (bad.heat, bad_residual)]
        by_image = [auroc(usual.scores[name], bad.scores[name]).auroc for name in names]
        largest = (each.max(axis=(1, 2)) for each in (usual_residual, bad_residual))
        by_image.append(auroc(*largest).auroc)
        print(f"{kind:14s} " + "  ".join(f"{each:.3f}" for each in (*by_pixel, *by_image)))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            shown = picture(torch.from_numpy(x[:SHOWN]), bad.heat[:SHOWN], levels, SHOWN)
            (args.out / f"{kind.replace(' ', '_')}.png").write_bytes(png(shown))


if __name__ == "__main__":
    main()
