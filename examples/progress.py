"""What a script is doing, and how long the rest will take."""

import time


def minutes(seconds):
    """Seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Announces the stages of a script.

    Args:
        stages: dict from a stage's name to what part of the whole time it takes, in
            order; or `None`, where that is not known.
    """

    def __init__(self, stages=None):
        self.stages = stages or {}
        self.start = time.monotonic()

    def __call__(self, stage):
        """Announces a stage; all before it are done."""
        names = list(self.stages)
        earlier = names[: names.index(stage)] if stage in names else []
        done = sum(self.stages[name] for name in earlier)
        spent = time.monotonic() - self.start
        left = ""
        if done:
            total = spent / done * sum(self.stages.values())
            left = f", about {minutes(total - spent)} left"
        print(f"[{minutes(spent)}{left}] {stage}", flush=True)

    def end(self):
        """Says how long all took."""
        print(f"All: {minutes(time.monotonic() - self.start)}")
