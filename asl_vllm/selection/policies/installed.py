"""Policies of other packages: the entry points of the group ``asl_vllm.policies``."""

from __future__ import annotations

import functools
import inspect
import re
from importlib.metadata import EntryPoint, entry_points

from asl_vllm.config import BUILT_IN_POLICIES, POLICY_GROUP, ConfigError
from asl_vllm.selection.policies.base import Policy

_NAME = re.compile("[a-z][a-z0-9_-]*")


@functools.cache
def policies_of_packages() -> dict[str, type[Policy]]:
    """Imports the policies that installed packages name; at most once.

    Raises:
        ConfigError: A name is taken or malformed, or what it stands for cannot be
            imported or is no policy.
    """
    found: dict[str, type[Policy]] = {}
    owners = dict.fromkeys(("none", *BUILT_IN_POLICIES), "asl_vllm")
    for point in entry_points(group=POLICY_GROUP):
        if not _NAME.fullmatch(point.name):
            raise _refusal(
                point,
                "as its name",
                "lower-case letters, digits, _ and -, a letter first",
                "rename it there",
            )
        if point.name in owners:
            raise _refusal(
                point,
                f"a name that {owners[point.name]} has",
                "a name of its own",
                f"uninstall {_package(point)} or rename the policy there",
            )
        owners[point.name] = _package(point)
        found[point.name] = _policy_of(point)
    return found


def _policy_of(point: EntryPoint) -> type[Policy]:
    allowed = "MODULE:CLASS, a subclass of asl_vllm.selection.Policy with a decide()"
    remedy = f"repair or uninstall {_package(point)}"
    try:
        policy = point.load()
    except Exception as error:  # Whatever importing another's code may raise.
        what = f"{type(error).__name__}: {error}"
        raise _refusal(
            point, f"which cannot be imported ({what})", allowed, remedy
        ) from error
    is_policy = isinstance(policy, type) and issubclass(policy, Policy)
    if not is_policy or inspect.isabstract(policy):
        raise _refusal(point, "which is no such class", allowed, remedy)
    checked: type[Policy] = policy
    return checked


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed package"


def _refusal(point: EntryPoint, got: str, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"entry point {point.name!r} of group {POLICY_GROUP} in package "
        f"{_package(point)}: got {point.value!r}, {got}; allowed: {allowed}. Remedy: "
        f"{remedy}."
    )
