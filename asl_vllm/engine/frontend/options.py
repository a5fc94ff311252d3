"""Refusing options of vLLM that nobody has looked at together with a policy.

``engine/options/LINE.txt`` names the engine arguments of a supported line of vLLM that
were looked at: they work with a policy, or are refused by `compat`. Any other is
refused unless it has its default. Refused, and not warned about, because what such an
option breaks is often silent: other tokens, or another request's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from pydantic.fields import FieldInfo
from vllm.engine.arg_utils import EngineArgs

from asl_vllm.engine import lines


@functools.cache
def looked_at() -> frozenset[str]:
    """The names of the installed line's list; of the newest beside another vLLM.

    Fields of an argument that is a configuration of its own are ``argument.field``.
    """
    found = lines.installed()
    line = lines.LINES[-1]
    for one in lines.LINES:
        if found is not None and one.has(found[1]):
            line = one
    text = files("asl_vllm.engine").joinpath("options", f"{line.name}.txt")
    return frozenset(text.read_text(encoding="utf-8").split())


def check(engine_args: EngineArgs) -> None:
    """Raises for the first option that was not looked at and has no default value.

    Raises:
        UnsupportedError: names the option.
    """
    from asl_vllm.engine.compat import UnsupportedError

    for name, value, default in given(engine_args):
        if name not in looked_at():
            option = "--" + name.replace("_", "-")
            raise UnsupportedError(
                "options that were looked at together with a policy",
                f"{option} {value!r}, which was not",
                f"leave it at its default, {default!r}",
            )


def given(engine_args: EngineArgs) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of each argument that has another than its default."""
    for name, value, default in _fields(engine_args):
        if dataclasses.is_dataclass(value) and type(value) is type(default):
            for inner, part, usual in _fields(value):
                if part != usual:
                    yield f"{name}.{inner}", part, usual
        elif value != default:
            yield name, value, default


def _fields(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of the fields that may be given and have a default."""
    for field in dataclasses.fields(thing):
        if not field.init:
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            default = field.default
        else:
            continue
        # pydantic's own record of a field, in configurations of 0.33.
        if isinstance(default, FieldInfo):
            default = default.get_default(call_default_factory=True)
        yield field.name, getattr(thing, field.name), default
