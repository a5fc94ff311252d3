"""Where our fields are in a request's body; a field in no such place is refused.

They are read at the top of a body and in its ``vllm_xargs``. A budget anywhere else
would be dropped without a sign, and its client would measure something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidatorFunctionWrapHandler

from asl_vllm.engine.frontend.admission import refuse, refuse_name
from asl_vllm.engine.frontend.fields import NAMES, resembles
from asl_vllm.selection.budget import shown

OBJECTS = ("extra_body", "extra_args", "sampling_params")
"""Objects that clients put our fields into by mistake: arguments of Python clients."""

AT_TOP = "Put it at the top of the body."
IN_PARAMETERS = "Put it into sampling_params.extra_args."
LEAVE_OUT = "This endpoint reads none. Leave it out; the server's default budget holds."


def looks_misplaced(name: str) -> bool:
    """Whether an endpoint that does not know a field must look at it."""
    return name in OBJECTS or resembles(name)


def refuse_misplaced(extra: Mapping[str, Any] | None, remedy: str) -> None:
    """Looks at the fields of a body that its endpoint does not know; null is none.

    Raises:
        VLLMValidationError: One was meant to be ours, or is an object that holds one
            that was.
    """
    for name, value in (extra or {}).items():
        if value is None or not looks_misplaced(name):
            continue
        if name not in OBJECTS:
            raise refuse_name(name, value)
        if path := path_to_ours(value):
            raise refuse(
                f"{path[-1]} is not read in {'.'.join([name, *path[:-1]])}. {remedy}",
                shown(value),
                name,
            )


def path_to_ours(value: Any) -> list[str]:
    """The way to the first field in an object that was meant to be ours, or none."""
    if not isinstance(value, dict):
        return []
    for name, inner in value.items():
        if inner is not None and (name in NAMES or resembles(name)):
            return [name]
    for name in OBJECTS:
        if path := path_to_ours(value.get(name)):
            return [name, *path]
    return []


def given_in(body: Any) -> dict[str, Any]:
    """Our fields of a request model, at its top or in ``vllm_xargs``.

    Raises:
        VLLMValidationError: One is in both, with different values.
    """
    given: dict[str, Any] = {}
    for name in NAMES:
        top, inner = getattr(body, name), (body.vllm_xargs or {}).get(name)
        values = [value for value in (top, inner) if value is not None]
        if len(values) == 2 and (type(top), top) != (type(inner), inner):
            raise refuse(
                f"{name}: got {shown(top)} in the body and {shown(inner)} in its "
                "vllm_xargs. Send it in one place.",
                shown(top),
                name,
            )
        if values:
            given[name] = values[0]
    return given


def as_sent(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validates ``vllm_xargs`` but for our fields, which stay as they were sent.

    Pydantic would make 1 of true, and refuse null.
    """
    if not isinstance(value, dict):
        return validate(value)
    ours = {k: v for k, v in value.items() if k in NAMES}
    others = validate({k: v for k, v in value.items() if k not in ours})
    return {**others, **{k: v for k, v in ours.items() if v is not None}}
