"""Replacing functions of vLLM loudly, once, and all that belong together or none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MARK = "__asl_vllm_original__"
"""Attribute of a replacement: the function of vLLM that it replaced."""


class UpstreamDriftError(RuntimeError):
    """vLLM is not what this package was written against."""


_waiting: list[Callable[[], None]] | None = None


@contextmanager
def together() -> Iterator[None]:
    """Checks every replacement inside before the first is made: all, or none.

    Also a decorator. One inside another is part of it.
    """
    if _waiting is not None:
        yield
        return
    with _collected() as waiting:
        yield
    for action in waiting:
        action()


def check(install: Callable[[], None]) -> None:
    """Checks what ``install`` would replace, and replaces nothing.

    Raises:
        UpstreamDriftError: something of it does not fit vLLM.
    """
    with _collected():
        install()


@contextmanager
def _collected() -> Iterator[list[Callable[[], None]]]:
    """The changes that are asked for inside, none of them made."""
    global _waiting
    before, _waiting = _waiting, []
    try:
        yield _waiting
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise UpstreamDriftError(f"vLLM lacks a name: {error}.") from error
    finally:
        _waiting = before


def change(action: Callable[[], None]) -> None:
    """Does ``action`` now; inside `together`, once everything there was checked."""
    if _waiting is None:
        action()
    else:
        _waiting.append(action)


def wrap_method(
    owner: type | ModuleType,
    name: str,
    parameters: tuple[str, ...],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Replaces ``owner.name`` by ``make(original)``; a second call does nothing.

    ``parameters`` are the leading parameter names that the replacement relies on.
    Static and class methods keep their kind. A module's functions are replaced the
    same way. Inside `together` it is checked at once and replaced at the end.

    Raises:
        UpstreamDriftError: the method is gone or has another signature; vLLM is left
            untouched.
    """
    raw = inspect.getattr_static(owner, name, None)
    where = f"{_dotted(owner)}.{name}"
    if raw is None:
        raise UpstreamDriftError(f"{where} is gone from vLLM.")
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind else raw
    if hasattr(original, MARK):
        return
    found = tuple(inspect.signature(original).parameters)
    if found[: len(parameters)] != parameters:
        raise UpstreamDriftError(
            f"{where} takes {found}, expected it to begin with {parameters}."
        )

    def replace() -> None:
        replacement = make(original)
        setattr(replacement, MARK, original)
        replacement.__name__ = original.__name__
        replacement.__qualname__ = original.__qualname__
        replacement.__doc__ = original.__doc__
        setattr(owner, name, kind(replacement) if kind else replacement)

    change(replace)


def add_method(owner: type, name: str, method: Callable[..., Any]) -> None:
    """Gives a class of vLLM a method it lacks; a second call does nothing.

    Raises:
        UpstreamDriftError: vLLM has that name itself.
    """
    found = inspect.getattr_static(owner, name, None)
    if found is not None and found is not method:
        where = f"{_dotted(owner)}.{name}"
        raise UpstreamDriftError(f"{where} is vLLM's own; ours needs another name.")
    change(lambda: setattr(owner, name, method))


def _dotted(owner: type | ModuleType) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
