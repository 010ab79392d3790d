"""pass@k: how often one of k generated programs passes its tests."""

import dataclasses
import io
import math
import os
import tokenize
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from keras_ebft.evaluation.sandbox import CheckResult, Sandbox
from keras_ebft.validation import check_instance, check_int

# What Python skips at both ends of a line; `str.strip` knows more.
BLANKS = " \t\f\r\n"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes.

        pass@k = 1 - C(n - c, k) / C(n, k)

    with n samples of which c passed (Chen et al., 2021, arXiv:2107.03374).

    Args:
        num_samples: int, n.
        num_correct: int, c.
        k: int from 1 to n.

    Returns:
        float in [0, 1].

    Raises:
        TypeError: for a value that is not an integer.
        ValueError: for a value out of range.

    Example:
    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5
    """
    num_samples = check_int("num_samples", num_samples, 1)
    num_correct = check_int("num_correct", num_correct, 0)
    k = check_int("k", k, 1)
    if num_correct > num_samples or k > num_samples:
        raise ValueError(
            "Expected `num_correct` and `k` of at most `num_samples`. Received: "
            f"num_samples={num_samples}, num_correct={num_correct}, k={k}. Draw more "
            "samples."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """A beginning of a program, and how to tell whether it was ended well.

    Attributes:
        prompt: str, source that the completion is appended to.
        tests: str, source of tests, see `Sandbox.check`.
        doctests: str, a docstring whose examples are run; instead of `tests`.
        setup: str, source that is run before the prompt, such as imports.
        share_objects: bool, see `Sandbox.check`.
    """

    prompt: str
    tests: str = ""
    doctests: str = ""
    setup: str = ""
    share_objects: bool = False

    def check(self, completion: str, sandbox: Sandbox) -> CheckResult:
        """Runs the tests on a completion.

        Args:
            completion: str.
            sandbox: `Sandbox`.

        Returns:
            `CheckResult`.

        Raises:
            ValueError: if there is neither `tests` nor `doctests`.
        """
        program = f"{self.setup}\n{self.prompt}{completion}\n"
        if self.tests:
            return sandbox.check(program, self.tests, self.share_objects)
        return sandbox.check_doctests(program, self.doctests, self.share_objects)


def check_completions(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    sandbox: Sandbox | None = None,
    workers: int | None = None,
) -> list[list[CheckResult]]:
    """Runs all tests on all completions, several at a time.

    Args:
        problems: list of `CodeProblem`.
        completions: list of as many lists of strings.
        sandbox: `Sandbox`, by default one with default limits.
        workers: int, completions that run at the same time, by default one for
            each processor.

    Returns:
        list of lists of `CheckResult`.

    Raises:
        ValueError: if the lengths differ.
    """
    sandbox = Sandbox() if sandbox is None else sandbox
    sandbox = check_instance("sandbox", sandbox, Sandbox, "Leave it out.")
    workers = check_int("workers", workers or os.cpu_count() or 1, 1)
    if len(problems) != len(completions):
        raise ValueError(
            "Expected a list of completions for each problem. Received: "
            f"{len(problems)} problems and {len(completions)} lists."
        )
    with ThreadPoolExecutor(workers) as pool:
        running = [
            [pool.submit(problem.check, text, sandbox) for text in texts]
            for problem, texts in zip(problems, completions)
        ]
        return [[check.result() for check in checks] for checks in running]


def mean_pass_at_k(results: Sequence[Sequence[CheckResult]], k: int) -> float:
    """pass@k over several problems.

    Args:
        results: list of lists of `CheckResult`, from `check_completions`.
        k: int, at most the number of completions of any problem.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: if there is no problem, or `k` is too large.
    """
    if not results:
        raise ValueError("Expected at least one problem. Received: none.")
    rates = [
        pass_at_k(len(checks), sum(check.passed for check in checks), k)
        for checks in results
    ]
    return sum(rates) / len(rates)


def function_body(completion: str) -> str:
    r"""The part of a completion that still belongs to the function begun before it.

    Models go on after the end of a function. Everything from the first statement on
    that is not indented is cut off, and comments in the margin before it. What stands
    in the margin within a string or brackets cuts nothing.

    Args:
        completion: str.

    Returns:
        str.

    Example:
    >>> function_body("    return 1\n\nprint(2)\n")
    '    return 1\n\n'
    """
    lines = list(io.StringIO(completion, newline=""))
    inside = _rows_inside_statements(lines)
    kept = 0
    for row, line in enumerate(lines):
        text = line.lstrip("\f")
        if not text.strip(BLANKS):
            kept += kept == row
        # The completion begins in the middle of a line.
        elif row == 0 or row in inside or text[0] in " \t":
            kept = row + 1
        elif text[0] != "#":
            break
    return "".join(lines[:kept])


def _rows_inside_statements(lines: list[str]) -> set[int]:
    """Rows that go on with what an earlier row has begun, such as a string.

    From the first thing on that is not Python, none.
    """
    # Indentation that begins in the middle of a line would be an error.
    bare = iter([line.strip(BLANKS) + "\n" for line in lines])
    inside: set[int] = set()
    first = None
    try:
        for token in tokenize.generate_tokens(lambda: next(bare, "")):
            if token.type == tokenize.NEWLINE:
                inside.update(range(first or token.start[0], token.end[0]))
                first = None
            elif first is None and token.type not in (tokenize.NL, tokenize.COMMENT):
                first = token.start[0]
    except (tokenize.TokenError, SyntaxError, ValueError):
        pass  # Rows of a statement that has not ended are not inside one.
    return inside
