"""Names for what functions take and return, for readers and type checkers.

Tensors of three backends have no common class, so their type says nothing; shapes and
dtypes stand in the docstrings, and tests hold them.
"""

from typing import Any, TypeAlias

import keras

# A tensor of the backend in use; functions that only compute take arrays as well.
Tensor: TypeAlias = Any
# What random numbers come from: a number gives the same ones each time.
Seed: TypeAlias = int | keras.random.SeedGenerator
# What weighs a term of the loss.
Weight: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule
