"""What `EBFTModel` puts around the train function that Keras makes."""

from keras_ebft.backend.process_memory import return_freed_memory


class TrainFunction:
    """A train function that can pass over batches that were trained on before.

    After its first call, which compiles it, memory that compiling took goes back to
    the system.

    Args:
        train_function: the train function that a Keras trainer made.
        steps_per_execution: int, batches per call.
    """

    def __init__(self, train_function, steps_per_execution):
        self.train_function = train_function
        self.steps_per_execution = steps_per_execution
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
        if hasattr(data, "__next__"):
            # Where the function itself takes batches from the iterator.
            for _ in range(self.steps_per_execution):
                next(data)
        return (self.logs, *state) if state else self.logs

    def _train(self, state_and_data):
        returned = self.train_function(*state_and_data)
        if not self.compiled:
            return_freed_memory()
            self.compiled = True
        return returned
