"""Functions with docstrings found in Python source."""

import ast
import dataclasses
import io


@dataclasses.dataclass(frozen=True)
class DocumentedFunction:
    """A function as a task: write the body.

    Attributes:
        name: str, with the names of the classes around it: `"Counter.update"`.
        prompt: str, `def` line and docstring, without indentation of its own,
            ending with a line break.
        body: str, the lines after the docstring.
        doctests: str, the docstring, if it has examples and the function stands
            alone, so that they can be run; else empty.
    """

    name: str
    prompt: str
    body: str
    doctests: str


def documented_functions(source):
    """Finds functions that have a docstring and a body.

    Args:
        source: str.

    Returns:
        list of `DocumentedFunction`, in the order of the source.

    Raises:
        SyntaxError: if the source is not Python.
    """
    # Where Python ends lines; `str.splitlines` also does at form feeds and U+2028.
    lines = list(io.StringIO(source, newline=""))
    return [
        found
        for prefix, node in _functions(ast.parse(source), "")
        if (found := _task(prefix, node, lines)) is not None
    ]


def _functions(node, prefix):
    """Yields `(prefix of the name, node)` of functions in modules and classes."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _task(prefix, node, lines):
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    end = node.body[0].end_lineno
    if node.body[1].lineno <= end:
        return None
    prompt = _without_indent(lines[node.lineno - 1 : end], node.col_offset)
    body = _without_indent(lines[end : node.end_lineno], node.col_offset)
    try:
        ast.parse(prompt + body)
    except SyntaxError:
        # A text that reaches into the margin, or a second statement on a line.
        return None
    runnable = not prefix and not node.decorator_list and ">>>" in docstring
    return DocumentedFunction(
        prefix + node.name, prompt, body, docstring if runnable else ""
    )


def _without_indent(lines, width):
    indent = " " * width
    return "".join(line.removeprefix(indent) for line in lines)
