"""How near texts are to reference texts."""

from collections.abc import Sequence
from typing import Any

from keras_ebft.validation import check_int


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    r"""Share of predictions that equal their reference, white space at the ends aside.

    Args:
        predictions: list of strings.
        references: list of as many strings.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: if there is nothing to compare or the lengths differ.

    Example:
    >>> exact_match(["4", " 5\n", "6"], ["4", "5", "7"])
    0.6666666666666666
    """
    _check_equally_many(predictions, references)
    equal = sum(p.strip() == r.strip() for p, r in zip(predictions, references))
    return equal / len(predictions)


def bleu(
    predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> float:
    """Corpus BLEU, computed by sacrebleu.

    Args:
        predictions: list of strings.
        references: list of as many strings.
        tokenize: str, sacrebleu's name of a tokenizer, for example `"zh"`.

    Returns:
        float in [0, 100].

    Raises:
        ImportError: if sacrebleu is not installed.
        ValueError: if there is nothing to compare or the lengths differ.
    """
    _check_equally_many(predictions, references)
    metric = _sacrebleu().metrics.BLEU(tokenize=tokenize)
    return metric.corpus_score(list(predictions), [list(references)]).score


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, computed by sacrebleu.

    Args:
        predictions: list of strings.
        references: list of as many strings.

    Returns:
        float in [0, 100].

    Raises:
        ImportError: if sacrebleu is not installed.
        ValueError: if there is nothing to compare or the lengths differ.
    """
    _check_equally_many(predictions, references)
    metric = _sacrebleu().metrics.CHRF()
    return metric.corpus_score(list(predictions), [list(references)]).score


def comet(
    sources: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    model: str = "Unbabel/wmt22-comet-da",
    batch: int = 8,
) -> float:
    """Mean COMET score, a trained model's judgement of translations.

    Args:
        sources: list of strings that were translated.
        predictions: list of as many translations.
        references: list of as many reference translations.
        model: name of a COMET model, fetched over the network when it is first
            used, or path of a checkpoint.
        batch: int, translations per forward pass.

    Returns:
        float; 1 is a perfect translation.

    Raises:
        ImportError: if the package `unbabel-comet` is not installed.
        ValueError: if there is nothing to compare or the lengths differ.
    """
    _check_equally_many(predictions, references)
    _check_equally_many(predictions, sources)
    batch = check_int("batch", batch, 1)
    try:
        import comet as library
    except ImportError as error:
        raise ImportError(
            "Expected the package 'unbabel-comet' for COMET. Received: "
            f'{error}. Install it: pip install "keras_ebft[comet]", or use `bleu` or '
            "`chrf`."
        ) from error
    path = model if model.endswith(".ckpt") else library.download_model(model)
    samples = [
        {"src": source, "mt": prediction, "ref": reference}
        for source, prediction, reference in zip(sources, predictions, references)
    ]
    scorer = library.load_from_checkpoint(path)
    return float(scorer.predict(samples, batch_size=batch).system_score)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(
            f"Expected the package 'sacrebleu'. Received: {error}. Install it: "
            'pip install "keras_ebft[data]".'
        ) from error
    return sacrebleu


def _check_equally_many(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError(
            "Expected lists of strings. Received: a single string. Wrap it in a list."
        )
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            "Expected as many predictions as references, and at least one. "
            f"Received: {len(predictions)} and {len(references)}."
        )
