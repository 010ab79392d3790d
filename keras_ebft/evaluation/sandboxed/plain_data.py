"""Plain Python values as JSON, for two processes that do not trust each other.

What arrives consists of Python's own types only, so that no comparison on the
receiving side can be influenced by code of the sender.
"""

import itertools

SMALL = 2**63


def _write_int(value):
    # Python limits the digits of decimal numbers, not of hexadecimal ones.
    return int(value) if -SMALL < value < SMALL else ["int", hex(value)]


SCALARS = {
    type(None): lambda value: None,
    bool: bool,
    str: str,
    float: float,
    int: _write_int,
    complex: lambda value: ["complex", [value.real, value.imag]],
    (bytes, bytearray): lambda value: ["bytes", bytes(value).hex()],
}
PARTLESS = {
    "int": lambda content: int(content, 16),
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
}
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MADE_OF_PARTS = {**CONTAINERS, "iterator": iter, "slice": lambda ends: slice(*ends)}
LONGEST_ITERATOR = 100_000


class NotPlainError(TypeError):
    """A value that is not made of Python's own types."""


def encode(value, refer=None):
    """A value as what `json` can write.

    Args:
        value: `None`, numbers, strings, bytes, and lists, tuples, sets, dicts and
            slices of such. Subclasses count as what they are derived from.
        refer: function from any other value to what is written in its place.

    Raises:
        NotPlainError: for another value without `refer`.
    """
    for kind, write in SCALARS.items():
        if isinstance(value, kind):
            return write(value)
    if isinstance(value, dict):
        items = [[encode(k, refer), encode(v, refer)] for k, v in value.items()]
        return ["dict", items]
    if isinstance(value, slice):
        ends = (value.start, value.stop, value.step)
        return ["slice", [encode(part, refer) for part in ends]]
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [encode(part, refer) for part in value]]
    if refer is None:
        raise NotPlainError(
            f"{type(value).__name__} cannot pass between tests and generated code: "
            "only numbers, strings, bytes, lists, tuples, sets and dicts can"
        )
    return refer(value)


def encode_iterator(iterator):
    """All that an iterator yields; it arrives as an iterator again.

    Raises:
        NotPlainError: if it yields too much, or what is not plain.
    """
    values = list(itertools.islice(iterator, LONGEST_ITERATOR + 1))
    if len(values) > LONGEST_ITERATOR:
        raise NotPlainError(f"an iterator of more than {LONGEST_ITERATOR} values")
    return ["iterator", [encode(value) for value in values]]


def decode(data, dereference):
    """The value that `encode` was given.

    Args:
        data: what `json` has read.
        dereference: function from a number to what it stands for.

    Raises:
        ValueError: for anything `encode` does not write.
    """
    if not isinstance(data, list):
        return data
    name, content = data
    if name == "reference":
        return dereference(content)
    if name in PARTLESS:
        return PARTLESS[name](content)
    if name == "dict":
        return {decode(k, dereference): decode(v, dereference) for k, v in content}
    parts = [decode(part, dereference) for part in content]
    if name not in MADE_OF_PARTS:
        raise ValueError(f"not an encoded value: {name!r:.80}")
    return MADE_OF_PARTS[name](parts)
