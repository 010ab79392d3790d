"""What `EBFTModel` puts around the train function that Keras makes."""

import itertools
import logging

from keras_ebft.backend.held_state import hand_back
from keras_ebft.backend.process_memory import return_freed_memory
from keras_ebft.backend.runtime import raising_collected

logger = logging.getLogger("keras_ebft")

# What a train step reports beside its logs: updates in a row that were not finite.
IN_A_ROW = "skipped_in_a_row"


class TrainFunction:
    """A train function that can pass over batches that were trained on before.

    It stops training where updates are not finite time after time. After its first
    call, which compiles it, memory that compiling took goes back to the system.

    Args:
        model: `EBFTModel`.
        most_skipped: int, updates in a row that may be skipped, or `None`.
    """

    def __init__(self, model, most_skipped):
        self.model = model
        self.train_function = model.train_function
        self.steps_per_execution = model.steps_per_execution
        self.most_skipped = most_skipped
        self.has_warned = False
        self.batches_to_pass = 0
        self.logs = {}
        self.compiled = False
        # Which kernels it runs, known once it has been traced.
        self.kernel_choices = {}

    def __call__(self, *state_and_data):
        """One call of the train function, or none at all."""
        if self.batches_to_pass <= 0:
            return self._train(state_and_data)
        self.batches_to_pass -= self.steps_per_execution
        *state, data = state_and_data
        try:
            self._pass_over(data)
        except BaseException:
            hand_back(self.model, state[0] if state else ())
            raise
        return (self.logs, *state) if state else self.logs

    def _pass_over(self, data):
        if not hasattr(data, "__next__"):
            # Keras took a batch from the iterator itself.
            return
        calls = itertools.islice(data, self.steps_per_execution)
        # An epoch may end within a call, as it did when it was trained on.
        if not raising_collected(lambda: sum(1 for _ in calls)):
            raise StopIteration

    def _train(self, state_and_data):
        returned = self.train_function(*state_and_data)
        if not self.compiled:
            return_freed_memory()
            self.compiled = True
        logs, state = returned if state_and_data[1:] else (returned, ())
        self._check_skipped(int(logs.pop(IN_A_ROW)), state)
        return returned

    def _check_skipped(self, in_a_row, state):
        if in_a_row and not self.has_warned:
            logger.warning(
                "An update was not finite and was skipped: weights and optimizer are "
                "as they were before it. The metric `skipped_updates` counts them."
            )
            self.has_warned = True
        if self.most_skipped is None or in_a_row <= self.most_skipped:
            return
        hand_back(self.model, state)
        self.model.forget_skipped_updates()
        raise FloatingPointError(
            f"Expected at most {self.most_skipped} updates in a row that are not "
            f"finite. Received: {in_a_row}. The model holds the weights and the "
            "optimizer it had before them. Lower the learning rate, clip gradients "
            "(`global_clipnorm`), look at the documents and the reward of these "
            "batches, or allow more with compile(max_skipped_updates=...)."
        )
