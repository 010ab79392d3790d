"""Says which implementation of each hot path a training runs."""

import logging

import keras

logger = logging.getLogger("keras_ebft")


class KernelLog(keras.callbacks.Callback):
    """Logs the chosen implementations at level INFO, once per `fit`.

    They are known once the first batch has been trained on. A train function that
    was compiled by an earlier `fit` chooses no more: what it chose is kept with it.

    Args:
        choices: dict that `watch_choices` fills.
    """

    def __init__(self, choices):
        super().__init__()
        self.choices = choices
        self.logged = False

    def on_train_batch_end(self, batch, logs=None):
        """Logs, if this is the first batch that was trained on."""
        if self.logged:
            return
        known = self.model.train_function.kernel_choices
        # Validation is not watched: this comes before it.
        known.update(self.choices)
        if known:
            chosen = (f"{op}={'+'.join(sorted(known[op]))}" for op in sorted(known))
            logger.info("Kernels of this training: %s.", ", ".join(chosen))
            self.logged = True
