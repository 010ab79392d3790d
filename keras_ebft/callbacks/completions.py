"""A callback that shows what the model writes while it trains."""

import os
from typing import Any

from keras_ebft.backend.replicas import is_first
from keras_ebft.callbacks.completion_writers import (
    JsonLines,
    MlflowTable,
    PrintedTable,
    TensorBoardText,
    WandbTable,
)
from keras_ebft.callbacks.periodic import Periodic
from keras_ebft.validation import MOST_INT, check_bool, check_int


class Completions(Periodic):
    """Shows what the model writes in the blocks of a few documents, and its rewards.

    For every block: the prompt, the true continuation, and each rollout with its
    alignment, diversity, reward and advantage. The documents are read in one batch,
    as `EBFTModel.completions` reads them, with the same random numbers every time.

    Training is left as it is: the same batches, random numbers and weights as without
    it. On JAX what it needs is compiled when it first fires.

    Args:
        documents: documents in memory, of any form `fit` accepts; a handful.
        every: int, steps or epochs from one time to the next.
        unit: `"epochs"` or `"steps"`, batches that were trained on.
        at_start: bool, whether also before the first step.
        path: path of a file that gets one line of JSON per block, or `None`. What is
            there stays; see `EBFTModel.completions` for what a line holds, beside
            `step`, `epoch` and `time` (seconds since 1970).
        show: bool, whether a table is printed.
        tensorboard: folder that gets texts, or `None`. Needs
            `pip install "keras_ebft[tensorboard]"`.
        wandb: bool, whether the running run of W&B (`wandb.init()`, online or
            offline) gets a table `completions` each time.
        mlflow: bool, whether the active run of MLflow gets the table
            `completions.json`.
        seed: int, decides the rollouts.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range. When training begins, for documents that
            cannot be used, a model that does not learn from rollouts, and without
            a run of W&B.
        ImportError: if a package that is asked for is not installed.

    Example:
    ```python
    completions = keras_ebft.callbacks.Completions(
        held_out[:2], every=50, unit="steps", path="run/completions.jsonl"
    )
    model.fit(texts, callbacks=[completions])
    ```
    """

    def __init__(
        self,
        documents: Any,
        every: int = 1,
        unit: str = "epochs",
        *,
        at_start: bool = False,
        path: str | os.PathLike[str] | None = None,
        show: bool = True,
        tensorboard: str | os.PathLike[str] | None = None,
        wandb: bool = False,
        mlflow: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(every, unit)
        self.documents = documents
        self.at_start = check_bool("at_start", at_start)
        self.seed = check_int("seed", seed, 0, MOST_INT)
        self.writers: list[Any] = []
        if path is not None:
            self.writers.append(JsonLines(path))
        if check_bool("show", show):
            self.writers.append(PrintedTable())
        if tensorboard is not None:
            self.writers.append(TensorBoardText(tensorboard))
        if check_bool("wandb", wandb):
            self.writers.append(WandbTable())
        if check_bool("mlflow", mlflow):
            self.writers.append(MlflowTable())
        if not self.writers:
            raise ValueError(
                "Expected a place for completions. Received: show=False and no other. "
                'Pass for example path="completions.jsonl".'
            )

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks what would otherwise fail hours later."""
        super().on_train_begin(logs)
        self.ebft_model.check_completions(self.documents)
        if not is_first():
            # All take part in what has to be computed.
            self.writers = []
        for writer in self.writers:
            writer.begin()

    def begin(self, logs: Any) -> None:
        """Writes what the model writes before training, if that is wanted."""
        if self.at_start:
            self.fire(logs)

    def fire(self, logs: Any) -> None:
        """Writes what the model writes now, everywhere."""
        blocks = self.ebft_model.completions(self.documents, seed=self.seed)
        for writer in self.writers:
            writer.write(self.step, self.epoch, blocks)

    def on_train_end(self, logs: Any = None) -> None:
        """Closes what is open."""
        for writer in self.writers:
            writer.end()
