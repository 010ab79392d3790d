"""Runs inside the sandbox: generated code, answering calls from the checker.

This process belongs to the generated code, which may change anything in it. It
only ever answers questions; what is right is decided in another process.
"""

import builtins
import collections.abc
import contextlib
import io
import json
import operator
import os
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from plain_data import NotPlainError, decode, encode, encode_iterator
from program import block_sockets, read_all


class Candidate:
    """The namespace of the generated code and the objects it has handed out.

    Args:
        namespace: dict.
        share_objects: bool, whether results may be more than plain data.
    """

    def __init__(self, namespace, share_objects):
        self.namespace = namespace
        self.share_objects = share_objects
        self.objects = []

    def answer(self, question, arguments):
        """Answers one question; returns what JSON can hold."""
        return getattr(self, f"answer_{question}")(*arguments)

    def answer_names(self, wanted):
        """The values of those names that exist, modules by name."""
        found = {}
        for name in wanted:
            if name in self.namespace:
                value = self.namespace[name]
                if isinstance(value, types.ModuleType):
                    found[name] = ["module", value.__name__]
                else:
                    found[name] = ["value", encode(value, self._refer)]
        return found

    def answer_call(self, reference, arguments, keywords):
        """Calls an object."""
        positional = [self.decode(argument) for argument in arguments]
        named = {name: self.decode(value) for name, value in keywords.items()}
        return self.encode(self.objects[reference](*positional, **named))

    def answer_attribute(self, reference, name):
        """Reads an attribute."""
        return self.encode(getattr(self.objects[reference], name))

    def answer_operate(self, name, arguments):
        """What a built-in function, or the operator of that name, makes of objects."""
        found = getattr(builtins, name, None) or getattr(operator, name, None)
        operation = found or getattr(operator, f"{name}_")
        return self.encode(operation(*map(self.decode, arguments)))

    def encode(self, value):
        """A result, or a reference to it where it is not plain."""
        return encode(value, self._refer if self.share_objects else _expand)

    def decode(self, data):
        """A value, references being this process' own objects."""
        return decode(data, self.objects.__getitem__)

    def _refer(self, value):
        self.objects.append(value)
        return ["reference", len(self.objects) - 1]


def _expand(value):
    if isinstance(value, collections.abc.Iterator):
        return encode_iterator(value)
    raise NotPlainError(f"the result is a {type(value).__name__}, not plain data")


def reply(candidate, question, arguments):
    """`["value", answer, printed]` or `["error", type, arguments, printed]`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            answer = candidate.answer(question, arguments)
        except BaseException as error:
            details = _plain_arguments(error)
            return ["error", type(error).__name__, details, printed.getvalue()]
    return ["value", answer, printed.getvalue()]


def _plain_arguments(error):
    try:
        return encode(list(error.args))
    except TypeError:
        return encode([str(error)])


def main():
    """Runs the generated code, then answers until nobody asks any more."""
    arguments = json.loads(sys.argv[1])
    source = read_all(arguments["source"])
    questions = os.fdopen(arguments["questions"], "r", encoding="utf-8")
    answers = os.fdopen(arguments["answers"], "w", encoding="utf-8")
    if arguments["block_sockets"]:
        block_sockets()
    namespace = {"__name__": "solution"}
    exec(compile(source, "<generated>", "exec"), namespace)
    candidate = Candidate(namespace, arguments["share_objects"])
    for line in questions:
        answers.write(json.dumps(reply(candidate, *json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
