"""KerasHub's layers with `power` of `backend.runtime` in place of `keras.ops.power`."""

import functools
import types

from keras import ops

from keras_ebft.backend.runtime import power
from keras_ebft.networks.patches import Patch


def powers_by_numbers(whole):
    """Patches with which a layer and those in it keep exponents numbers.

    Normalisations by root mean squares gain by it, which take squares of all tokens.

    Args:
        whole: layer or model.

    Returns:
        list of `Patch`.
    """
    patches = []
    for layer in whole._flatten_layers():
        call = type(layer).call
        if _takes_powers(call):
            patches.append(
                Patch(layer, "call", types.MethodType(_by_numbers(call), layer))
            )
    return patches


class _Ops:
    """`keras.ops` with another `power`."""

    power = staticmethod(power)

    def __getattr__(self, name):
        return getattr(ops, name)


def _takes_powers(call):
    return (
        isinstance(call, types.FunctionType)
        and "power" in call.__code__.co_names
        and call.__globals__.get("ops") is ops
    )


@functools.cache
def _by_numbers(call):
    """The same function, reading `ops` from elsewhere."""
    found = types.FunctionType(
        call.__code__,
        {**call.__globals__, "ops": _Ops()},
        call.__name__,
        call.__defaults__,
        call.__closure__,
    )
    found.__kwdefaults__ = call.__kwdefaults__
    return found
