"""The one place that branches on the Keras backend."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ebft.typing import Tensor

# Read by networks of about twelve layers, from which on TensorFlow traces one layer and
# not all of them.
MANY_VARIABLES = 100


def backend_name() -> str:
    """Name of the running Keras backend."""
    return keras.backend.backend()


def multiplies_mixed_dtypes() -> bool:
    """Whether products of tensors of unlike dtypes run; PyTorch refuses them."""
    return keras.backend.backend() != "torch"


def power(x: Any, exponent: Any) -> Tensor:
    """`keras.ops.power`; on PyTorch a number that is the exponent stays one.

    Keras makes a tensor of it, and PyTorch then takes logarithms: a square takes forty
    times as long on a CPU, and on a GPU waits for a copy from the host.
    """
    if keras.backend.backend() == "torch" and isinstance(exponent, int | float):
        import torch

        if isinstance(x, torch.Tensor):
            return torch.pow(x, exponent)
    return keras.ops.power(x, exponent)


def no_gradient() -> contextlib.AbstractContextManager[Any]:
    """Context in which no gradient is recorded.

    JAX and TensorFlow drop what `stop_gradient` cuts off; PyTorch builds the
    autograd graph regardless, and with it keeps every activation of sampling.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def dense(gradient: Any) -> Tensor:
    """A gradient with all of its rows.

    TensorFlow's of an embedding has those that were read, each as often as it was.
    """
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def after(*tensors: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which operations wait for tensors, though they do not read them.

    TensorFlow's graph begins with all that depends on variables alone; elsewhere
    operations run in the order of the program or as XLA decides.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies(tensors)


def without_values(make: Callable[[], Any]) -> Any:
    """Calls a function that makes layers, whose variables get shapes and no memory.

    Args:
        make: function without arguments.

    Returns:
        What it returned: to be asked for shapes, not to be called.
    """
    if keras.backend.backend() == "torch":
        with keras.device("meta"):
            return make()
    found: list[Any] = []

    def trace() -> int:
        with keras.StatelessScope():
            found.append(make())
        return 0

    if keras.backend.backend() == "jax":
        import jax

        jax.eval_shape(trace)
    else:
        import tensorflow as tf

        with tf.Graph().as_default():
            trace()
    return found[0]


def resolve_jit_compile(
    jit_compile: bool | str, runs_python: bool = False, processes: int = 1
) -> bool | str:
    """What `jit_compile="auto"` means here: XLA on JAX and TensorFlow's accelerators.

    On a CPU, TensorFlow's own graph runs a step about as fast as XLA's program, is
    ready in half the time and takes less memory (docs/benchmarks.md).

    Args:
        jit_compile: bool or `"auto"`.
        runs_python: bool, whether the step calls Python (`call_python`), which
            XLA allows on JAX only.
        processes: int, how many train together; on TensorFlow XLA cannot compile
            what they say to each other.

    Raises:
        ValueError: where a compiled step cannot do what it has to.
    """
    backend = keras.backend.backend()
    if jit_compile == "auto":
        on_accelerator = backend == "tensorflow" and _tensorflow_has_accelerator()
        return backend == "jax" or (
            on_accelerator and not runs_python and processes == 1
        )
    if jit_compile and backend == "torch":
        raise ValueError(
            "Expected steps that run op by op on PyTorch: `torch.compile` does not get "
            'through one (docs/benchmarks.md). Received: jit_compile=True. Use "auto" '
            "or False, or another backend."
        )
    if jit_compile and runs_python and backend == "tensorflow":
        raise ValueError(
            "Expected no XLA compilation on TensorFlow with a reward that runs "
            "Python code, which XLA cannot call. Received: jit_compile=True. Use "
            'jit_compile="auto" or False.'
        )
    if jit_compile and processes > 1 and backend == "tensorflow":
        raise ValueError(
            "Expected no XLA compilation in several processes of TensorFlow, which "
            "XLA cannot send from one to another. Received: jit_compile=True. Use "
            'jit_compile="auto" or False.'
        )
    return jit_compile


def _tensorflow_has_accelerator() -> bool:
    import tensorflow as tf

    return any(d.device_type != "CPU" for d in tf.config.list_physical_devices())


def compiled(
    function: Callable[..., Any], variables: Callable[[], list[keras.Variable]]
) -> Callable[..., Any]:
    """Compiles a function of tensors that reads Keras variables, where it pays.

    Op by op, JAX compiles every loop anew in each call. TensorFlow runs a deep network
    several times slower than as a graph, and a small one well enough that tracing for
    a few calls costs more; PyTorch gains nothing.

    Args:
        function: function of tensors; must not assign variables.
        variables: function without arguments that returns the variables read.

    Returns:
        A function of the same tensors, differentiable as before.
    """
    if keras.backend.backend() == "tensorflow":
        return _Graphs(function, variables)
    if keras.backend.backend() != "jax":
        return function
    import jax

    @jax.jit
    def stateless(values: list[Tensor], *tensors: Tensor) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables(), values))):
            return function(*tensors)

    def call(*tensors: Tensor) -> Any:
        return stateless([variable.value for variable in variables()], *tensors)

    return call


