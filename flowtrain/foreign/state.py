"""The tensors, modules and functions to which a flow of other code refers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dis import get_instructions
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions.transforms import _InverseTransform

from flowtrain.errors import UserError

T = TypeVar("T")
Change = Callable[[Tensor], Tensor]
Seen = dict[int, tuple[Any, Any]]  # objects by their ids, and what replaces them
_STATE = (Tensor, nn.Module)
_OF_TORCH = ("_parameters", "_buffers", "_modules")  # of a module, which `_apply` changes


@torch.no_grad()
def map_tensors(thing: Any, fn: Change) -> None:
    """Replaces the tensors in an object, and in all objects and functions that it refers to.

    Tensors that a module holds as neither parameter nor buffer stay on their device, as in the
    `to` of torch.
    """
    _walk(thing, fn, {})


def modules_in(thing: Any) -> list[nn.Module]:
    """The modules in an object, except for those in other modules."""
    modules = [each for each in _found(thing) if isinstance(each, nn.Module)]
    inner = {id(part) for each in modules for part in each.modules() if part is not each}
    return [each for each in modules if id(each) not in inner]


def tensors_in(thing: Any) -> list[Tensor]:
    """The tensors in an object that are no parameters or buffers of modules, nor gradients."""
    state = [t for each in modules_in(thing) for t in (*each.parameters(), *each.buffers())]
    known = {id(each) for tensor in state for each in (tensor, tensor.grad)}
    return [each for each in _found(thing) if isinstance(each, Tensor) and id(each) not in known]


def require_held(thing: Any) -> None:
    """Raises `UserError` for a module with parameters that a method reads from its file. It is no
    part of the object, so it would stay as it is: on its device, and in training mode.
    """
    held = {id(part) for each in modules_in(thing) for part in each.modules()}
    classes = {base: None for each in _found(thing) for base in type(each).__mro__}
    methods = [each for base in classes for each in vars(base).values()]
    for method in (each for each in methods if isinstance(each, FunctionType)):
        for name in _global_names(method):
            read = method.__globals__[name]
            if isinstance(read, nn.Module) and id(read) not in held and list(read.parameters()):
                raise UserError(
                    f"{method.__qualname__}: it reads the global variable {name}, a module with "
                    f"parameters: make it an attribute of the flow"
                )


@torch.no_grad()
def copied(thing: T, memo: dict[int, Any] | None = None) -> T:
    """A deep copy. Its tensors are detached, because torch copies no tensor with a history of
    gradients. Its functions refer to copies too, unlike after `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    found = _found(thing)
    for tensor in (each for each in found if isinstance(each, Tensor)):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    for each in reversed(found):  # parts first
        if isinstance(each, _InverseTransform):  # whose copy by torch lacks its transform
            memo[id(each)] = copy.deepcopy(each.inv, memo).inv
    new: T = _walk(copy.deepcopy(thing, memo), lambda tensor: tensor, {}, memo)
    return new


def _found(thing: Any) -> list[Any]:
    """The tensors, and then all other objects, to which an object refers."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    seen: Seen = {}
    _walk(thing, note, seen)
    return [*tensors, *(each for each, _ in seen.values())]


def _staying(fn: Change) -> Change:
    def change(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.device == tensor.device else tensor

    return change


def _walk(thing: Any, fn: Change, seen: Seen, memo: dict[int, Any] | None = None) -> Any:
    """An object with its tensors replaced, in place if that is possible.

    `seen` gets the other objects, and what replaces them. If there is the `memo` of a deep copy,
    functions that refer to tensors or modules are replaced by functions that refer to copies.
    """
    if isinstance(thing, Tensor):
        return fn(thing)
    if isinstance(thing, type | ModuleType | str | int | float | None):
        return thing
    if id(thing) in seen:
        return seen[id(thing)][1]
    seen[id(thing)] = thing, thing

    def inner(each: Any) -> Any:
        return _walk(each, fn, seen, memo)

    if isinstance(thing, nn.Module):
        thing._apply(fn)
        fn = _staying(fn)
        parts = list(thing.modules())
        seen.update({id(part): (part, part) for part in parts})
        for part in parts:
            _replace(vars(part), inner, _OF_TORCH)
    elif isinstance(thing, list):
        thing[:] = [inner(each) for each in thing]
    elif isinstance(thing, tuple):
        entries = [inner(each) for each in thing]
        if any(new is not each for new, each in zip(entries, thing, strict=True)):
            make = getattr(thing, "_make", type(thing))  # of a named tuple
            seen[id(thing)] = thing, make(entries)
    elif isinstance(thing, dict):
        _replace(thing, inner)
    elif isinstance(thing, partial):
        state = inner(thing.func), inner(thing.args), inner(thing.keywords), vars(thing)
        thing.__setstate__(state)  # type: ignore[attr-defined]
    elif isinstance(thing, MethodType):
        inner(thing.__self__)
    elif isinstance(thing, FunctionType):
        if memo is not None and any(isinstance(part, _STATE) for part in _found(thing)):
            seen[id(thing)] = thing, _function_of_copies(thing, memo)
        function = seen[id(thing)][1]
        function.__defaults__ = inner(function.__defaults__)
        inner(function.__kwdefaults__)
        for cell in filter(_is_full, function.__closure__ or ()):
            cell.cell_contents = inner(cell.cell_contents)
        for name in _global_names(function):
            function.__globals__[name] = inner(function.__globals__[name])
    else:
        if hasattr(thing, "__dict__"):
            _replace(vars(thing), inner)
        held = object.__getstate__(thing)
        for name, each in (held[1] if isinstance(held, tuple) else {}).items():  # of __slots__
            if (new := inner(each)) is not each:
                object.__setattr__(thing, name, new)
    return seen[id(thing)][1]


def _replace(values: dict[Any, Any], inner: Callable[[Any], Any], but: Sequence[str] = ()) -> None:
    for key, each in list(values.items()):
        if key not in but and (new := inner(each)) is not each:
            values[key] = new


def _function_of_copies(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with deep copies of its defaults, and of the variables in its closure and in
    its file.
    """
    cells = tuple(CellType() for _ in function.__closure__ or ())
    for old, cell in zip(function.__closure__ or (), cells, strict=True):
        if _is_full(old):
            cell.cell_contents = copy.deepcopy(old.cell_contents, memo)
    defaults = copy.deepcopy(function.__defaults__, memo)
    of_file = dict(function.__globals__)
    of_file |= {name: copy.deepcopy(of_file[name], memo) for name in _global_names(function)}
    new = FunctionType(function.__code__, of_file, function.__name__, defaults, cells or None)
    new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    return new


def _global_names(function: FunctionType) -> list[str]:
    """The global variables of a function that are tensors, modules, or functions of its file."""

    def names(code: CodeType) -> Iterator[str]:
        # `co_names` has the names of attributes, too.
        yield from (each.argval for each in get_instructions(code) if each.opname == "LOAD_GLOBAL")
        for inner in code.co_consts:
            if isinstance(inner, CodeType):  # of a comprehension, for example
                yield from names(inner)

    def counts(each: Any) -> bool:
        own = isinstance(each, FunctionType) and each.__module__ == function.__module__
        return own or isinstance(each, _STATE)

    found = dict.fromkeys(names(function.__code__))
    return [name for name in found if counts(function.__globals__.get(name))]


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
