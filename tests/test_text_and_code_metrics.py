"""Metrics against numbers worked out by hand and against their definitions."""

import itertools
import sys

import pytest
import sacrebleu

from keras_ebft.evaluation import (
    CodeProblem,
    Sandbox,
    bleu,
    check_completions,
    chrf,
    comet,
    exact_match,
    function_body,
    mean_pass_at_k,
    pass_at_k,
)

pytestmark = pytest.mark.backend_independent


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_is_the_mean_over_all_draws(samples):
    """Drawing k of n without replacement, every draw listed."""
    for correct in range(samples + 1):
        outcomes = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(outcomes, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(samples, correct, k) == pytest.approx(expected)


def test_pass_at_k_with_many_samples():
    """1 - (1 - c/n) for k = 1; the published product form for k = 100."""
    assert pass_at_k(200, 30, 1) == pytest.approx(0.15)
    product = 1.0
    for i in range(200 - 30 + 1, 201):
        product *= 1 - 100 / i
    assert pass_at_k(200, 30, 100) == pytest.approx(1 - product)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((4, 5, 1), ValueError, "num_correct=5"),
        ((4, 1, 5), ValueError, "k=5"),
        ((4, 1, 0), ValueError, "k=0"),
        ((4, -1, 1), ValueError, "num_correct=-1"),
        ((4.0, 1, 1), TypeError, "num_samples=4.0"),
    ],
)
def test_pass_at_k_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        pass_at_k(*arguments)


def test_exact_match_by_hand():
    assert exact_match(["a", " b", "c\n", "d"], ["a", "b", "c", "D"]) == 0.75


PREDICTIONS = ["the cat sat on the mat today", "a dog barks"]
REFERENCES = ["the cat sat on the mat", "a dog barks loudly"]


def test_bleu_and_chrf_are_those_of_sacrebleu():
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(
        sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    )
    assert chrf(PREDICTIONS, REFERENCES) == pytest.approx(
        sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    )
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)
    assert bleu(["我喜欢猫"], ["我喜欢狗"], tokenize="char") > 0


def test_bleu_by_hand():
    """Five words, all in the reference of ten: precisions 1, brevity e^(1 - 10/5)."""
    reference = "one two three four five six seven eight nine ten"
    prediction = "one two three four five"
    assert bleu([prediction], [reference]) == pytest.approx(36.7879, abs=1e-3)


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf])
def test_text_metrics_refuse(metric):
    with pytest.raises(ValueError, match="2 and 1"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        metric([], [])
    with pytest.raises(ValueError, match="single string"):
        metric("a", "a")


def test_comet_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(ImportError, match=r"unbabel-comet.*keras_ebft\[comet\]"):
        comet(["a"], ["b"], ["c"])


def test_function_body():
    assert function_body("    x = 1\n\n    return x\ndef g():\n    pass") == (
        "    x = 1\n\n    return x\n"
    )
    assert function_body(" 1\n") == " 1\n"
    assert function_body("") == ""


BODIES = {
    "what only str ends lines at": "    return 'a\u2028b\x0cc\x85d\x1ce' + 'f'\n",
    "a string over lines": '    text = """\nin the margin\n"""\n    return text\n',
    "brackets over lines": "    pairs = {\n'a': 1,\n}\n    return pairs\n",
    "a line that goes on": "    x = 1 + \\\n2\n    return x\n",
    "a comment in the margin": "    x = 1\n# two\n\n    return x\n",
    "a page within the body": "    x = 1\n\x0c\n    return x\n",
    "what began before": " x:\n        return 1\n    return (\n2)\n",
}
AFTER = ("print(1)\n", "# an example\n\nprint('''\n", "\x0cdef g():\n  1\n")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_function_body_cuts_no_valid_code(body):
    assert function_body(body) == body
    for after in AFTER:
        assert function_body(body + after) == body, after


def test_function_body_ends_where_python_does():
    # None is Python, and none keeps more than its own lines.
    for kept in ("    return 'a\n", " a.'''\n    return 1\n", "    f(\n"):
        assert function_body(f"{kept}x = 1\n") == kept
    # Windows' and old Macs' ends of lines.
    for end in ("\r\n", "\r"):
        kept = f"    x = 1{end}    return x{end}"
        assert function_body(f"{kept}x = 2{end}") == kept


def test_pass_at_k_of_generated_code():
    problems = [
        CodeProblem("def inc(x):\n", tests="assert inc(1) == 2"),
        CodeProblem(
            "def root(x):\n", doctests=">>> root(9.0)\n3.0\n", setup="import math"
        ),
    ]
    completions = [
        ["    return x + 1", "    return x", "    return", "    return 1 + x"],
        ["    return math.sqrt(x)", "    retrun 3", "    return 3", "    return -x"],
    ]
    results = check_completions(problems, completions, Sandbox(), workers=2)
    passed = [[check.passed for check in checks] for checks in results]
    assert passed == [[True, False, False, True], [True, False, False, False]]
    assert mean_pass_at_k(results, 1) == pytest.approx((0.5 + 0.25) / 2)
    assert mean_pass_at_k(results, 4) == 1.0
    with pytest.raises(ValueError, match="1 problems and 2"):
        check_completions(problems[:1], completions)
    with pytest.raises(ValueError, match="at least one problem"):
        mean_pass_at_k([], 1)
    with pytest.raises(ValueError, match="without any"):
        CodeProblem("x = 1").check("", Sandbox())
