"""Freed memory that stays with the process."""

from unittest import mock

from flowtrain.system import allocator


def test_other_and_older_c_libraries(monkeypatch):
    """Others are left alone. A threshold (-3) that is refused is lowered."""
    for missing in ("mallopt", "gnu_get_libc_version"):
        library = mock.Mock(["mallopt", "gnu_get_libc_version"])
        delattr(library, missing)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name, library=library: library)
        allocator.keep_freed_memory()
        assert not library.mock_calls
    for largest, lowered in ((2**30, []), (2**25, [(-3, 2**25)])):
        library = mock.Mock()
        library.mallopt.side_effect = lambda key, value, most=largest: int(value <= most)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name, library=library: library)
        allocator.keep_freed_memory()
        calls = [call.args for call in library.mallopt.mock_calls]
        assert calls == [(-3, 2**30), *lowered, (-1, -1)]
