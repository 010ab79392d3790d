"""Interactive sessions in docstrings as code of the site."""

import re

import griffe

# From a prompt to the next empty line.
SESSION = re.compile(r"^( *)>>> .*\n?(?:.*\S.*\n?)*", re.MULTILINE)


class Sessions(griffe.Extension):
    """Puts fences around what stands after `>>>`, which Markdown takes for a quote."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Changes one docstring."""
        if obj.docstring:
            obj.docstring.value = SESSION.sub(fenced, obj.docstring.value)


def fenced(session: re.Match[str]) -> str:
    """A session as a block of code."""
    indent = session[1]
    return f"\n{indent}```pycon\n{session[0].rstrip()}\n{indent}```\n"
