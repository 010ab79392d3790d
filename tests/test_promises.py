"""Every test that docs/promises.md names is there."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_independent

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "promises.md"


def test_nothing_promises_that_keras_backups_survive():
    """They write over their only file: wherever they are named, that is said."""
    reservation = re.compile(r"Not promised|over its only file|is refused")
    named = 0
    for page in [TABLE.parent.parent / "README.md", *TABLE.parent.rglob("*.md")]:
        # Paragraphs, and points of a list.
        for part in re.split(r"\n\s*\n|\n- ", page.read_text("utf-8")):
            if "BackupAndRestore" in part:
                named += 1
                assert reservation.search(part), f"{page.name}: {part}"
    assert named >= 3


def test_every_promise_is_held_by_a_test():
    rows = [
        line.strip().strip("|").split("|")
        for line in TABLE.read_text("utf-8").splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| promised"))
    ]
    assert len(rows) > 30
    for promise, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("::"), promise
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text("utf-8"))
            found = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in found, f"{file}::{name} of: {promise}"
