"""Python functions with a task in words and inputs to try: a data set that is checked.

They lie in the package `reasoning-gym` (Apache-2.0), which is not imported: about 3,000
tasks, each with a function that solves it and one that draws inputs. Taken are
those whose program is one function that needs nothing but Python's `math`. What is
asked of a model is the body; it is right where it returns what the original returns.
"""

import ast
import gzip
import importlib.metadata
import json
import random
import re
import sys
import textwrap

from keras_ebft.evaluation import CodeProblem

FILE = "reasoning_gym/data/codeio.jsonl.gz"
CALLS = 5
MODULES = ("math",)
# Results are drawn and compared inside the sandbox: nothing of the package runs
# outside. Sums in another order differ in the last digits of floats.
TESTS = """
import math
from random import Random

{generator}

{original}

def same(one, other):
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other

for seed in range({calls}):
    given = generate_inputs(Random(seed))
    expected = original_solution(**generate_inputs(Random(seed)))
    assert same(expected, main_solution(**given))
"""


def load(most_characters=900):
    """`(question, answer, problem)` of every function that is short enough.

    Args:
        most_characters: int, of question and answer together.

    Returns:
        list of `(str, str, CodeProblem)`, in a fixed random order. A question is the
        beginning of a program up to the docstring of the function, an answer its
        body.
    """
    try:
        package = importlib.metadata.distribution("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "The functions lie in the package reasoning-gym, which is not installed. "
            "Run `pip install --no-deps reasoning-gym==0.1.25`, or this with --dataset "
            "python_docstrings."
        )
    with gzip.open(package.locate_file(FILE), "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    found = [function for function in map(read_function, records) if function]
    # No task and no solution twice: some are to be held out.
    found = {question: rest for question, *rest in found}
    found = {answer: (question, answer, p) for question, (answer, p) in found.items()}
    short = [f for f in found.values() if len(f[0]) + len(f[1]) <= most_characters]
    random.Random(0).shuffle(short)
    return short


def read_function(record):
    """Question, answer and problem of a record, or `None` for one that is not taken."""
    try:
        body = ast.parse(record["code_sample"]).body
    except SyntaxError:
        return None
    function, imports = body[-1], body[:-1]
    if not isinstance(function, ast.FunctionDef) or function.name != "main_solution":
        return None
    generator = ast.parse(record["input_generator"])
    if not all(isinstance(s, ast.Import | ast.ImportFrom) for s in imports):
        return None
    if not all(map(needs_only_math, (*imports, generator, function))):
        return None
    statements = function.body[ast.get_docstring(function) is not None :]
    asked = docstring(record)
    if not statements or not asked.isascii():
        return None
    answer = textwrap.indent("\n".join(map(ast.unparse, statements)), "    ") + "\n"
    head = "".join(f"{ast.unparse(statement)}\n" for statement in imports)
    signature = f"def main_solution({ast.unparse(function.args)}):"
    question = f"{head}\n\n{signature}\n{asked}".lstrip("\n")
    function.name = "original_solution"
    tests = TESTS.format(
        generator=record["input_generator"],
        original="\n".join(map(ast.unparse, [*imports, function])),
        calls=CALLS,
    )
    return question, answer, CodeProblem(question, tests=tests)


def needs_only_math(tree):
    """Whether code imports nothing but Python's `math`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module}
        else:
            continue
        if not names <= set(MODULES):
            return False
    return True


def docstring(record):
    """What the function is to do, and what it returns, as a docstring."""
    result = record["input_output_spec"].partition("Output:")[2].strip()
    result = re.sub("^`?return`?", "Returns", result)
    paragraphs = [
        textwrap.fill(line, 84)
        for text in (record["task_description"], "", result)
        for line in text.splitlines() or [""]
    ]
    text = "\n".join(paragraphs).replace("\\", "").replace('"""', "'").strip()
    return textwrap.indent(f'"""{text}\n"""\n', "    ")
