"""What image sizes allow, said before any data is read."""

from flowtrain.errors import UserError

_TIMES = {0: "cannot be squeezed", 1: "can be squeezed once", 2: "can be squeezed twice"}


def check_squeezes(shape: tuple[int, int, int], squeezes: int, levels: int) -> None:
    """Raises `UserError` unless both sides can be halved `squeezes` times."""
    _, height, width = shape
    sizes = [(height, width)]
    while sizes[-1][0] % 2 == 0 and sizes[-1][1] % 2 == 0 and min(sizes[-1]) > 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    possible = len(sizes) - 1
    if squeezes <= possible:
        return
    path = " -> ".join(str(h) if height == width else f"{h}x{w}" for h, w in sizes)
    times = _TIMES.get(possible, f"can be squeezed {possible} times")
    raise UserError(
        f"model.levels: {height}x{width} {times}{f' ({path})' if possible else ''}; "
        f"levels: {levels} needs a multiple of {2**squeezes}"
    )
