"""Replacing methods: loud, once, all or none, and without traces on failure."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from asl_vllm.engine.patching import (
    UpstreamDriftError,
    add_method,
    change,
    check,
    together,
    wrap_method,
)
from asl_vllm_testing.originals import original_of


class Upstream:
    def plain(self, number: int, *, twice: bool = False) -> int:
        """What upstream says."""
        return number * (2 if twice else 1)

    @staticmethod
    def static(number: int) -> int:
        return number

    @classmethod
    def of_class(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number


@pytest.fixture
def upstream() -> type[Upstream]:
    """A class of its own for each test."""
    return type("Upstream", (), dict(vars(Upstream)))


def plus_one(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        return original(self, number + 1, *args, **kwargs)

    return replacement


def never(original: Callable[..., Any]) -> Callable[..., Any]:
    raise AssertionError("nothing must be made")


def test_a_method_is_replaced_and_delegates(upstream: type[Upstream]) -> None:
    wrap_method(upstream, "plain", ("self", "number"), plus_one)
    assert upstream().plain(1) == 2
    assert upstream().plain(1, twice=True) == 4


def test_a_second_call_does_nothing(upstream: type[Upstream]) -> None:
    wrap_method(upstream, "plain", ("self", "number"), plus_one)
    once = vars(upstream)["plain"]
    wrap_method(upstream, "plain", ("self", "number"), never)
    assert vars(upstream)["plain"] is once
    assert upstream().plain(1) == 2


def test_a_modules_function_is_replaced() -> None:
    module = ModuleType("upstream_module")
    module.double = lambda number: 2 * number  # type: ignore[attr-defined]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda number: original(number) + 1

    for make_or_not in (make, never):
        wrap_method(module, "double", ("number",), make_or_not)
    assert module.double(3) == 7
    assert original_of(module, "double")(3) == 6  # type: ignore[misc]
    with pytest.raises(UpstreamDriftError, match=r"upstream_module\.triple is gone"):
        wrap_method(module, "triple", ("number",), never)


def test_a_method_is_added_once(upstream: type[Upstream]) -> None:
    def triple(self: Any, number: int) -> int:
        return 3 * number

    for _ in range(2):
        add_method(upstream, "triple", triple)
    assert upstream().triple(2) == 6  # type: ignore[attr-defined]


def test_a_name_of_upstream_is_not_taken(upstream: type[Upstream]) -> None:
    with pytest.raises(UpstreamDriftError, match=r"plain is vLLM's own"):
        add_method(upstream, "plain", never)
    assert upstream().plain(1) == 1


def test_a_static_method_stays_one(upstream: type[Upstream]) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda number: original(number) + 10

    for make_or_not in (make, never):
        wrap_method(upstream, "static", ("number",), make_or_not)
        assert isinstance(vars(upstream)["static"], staticmethod)
        assert upstream.static(1) == upstream().static(1) == 11


def test_a_class_method_stays_one(upstream: type[Upstream]) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda cls, number: original(cls, number + 10)

    for make_or_not in (make, never):
        wrap_method(upstream, "of_class", ("cls", "number"), make_or_not)
        assert isinstance(vars(upstream)["of_class"], classmethod)
        derived = type("Derived", (upstream,), {})
        assert derived.of_class(1) == ("Derived", 11)


def test_name_and_documentation_are_kept(upstream: type[Upstream]) -> None:
    wrap_method(upstream, "plain", ("self",), plus_one)
    assert upstream.plain.__name__ == "plain"
    assert upstream.plain.__qualname__ == "Upstream.plain"
    assert upstream.plain.__doc__ == "What upstream says."


def test_the_original_can_be_found(upstream: type[Upstream]) -> None:
    for name in ("plain", "static", "of_class"):
        assert original_of(upstream, name) is None
    before = upstream.plain
    wrap_method(upstream, "plain", ("self",), plus_one)
    assert original_of(upstream, "plain") is before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", ("self", "amount")),
        ("plain", ("number", "self")),
        ("plain", ("self", "number", "twice", "more")),
        ("static", ("self", "number")),
        ("of_class", ("number",)),
    ],
)
def test_another_signature_is_refused_and_left_alone(
    upstream: type[Upstream], name: str, expected: tuple[str, ...]
) -> None:
    before = vars(upstream)[name]
    with pytest.raises(UpstreamDriftError) as refused:
        wrap_method(upstream, name, expected, never)
    assert vars(upstream)[name] is before
    message = str(refused.value)
    assert f"Upstream.{name}" in message
    assert str(expected) in message
    assert "'number'" in message, "what was found is not named"


def test_a_missing_method_is_refused(upstream: type[Upstream]) -> None:
    before = dict(vars(upstream))
    with pytest.raises(UpstreamDriftError, match=r"Upstream\.gone is gone from vLLM"):
        wrap_method(upstream, "gone", ("self",), never)
    assert dict(vars(upstream)) == before


def test_what_belongs_together_is_replaced_together(upstream: type[Upstream]) -> None:
    before = dict(vars(upstream))
    with together():
        wrap_method(upstream, "plain", ("self", "number"), plus_one)
        add_method(upstream, "triple", lambda self: 3)
        change(lambda: setattr(upstream, "fields", ("ours",)))
        assert dict(vars(upstream)) == before, "not all is checked yet"
    assert upstream().plain(1) == 2
    assert upstream().triple() == 3  # type: ignore[attr-defined]
    assert upstream.fields == ("ours",)  # type: ignore[attr-defined]


@together()
def install(upstream: type[Upstream]) -> None:
    wrap_method(upstream, "plain", ("self", "number"), plus_one)


def drift(upstream: type[Upstream]) -> None:
    wrap_method(upstream, "static", ("self", "number"), never)


def gone(upstream: type[Upstream]) -> None:
    from vllm.engine.arg_utils import NoSuchName  # noqa: F401


@pytest.mark.parametrize("broken", [drift, gone])
def test_nothing_is_half_replaced(
    upstream: type[Upstream], broken: Callable[..., None]
) -> None:
    before = dict(vars(upstream))
    with pytest.raises(UpstreamDriftError), together():
        install(upstream)
        broken(upstream)
    assert dict(vars(upstream)) == before
    install(upstream)
    assert upstream().plain(1) == 2, "what follows is replaced as always"


def test_a_check_replaces_nothing(upstream: type[Upstream]) -> None:
    before = dict(vars(upstream))
    check(lambda: install(upstream))
    with pytest.raises(UpstreamDriftError, match=r"static takes"):
        check(lambda: drift(upstream))
    assert dict(vars(upstream)) == before


def test_an_import_error_of_our_own_is_no_drift() -> None:
    with pytest.raises(ModuleNotFoundError), together():
        import asl_vllm.no_such_module  # noqa: F401
