"""Functions of tensors as a list of PyTorch's operations, played again without Python.

Op by op, PyTorch spends more time in the layers and operations of Keras than on the
numbers of a few tokens. What a function does to tensors of some shapes is the same
every time, if nothing in it asks for their values.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# Of constants, which are computed when they are recorded.
BEFORE_ANY = -1


class NotRecordableError(Exception):
    """Raised for a function whose operations do not follow from shapes alone."""


def runs_op_by_op() -> bool:
    """Whether operations run one by one, and none is kept for a gradient."""
    if backend_name() != "torch":
        return False
    import torch

    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled()
        or torch.compiler.is_compiling()
    )


class Recording(NamedTuple):
    """A function cut in stages, by what arrives when.

    Attributes:
        stages: list with one function for each list of arguments.
        constants: dict of what follows from no argument.
        result_stages: list with the stage after which each result is there.
    """

    stages: list[Any]
    constants: dict[Any, Tensor]
    result_stages: list[int]

    def play(
        self, stage: int, arguments: Sequence[Tensor], known: dict[Any, Tensor]
    ) -> tuple[list[Tensor], dict[Any, Tensor]]:
        """Runs one stage.

        Args:
            stage: int.
            arguments: list of tensors, those of the stage.
            known: dict, what the stages before it left.

        Returns:
            `(results, left)`: those results that are there now, and what later stages
            need of this one.
        """
        return self.stages[stage](arguments, {**self.constants, **known})


def record(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Sequence[Tensor]]
) -> Recording:
    """Records a function, in stages.

    Args:
        function: function of all tensors, one after another, to a list of tensors.
        arguments: one list of tensors for each stage.

    Returns:
        `Recording`.

    Raises:
        NotRecordableError: if an operation writes to a tensor, draws numbers, or has a
            result whose shape its values decide; if a value is asked for, or a weight
            read that is no argument.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        module = make_fx(function)(*(t for own in arguments for t in own))
    except RuntimeError as error:
        raise NotRecordableError(str(error)) from error
    graph = module.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        _check(node, module)
    stage_of = _stages_of(graph, arguments)
    results = graph.output_node().args[0]
    cut = functools.partial(_Stage, module, stage_of, results)
    constants = cut(BEFORE_ANY)([], {})[1]
    return Recording(
        [cut(stage) for stage in range(len(arguments))],
        constants,
        [stage_of[node] for node in results],
    )


def _check(node: Any, module: Any) -> None:
    import torch

    if node.op == "get_attr":
        if isinstance(getattr(module, node.target), torch.nn.Parameter):
            raise NotRecordableError("it reads a weight that is no argument")
    elif isinstance(node.target, torch._ops.OpOverload):
        unsteady = {
            torch.Tag.nondeterministic_seeded,
            torch.Tag.dynamic_output_shape,
            torch.Tag.data_dependent_output,
        }
        if node.target._schema.is_mutable or unsteady & set(node.target.tags):
            raise NotRecordableError(f"{node.target} is part of it")
    elif node.op == "call_function" and node.target is not operator.getitem:
        raise NotRecordableError(f"{node.target} is part of it")


def _stages_of(graph: Any, arguments: Sequence[Sequence[Tensor]]) -> dict[Any, int]:
    """The first stage at which all that a node reads is there."""
    arrivals = (stage for stage, own in enumerate(arguments) for _ in own)
    found: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = next(arrivals)
        else:
            read = (found[one] for one in node.all_input_nodes)
            found[node] = max(read, default=BEFORE_ANY)
    return found


class _Stage:
    """The operations of one stage as a function of their own."""

    def __init__(
        self, module: Any, stage_of: dict[Any, int], results: list[Any], stage: int
    ) -> None:
        from torch import fx

        nodes = [n for n in stage_of if stage_of[n] == stage and n.op != "output"]
        self.known = _read_from_before(nodes)
        self.left = _read_later(nodes, stage_of, stage)
        self.results = [node for node in results if stage_of[node] == stage]
        cut, copies = fx.Graph(), {}
        for node in [*(n for n in nodes if n.op == "placeholder"), *self.known]:
            copies[node] = cut.placeholder(node.name)
        for node in nodes:
            if node not in copies:
                copies[node] = cut.node_copy(node, copies.__getitem__)
        cut.output([copies[node] for node in [*self.results, *self.left]])
        self.run = fx.GraphModule(module, cut).forward

    def __call__(
        self, arguments: Sequence[Tensor], known: dict[Any, Tensor]
    ) -> tuple[list[Tensor], dict[Any, Tensor]]:
        found = self.run(*arguments, *(known[node] for node in self.known))
        count = len(self.results)
        return found[:count], dict(zip(self.left, found[count:]))


def _read_from_before(nodes: list[Any]) -> list[Any]:
    own = set(nodes)
    read = dict.fromkeys(one for node in nodes for one in node.all_input_nodes)
    return [node for node in read if node not in own]


def _read_later(nodes: list[Any], stage_of: dict[Any, int], stage: int) -> list[Any]:
    return [
        node
        for node in nodes
        if any(stage_of[user] > stage and user.op != "output" for user in node.users)
    ]
