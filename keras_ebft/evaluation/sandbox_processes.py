"""Starts confined processes, connects them, and ends them in time."""

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from keras_ebft.evaluation.bubblewrap import (
    SCRIPTS_INSIDE,
    find_bubblewrap,
    wrapped,
)
from keras_ebft.evaluation.system_calls import filter_programs

SCRIPTS = Path(__file__).parent / "sandboxed"
READ_BYTES = 65536
# What the others get to end by themselves once the first process has.
GRACE_SECONDS = 0.5


class Confinement:
    """One confined process, before and while it runs.

    Args:
        script: file name in `sandboxed/`.
        source: what the script reads: a string, or anything JSON can hold.
        limits: dict of limits.
        arguments: dict, further arguments of the script.
    """

    def __init__(self, script, source, limits, arguments=None):
        self.script = script
        self.limits = limits
        self.arguments = dict(arguments or {})
        self.handed_over = []
        self.verdict_pipe = None
        self._hand_over_text("source", source)

    def ask(self, other):
        """Connects this process, which asks, with `other`, which answers."""
        for name, writer, reader in (
            ("questions", self, other),
            ("answers", other, self),
        ):
            read_end, write_end = os.pipe()
            reader._hand_over(name, read_end)
            writer._hand_over(name, write_end)
        self.verdict_pipe, write_end = os.pipe()
        self._hand_over("verdict", write_end)

    def start(self):
        """Starts the process; its ends of all pipes are its own from then on."""
        self.folder = tempfile.mkdtemp(prefix="keras_ebft_")
        self.status_pipe, status = os.pipe()
        filters, no_filter = filter_programs()
        config = {
            **self.limits,
            "script": self.script,
            "scripts": str(SCRIPTS),
            "folder": self.folder,
            **_interpreter(),
            "arguments": self.arguments,
            "filters": filters,
            "no_filter": no_filter,
            "status_pipe": status,
            "inside": False,
        }
        wrapper = wrapped(config, SCRIPTS)
        scripts = SCRIPTS_INSIDE if config["inside"] else config["scripts"]
        self.process = subprocess.Popen(
            [
                *wrapper,
                *(config["python"], "-I", "-S", "-B"),
                *(f"{scripts}/confinement.py", json.dumps(config)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status, *self.handed_over),
            env={},
            cwd="/",
            start_new_session=True,
        )
        os.close(status)
        self._close_handed_over()

    def kill(self):
        """Ends the process and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        os.close(self.status_pipe)
        if self.verdict_pipe is not None:
            os.close(self.verdict_pipe)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hand_over(self, name, pipe):
        self.arguments[name] = pipe
        self.handed_over.append(pipe)

    def _hand_over_text(self, name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        with tempfile.TemporaryFile() as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
            self._hand_over(name, os.dup(file.fileno()))

    def _close_handed_over(self):
        for pipe in self.handed_over:
            os.close(pipe)
        self.handed_over = []


@dataclasses.dataclass(frozen=True)
class Ending:
    """How one confined process ended.

    Attributes:
        status: `"exited"`, `"killed"` or `"timeout"`.
        exit_code: int or `None`.
        signal: int or `None`.
        output: str.
        errors: str.
    """

    status: str
    exit_code: int | None
    signal: int | None
    output: str
    errors: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How all processes of one run ended.

    Attributes:
        status: `"timeout"` or `"too_much_output"`, or `""` if they ended alone.
        endings: list of `Ending`.
        verdict: dict that the asking process wrote, empty without.
        seconds: float.
        protections: tuple of str.
        reason: str, why protections are missing.
    """

    status: str
    endings: list
    verdict: dict
    seconds: float
    protections: tuple
    reason: str


def run_together(confinements, wall_seconds, output_bytes):
    """Runs processes until the first of them ends.

    Args:
        confinements: list of `Confinement`.
        wall_seconds: float, time after which all are killed.
        output_bytes: int, what each may write before all are killed.

    Returns:
        `Outcome`.

    Raises:
        RuntimeError: if a process could not be confined.
    """
    _find_engines()
    start = time.monotonic()
    started = []
    try:
        for confinement in confinements:
            confinement.start()
            started.append(confinement)
        reader = _Reader(confinements, output_bytes)
        status = reader.read(reader.files_of(0), start + wall_seconds)
        if not status:
            rest = [f for i in range(len(confinements)) for f in reader.files_of(i)]
            reader.read(rest, time.monotonic() + GRACE_SECONDS)
        return _outcome(reader, status, time.monotonic() - start)
    finally:
        for confinement in started:
            confinement.kill()


def _interpreter():
    return {
        "prefix": os.path.realpath(sys.base_prefix),
        "python": os.path.realpath(sys._base_executable),
    }


def _find_engines():
    """Looks for what confines, which takes a while once, before a clock runs."""
    filters, _ = filter_programs()
    if filters:
        find_bubblewrap(SCRIPTS, **_interpreter())


class _Reader:
    """Reads what several processes write, all at once."""

    def __init__(self, confinements, output_bytes):
        self.count = len(confinements)
        self.most = output_bytes
        self._selector = selectors.DefaultSelector()
        self.text = {}
        for index, confinement in enumerate(confinements):
            process = confinement.process
            self._watch((index, "status"), confinement.status_pipe)
            self._watch((index, "output"), process.stdout.fileno())
            self._watch((index, "errors"), process.stderr.fileno())
            if confinement.verdict_pipe is not None:
                self._watch((index, "verdict"), confinement.verdict_pipe)

    def _watch(self, name, pipe):
        self.text[name] = b""
        self._selector.register(pipe, selectors.EVENT_READ, name)

    def files_of(self, index):
        """Names of what process `index` writes."""
        return [name for name in self.text if name[0] == index]

    def read(self, names, deadline):
        """Reads until the named files have ended.

        Returns:
            `""`, `"timeout"` or `"too_much_output"`.
        """
        names = set(names)
        while names.intersection(k.data for k in self._selector.get_map().values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            for key, _ in self._selector.select(left):
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    self._selector.unregister(key.fd)
                self.text[key.data] += data
                if len(self.text[key.data]) > self.most:
                    return "too_much_output"
        return ""


def _outcome(reader, status, seconds):
    endings, protections, reason = [], None, ""
    for index in range(reader.count):
        values = {}
        for line in reader.text[index, "status"].splitlines():
            values.update(json.loads(line))
        if "error" in values:
            raise RuntimeError(
                "Expected to confine a process. Received: "
                f"{values['error']}. See docs/evaluation.md for what it needs."
            )
        active = values.get("active", [])
        protections = [p for p in active if protections is None or p in protections]
        reason = values.get("reason") or reason
        endings.append(_ending(reader, index, values))
    return Outcome(
        status=status or ("timeout" if endings[0].status == "timeout" else ""),
        endings=endings,
        verdict=_verdict(reader.text.get((0, "verdict"), b"")),
        seconds=seconds,
        protections=tuple(protections),
        reason=reason,
    )


def _ending(reader, index, values):
    number = values.get("signal")
    if number == signal.SIGXCPU:
        status = "timeout"
    else:
        status = "exited" if "exit_code" in values else "killed"
    output, errors = (
        reader.text[index, name][: reader.most].decode("utf-8", "replace")
        for name in ("output", "errors")
    )
    return Ending(status, values.get("exit_code"), number, output, errors)


def _verdict(text):
    try:
        verdict = json.loads(text)
    except ValueError:
        return {}
    return verdict if isinstance(verdict, dict) else {}
