"""Measuring a model: likelihood, features, texts, and code that must run."""

from keras_ebft.evaluation.audit import AuditResult, RewardAudit
from keras_ebft.evaluation.code_checks import (
    CodeProblem,
    check_completions,
    function_body,
    mean_pass_at_k,
    pass_at_k,
)
from keras_ebft.evaluation.feature_matching import FeatureMatching
from keras_ebft.evaluation.generation import TextGenerator
from keras_ebft.evaluation.likelihood import cross_entropy
from keras_ebft.evaluation.paired import (
    Change,
    PairedFeatureMatching,
    paired_change,
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
    "AuditResult",
    "Change",
    "CheckResult",
    "CodeProblem",
    "FeatureMatching",
    "PairedFeatureMatching",
    "RewardAudit",
    "RunResult",
    "Sandbox",
    "TextGenerator",
    "bleu",
    "check_completions",
    "chrf",
    "comet",
    "cross_entropy",
    "exact_match",
    "function_body",
    "mean_pass_at_k",
    "paired_change",
    "pass_at_k",
]
