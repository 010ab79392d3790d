"""What the kernels of `feature_reward` know about Jacobi's method."""

# Sweeps after which float32 matrices of a size change no more, nearly singular ones
# included, and one or more to spare.
SWEEPS = {2: 3, 4: 6, 8: 8, 16: 10}


def padded_size(samples):
    """The power of two, at least 2, that holds a number of samples."""
    return max(2, 1 << (samples - 1).bit_length())


def sweeps_for(samples):
    """Sweeps for matrices of a size."""
    return SWEEPS[padded_size(samples)]
