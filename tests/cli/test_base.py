"""What the commands share."""

import warnings

from flowtrain.cli.base import command


def test_warnings_of_pillow_are_no_messages():
    """Pillow warns of pictures that it reads all the same."""

    @command
    def reads_a_picture():
        for module in ("PIL.Image", "torch"):
            warnings.warn_explicit("large", UserWarning, "file.py", 1, module)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        reads_a_picture()
    assert len(shown) == 1
