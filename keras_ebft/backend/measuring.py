"""Functions of tensors seen from outside: outputs, gradients, time, and poison."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# Sizes of the pieces of poison, as powers of 2: freed, they are what allocators hand
# out next, whatever size is asked for.
POISON_SIZES = range(6, 22)


def with_gradients(
    function: Callable[..., Any], weigh: Callable[[Any], Any]
) -> Callable[..., tuple[Any, Any]]:
    """A function, and the gradients of its outputs' weighted sum.

    Args:
        function: function of float tensors that returns a tuple of tensors.
        weigh: function of the outputs, returns what each is weighted with.

    Returns:
        A function of the same tensors that returns `(outputs, gradients)`, tuples;
        compiled on JAX and, where there is an accelerator, on TensorFlow.
    """
    return _WITH_GRADIENTS[backend_name()](function, weigh)


def _jax_with_gradients(function: Any, weigh: Any) -> Callable[..., Any]:
    import jax

    def run(*tensors: Tensor) -> Any:
        outputs, pull = jax.vjp(function, *tensors)
        return outputs, pull(weigh(outputs))

    return jax.jit(run)


def _torch_with_gradients(function: Any, weigh: Any) -> Callable[..., Any]:
    import torch

    def run(*tensors: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            outputs = function(*leaves)
            found = torch.autograd.grad(outputs, leaves, weigh(outputs))
        return tuple(output.detach() for output in outputs), found

    return run


def _tensorflow_with_gradients(function: Any, weigh: Any) -> Callable[..., Any]:
    import tensorflow as tf

    def run(*tensors: Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = function(*tensors)
        return outputs, tuple(tape.gradient(outputs, tensors, weigh(outputs)))

    return run


_WITH_GRADIENTS = {
    "jax": _jax_with_gradients,
    "torch": _torch_with_gradients,
    "tensorflow": _tensorflow_with_gradients,
}


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it runs where nothing is differentiated; compiled on JAX."""
    if backend_name() == "jax":
        import jax

        return jax.jit(function)
    if backend_name() == "torch":
        import torch

        return torch.no_grad()(function)
    return function


def wait(structure: Any) -> None:
    """Returns when the tensors of a structure are computed."""
    if backend_name() == "jax":
        import jax

        jax.block_until_ready(structure)
        return
    leaves = keras.tree.flatten(structure)
    if backend_name() == "torch":
        import torch

        if any(leaf.is_cuda for leaf in leaves):
            torch.cuda.synchronize()
        return
    for leaf in leaves:
        # A number that depends on all of it.
        keras.ops.convert_to_numpy(keras.ops.sum(leaf))


def milliseconds(
    functions: dict[str, Callable[[], Any]], rounds: int = 5, target: float = 0.05
) -> dict[str, float]:
    """Times of functions, taken in turns so that all see the same machine.

    Args:
        functions: dict from names to functions without arguments that return
            tensors.
        rounds: int, how often each has its turn.
        target: float, seconds that a turn takes at least, unless one call does.

    Returns:
        dict from names to the median over rounds of the mean time of a call.
    """
    calls = {}
    for name, function in functions.items():
        wait(function())
        calls[name] = max(1, min(50, int(target / max(_seconds(function, 1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name]))
    return {name: 1e3 * sorted(found)[rounds // 2] for name, found in times.items()}


def _seconds(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        found = function()
    wait(found)
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which memory that nothing was written to holds not-a-number.

    On PyTorch what `torch.empty` returns is filled (-1 for integers). Everywhere,
    memory is filled and given back, for what is allocated next to be made of it.
    """
    pieces = [keras.ops.full((2**size,), float("nan")) for size in POISON_SIZES]
    wait(pieces)
    del pieces
    if backend_name() != "torch":
        yield
        return
    import torch

    real = torch.empty

    def empty(*shape: Any, **options: Any) -> Any:
        tensor = real(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real


def product_precision() -> str | bool | None:
    """How precise products of float32 are, as the backend has it set."""
    if backend_name() == "jax":
        import jax

        return jax.config.jax_default_matmul_precision
    if backend_name() == "torch":
        import torch

        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            # Set for one kind of device alone, as `set_float32_matmul_precision` never
            # does: the words are other ones then.
            return torch.backends.cuda.matmul.fp32_precision
    import tensorflow as tf

    return tf.config.experimental.tensor_float_32_execution_enabled()


def set_product_precision(precision: str | bool | None) -> None:
    """Sets what `product_precision` returned."""
    if backend_name() == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", precision)
    elif backend_name() == "torch":
        import torch

        if precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
        else:
            torch.backends.cuda.matmul.fp32_precision = precision
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(precision)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Context in which products of float32 are as precise as the backend can."""
    before = product_precision()
    set_product_precision(False if backend_name() == "tensorflow" else "highest")
    try:
        yield
    finally:
        set_product_precision(before)
