"""Running generated code, and tests against it, without trusting it."""

import dataclasses
import os
import secrets
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from keras_ebft.configurable import Shown
from keras_ebft.evaluation.sandbox_processes import Confinement, run_together
from keras_ebft.validation import check_choice, check_int, check_number

# As limits of the system are counted.
MOST_BYTES = 2**62
PROTECTIONS = (
    *("limits", "network", "filesystem", "processes", "user"),
    *("keyring", "syscalls"),
)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a program ended.

    Attributes:
        status: `"exited"`, `"killed"` (by a signal or a limit), `"timeout"` or
            `"too_much_output"`.
        exit_code: int; `None` unless it exited.
        output: str, what it wrote to standard output, up to the limit.
        errors: str, the same of standard error.
        seconds: float, wall time.
        protections: tuple of those of `PROTECTIONS` that were in force.
    """

    status: str
    exit_code: int | None
    output: str
    errors: str
    seconds: float
    protections: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The verdict on generated code.

    Attributes:
        passed: bool, whether all tests passed.
        status: `"passed"`, `"failed"` (a test failed, or the code does not run),
            `"killed"`, `"timeout"` or `"too_much_output"`.
        message: str, why it did not pass.
        seconds: float, wall time.
        protections: tuple of those of `PROTECTIONS` that were in force.
    """

    passed: bool
    status: str
    message: str
    seconds: float
    protections: tuple[str, ...]


