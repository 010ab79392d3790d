"""What is not finite is found, on every backend, in a compiled step and outside."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ebft.backend import updates


def compiled(function):
    """As in a step: by XLA on JAX, as a graph on TensorFlow, op by op on PyTorch."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    return function


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, -2.0], [3.0]], True),
        ([[1.0, np.nan], [3.0]], False),
        ([[1.0, 2.0], [np.inf]], False),
        # Sums that cancel, and sums that overflow where no number does.
        ([[np.inf, 2.0], [-np.inf]], False),
        ([[3e38, 3e38], [3e38]], True),
        ([[3e38, 3e38], [np.nan]], False),
        ([], True),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_finite_is_told_number_by_number(values, expected, dtype):
    if dtype == "float16":
        values = [[6e4 if v == 3e38 else v for v in part] for part in values]
    tensors = [ops.convert_to_tensor(part, dtype) for part in values]
    tensors.append(ops.convert_to_tensor([7], "int32"))
    assert bool(updates._all_finite(tensors)) is expected
    assert bool(compiled(updates._all_finite)(tensors)) is expected


@pytest.mark.numbers
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 700_000, 1_048_575])
def test_one_number_among_many_is_found(value, place):
    """However the largest of many is found, with vectors and in parts."""
    good = np.full((1024, 1024), 2.0, "float32")
    bad = good.copy()
    bad.flat[place] = value
    check = compiled(updates._all_finite)
    assert bool(check([ops.convert_to_tensor(good)] * 2))
    assert not bool(check([ops.convert_to_tensor(good), ops.convert_to_tensor(bad)]))
    assert not bool(check([ops.convert_to_tensor(bad), ops.convert_to_tensor(good)]))


@pytest.mark.numbers
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's schedule on JAX")
def test_looking_at_an_update_holds_no_tensor():
    """XLA shares tensors of zeros, and then holds them from one use to the other."""
    import jax

    rows, width = 2**14, 64
    optimizer = keras.optimizers.AdamW()
    optimizer.build([keras.Variable(ops.zeros((rows, width)))])
    apply = updates._stateless_apply_if_finite(optimizer, [])

    def step(weights, state, tokens, changes):
        gradient = ops.zeros((rows, width)).at[tokens].add(changes)
        return apply(state, [gradient], [weights])

    state = [variable.value for variable in optimizer.variables]
    weights, changes = ops.ones((rows, width)), ops.ones((8, width))
    arguments = weights, state, ops.arange(8), changes
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    # The gradient itself.
    assert temporary < 1.5 * weights.nbytes
