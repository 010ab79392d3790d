"""What a reward would reward, measured before training."""

from keras_ebft.evaluation.audit.result import AuditResult
from keras_ebft.evaluation.audit.reward_audit import RewardAudit

__all__ = ["AuditResult", "RewardAudit"]
