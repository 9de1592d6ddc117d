"""Held-out splits, and image files brought to a shape."""

import contextlib
import io
import os

import numpy as np
import pytest
from dataset_helpers import encoded, noise
from PIL import Image

from flowtrain.datasets import base
from flowtrain.errors import UserError


@pytest.mark.parametrize(
    "n, held, count",
    [(1797, 0.1, 180), (10, 3, 3), (10, 0.25, 2), (10, 0, 0), (10, 0.0, 0), (5, 0.01, 1)]
    + [(10, 2.0, 2), (2, 1, 1)],
)
def test_hold_out(n, held, count):
    kept, out = base.hold_out(np.arange(n), held, 0)
    assert len(out) == count and sorted([*kept, *out]) == list(range(n))
    assert (np.diff(kept) > 0).all() and (np.diff(out) > 0).all()
    # Pinned: a resumed run, on any machine and numpy, has to find the same validation images.
    assert base.hold_out(np.arange(20), 5, 0)[1].tolist() == [1, 4, 9, 10, 11]
    assert base.hold_out(np.arange(20), 5, 1)[1].tolist() != [1, 4, 9, 10, 11]


def test_hold_out_refuses():
    for n, held in [(10, 10), (10, 11), (1, 0.5), (0, 0), (10, 1.5)]:
        with pytest.raises(UserError, match="cannot hold"):
            base.hold_out(np.arange(n), held, 0)


def test_equal_images_are_held_out_together():
    random = np.random.default_rng(0)
    for seed in range(20):
        first = random.integers(0, 60, 100)
        first = np.array([np.flatnonzero(first == value)[0] for value in first])
        kept, out = base.hold_out(first, 0.3, seed)
        assert not set(first[kept]) & set(first[out])
        assert sorted([*kept, *out]) == list(range(100))
        assert len(out) == 30  # there are enough single images to fill up the count
    pairs, same = np.arange(20) // 2 * 2, np.zeros(5, int)
    assert len(base.hold_out(pairs, 5, 0)[1]) == 4
    assert len(base.hold_out(pairs, 1, 0)[1]) == 2
    assert base.hold_out(np.array([0, 0, 0, 3, 3]), 1, 0)[1].tolist() == [3, 4]  # the fewest
    most = np.array([0, 1, *[0] * 18])  # 19 of 20 are equal
    assert base.hold_out(most, 10, 0)[1].tolist() == [1]
    assert base.hold_out(same, 0, 0)[1].tolist() == []
    assert len(base.hold_out(same, 2, 0)[1]) == 2  # all are equal: there is no way


@pytest.mark.parametrize("hashed", [1, 100, 2**24])  # one image at a time, several, all
def test_equal_images_are_found(monkeypatch, hashed):
    monkeypatch.setattr(base, "HASHED", hashed)
    pixels = noise(30, 3, 2, 2)[np.r_[0:10, 3, 10:20, 0, 3]]
    found = base.first_equal(base.digests(pixels))
    assert found.tolist() == [*range(10), 3, *range(11, 21), 0, 3]
    assert base.duplicates(found) == 3
    rows = np.array([20, 3, 10])
    assert base.first_equal(base.digests(pixels, rows)).tolist() == [0, 1, 1]
    turned = np.asfortranarray(pixels)
    assert np.array_equal(base.digests(turned), base.digests(pixels))


def test_resizing():
    for height, width in ((20, 20), (40, 20), (41, 20), (20, 40), (20, 47)):
        wide, top, left = noise(height, width, 3), (height - 20) // 2, (width - 20) // 2
        out = base.resize(Image.fromarray(wide), (3, 20, 20), "crop")
        middle = wide[top : top + 20, left : left + 20]
        assert np.array_equal(out, middle.transpose(2, 0, 1)) and out.flags.c_contiguous
    pixels = noise(20, 30, 3)
    for policy in ("crop", "stretch", "exact"):
        out = base.resize(Image.fromarray(pixels), (3, 20, 30), policy)
        assert np.array_equal(out, pixels.transpose(2, 0, 1))
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # a white square in the middle third
    assert base.resize(image, (1, 10, 10), "crop").min() > 225
    stretched = base.resize(image, (1, 10, 10), "stretch")
    assert stretched[0, :, 0].max() < 30 and stretched[0, :, 5].min() > 225
    checks = Image.fromarray(np.indices((640, 640)).sum(0).astype(np.uint8) % 2 * 255)
    out = base.resize(checks, (1, 16, 16), "crop")  # antialiased
    assert out.min() >= 120 and out.max() <= 136


