"""Runs inside a sandbox of its own: tests, against generated code elsewhere.

The tests call stand-ins for the generated code's functions. Arguments and results
travel as plain data, and all comparing happens here, where no generated code has
ever run. The verdict goes, with a number that only this process and the one that
started it know, into a pipe that the generated code does not have.
"""

import ast
import builtins
import importlib
import io
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from plain_data import decode, encode
from program import block_sockets, read_all

ERROR_CHARACTERS = 2000


class CandidateError(Exception):
    """The generated code raised an exception that is not one of Python's own."""


class Connection:
    """Questions to the generated code and its answers."""

    def __init__(self, questions, answers, share_objects):
        self._questions = questions
        self._answers = answers
        self._share_objects = share_objects

    def ask(self, question, *arguments):
        """Asks one question; what the generated code printed is printed here."""
        self._questions.write(json.dumps([question, arguments]) + "\n")
        self._questions.flush()
        line = self._answers.readline()
        if not line:
            raise CandidateError("the generated code has ended")
        kind, *content, printed = json.loads(line)
        sys.stdout.write(str(printed))
        if kind == "error":
            raise error_named(*content)
        return content[0]

    def decoded(self, question, *arguments):
        """Asks one question; returns the result."""
        return self.decode(self.ask(question, *arguments))

    def decode(self, data):
        """A result from the other side; other objects become stand-ins."""
        return decode(data, self.stand_in if self._share_objects else _refuse)

    def stand_in(self, number):
        """The stand-in of an object that the generated code has handed out."""
        return StandIn(self, number)


def _refuse(number):
    raise CandidateError("the result is not plain data")


class StandIn:
    """An object of the generated code's process.

    What Python's operators and built-in functions do with the object happens over
    there, with one exception: beside a value of the tests' own it is never equal,
    and cannot be put in order, whatever its class says.
    """

    __slots__ = ("_stand_in",)

    def __init__(self, connection, number):
        object.__setattr__(self, "_stand_in", (connection, int(number)))

    def __call__(self, *arguments, **keywords):
        """Calls the object over there."""
        connection, number = self._stand_in
        return connection.decoded(
            "call",
            number,
            [to_candidate(argument) for argument in arguments],
            {name: to_candidate(value) for name, value in keywords.items()},
        )

    def __getattr__(self, name):
        connection, number = self._stand_in
        return connection.decoded("attribute", number, name)

    def __setattr__(self, name, value):
        _operate(self, "setattr", self, name, value)

    def __delattr__(self, name):
        _operate(self, "delattr", self, name)

    def __contains__(self, value):
        return bool(_operate(self, "contains", self, value))

    def __instancecheck__(self, value):
        return isinstance(value, StandIn) and _operate(self, "isinstance", value, self)

    def __subclasscheck__(self, value):
        return isinstance(value, StandIn) and _operate(self, "issubclass", value, self)


def _operate(stand_in, operation, *arguments):
    """One operation of the generated code's process."""
    connection, _ = stand_in._stand_in
    written = [to_candidate(argument) for argument in arguments]
    return connection.decoded("operate", operation, written)


def _method(operation):
    return lambda self, *arguments: _operate(self, operation, self, *arguments)


def _reflected(operation):
    return lambda self, other: _operate(self, operation, other, self)


def _comparison(operation):
    def compare(self, other):
        if not isinstance(other, StandIn):
            # Python's own answer: not equal, and no order.
            return NotImplemented
        return _operate(self, operation, self, other)

    return compare


OPERATIONS = ("abs", "neg", "pos", "invert", "round", "getitem", "setitem", "delitem")
OPERATIONS += ("len", "hash", "iter", "next", "reversed", "bool", "str", "repr")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
ARITHMETIC += ("lshift", "rshift", "xor", "and", "or", "divmod")


def _add_operators():
    # Python looks operators up in the class, so that `__getattr__` is not asked.
    for name in OPERATIONS:
        setattr(StandIn, f"__{name}__", _method(name))
    for name in COMPARISONS:
        setattr(StandIn, f"__{name}__", _comparison(name))
    for name in ARITHMETIC:
        setattr(StandIn, f"__{name}__", _method(name))
        setattr(StandIn, f"__r{name}__", _reflected(name))
        setattr(StandIn, f"__i{name}__", _method(f"i{name}"))


_add_operators()


def to_candidate(value):
    """A value for the generated code, stand-ins as the objects they stand for."""
    return encode(value, _reference)


def _reference(value):
    if isinstance(value, StandIn):
        return ["reference", value._stand_in[1]]
    return encode(value)


def error_named(name, arguments):
    """An exception of Python's own type `name`, or `CandidateError`."""
    kind = getattr(builtins, str(name), None)
    arguments = decode(arguments, _refuse)
    if isinstance(kind, type) and issubclass(kind, Exception):
        error = kind.__new__(kind)
        error.args = tuple(arguments)
        return error
    return CandidateError(f"{name}: {arguments}")


def names_wanted(sources):
    """Names the tests use, and neither define themselves nor have from Python."""
    used, defined = set(), set(dir(builtins))
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
    return sorted(used - defined)


def namespace_for(connection, sources):
    """What the tests see of the generated code."""
    namespace = {"__name__": "tests"}
    wanted = names_wanted(sources)
    found = connection.ask("names", wanted)
    # Of the answer, only what was asked for: anything else could hide a builtin.
    for name in wanted:
        kind, content = found.get(name, ("missing", None))
        if kind == "value":
            namespace[name] = decode(content, connection.stand_in)
        elif kind == "module" and content in sys.stdlib_module_names:
            # The real one, from this process.
            namespace[name] = importlib.import_module(content)
    return namespace


def run_tests(connection, source):
    """Runs tests; they pass if they end without an exception."""
    namespace = namespace_for(connection, [source])
    exec(compile(source, "<tests>", "exec"), namespace)


def run_doctests(connection, text):
    """Runs the examples of a docstring; they pass if all outputs are right."""
    # Takes longer to import than everything else here together.
    import doctest

    examples = doctest.DocTestParser().get_examples(text)
    namespace = namespace_for(connection, [example.source for example in examples])
    test = doctest.DocTest(examples, namespace, "docstring", None, None, text)
    written = io.StringIO()
    results = doctest.DocTestRunner(verbose=False).run(test, out=written.write)
    if results.failed or not results.attempted:
        raise AssertionError(written.getvalue() or "no examples")


def main():
    """Runs the tests and writes the verdict."""
    arguments = json.loads(sys.argv[1])
    tests = json.loads(read_all(arguments["source"]))
    verdict = os.fdopen(arguments["verdict"], "w", encoding="utf-8")
    connection = Connection(
        os.fdopen(arguments["questions"], "w", encoding="utf-8"),
        os.fdopen(arguments["answers"], "r", encoding="utf-8"),
        tests["share_objects"],
    )
    if arguments["block_sockets"]:
        block_sockets()
    run = run_doctests if tests["kind"] == "doctests" else run_tests
    try:
        run(connection, tests["source"])
        passed, message = True, ""
    except BaseException as error:
        passed, message = False, f"{type(error).__name__}: {error}"
    json.dump(
        {
            "number": tests["number"],
            "passed": passed,
            "message": message[:ERROR_CHARACTERS],
        },
        verdict,
    )
    verdict.flush()


if __name__ == "__main__":
    main()
