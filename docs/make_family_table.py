"""Writes docs/families.md: every family, its route and what was tested.

    python docs/make_family_table.py            # from the code alone
    python docs/make_family_table.py --measure  # also runs each family here

Measuring runs the comparison of `tests/test_families.py` under the backend in
`KERAS_BACKEND` and stores the largest differences in docs/families.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MEASURED = ROOT / "docs" / "families.json"
ROUTES = {
    "serving": "shared document, attention by KerasHub's serving interface",
    "patched": "shared document, attention by patched layers",
    "rows": "every block a sequence of its own (slow)",
}
HEAD = """# Families

Made by `docs/make_family_table.py`. Errors are the largest absolute difference of
log-probabilities between block-parallel passes and each block alone as a plain
causal sequence, float32, tiny random models; `tests/test_families.py` runs the same
comparison, and one of gradients, on every backend.

On a shared document the embeddings run first, then one decoder layer after another
with the caller's attention in each, then the final normalisation
(`keras_ebft/networks/routed_network.py`). Other families are run as KerasHub's own
graph, on whole rows: those with a recurrent state (Qwen 3.5, RWKV-7), and those whose
attention depends on more than queries, keys, values and positions (GPT-OSS's sinks;
Phi-3's long frequencies, which change with a row's length; Gemma 4's uppermost layers,
which attend to keys and values from below, of several widths).

How a family is added stands in `keras_ebft/networks/families/__init__.py`.

| family | way it is run | JAX | TensorFlow | PyTorch |
|---|---|---|---|---|
"""


def measure():
    """Errors of every family under this process's backend."""
    import keras
    from test_families import FAMILIES, errors

    known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    backend = keras.backend.backend()
    known[backend] = {name: f"{errors(name)['log_prob']:.1e}" for name in FAMILIES}
    MEASURED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def table():
    """The table in Markdown."""
    from helpers import family
    from test_families import FAMILIES

    from keras_ebft.networks import REFUSED, family_of

    measured = json.loads(MEASURED.read_text())
    lines = []
    for name in FAMILIES:
        route = family_of(family(name).backbone).route
        errors = [measured[b][name] for b in ("jax", "tensorflow", "torch")]
        lines.append(f"| {name} | {ROUTES[route]} | {' | '.join(errors)} |")
    lines.append("")
    lines.append("Refused, with an error that says so:\n")
    for name, reason in sorted(REFUSED.items()):
        lines.append(f"- {name.removesuffix('Backbone')}: {reason}.")
    return HEAD + "\n".join(lines) + "\n"


def main():
    """Measures if asked to, and writes the table where all is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    if arguments.measure:
        measure()
    if len(json.loads(MEASURED.read_text())) == 3:
        (ROOT / "docs" / "families.md").write_text(table())


if __name__ == "__main__":
    main()
