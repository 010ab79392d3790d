"""Jinja's sandbox with a limit on what a template makes.

The sandbox keeps a template from reaching out, but not from taking all memory: one
expression can ask for ten thousand million characters. Everything here that makes a
value longer than what it was given is asked for its length first, or cannot pass on
more than `MOST_CHARACTERS`. Nor does it keep from running for days: every step of a
loop, every call and every operation looks at the clock.
"""

import contextlib
import contextvars
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A conversation is a small part of that.
MOST_CHARACTERS = 10_000_000
MOST_EXPONENT = 1000
MOST_BITS = 10_000
# Of CPU time; a conversation takes thousandths.
MOST_SECONDS = 10.0
STEPS_PER_LOOK = 64
WIDENING = ("ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes")


class TooMuchError(Exception):
    """A template asks for more than a conversation can need."""

    def __init__(self) -> None:
        super().__init__(
            f"it makes more than {MOST_CHARACTERS} characters or items, the most it may"
        )


class TooLongError(Exception):
    """A template runs for longer than a conversation can need."""

    def __init__(self) -> None:
        super().__init__(f"it runs for more than {MOST_SECONDS:g} s, the most it may")


_end: contextvars.ContextVar[float] = contextvars.ContextVar(
    "end", default=float("inf")
)


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Context in which templates may take `MOST_SECONDS` of this thread's CPU time."""
    token = _end.set(time.thread_time() + MOST_SECONDS)
    try:
        yield
    finally:
        _end.reset(token)


def check_time() -> None:
    """Raises `TooLongError` if a template has taken too long."""
    if time.thread_time() > _end.get():
        raise TooLongError


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values that a loop goes over.

    Raises:
        TooLongError: when the template has taken too long.
    """
    for index, value in enumerate(values):
        # Asking the clock takes longer than a step.
        if index % STEPS_PER_LOOK == 0:
            check_time()
        yield value


def check_size(size: Any) -> None:
    """Raises `TooMuchError` if a number of characters or items is too great."""
    if isinstance(size, int) and size > MOST_CHARACTERS:
        raise TooMuchError


def checked(value: Any) -> Any:
    """A value that is not too long.

    Raises:
        TooMuchError: if it is.
    """
    if isinstance(value, (str, bytes, list, tuple)):
        check_size(len(value))
    return value


def joined(parts: Iterable[str]) -> str:
    """Parts of a text as one, read until they are too long.

    Raises:
        TooMuchError: if they are.
    """
    found, size = [], 0
    for part in parts:
        size += len(part)
        check_size(size)
        found.append(part)
    return "".join(found)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no value gets too long."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One operation, unless its result would be too long."""
        check_time()
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            for one, other in ((left, right), (right, left)):
                if isinstance(one, Sized) and isinstance(other, int):
                    check_size(len(one) * other)
        elif operator == "**" and isinstance(right, int):
            check_size(right * MOST_CHARACTERS // MOST_EXPONENT)
            if isinstance(left, int):
                _check_bits(left.bit_length() * abs(right))
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """One call, unless its result would be too long."""
        check_time()
        given = (*args, *kwargs.values())
        # The sandbox has wrapped the methods that format.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(owner, (str, bytes)):
            if name in WIDENING:
                for value in given:
                    check_size(value)
            elif name in ("format", "format_map"):
                _check_format(str(owner), given)
            elif name == "replace":
                check_replace(owner, *args)
            elif name == "join" and args:
                args = (_join_checked(owner, args[0]), *args[1:])
        return checked(super().call(context, function, *args, **kwargs))

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        # `a ~ b` is no operation that a sandbox can look at; a filter is.
        for node in list(source.find_all(nodes.Concat)):
            parts = nodes.List(list(node.nodes), lineno=node.lineno)
            given = (parts, "concatenate", [], [], None, None)
            _put(source, node, nodes.Filter(*given, lineno=node.lineno))
        # Nor is a step of a loop.
        for loop in list(source.find_all(nodes.For)):
            given = (loop.iter, "counted", [], [], None, None)
            loop.iter = nodes.Filter(*given, lineno=loop.lineno)
        return super()._generate(source, *args, **kwargs)


def make_environment() -> LimitedEnvironment:
    """The environment that chat templates are written for."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    filters = environment.filters
    for name in ("center", "indent", "batch", "slice", "wordwrap", "round"):
        filters[name] = _with_checked_arguments(filters[name])
    plain_format = filters["format"]
    filters["format"] = lambda value, *args, **kwargs: (
        _check_format(str(value), (*args, *kwargs.values()))
        or plain_format(value, *args, **kwargs)
    )
    filters["replace"] = _replace
    filters["join"] = _join
    filters["concatenate"] = lambda parts: joined(str(part) for part in parts)
    filters["counted"] = counted
    # It writes text of any length, which no conversation asks for.
    environment.globals["lipsum"] = _no_lipsum
    return environment


def _put(tree: Any, old: Any, new: Any) -> None:
    """Puts a node in the place of another."""
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in parent.iter_fields():
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list):
                value[:] = [new if item is old else item for item in value]


def _check_format(template: str, values: Iterable[Any]) -> None:
    """Widths are numbers in the template, or among what is filled in."""
    digits = "".join(c if c.isdigit() else " " for c in template).split()
    for width in digits:
        check_size(int(width[:20]))
    if "*" in template or "{:{" in template or template.count("{") > 1:
        for value in values:
            check_size(value)


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TooMuchError


def check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    """Raises `TooMuchError` if a replacement would be too long."""
    check_size(len(text) + text.count(old) * len(new))


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    check_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join_checked(glue: Any, parts: Iterable[Any]) -> list[Any]:
    """The parts of a join that is not too long."""
    kept = list(parts)
    check_size(sum(len(part) + len(glue) for part in kept if isinstance(part, Sized)))
    return kept


def _join(parts: Iterable[Any], glue: str = "", attribute: str | None = None) -> str:
    found = parts if attribute is None else (part[attribute] for part in parts)
    texts = [str(part) for part in found]
    return str(glue).join(_join_checked(glue, texts))


def _with_checked_arguments(function: Any) -> Any:
    passed = getattr(function, "jinja_pass_arg", None)

    def limited(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            check_size(value)
        return function(*args, **kwargs)

    if passed is not None:
        limited.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return limited


def _no_lipsum(*_: Any, **__: Any) -> str:
    raise TooMuchError
