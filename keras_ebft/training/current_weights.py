"""Variables hold the current weights whenever a callback of the user runs."""

import keras


class CurrentWeights(keras.callbacks.Callback):
    """Hands the state of training back to the model after every batch.

    On JAX, Keras keeps it apart while an epoch runs, and takes the variables' values
    from them. Callbacks that reach the model by `self.model` are spared that; those
    that hold on to the language model itself, to generate text, would find an error,
    or values that are newly initialised. It must come before them.
    """

    def on_train_batch_end(self, batch, logs=None):
        """Hands back the state of a training step."""
        self._hand_back()

    def on_test_batch_end(self, batch, logs=None):
        """Hands back the state of an evaluation step."""
        self._hand_back()

    def _hand_back(self):
        # Keras does it whenever this property is read.
        return self.model
