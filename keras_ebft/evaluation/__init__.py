"""Measuring a model: likelihood, features, texts, and code that must run."""

from keras_ebft.evaluation.code_checks import (
    CodeProblem,
    check_completions,
    function_body,
    mean_pass_at_k,
    pass_at_k,
)
from keras_ebft.evaluation.sandbox import (
    PROTECTIONS,
    CheckResult,
    RunResult,
    Sandbox,
)
from keras_ebft.evaluation.text_metrics import bleu, chrf, comet, exact_match

__all__ = [
    "PROTECTIONS",
    "CheckResult",
    "CodeProblem",
    "RunResult",
    "Sandbox",
    "bleu",
    "check_completions",
    "chrf",
    "comet",
    "exact_match",
    "function_body",
    "mean_pass_at_k",
    "pass_at_k",
]