def pixel(image, channels):
    return base.resize(image, (channels, *image.size[::-1]), "exact")[:, 0, 0].tolist()


@pytest.mark.parametrize(
    "image, channels, wanted",
    [
        (Image.new("RGB", (2, 2), (10, 20, 30)), 3, [10, 20, 30]),
        (Image.new("RGB", (2, 2), (255, 0, 0)), 1, [76]),
        (Image.new("L", (2, 2), 9), 3, [9, 9, 9]),
        (Image.new("1", (2, 2), 1), 1, [255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), 3, [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), 3, [255, 0, 0]),
        (Image.new("LA", (2, 2), (0, 0)), 1, [255]),
        (Image.new("RGB", (2, 2), (255, 51, 0)).convert("P", palette=1), 3, [255, 51, 0]),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), 3, [255, 0, 0]),
        (Image.fromarray(np.full((2, 2), 0x8001, np.uint16)), 1, [0x80]),
        (Image.fromarray(np.full((2, 2), 0x8001, np.int32)), 3, [0x80] * 3),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_modes(image, channels, wanted):
    assert pixel(image, channels) == wanted


def test_a_transparent_palette_and_exif_orientation(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "p.png", transparency=1)
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P" and pixel(image, 3) == [255, 255, 255]
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left becomes the top
    image.save(tmp_path / "a.png", exif=exif)
    out = base.open_image(tmp_path / "a.png", (1, 16, 8), 256, "exact")
    assert out[0, :8].min() == 255 and out[0, 8:].max() == 0


def test_a_large_jpeg_decodes_reduced_to_the_same_picture(tmp_path):
    image = Image.fromarray(noise(128, 128)).resize((1024, 1024))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpg, png = (base.open_image(tmp_path / f"a.{s}", (1, 120, 120), 256) for s in ("jpg", "png"))
    assert np.abs(jpg.astype(int) - png).mean() < 2


def test_a_damaged_png_is_never_taken_for_other_pixels(tmp_path):
    """Pillow alone takes some of these, which lost the end of their data with its checksum."""
    pixels = noise(8, 8, 3)
    data = encoded(pixels.transpose(2, 0, 1))
    start = data.index(b"IDAT")
    taken = 0
    for length in range(190, int.from_bytes(data[start - 4 : start], "big")):
        shorter = data[: start - 4] + length.to_bytes(4, "big") + data[start:]
        for changed in (shorter, bytes(b ^ (i == start + 50) for i, b in enumerate(shorter))):
            (tmp_path / "a.png").write_bytes(changed)
            with contextlib.suppress(OSError, SyntaxError):
                taken += np.any(np.asarray(Image.open(io.BytesIO(changed))) != pixels)
            with pytest.raises(UserError, match="cannot be read as an image"):
                base.open_image(tmp_path / "a.png", (3, 8, 8), 256)
    assert taken


def test_open_image_errors(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    Image.fromarray(noise(30, 30)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        **dict.fromkeys(["none.png", f"{'a' * 300}.png"], "there is no such image file"),
        **dict.fromkeys(["empty.png", "text.png", "cut.png"], "cannot be read as an image"),
        ".": "is a folder: give an image file",
        "float.tiff": "floating-point pixels",
        "pipe.png": "cannot be read as an image .*not a regular file",
        "eps.png": r"cannot be read as an image \(cannot identify",  # Ghostscript was not asked
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            base.open_image(tmp_path / name, (1, 8, 8), 256)
        assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(UserError, match=r"whole.png: the image is 30x30"):
        base.open_image(tmp_path / "whole.png", (1, 8, 8), 256, "exact")


def test_an_image_of_another_size_is_not_decoded():
    cut_short = encoded(noise(3, 64, 16), "JPEG")[:-500]  # which decoding would notice
    with pytest.raises(UserError, match="the image is 16x64"):
        base.decode(cut_short, (3, 8, 8), "exact")