class Sandbox(Shown):
    r"""A place for code that nobody has read.

    Every program runs in a process of its own with an empty working directory.
    On Linux, as root or where unprivileged user namespaces are allowed, it sees
    no network, no process but its own and no file but the Python interpreter, and
    belongs to a user that owns nothing. With `keras_ebft[sandbox]` the kernel also
    refuses it what these do not hold: memory that no limit counts, other sockets,
    keys, io_uring. Elsewhere limits remain; what is missing is named in a warning.
    docs/evaluation.md says what this does and does not protect against.

    Args:
        wall_seconds: float, time after which everything is killed.
        cpu_seconds: int, processor time of a process.
        memory_bytes: int, address space of a process. Python itself needs 30 MB.
        processes: int, processes and threads together. With more than 1,
            `memory_bytes` holds for each.
        disk_bytes: int, size of the working directory and of any file.
        open_files: int, files a process may have open.
        output_bytes: int, standard output and error together.
        require: names from `PROTECTIONS` without which nothing is run.

    Raises:
        TypeError: for a limit of the wrong type.
        ValueError: for a limit out of range or an unknown protection.
        OSError: on systems without POSIX limits.

    Example:
    >>> sandbox = Sandbox()
    >>> sandbox.run("print(1 + 1)").output
    '2\n'
    >>> code = "def double(x):\n    return 2 * x"
    >>> sandbox.check(code, "assert double(3) == 6").passed
    True
    """

    def __init__(
        self,
        wall_seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_bytes: int = 2**29,
        processes: int = 1,
        disk_bytes: int = 2**24,
        open_files: int = 32,
        output_bytes: int = 2**20,
        require: Iterable[str] = (),
    ) -> None:
        if os.name != "posix":
            raise OSError(
                "Expected a POSIX system, whose limits the sandbox is made of. "
                f"Received: {sys.platform}. Run the evaluation on Linux."
            )
        self.wall_seconds = check_number(
            "wall_seconds", wall_seconds, 0.0, exclusive=True
        )
        self.limits = {
            "cpu_seconds": check_int("cpu_seconds", cpu_seconds, 1),
            "memory_bytes": check_int("memory_bytes", memory_bytes, 2**25, MOST_BYTES),
            "processes": check_int("processes", processes, 1),
            "disk_bytes": check_int("disk_bytes", disk_bytes, 4096, MOST_BYTES),
            "open_files": check_int("open_files", open_files, 8),
        }
        self.output_bytes = check_int("output_bytes", output_bytes, 1, MOST_BYTES)
        if not isinstance(require, (list, tuple, set, frozenset)):
            raise TypeError(
                "Expected `require` to be a tuple of protections. Received: "
                f"require={require!r} (of type {type(require).__name__}). Pass for "
                'example ("network",).'
            )
        self.require = tuple(
            check_choice("require", name, PROTECTIONS) for name in require
        )

    def _shown_settings(self) -> dict[str, Any]:
        return {**super()._shown_settings(), **self.limits}

    def run(self, source: str) -> RunResult:
        """Runs a program.

        Args:
            source: str, Python source.

        Returns:
            `RunResult`.

        Raises:
            RuntimeError: if the sandbox cannot be set up, or lacks a protection
                of `require`.
        """
        program = Confinement("program.py", source, self.limits)
        outcome = run_together([program], self.wall_seconds, self.output_bytes)
        ending = outcome.endings[0]
        return RunResult(
            status=outcome.status or ending.status,
            exit_code=None if outcome.status else ending.exit_code,
            output=ending.output,
            errors=ending.errors,
            seconds=outcome.seconds,
            protections=self._protections(outcome),
        )

    def check(self, code: str, tests: str, share_objects: bool = False) -> CheckResult:
        """Runs tests against generated code.

        The tests run in one sandbox, the code in another. A function of the code
        that a test calls is a stand-in: arguments and results pass as plain data
        (numbers, strings, bytes, lists, tuples, sets, dicts; iterators are read
        out), and the comparing is done where the code has never been.

        Args:
            code: str, Python source that defines what the tests call.
            tests: str, Python source, for example lines of `assert`. They pass if
                they end without an exception. Names they neither define nor
                import are the code's.
            share_objects: bool, whether results may be objects of the code's own
                classes, as tests of classes need. What methods and operators of such
                an object return is then believed; but to plain data it is never
                equal, nor can it be put in order with it.

        Returns:
            `CheckResult`.

        Raises:
            ValueError: if `tests` is empty or does not compile.
            RuntimeError: as `run`.
        """
        try:
            compile(tests, "<tests>", "exec")
        except SyntaxError as error:
            raise ValueError(
                f"Expected `tests` to be Python source. Received: {error}."
            ) from error
        return self._check(code, tests, "tests", share_objects)

    def check_doctests(
        self, code: str, docstring: str, share_objects: bool = False
    ) -> CheckResult:
        """Runs the examples of a docstring against generated code.

        Args:
            code: str, Python source.
            docstring: str with at least one `>>>` example.
            share_objects: bool, see `check`.

        Returns:
            `CheckResult`.

        Raises:
            ValueError: if there is no example.
            RuntimeError: as `run`.
        """
        if ">>>" not in docstring:
            docstring = ""
        return self._check(code, docstring, "doctests", share_objects)

    def _check(
        self, code: str, source: str, kind: str, share_objects: bool
    ) -> CheckResult:
        if not source.strip():
            raise ValueError(
                f"Expected at least one test. Received: {kind} without any. Leave "
                "the problem out: without a test everything would pass."
            )
        number = secrets.token_hex(16)
        tests = {
            "number": number,
            "kind": kind,
            "source": source,
            "share_objects": share_objects,
        }
        candidate = Confinement(
            "candidate.py", code, self.limits, {"share_objects": share_objects}
        )
        checker = Confinement("checker.py", tests, self.limits)
        checker.ask(candidate)
        outcome = run_together(
            [checker, candidate], self.wall_seconds, self.output_bytes
        )
        verdict = outcome.verdict
        passed = verdict.get("number") == number and verdict.get("passed") is True
        if outcome.status:
            passed = False
        status, message = _explain(outcome, verdict, passed)
        return CheckResult(
            passed, status, message, outcome.seconds, self._protections(outcome)
        )

    def _protections(self, outcome: Any) -> tuple[str, ...]:
        missing = set(PROTECTIONS) - set(outcome.protections)
        if missing.intersection(self.require):
            raise RuntimeError(
                f"Expected the protections {self.require}. Received: a system that "
                f"does not offer {sorted(missing)} ({outcome.reason}). Run as root "
                "or allow unprivileged user namespaces, pip install "
                "'keras_ebft[sandbox]', or require less."
            )
        if missing:
            warnings.warn(
                f"The sandbox runs without {sorted(missing)}: {outcome.reason}. See "
                "docs/evaluation.md before running code that nobody has read.",
                stacklevel=4,
            )
        return outcome.protections


def _explain(outcome: Any, verdict: dict[str, Any], passed: bool) -> tuple[str, str]:
    if passed:
        return "passed", ""
    if outcome.status:
        return outcome.status, ""
    candidate = outcome.endings[1]
    # Without a signal it had only not ended yet when the tests had.
    if candidate.signal is not None:
        return "killed", f"signal {candidate.signal}"
    if candidate.errors:
        # The code did not even run; its own last line says why.
        return "failed", candidate.errors.strip().rpartition("\n")[2]
    return "failed", str(verdict.get("message", "no verdict"))
