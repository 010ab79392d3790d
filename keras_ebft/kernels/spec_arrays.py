"""Numbers that implementations are tested and timed with."""

import numpy as np


def normal_arrays(shapes, seed):
    """Normally distributed numbers.

    Args:
        shapes: dict of tuples of ints by name.
        seed: int.

    Returns:
        dict of float32 NumPy arrays.
    """
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
