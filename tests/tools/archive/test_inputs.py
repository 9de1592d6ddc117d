"""The images that go into an archive."""

import zlib

import pytest
import torch
from adversarial.damage import png
from coding_helpers import claiming, picture
from helpers import images, memory_below

from flowtrain.errors import UserError
from flowtrain.pictures import lossless
from flowtrain.pictures.grid import to_8bit
from flowtrain.tools.archive.inputs import find_files, ordinary_sizes, read_files


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_files_of_few_levels_are_those_that_decompress_writes(levels, tmp_path):
    x = images(3, (3, 4, 4), levels)
    for i, image in enumerate(x):
        (tmp_path / f"{i}.png").write_bytes(lossless.encoded(to_8bit(image, levels), "PNG"))
    files = find_files([tmp_path])
    assert list(files) == [f"{tmp_path.name}/{i}.png" for i in range(3)]
    assert torch.equal(read_files(list(files.values()), (3, 4, 4), levels), x)


def test_a_format_is_compared_only_if_it_gives_every_image_back(monkeypatch):
    x, decoded = images(3, (3, 4, 4)), lossless.decoded
    assert set(ordinary_sizes(x, 256)) >= {"PNG", "WEBP"}
    last = lossless.encoded(x[2], "WEBP")
    monkeypatch.setattr(lossless, "decoded", lambda data, *of: decoded(data, *of) ^ (data == last))
    assert "WEBP" not in ordinary_sizes(x, 256)


def test_a_picture_of_another_size_is_not_decoded(tmp_path):
    """Its pixels may take gigabytes."""
    data = lossless.encoded(to_8bit(images(1, (1, 8, 8), 256)[0], 256), "PNG")
    (tmp_path / "a.png").write_bytes(claiming(data, 8, 2**23))
    refused = pytest.raises(UserError, match="a.png: 8x8388608 L: .*\n.* is for 8x8 L")
    with memory_below(2**25), refused:
        read_files([tmp_path / "a.png"], (1, 8, 8), 256)


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow opens them as colours of 8 bits."""
    values = bytes(range(12))  # two pixels
    pixels = [b"IDAT", zlib.compress(b"\0" + values)]
    deep = png([[b"IHDR", [2, 1, 16, 2, 0, 0, 0]], pixels, [b"IEND", b""]])
    for name, data in (("a.png", deep), ("a.ppm", b"P6 2 1 65535\n" + values)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: 2x1 RGB of 16 bits: does not fit the model"):
            read_files([tmp_path / name], (3, 1, 2), 256)
    (tmp_path / "b.ppm").write_bytes(b"P6 2 1 255\n" + values[:6])
    assert read_files([tmp_path / "b.ppm"], (3, 1, 2), 256).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_all_files_that_do_not_fit_are_named(tmp_path, capsys):
    for name, size, mode in (("fits", (8, 8), "L"), ("wide", (9, 8), "L"), ("rgb", (8, 8), "RGB")):
        picture(tmp_path / f"{name}.png", size, mode)
    picture(tmp_path / "grey.png", value=128)
    with pytest.raises(UserError, match="grey.png: its values .* 2 more of 4 .*\n.*\n--fit packs"):
        read_files(sorted(tmp_path.iterdir()), (1, 8, 8), 17)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == [
        "grey.png: its values are not the 17 levels 0, 15, 31, 47, ..., 255",
        *("rgb.png: 8x8 RGB", "wide.png: 9x8 L"),
    ]


def test_folders_are_read_as_the_data_set_reads_them(tmp_path):
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "one" / ".hidden.png")
    picture(tmp_path / "two" / "shot 12:30.JPG")
    (tmp_path / "one" / "link").symlink_to(tmp_path / "two")
    assert list(find_files([tmp_path / "one"])) == ["one/a.png", "one/link/shot 12:30.JPG.png"]
