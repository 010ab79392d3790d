"""Everything that differs between JAX, TensorFlow and PyTorch."""
