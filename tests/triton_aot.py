"""Compiles Triton kernels for GPUs that are not there and says what they take."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# Triton 3.9 warns unless it is said; 1 is its default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, in bytes.
SHARED_LIMIT = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}
# Integers that are multiples of 16 in all calls that matter: Triton compiles for it.
DIVISIBLE = ("width", "row_stride", "head_row_stride")
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}


class Compiled(NamedTuple):
    """What a compiled kernel takes per program and thread."""

    shared: int
    registers: int
    spills: int
    matrix_instructions: int


def compile_kernel(kernel, pointers, floats, constants, options, capability):
    """Compiles a kernel.

    Args:
        kernel: `@triton.jit` function.
        pointers: dict of argument -> dtype name; taken to be aligned.
        floats: names of float arguments; all others are int32.
        constants: dict of constant -> value.
        options: dict, `num_warps` and `num_stages`.
        capability: `(major, minor)`.

    Returns:
        `Compiled`.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = POINTERS[pointers[name]]
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in floats else "i32"
            if name in DIVISIBLE:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    compiled = triton.compile(source, target=target, options=options)
    return Compiled(
        compiled.metadata.shared,
        *_resources(compiled.asm["ptx"]),
        len(
            re.findall(r"(?:wgmma|tcgen05|mma)\S*\.mma|mma\.sync", compiled.asm["ptx"])
        ),
    )


def _resources(ptx):
    """`(registers, spilled bytes)` as the assembler reports them."""
    bin_folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    architecture = re.search(r"^\.target (\S+?),?$", ptx, re.M).group(1)
    # As Triton chooses them.
    name = "ptxas" if architecture.startswith("sm_8") else "ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        process = subprocess.run(
            [
                bin_folder / name,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name={architecture}",
                path,
                "-o",
                Path(folder) / "kernel.cubin",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = int(re.search(r"Used (\d+) registers", process.stderr).group(1))
    spills = re.search(r"(\d+) bytes spill stores", process.stderr).group(1)
    return registers, int(spills)
