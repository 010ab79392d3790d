"""What is changed in KerasHub for the length of a call: data, and one applier.

A patch is `(owner, name, value)`: an instance, one of its attributes, and what stands
there for a while. Nothing else in this library changes a layer it did not make.
"""

import contextlib
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """One attribute in place of an instance's own or its class's.

    Attributes:
        owner: layer.
        name: str, the attribute.
        value: a method or setting, not a layer or variable.
    """

    owner: Any
    name: str
    value: Any


@contextlib.contextmanager
def patched(patches):
    """Context in which patches hold; afterwards every owner is as it was.

    Args:
        patches: iterable of `Patch`, or of tuples like it; of two for one attribute
            the later holds.
    """
    undo = []
    try:
        for owner, name, value in patches:
            undo.append((owner, name, vars(owner).get(name, _MISSING)))
            # Past the trackers of Keras and PyTorch, which would keep the value.
            object.__setattr__(owner, name, value)
        yield
    finally:
        for owner, name, own in reversed(undo):
            if own is not _MISSING:
                object.__setattr__(owner, name, own)
            elif name in vars(owner):
                object.__delattr__(owner, name)


_MISSING = object()
