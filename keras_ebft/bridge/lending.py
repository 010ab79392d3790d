"""Attributes lent to a layer for a while."""

import contextlib


@contextlib.contextmanager
def lent(owner, name, value):
    """Gives an instance an attribute in place of its own or its class's.

    Args:
        owner: layer.
        name: str.
        value: a method or setting, not a layer or variable.
    """
    # Past the trackers of Keras and PyTorch, which it is none of the business of.
    missing = object()
    own = vars(owner).get(name, missing)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, own)
