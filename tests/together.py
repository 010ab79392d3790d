"""Programs that run at the same time and wait for one another."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_ports(count):
    """Ports of this machine that nobody listens at; all different, a list of ints."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def run_together(program, arguments, folder, bound, env=None):
    """Runs a program several times at once.

    Args:
        program: path of the program.
        arguments: list of lists of strings, one for each process.
        folder: where their output is kept.
        bound: seconds after which all of them are ended.
        env: environment, or `None`.

    Returns:
        list of what each wrote, strings. If one fails the others are ended, too, and
        an `AssertionError` says what it wrote last.
    """
    logs = [Path(folder) / f"output_{index}.txt" for index in range(len(arguments))]
    processes = []
    try:
        for log, own in zip(logs, arguments):
            with log.open("w") as file:
                command = [sys.executable, str(program), *map(str, own)]
                processes.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env=env
                    )
                )
        end = time.monotonic() + bound
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    texts = [log.read_text() for log in logs]
    ends = "\n".join(text[-3000:] for text in texts)
    assert codes == [0] * len(arguments), f"exit codes {codes} (None: too late)\n{ends}"
    return texts
