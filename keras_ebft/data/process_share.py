"""Documents that belong to one of several processes."""

from typing import Any

from keras_ebft.configurable import Shown


class ProcessShare(Shown):
    """Documents that this process alone has, of several that train together.

    Otherwise every process is given the same documents, and `fit` takes its share of
    each batch. Where documents are shared out already, say because each process streams
    files of its own, this says so. A batch is then put together of what every process
    brings to it: `batch_size` is that of all of them, and a stream's batches are the
    process's own rows.

    Processes need not have as many documents. An epoch is as long as that of the
    process that has most of them; the others take part with rows that count for
    nothing.

    Args:
        documents: what `EBFTModel.fit` and `evaluate` take: documents in memory, or a
            stream of batches that knows its length, or is read with
            `steps_per_epoch`.

    Raises:
        TypeError: for a `ProcessShare`.

    Example:
    ```python
    import keras_ebft

    mine = keras_ebft.data.ProcessShare(["one text", "another"])
    # model.fit(mine, batch_size=16)
    ```
    """

    def __init__(self, documents: Any) -> None:
        if isinstance(documents, ProcessShare):
            raise TypeError(
                "Expected documents, or a stream of batches of them. Received: a "
                "ProcessShare. Pass it as it is."
            )
        self.documents = documents
