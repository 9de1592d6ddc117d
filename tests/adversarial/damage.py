"""How a file is damaged or crafted: functions of a seeded generator and of a sound file."""

import copy
import json
import random
import re
import string

DEEP = "@deep@"  # where `dumped` puts lists of thousands of levels
NUMBERS = [0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**32, 2**53, 2**63, 10**30, 10**400]
NUMBERS += [0.5, -0.0, 1e-300, 1e300, float("inf"), float("nan")]
VALUES = [None, True, False, "", "x", [], {}, [[]], {"": {}}, [0], [None], {"name": "x"}, DEEP]
VALUES += ["9" * 5000, "x" * 100_000, "\0", "\ud800", "\n\n\n\n\n\n\n\n", "%s{}\x1b[31m"]
VALUES += ["/dev/zero", "..", "../../x", "/", "fifo", "os.path", "antigravity", "1e5", "nan"]


def of_bytes(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Damaged bytes. `other` is a file of the same kind, for splices."""
    return draw.choice(WAYS)(draw, data, other)


def _flip(draw, data, other):
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[_place(draw, data)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(draw, data, other):
    return data[: draw.choice([0, 1, 8, _place(draw, data), len(data) - 1])]


def _insert(draw, data, other):
    at = _place(draw, data)
    return data[:at] + draw.randbytes(draw.choice([1, 4, 100])) + data[at:]


def _remove(draw, data, other):
    at = _place(draw, data)
    return data[:at] + data[at + draw.choice([1, 4, 100]) :]


def _splice(draw, data, other):
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _fill(draw, data, other):
    at = _place(draw, data)
    length = min(draw.choice([1, 4, 8, 100, len(data)]), len(data) - at)
    return data[:at] + draw.choice([b"\0", b"\xff", b"9", b" "]) * length + data[at + length :]


def _repeat(draw, data, other):
    at = _place(draw, data)
    part = data[at : at + draw.choice([1, 8, 100, 10_000])]
    return data[:at] + part * draw.choice([2, 3, 100]) + data[at + len(part) :]


def _number(draw, data, other):
    """A number in text is replaced, or a binary one."""
    places = list(re.finditer(rb"\d+", data[:20_000]))
    if places and draw.random() < 0.5:
        match = draw.choice(places)
        number = str(draw.choice(NUMBERS)).encode()
        return data[: match.start()] + number + data[match.end() :]
    at, size = _place(draw, data), draw.choice([2, 4, 8])
    number = draw.choice([0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1))])
    return data[:at] + number.to_bytes(size, "little", signed=True) + data[at + size :]


WAYS = [_flip, _flip, _truncate, _insert, _remove, _splice, _fill, _repeat, _number, _number]


def _place(draw: random.Random, data: bytes) -> int:
    """Often near the beginning or the end, where headers are."""
    last = max(len(data) - 1, 0)
    kind = draw.random()
    if kind < 0.3:
        return min(int(draw.expovariate(1 / 64)), last)
    if kind < 0.4:
        return max(last - int(draw.expovariate(1 / 64)), 0)
    return draw.randint(0, last)


def of_value(draw: random.Random, value):
    """A nested value as JSON and YAML have it, with one or two edits somewhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2])):
        value = _edited(draw, value)
    return value


def _edited(draw, value):
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return draw.choice(VALUES)
    container, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.45:
        container[key] = _extreme(draw, container[key])
    elif kind < 0.6:
        del container[key]
    elif kind < 0.7:
        there, name = draw.choice(places)
        container[key] = copy.deepcopy(there.get(name) if isinstance(there, dict) else 0)
    elif kind < 0.8:
        container[key] = [copy.deepcopy(container[key])] * draw.choice([1, 2, 1000])
    elif isinstance(container, dict):
        name = draw.choice(["", "x", key + "x", "name", "x" * 300, "\0", *string.ascii_letters])
        container[name] = container[key] if kind < 0.9 else container.pop(key)
    else:
        container.insert(key, draw.choice([*VALUES, *NUMBERS]))
    return value


def _extreme(draw, value):
    """Often of the same type, which gets further than another one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or draw.random() < 0.3:
        return draw.choice([*VALUES, *NUMBERS])
    if draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 2])
    return draw.choice(NUMBERS)


def _places(value):
    """`(container, key)` of everything inside a nested value."""
    if not isinstance(value, dict | list):
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(pairs):
        yield value, key
        yield from _places(each)


def dumped(value) -> str:
    """JSON, which may be deeper than `json` can write."""
    return json.dumps(value, separators=(",", ":")).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
