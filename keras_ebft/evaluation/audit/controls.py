"""Continuations of which is known which one must win, in NumPy."""

import numpy as np

CONTROLS = ("truth", "one_changed", "shuffled", "other_document")
TRIES = 8


def control_rollouts(true_ids, counted, usable, filling, seed=0):
    """The truth and three continuations that are less than it, as rollouts.

    Every block that can be used gets `CONTROLS`: the truth; the truth with one of
    the tokens that count exchanged; with those tokens shuffled; and the truth of
    another row.

    Args:
        true_ids: int array `[B, K, G]`, what the windows hold, ended where the text
            ends.
        counted: bool array `[B, K, G]`, true tokens that count.
        usable: bool array `[B, K]`, blocks whose truth can stand as a rollout.
        filling: int array `[P]`, tokens that exchanged ones are drawn from.
        seed: int.

    Returns:
        `(token_ids, told_apart)`: int32 `[B, 4, K, G]`, and bool `[B, K]`, blocks
        where all three differ from the truth.
    """
    random = np.random.default_rng(seed)
    rows = len(true_ids)
    found = np.repeat(true_ids[:, None], len(CONTROLS), axis=1).astype("int32")
    for row in range(rows):
        others = np.argwhere(usable & (np.arange(rows) != row)[:, None])
        for block in np.flatnonzero(usable[row]):
            places = np.flatnonzero(counted[row, block])
            truth = true_ids[row, block]
            found[row, 1, block] = _one_changed(truth, places, filling, random)
            found[row, 2, block] = _shuffled(truth, places, random)
            if len(others):
                found[row, 3, block] = true_ids[
                    tuple(others[random.integers(len(others))])
                ]
    differ = np.any((found != found[:, :1]) & counted[:, None], axis=-1)
    return found, usable & np.all(differ[:, 1:], axis=1)


def _one_changed(truth, places, filling, random):
    changed, place = truth.copy(), random.choice(places)
    for _ in range(TRIES):
        changed[place] = random.choice(filling)
        if changed[place] != truth[place]:
            break
    return changed


def _shuffled(truth, places, random):
    shuffled = truth.copy()
    for _ in range(TRIES):
        shuffled[places] = random.permutation(truth[places])
        if np.any(shuffled != truth):
            break
    return shuffled
