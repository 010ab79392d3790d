"""What several devices say to each other in a step, and what it would cost at scale.

    python benchmarks/scaling_devices.py --results scaling_devices

Three tables:

- JAX: the collectives of the compiled step, on 1, 2 and 4 virtual devices of one CPU
  under `DataParallel` and `ModelParallel`: how many and how many bytes each. One in a
  loop is counted once: the head's gradient is summed a tile of the head at a time. Its
  seconds are of devices that share the cores: they show what sharing costs, and no
  speed-up.
- PyTorch: what 2 processes (gloo) sent in a step, counted where it is sent.
- On paper: a step of a 1B and a 7B model on 8 to 512 accelerators, from counted
  operations and bytes (`keras_ebft.estimates`), with the assumptions beside it.
"""

import argparse
import collections
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
import step

SHAPE = {**step.DEFAULTS, "length": 128, "batch": 4, "layers": 4, "repeats": 3}
# `mesh` of batch and model axes.
MESHES = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "2 x 2": (2, 2), "1 x 4": (1, 4)}
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
BITS = {"pred": 8}

# An accelerator on paper: dense bfloat16 operations per second, bytes per second that
# a device sends to others of its node and to other nodes, and devices of a node, as
# published for H100 in nodes of eight with 400 Gbit/s per device.
ACCELERATOR = {"operations": 989e12, "inside": 450e9, "outside": 50e9, "node": 8}
# Of the rate; what one device reaches must be measured, this is an assumption.
UTILIZATION = 0.4
PAPER = {"length": 1024, "rows_per_device": 16}


def collectives(program):
    """Counts the collectives of a compiled program.

    Args:
        program: string, XLA's text of the optimized module.

    Returns:
        dict `{name: [count, bytes]}`; bytes are those of the result on one device.
    """
    found = collections.defaultdict(lambda: [0, 0])
    pattern = rf"= (\(?[^=]*?\)?) ({'|'.join(COLLECTIVES)})(-start)?\("
    # Long results are numbered in comments.
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        match = re.search(pattern, line)
        if match:
            result, name, starts = match.groups()
            arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
            if starts:
                # An operation in two parts has its operands in its result, too.
                arrays = arrays[len(arrays) // 2 :]
            found[name][0] += 1
            found[name][1] += sum(_bytes(*array) for array in arrays)
    return dict(found)


def _bytes(dtype, dimensions):
    sizes = [int(size) for size in dimensions.split(",") if size]
    bits = BITS.get(dtype) or int(re.search(r"\d+$", dtype).group())
    return math.prod(sizes) * bits // 8


def largest_program(folder):
    """The text of the largest program that XLA wrote: the training step."""
    files = Path(folder).glob("*after_optimizations.txt")
    return max(files, key=lambda path: path.stat().st_size).read_text()


def distribute(mesh, shape):
    """Sets the distribution that a mesh means."""
    import keras
    import keras_hub

    import keras_ebft

    parallel = keras.distribution
    rows, parts = mesh
    devices = parallel.list_devices()[: rows * parts]
    if rows * parts == 1:
        return
    if parts == 1:
        parallel.set_distribution(parallel.DataParallel(devices=devices))
        return
    device_mesh = parallel.DeviceMesh(mesh, ("batch", "model"), devices)
    config = {**harness.LLAMA, **step.model_config(shape)}
    layout = keras_ebft.distribution.layout_map(
        lambda: keras_hub.models.LlamaBackbone(**config), device_mesh
    )
    distribution = parallel.ModelParallel(layout_map=layout, batch_dim_name="batch")
    parallel.set_distribution(distribution)


def one_step(shape):
    """A function that makes one step of a model, or several in one `fit`."""
    model = harness.make_model(shape, **step.model_config(shape))
    tokens = harness.random_tokens(shape, shape["vocabulary"])

    def run(steps=1):
        rows = np.tile(tokens, (steps, 1))
        model.fit(rows, batch_size=len(tokens), verbose=0)

    return run


def measure_jax(mesh, shape):
    """One mesh, in this process."""
    distribute(mesh, shape)
    return {"seconds": harness.measure(one_step(shape), shape["repeats"])["seconds"]}


def run_jax(name, shape):
    """One mesh, in a process of its own that writes its programs down."""
    rows, parts = MESHES[name]
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_force_host_platform_device_count={rows * parts} "
            f"--xla_dump_to={folder} --xla_dump_hlo_as_text "
            "--xla_dump_hlo_module_re=.*train_step.*|.*one_step.*"
        )
        environment = {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
        options = [str(part) for k, v in shape.items() for part in (f"--{k}", v)]
        found = harness.run_alone([__file__, "--only", name, *options], environment)
        found["collectives"] = collectives(largest_program(folder))
    return found


class Counted:
    """Counts calls and bytes of `torch.distributed`, by name."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")

    def __init__(self):
        import torch.distributed

        self.found = collections.defaultdict(lambda: [0, 0])
        for name in self.NAMES:
            real = getattr(torch.distributed, name)
            setattr(torch.distributed, name, self._counting(name, real))

    def _counting(self, name, real):
        def call(*arguments, **options):
            import torch

            # What is summed or sent, or where the others' parts are put.
            tensors = arguments[0]
            tensors = [tensors] if torch.is_tensor(tensors) else tensors
            self.found[name][0] += 1
            self.found[name][1] += sum(t.numel() * t.element_size() for t in tensors)
            return real(*arguments, **options)

        return call


def measure_torch(rank, count, port, shape):
    """One process of PyTorch: what a step sends after the first."""
    import torch.distributed

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    torch.set_num_threads(1)
    run = one_step(shape)
    seconds = harness.measure(run, shape["repeats"])["seconds"]
    counted = Counted()
    run(1)
    # What is sent once for all steps of a `fit` is no part of a step.
    first = {name: list(sent) for name, sent in counted.found.items()}
    counted.found.clear()
    run(2)
    torch.distributed.destroy_process_group()
    found = {
        name: [both - one for both, one in zip(sent, first[name])]
        for name, sent in counted.found.items()
    }
    return {
        "seconds": seconds,
        "collectives": {name: sent for name, sent in found.items() if sent[0]},
    }


def run_torch(count, shape):
    """Processes of PyTorch at once; what the first found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [str(part) for k, v in shape.items() for part in (f"--{k}", v)]
    command = [sys.executable, __file__, *options, "--process"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(port)],
            env={**os.environ, "KERAS_BACKEND": "torch"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("A process of PyTorch failed; see above.")
    return json.loads(outputs[0].splitlines()[-1])


def paper_step(shape, devices, parts=1):
    """Seconds of a step on paper: `(compute, communication)`.

    `DataParallel` sums gradients in a ring: each device sends 2 (N - 1) / N of their
    bytes, through the slower link where there is more than one node. `parts` cuts
    weights and activations along a model axis within a node: two sums of activations
    for every pass of a token through a layer's weights, a backward pass as two, which
    is one sum more than it needs.
    """
    import keras_ebft

    work = keras_ebft.estimates.work(
        shape, PAPER["length"], PAPER["rows_per_device"] * parts
    )
    compute = work.seconds(ACCELERATOR["operations"] * parts, UTILIZATION)
    replicas = devices // parts
    gradients = 4 * shape.parameters / parts
    link = "inside" if devices <= ACCELERATOR["node"] else "outside"
    sent = 2 * (replicas - 1) / replicas * gradients / ACCELERATOR[link]
    if parts > 1:
        passes = work.total / (2 * shape.num_layers * shape.projections)
        activations = 2 * shape.num_layers * passes * shape.hidden_dim * 2
        sent += 2 * (parts - 1) / parts * activations / ACCELERATOR["inside"]
    return compute, sent


def paper_rows():
    """Lines of the table on paper."""
    from keras_ebft.estimates import SHAPES

    for name, parts in (("1B", 1), ("7B", 1), ("7B", 8)):
        for devices in (8, 16, 64, 256, 512):
            compute, sent = paper_step(SHAPES[name], devices, parts)
            rows = PAPER["rows_per_device"] * devices
            yield (
                f"{name}, {'whole' if parts == 1 else f'{parts} parts'}",
                devices,
                rows,
                f"{compute:.2f}",
                f"{sent:.2f}",
                f"{rows * PAPER['length'] / (compute + sent) / 1e6:.2f}",
                f"{compute / (compute + sent):.0%}",
            )


def described(found):
    """`name: count, MiB` of what was sent."""
    parts = [
        f"{count} {name}, {size / harness.MIB:.2f} MiB"
        for name, (count, size) in sorted(found.items())
    ]
    return "; ".join(parts) or "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--only", choices=MESHES, help=argparse.SUPPRESS)
    parser.add_argument("--process", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", help="write results/<name>.json and .md")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in SHAPE}
    if arguments.only:
        print(json.dumps(measure_jax(MESHES[arguments.only], shape)))
        return
    if arguments.process:
        print(json.dumps(measure_torch(*arguments.process, shape)))
        return
    found = {"jax": {name: run_jax(name, shape) for name in MESHES}}
    found["torch"] = {str(count): run_torch(count, shape) for count in (1, 2)}
    lines = [
        (engine, name, f"{one['seconds']:.2f}", described(one["collectives"]))
        for engine, runs in found.items()
        for name, one in runs.items()
    ]
    columns = ("engine", "batch x model axis", "a step, s", "collectives of a step")
    paper = harness.table(
        ("model", "devices", "rows", "compute, s", "sent, s", "10^6 tokens/s", "kept"),
        list(paper_rows()),
    )
    text = f"{harness.table(columns, lines)}\n\n{assumptions()}\n\n{paper}"
    if not arguments.results:
        print(text)
        return
    given = [f"--{k} {v}" for k, v in shape.items() if v != SHAPE[k]]
    command = " ".join(["python benchmarks/scaling_devices.py", *given])
    harness.write_results(
        arguments.results, command, text, {"shape": shape, "found": found}
    )


def assumptions():
    """What the table on paper takes for granted, a sentence."""
    return (
        f"On paper: {PAPER['rows_per_device']} rows of {PAPER['length']} tokens per "
        "device, the paper's blocks for code, all weights trained, "
        f"{ACCELERATOR['operations'] / 1e12:.0f} "
        f"TFLOP/s in bfloat16 of which {UTILIZATION:.0%} are reached, "
        f"{ACCELERATOR['inside'] / 1e9:.0f} GB/s within a node of "
        f"{ACCELERATOR['node']} and {ACCELERATOR['outside'] / 1e9:.0f} GB/s per "
        "device between nodes, gradients in float32, nothing sent while anything is "
        "computed. `kept` is compute's share of the time. Whether it fits is another "
        "table's question (docs/distribution.md): 7B, all weights, needs parts."
    )


if __name__ == "__main__":
    main()
