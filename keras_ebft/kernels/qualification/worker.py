"""What runs in the process of trials: reads them, one a line, and answers."""

import json
import os
import sys
import threading
from dataclasses import asdict

from keras import ops

from keras_ebft.backend.device import device_name, device_of
from keras_ebft.kernels.qualification.process import MARK
from keras_ebft.kernels.qualification.trial import Trial
from keras_ebft.kernels.qualification.trying import try_out

# Seconds without work after which it gives its device back.
IDLE_LIMIT = 20.0


def main():
    """Answers until nothing more comes, or nothing for `IDLE_LIMIT` seconds."""
    tensor = ops.zeros((1,))
    _say(0, {"device": device_name(tensor), **device_of(tensor)._asdict()})
    while True:
        idle = threading.Timer(IDLE_LIMIT, os._exit, (0,))
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return
        asked = json.loads(line)
        _say(asked["number"], asdict(try_out(Trial.from_dict(asked["request"]))))


def _say(number, found):
    answer = {"number": number, "found": found}
    # A line of its own, whatever a kernel has printed.
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