class _Graphs:
    """A function as a graph of TensorFlow, if the variables it reads are many."""

    def __init__(
        self, function: Callable[..., Any], variables: Callable[[], list[Any]]
    ) -> None:
        self.function = function
        self.variables = variables
        self.read: list[Any] = []
        self.graph: Callable[..., Any] = function

    def __call__(self, *tensors: Tensor) -> Any:
        import tensorflow as tf

        read = self.variables()
        if len(read) < MANY_VARIABLES or not tf.executing_eagerly():
            return self.function(*tensors)
        # Adapters may have come, which a graph that is known has not read.
        if list(map(id, read)) != list(map(id, self.read)):
            self.graph = tf.function(self.function, autograph=False)
            self.read = read
        return raising_collected(self.graph, *tensors)


def call_python(
    function: Callable[..., np.ndarray], shape: tuple[int, ...], *tensors: Tensor
) -> Tensor:
    """Calls a Python function of arrays from within a step, compiled or not.

    Args:
        function: takes NumPy arrays, returns a float32 array of `shape`; may have
            effects of its own, and is called once per step.
        shape: tuple of ints.
        *tensors: its arguments; no gradient flows through.

    Returns:
        float32 tensor of `shape`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax
        from jax.experimental import io_callback

        result = jax.ShapeDtypeStruct(shape, "float32")
        return io_callback(functools.partial(_call, function, shape), result, *tensors)
    if backend == "tensorflow":
        import tensorflow as tf

        call = functools.partial(_call, function, shape)
        result = tf.numpy_function(call, tensors, tf.float32)
        return tf.ensure_shape(result, shape)
    arrays = [keras.ops.convert_to_numpy(tensor) for tensor in tensors]
    return keras.ops.convert_to_tensor(function(*arrays))


# While `collected_errors` is open: what Python code within a step raised.
_collected: list[list[BaseException]] = []


@contextlib.contextmanager
def collected_errors() -> Iterator[list[BaseException]]:
    """Context in which Python code that a compiled step calls does not end the step.

    A step that ends by an exception has lost the memory of the weights that it was
    handed over (JAX), or has done a part of its update (TensorFlow). With NaN for what
    the code would have returned it comes to its end, and its update is one that is not
    finite.

    Yields:
        list, what was raised.
    """
    errors: list[BaseException] = []
    _collected.append(errors)
    try:
        yield errors
    finally:
        # By identity: equal lists may be collecting too.
        _collected[:] = [other for other in _collected if other is not errors]


def raising_collected(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a compiled function; what Python code within it raised comes at its end.

    Args:
        function: any function.
        *arguments: its arguments.

    Returns:
        What it returned.

    Raises:
        BaseException: what Python code that it calls raised first, as it was raised.
    """
    returned = None
    with collected_errors() as errors:
        try:
            returned = function(*arguments)
        except BaseException:
            # Data that failed are data that end.
            if not errors:
                raise
    if errors:
        raise errors[0]
    return returned


def python_failed(known: Tensor) -> Tensor:
    """Whether Python code raised that this call of a compiled function has called.

    Args:
        known: tensor; what it is computed from has been asked when this is found.

    Returns:
        bool scalar tensor; false on backends whose steps end by an exception.
    """
    if keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_tensor(False)
    import tensorflow as tf

    failed = tf.numpy_function(lambda _: np.bool_(_has_failed()), (known,), tf.bool)
    return tf.ensure_shape(failed, ())


def _has_failed() -> bool:
    return bool(_collected and _collected[-1])


def _call(
    function: Callable[..., np.ndarray], shape: tuple[int, ...], *arrays: Any
) -> np.ndarray:
    try:
        # Steps of one call that follow a failure have no update, as it has none.
        if not _has_failed():
            return function(*(np.asarray(array) for array in arrays))
    except BaseException as error:
        collect(error)
    return np.full(shape, np.nan, "float32")


def collect(error: BaseException) -> None:
    """Keeps what Python code within a step raised for the end of the step.

    Args:
        error: what was raised; raised again where no `collected_errors` is open.
    """
    if not _collected:
        raise error
    _collected[-1].append(error)


def run_in_state(
    model: keras.Model, state: list[Any], function: Callable[[], Any]
) -> tuple[Any, list[Any]]:
    """Runs a function that may assign non-trainable variables of a model.

    Args:
        model: `keras.Model`.
        state: what a train step gets before its batch: on JAX a list with the
            values of all variables, elsewhere empty.
        function: function without arguments.

    Returns:
        `(value, state)`: what the function returned and the new state.
    """
    if not state:
        return function(), state
    (trainable, non_trainable, *others) = state[0]
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    mapping = list(zip(variables, [*trainable, *non_trainable]))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        value = function()
    updated = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return value, [(trainable, updated, *others)]
