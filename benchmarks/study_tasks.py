"""Tasks of the study: pairs of prompt and answer, and a score for what is written.

A task is a dict of a plan, `{"kind": ..., ...}`. Its documents are drawn once from a
seed and cut into parts that share no prompt:

    base        what the base model is trained on
    train       what every method is trained on
    validation  where learning rates are chosen, and the base is admitted
    test        what is reported
"""

import math
import random
from dataclasses import dataclass

PARTS = ("base", "train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """Documents in four parts, and how an answer is scored.

    Attributes:
        parts: dict from a part's name to a list of pairs of prompt and answer.
        verify: function of a prompt and a completion to a number from 0 to 1.
        binary: bool, whether `verify` says right or wrong.
        answer_tokens: int, the longest answer that is written.
    """

    parts: dict
    verify: object
    binary: bool
    answer_tokens: int


def make_task(settings):
    """The task of a plan's settings.

    Raises:
        ValueError: for an unknown kind.
    """
    kinds = {
        "numbers": numbers,
        "translation": translation,
        "reasoning_gym": from_reasoning_gym,
    }
    kind = settings["kind"]
    if kind not in kinds:
        raise ValueError(
            f"Expected a task of kind {', '.join(kinds)}. Received: {kind!r}."
        )
    return kinds[kind](**{k: v for k, v in settings.items() if k != "kind"})


def cut(pairs, sizes, seed):
    """Parts without a common prompt, in a fixed random order."""
    unique = list(dict(pairs).items())
    random.Random(seed).shuffle(unique)
    needed = sum(sizes[name] for name in PARTS)
    if len(unique) < needed:
        raise ValueError(
            f"Expected {needed} documents with prompts of their own. Received: "
            f"{len(unique)}. Ask for fewer."
        )
    parts, first = {}, 0
    for name in PARTS:
        parts[name] = unique[first : first + sizes[name]]
        first += sizes[name]
    return parts


def same_text(answers):
    """A verifier: the answer's text, white space at the ends aside."""

    def verify(prompt, completion):
        return float(completion.strip() == answers[prompt].strip())

    return verify


# Numbers: every family is a function of a random generator to (prompt, answer).


def _digits(draw, count):
    return "".join(str(draw.randrange(10)) for _ in range(count))


def _several(draw, count, low=10, high=99):
    return [draw.randint(low, high) for _ in range(count)]


def _add(draw):
    a, b = draw.randint(10, 999), draw.randint(10, 999)
    return f"{a}+{b}=", f"{a + b}"


def _subtract(draw):
    a, b = sorted(_several(draw, 2, 10, 999), reverse=True)
    return f"{a}-{b}=", f"{a - b}"


def _multiply(draw):
    a, b = draw.randint(2, 99), draw.randint(2, 20)
    return f"{a}*{b}=", f"{a * b}"


def _remainder(draw):
    a, b = draw.randint(10, 999), draw.randint(3, 12)
    return f"{a}%{b}=", f"{a % b}"


def _divisor(draw):
    b = draw.randint(2, 12)
    x, y = b * draw.randint(2, 40), b * draw.randint(2, 40)
    return f"gcd {x} {y}=", f"{math.gcd(x, y)}"


def _largest(draw):
    values = _several(draw, 5, 100, 999)
    return f"max {' '.join(map(str, values))}=", f"{max(values)}"


def _sort(draw):
    values = _several(draw, 4)
    return (
        f"sort {' '.join(map(str, values))}=",
        " ".join(map(str, sorted(values))),
    )


def _reverse(draw):
    text = _digits(draw, draw.randint(5, 9))
    return f"reverse {text}=", text[::-1]


def _count(draw):
    text, wanted = _digits(draw, draw.randint(6, 10)), draw.randrange(10)
    text += str(wanted) * draw.randrange(4)
    shuffled = "".join(draw.sample(text, len(text)))
    return f"count {wanted} in {shuffled}=", f"{shuffled.count(str(wanted))}"


def _next(draw):
    first, step = draw.randint(1, 99), draw.randint(2, 40)
    values = [first + step * i for i in range(4)]
    return f"next {' '.join(map(str, values[:3]))}=", f"{values[3]}"


def _add_small(draw):
    a, b = _several(draw, 2)
    return f"{a}+{b}=", f"{a + b}"


def _subtract_small(draw):
    a, b = sorted(_several(draw, 2), reverse=True)
    return f"{a}-{b}=", f"{a - b}"


def _multiply_small(draw):
    a, b = draw.randint(2, 99), draw.randint(2, 9)
    return f"{a}*{b}=", f"{a * b}"


def _remainder_small(draw):
    a, b = draw.randint(10, 99), draw.randint(2, 9)
    return f"{a}%{b}=", f"{a % b}"


def _largest_small(draw):
    values = _several(draw, 3)
    return f"max {' '.join(map(str, values))}=", f"{max(values)}"


FAMILIES = {
    "max_small": _largest_small,
    "add_small": _add_small,
    "subtract_small": _subtract_small,
    "multiply_small": _multiply_small,
    "remainder_small": _remainder_small,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "remainder": _remainder,
    "gcd": _divisor,
    "max": _largest,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "next": _next,
}


def numbers(families, sizes, seed=0, answer_tokens=13):
    """Short questions about numbers, with one right answer each.

    Args:
        families: list of names of `FAMILIES`; documents are drawn of all alike.
        sizes: dict from each of `PARTS` to a number of documents.
        seed: int.
        answer_tokens: int.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(
            f"Expected families of {', '.join(FAMILIES)}. Received: {unknown}."
        )
    draw = random.Random(seed)
    needed = sum(sizes[name] for name in PARTS)
    pairs = {}
    for attempt in range(50 * needed):
        if len(pairs) == needed:
            break
        prompt, answer = FAMILIES[families[attempt % len(families)]](draw)
        pairs[prompt] = answer
    return Task(cut(pairs.items(), sizes, seed), same_text(pairs), True, answer_tokens)


def from_reasoning_gym(name, sizes, seed=0, answer_tokens=16, longest=160, **config):
    """Questions of `reasoning-gym`, judged by its own verifiers.

    Args:
        name: str, such as `"chain_sum"`; or a list of names.
        sizes: dict from each of `PARTS` to a number of documents.
        seed: int.
        answer_tokens: int.
        longest: int, characters of the longest question that is taken.
        **config: of the data set.

    Raises:
        ImportError: if the package is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"Expected the package 'reasoning-gym'. Received: {error}. Install it with "
            '`pip install "keras_ebft[study]"`, or choose a task of another kind.'
        ) from error
    names = [name] if isinstance(name, str) else name
    size = 2 * sum(sizes.values()) // len(names)
    entries = {}
    for one in names:
        data = reasoning_gym.create_dataset(one, size=size, seed=seed, **config)
        for entry in data:
            if len(entry["question"]) <= longest:
                entries[f"{entry['question']}\nAnswer:"] = (data, entry)

    def verify(prompt, completion):
        data, entry = entries[prompt]
        # Some verifiers give part of the credit for a wrong answer.
        score = data.score_answer(answer=completion.strip(), entry=entry)
        return float(score >= 1.0)

    pairs = [(prompt, f" {entry['answer']}") for prompt, (_, entry) in entries.items()]
    return Task(cut(pairs, sizes, seed), verify, True, answer_tokens)


def translation(
    sizes, config="en-de", longest=60, seed=0, answer_tokens=40, data_dir=None
):
    """Short messages of installed programs and their translations, judged by chrF.

    Args:
        sizes: dict from each of `PARTS` to a number of documents.
        config: str, pair of languages.
        longest: int, characters of the longest text that is taken.
        seed: int.
        answer_tokens: int.
        data_dir: str, where the data set is kept; by default the user's cache.
    """
    import os
    from pathlib import Path

    import sacrebleu

    import keras_ebft

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = keras_ebft.data.load(
        "message_catalogues",
        split="train",
        config=config,
        data_dir=data_dir or str(cache / "keras_ebft" / "data"),
    )
    metric = sacrebleu.metrics.CHRF()
    answers = {}
    for source, target in ([text.strip() for text in pair] for pair in found):
        # Two words or more: single ones have too many translations.
        if " " in source and len(source) <= longest >= len(target):
            answers.setdefault(f"{source}\n", target)

    def verify(prompt, completion):
        written = completion.strip().partition("\n")[0]
        return metric.sentence_score(written, [answers[prompt]]).score / 100.0

    return Task(cut(answers.items(), sizes, seed), verify, False, answer_tokens)
