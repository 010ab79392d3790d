"""Unproven implementations are tried where they are to run, before they run.

A trial has its own process and a time limit: checked against the definition, forward
and backward, then timed against what runs without it, at a shape like the call's. It
passes if it is right and faster. What was found is kept per device, versions and class
of shapes. Whatever goes wrong costs a line in the log, and never more.
"""

import atexit
import json
import logging
import signal
import threading

from keras_ebft.kernels.qualification import kept
from keras_ebft.kernels.qualification.process import TrialProcess, UnansweredError
from keras_ebft.kernels.qualification.trial import Trial, Verdict, versions

__all__ = [
    "Trial",
    "Verdict",
    "kept",
    "passes",
    "process_of",
    "verdict_of",
    "versions",
]

logger = logging.getLogger("keras_ebft")

# Seconds for one trial: compiling a kernel's few forms, some milliseconds of running.
TRIAL_LIMIT = 90.0
# Of a process that had waited too long for work, or that the system has ended.
ENDED_BY_OTHERS = (0, -signal.SIGTERM, -9)


class _Session:
    """What one Python process knows of trials, and the process that makes them."""

    def __init__(self):
        # By exact shapes, which are looked for in every call, and by classes of them.
        self.verdicts = {}
        self.by_class = {}
        self.lock = threading.RLock()
        self.said = set()
        self.process = None
        # Why no process can be had, so that it is asked for once.
        self.unavailable = None
        self.cleared = False

    def close(self):
        """Ends the process that makes trials; the next one starts another."""
        if self.process is not None:
            self.process.close()
        self.process = None


_session = _Session()
atexit.register(_session.close)


def passes(trial, words=frozenset()):
    """Whether an unproven implementation is right and faster here.

    Args:
        trial: `Trial`.
        words: what `KERAS_EBFT_KERNELS` asks for: with `"clear"`, what was kept
            before this process is forgotten; with `"show"`, what was found is
            logged as a warning, also if it was kept.

    Returns:
        bool. The log says why, once per process.
    """
    if trial not in _session.verdicts:
        with _session.lock:
            _decide(trial, words)
    return _session.verdicts[trial].outcome == "faster"


def _decide(trial, words):
    known = json.dumps(trial.key(), sort_keys=True)
    if known not in _session.by_class:
        try:
            if "clear" in words and not _session.cleared:
                kept.clear()
            _session.cleared = True
            verdict = verdict_of(trial)
        except Exception as error:  # nothing that fails here may cost a run
            verdict = Verdict("unchecked", f"{type(error).__name__}: {error}")
        _session.by_class[known] = verdict
        _say(verdict.sentence(trial), not verdict.is_usual or "show" in words)
    _session.verdicts[trial] = _session.by_class[known]


def _say(sentence, is_warning):
    # Other sizes of the same class say the same.
    if sentence not in _session.said:
        _session.said.add(sentence)
        logger.log(logging.WARNING if is_warning else logging.INFO, "%s", sentence)


def verdict_of(trial):
    """What was kept of a trial, or what it gives now.

    Args:
        trial: `Trial`.

    Returns:
        `Verdict`.
    """
    verdict = kept.read(trial)
    if verdict is not None and verdict.is_final:
        return verdict
    verdict = _try(trial)
    try:
        kept.write(trial, verdict)
    except OSError as error:
        logger.warning("What was found of kernels is not kept: %s.", error)
    return verdict


def process_of(backend):
    """The process that makes trials, started if need be.

    Args:
        backend: str, the Keras backend.

    Returns:
        `TrialProcess`.

    Raises:
        OSError, UnansweredError: if none can be had.
    """
    if _session.process is None or not _session.process.is_alive:
        _session.close()
        _session.process = TrialProcess(backend)
    return _session.process


def _try(trial):
    """A trial; another where its process was ended by what is not the kernel."""
    try:
        return _try_once(trial)
    except UnansweredError as error:
        logger.info("Trying again: %s.", error)
    try:
        return _try_once(trial)
    except UnansweredError as error:
        return Verdict("unchecked", str(error))


def _try_once(trial):
    if _session.unavailable is not None:
        return Verdict("unchecked", _session.unavailable)
    try:
        device = process_of(trial.backend).device
    except (OSError, UnansweredError) as error:
        _session.unavailable = f"no process for it could be started: {error}"
        return Verdict("unchecked", _session.unavailable)
    if device != trial.device:
        _session.close()
        _session.unavailable = f"another process finds the device {device}"
        return Verdict("unchecked", _session.unavailable)
    logger.info("Trying %s for %s on %s.", trial.name, trial.op, trial.device)
    verdict = None
    try:
        verdict = Verdict(**_session.process.ask(trial.as_dict(), TRIAL_LIMIT))
    except UnansweredError as error:
        if error.code in ENDED_BY_OTHERS:
            raise
        verdict = Verdict("hung" if error.code is None else "failed", str(error))
    finally:
        # An error on a device may spoil all that its process does afterwards, and an
        # answer that nobody waited for would be taken for the next one's.
        if verdict is None or verdict.outcome not in ("faster", "slower", "wrong"):
            _session.close()
    return verdict
