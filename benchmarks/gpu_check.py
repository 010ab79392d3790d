"""All that is to be known of the kernels on a GPU, in calls of under ten minutes.

    python benchmarks/gpu_check.py --reference <checkout>   # all, one after the other
    python benchmarks/gpu_check.py --parts torch_trials jax_trials
    python benchmarks/gpu_check.py --dry-run                # what it would do, anywhere

For PyTorch and JAX: trials as users have them (`python -m keras_ebft.kernels`), every
spec of every kernel under its contract on the device, the benchmarks `kernels.py` and
`kernels_jax.py` with FlexAttention, Liger and cuDNN beside them where installed, and
whole steps (`gpu_step.py`) with and without unproven kernels, beside the authors' code
from a checkout of theirs. Each part has a process and a time limit of its own: what
fails or is late says so, and the rest goes on.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LIMIT = 570.0
PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "torch", "triton", "liger-kernel")


def parts(reference=None):
    """`(name, backend, command, seconds)` of each part, in order.

    `OUTPUT` in a command is where it writes JSON.

    Args:
        reference: path of a checkout of the authors' code, or `None`.
    """
    python, own = sys.executable, str(Path(__file__).resolve())
    scripts = {"torch": "kernels.py", "jax": "kernels_jax.py"}
    for backend in scripts:
        yield (
            f"{backend}_contracts",
            backend,
            [python, own, "--contracts", "OUTPUT"],
            180,
        )
    for backend in scripts:
        command = [python, "-m", "keras_ebft.kernels"]
        yield f"{backend}_trials", backend, command, 120
    for backend, script in scripts.items():
        command = [python, str(HERE / script), "OUTPUT", "--seconds", "130"]
        yield f"{backend}_benchmark", backend, command, 150
    step = [python, str(HERE / "gpu_step.py"), "OUTPUT", "--shape"]
    for shape in ("1b", "smollm2"):
        for backend in scripts:
            yield f"{backend}_step_{shape}", backend, [*step, shape], 120
            plain = [*step, shape, "--kernels", "off"]
            yield f"{backend}_plain_step_{shape}", backend, plain, 120
        if reference is not None:
            theirs = [*step, shape, "--reference", str(reference)]
            yield f"reference_step_{shape}", "torch", theirs, 120


def run_part(backend, command, seconds, folder):
    """Runs one part; returns what it wrote, its last words and its exit code."""
    output = folder / "output.json"
    output.unlink(missing_ok=True)
    command = [str(output) if word == "OUTPUT" else word for word in command]
    path = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    )
    start = time.monotonic()
    try:
        process = subprocess.run(
            command,
            env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        said, code = process.stdout, process.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stdout or b"").decode(errors="replace"), "out of time"
    found = {"exit_code": code, "seconds": time.monotonic() - start}
    if output.exists():
        found["results"] = json.loads(output.read_text())
    # What was written says all that these print.
    found["said"] = said[-20000:] if "results" not in found else said[-2000:]
    return found


def contracts(output):
    """Every kernel of this backend with every spec that it supports, on the device."""
    import keras
    import kernel_harness as harness
    from keras import ops

    from keras_ebft import kernels
    from keras_ebft.backend.device import device_name, device_of

    tensor = ops.zeros((1,))
    results = {"device": device_name(tensor), "platform": device_of(tensor).platform}
    for op in kernels.__all__:
        if importlib.util.find_spec(f"keras_ebft.kernels.{op}") is None:
            continue
        for record in kernels.implementations(op):
            if record.unproven and keras.backend.backend() in record.backends:
                found = harness.attempt(contract_of, op, record, device_of(tensor))
                results.setdefault(op, {})[record.name] = found
                Path(output).write_text(json.dumps(results, indent=1))
    found = [
        found
        for records in results.values()
        if isinstance(records, dict)
        for found in records.values()
    ]
    is_right = not any("failed" in f or "not supported" in f for f in found) and all(
        # Not-a-number is not right.
        off["error"] <= off["allowed"]
        for specs in found
        for off in specs.values()
    )
    sys.exit(not is_right)


def contract_of(op, record, device):
    """The worst deviation of a kernel for each spec and dtype."""
    import importlib

    import keras

    from keras_ebft.kernels import dispatch
    from keras_ebft.kernels.contracts import deviations

    specs = importlib.import_module(f"keras_ebft.kernels.{op}.specs")
    definition = dispatch.implementations(op)[-1].load()
    worst = {}
    for spec in specs.SPECS:
        for dtype in ("float32", "bfloat16"):
            call = dispatch.Call(
                op,
                keras.backend.backend(),
                device,
                frozenset([dtype]),
                getattr(spec, "head_size", None),
                spec.in_use(),
            )
            if record.refusal(call, qualified=True) is not None:
                continue
            found = deviations(spec, record.load(), definition, dtype)
            off = max(found, key=lambda deviation: deviation.share)
            worst[f"{spec.name}, {dtype}"] = {
                "what": off.what,
                "error": float(off.error),
                "allowed": float(off.allowed),
            }
    return worst


def machine():
    """Date, device and versions."""
    found = {"date": datetime.date.today().isoformat()}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")):
            found[name] = metadata.version(name)
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["device"], found["driver"] = said.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError):
        found["device"] = None
    return found


def write(results, folder):
    """Writes all results, and a page to read; both under the device's name."""
    device = results["machine"]["device"].lower().replace(" ", "_")
    path = folder / f"gpu_check_{device}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    lines = ["`python benchmarks/gpu_check.py`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in results["machine"].items()), ""]
    lines += ["| part | seconds | exit code |", "|---|---|---|"]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['seconds']:.0f} | {part['exit_code']} |")
    for name, part in results["parts"].items():
        if name.endswith("_trials"):
            lines += ["", f"## {name}", "", "```", part["said"].strip(), "```"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--contracts", metavar="OUTPUT", help="of this backend alone")
    parser.add_argument("--parts", nargs="+", help="those alone, in their order")
    parser.add_argument(
        "--reference", type=Path, help="a checkout of the authors' code"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="to write to")
    parser.add_argument("--seconds", type=float, default=LIMIT)
    arguments = parser.parse_args()
    if arguments.contracts:
        contracts(arguments.contracts)
    found = machine()
    planned = [
        part
        for part in parts(arguments.reference and arguments.reference.resolve())
        if arguments.parts is None or part[0] in arguments.parts
    ]
    if arguments.dry_run:
        print(json.dumps(found, indent=1))
        for name, backend, command, seconds in planned:
            print(f"{name} ({backend}, {seconds} s): {' '.join(command)}")
        return
    if found["device"] is None:
        parser.error(
            "Expected a GPU (nvidia-smi finds none). Use --dry-run without one."
        )
    results, start = {"machine": found, "parts": {}}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, backend, command, seconds in planned:
            left = arguments.seconds - (time.monotonic() - start)
            part = run_part(
                backend, command, max(1.0, min(seconds, left)), Path(folder)
            )
            results["parts"][name] = part
            print(name, part["exit_code"], f"{part['seconds']:.0f} s", flush=True)
            if part["exit_code"] != 0:
                print(part["said"][-2000:], flush=True)
            write(results, arguments.folder)
    sys.exit(any(part["exit_code"] != 0 for part in results["parts"].values()))


if __name__ == "__main__":
    main()
