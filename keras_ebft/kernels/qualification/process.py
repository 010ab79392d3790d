"""The process that makes trials: started, asked, and ended if it does not answer."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import keras_ebft
from keras_ebft.backend.device import Device, current_device_alone

# Seconds until it has imported its backend and found the device.
START_LIMIT = 120.0
# Whatever else a library prints, answers are the lines that begin so.
MARK = "@keras_ebft "
# What TensorFlow says when it is imported, for information: no reason of a failure.
CHATTER = re.compile(r"I\d{4} |WARNING: All log messages before absl")
# The kernels alone: all of the library would import KerasHub too, for seconds.
BOOT = """
import sys, types
package = types.ModuleType("keras_ebft")
package.__path__ = [sys.argv[1]]
sys.modules["keras_ebft"] = package
from keras_ebft.kernels.qualification import worker
worker.main()
"""
COMMAND = (sys.executable, "-c", BOOT, keras_ebft.__path__[0])


class UnansweredError(Exception):
    """No answer came.

    Attributes:
        code: int, what the process ended with; `None` if the time was up.
    """

    def __init__(self, message, code=None):
        super().__init__(message)
        self.code = code


class TrialProcess:
    """A Python process with a device of its own to try kernels on.

    Args:
        backend: str, the Keras backend.

    Attributes:
        device: str, the model of the device that it found.
        place: `Device`, the same as implementations know it.

    Raises:
        OSError: if it cannot be started.
        UnansweredError: if it finds no device in `START_LIMIT` seconds.
    """

    def __init__(self, backend):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(backend),
                text=True,
                encoding="utf-8",
                # A kernel may print anything.
                errors="replace",
                # Compilers that it starts end with it.
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        self._answers = queue.SimpleQueue()
        self._asked = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            found = self._answer(START_LIMIT)["found"]
            self.device = found["device"]
            capability = found["capability"]
            self.place = Device(
                found["platform"],
                None if capability is None else tuple(capability),
                found["maker"],
            )
        except BaseException:
            self.close()
            raise

    @property
    def is_alive(self):
        """Whether it runs; without work it ends by itself."""
        return self._process.poll() is None

    def ask(self, request, limit):
        """What it answers to a request, both dicts.

        Raises:
            UnansweredError: if it ends first, or takes longer than `limit` seconds.
        """
        self._asked += 1
        numbered = {"number": self._asked, "request": request}
        # If it has ended, what it left to say comes below.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(numbered) + "\n")
            self._process.stdin.flush()
        return self._answer(limit)["found"]

    def close(self):
        """Ends it and what it has started, whatever they do."""
        self._kill()
        try:
            # A hanging kernel may keep it in the driver.
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            return
        self._reader.join(10.0)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            # What it never read cannot be written any more.
            with contextlib.suppress(OSError):
                stream.close()

    def _kill(self):
        if not hasattr(os, "killpg"):
            self._process.kill()
            return
        # Of all processes that are in its session, some may have ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self):
        try:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    with contextlib.suppress(ValueError):
                        self._answers.put(json.loads(line.removeprefix(MARK)))
        finally:
            self._answers.put(None)

    def _answer(self, limit):
        """The answer to the last request; others have been given up."""
        end = time.monotonic() + limit
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise UnansweredError(f"no answer in {limit:g} s") from None
            if answer is None:
                code = self._process.wait()
                words = f"its process ended with {code}{self._last_words()}"
                raise UnansweredError(words, code)
            if answer["number"] == self._asked:
                return answer

    def _last_words(self):
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        words = self._errors.read().decode(errors="replace").strip()
        lines = [line for line in words.splitlines() if not CHATTER.match(line)]
        return f": {lines[-1].strip()}" if lines else ""


def _environment(backend):
    return {
        **os.environ,
        **current_device_alone(),
        "KERAS_BACKEND": backend,
        "KERAS_EBFT_KERNELS": "off",
        "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path),
        "PYTHONIOENCODING": "utf-8",
        # Training has most of the device's memory already.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
