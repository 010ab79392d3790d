"""Training through Keras: data in, callbacks, checkpoints, metrics."""
