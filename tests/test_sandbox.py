"""One attack for every promise of the sandbox."""

import os
import time
from pathlib import Path

import pytest

from keras_ebft.evaluation import PROTECTIONS, Sandbox
from keras_ebft.evaluation.sandbox_processes import Ending, Outcome

pytestmark = pytest.mark.backend_independent

SANDBOX = Sandbox(wall_seconds=5.0, cpu_seconds=1, memory_bytes=2**28)
FULL = set(SANDBOX.run("").protections) == set(PROTECTIONS)
isolated = pytest.mark.skipif(
    not FULL, reason="this system offers neither root nor user namespaces"
)


def test_a_program_runs():
    result = SANDBOX.run("import sys\nprint(6 * 7)\nprint('no', file=sys.stderr)")
    assert (result.status, result.exit_code) == ("exited", 0)
    assert (result.output, result.errors) == ("42\n", "no\n")
    assert SANDBOX.run("raise SystemExit(3)").exit_code == 3
    failed = SANDBOX.run("1 / 0")
    assert failed.exit_code == 1
    assert "ZeroDivisionError" in failed.errors


def test_its_directory_is_its_own_and_empty():
    source = "import os\nprint(os.listdir())\nopen('a', 'w').write('x')"
    assert SANDBOX.run(source).output == "[]\n"
    assert SANDBOX.run(source).output == "[]\n"


def test_infinite_loop():
    start = time.monotonic()
    result = SANDBOX.run("while True: pass")
    assert result.status == "timeout"
    assert result.exit_code is None
    assert time.monotonic() - start < 4


def test_sleeping_forever():
    result = Sandbox(wall_seconds=0.5).run("import time\ntime.sleep(60)")
    assert result.status == "timeout"
    assert 0.4 < result.seconds < 3


def test_signals_that_ask_to_end_can_be_ignored_but_not_for_long():
    source = (
        "import signal\n"
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "while True: pass"
    )
    result = Sandbox(wall_seconds=8.0, cpu_seconds=1).run(source)
    assert result.status in ("killed", "timeout")
    assert result.seconds < 6


def test_fork_bomb():
    source = "import os\nwhile True:\n    os.fork()"
    result = SANDBOX.run(source)
    assert "BlockingIOError" in result.errors
    several = Sandbox(wall_seconds=3.0, processes=4).run(
        "import os\n"
        "children = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0:\n"
        "            while True: pass\n"
        "        children += 1\n"
        "except BlockingIOError:\n"
        "    print(children)"
    )
    assert several.output == "3\n"


@isolated
def test_nothing_outlives_the_program():
    """A child in a session of its own still ends with the program."""
    source = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    time.sleep(60)\n"
        "print('parent')"
    )
    result = Sandbox(processes=2).run(source)
    assert result.output == "parent\n"
    assert result.seconds < 5


def test_allocating_ten_gigabytes():
    result = SANDBOX.run("data = bytearray(10 * 2**30)")
    assert "MemoryError" in result.errors
    growing = SANDBOX.run("data = []\nwhile True: data.append(bytearray(2**20))")
    assert "MemoryError" in growing.errors


@isolated
def test_reading_the_home_directory(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path.home() / ".profile", "/etc/passwd", "/proc/1/environ"):
        result = SANDBOX.run(f"print(open({str(path)!r}).read())")
        assert result.exit_code == 1
        assert not result.output
        assert "FileNotFoundError" in result.errors
    listed = SANDBOX.run("import os\nprint(sorted(os.listdir('/')))").output
    assert "home" not in listed
    assert "tmp" not in listed
    assert SANDBOX.run("import os\nprint(dict(os.environ))").output.count("=") == 0


@isolated
def test_writing_outside(tmp_path):
    for folder in (tmp_path, "/tmp", "/dev/shm", "/", "/usr/lib", "/scripts", "/dev"):
        result = SANDBOX.run(f"open({str(folder)!r} + '/mark', 'w').write('x')")
        assert result.exit_code == 1, folder
    for path in (tmp_path / "mark", Path("/tmp/mark"), Path("/mark")):
        assert not path.exists()


def test_filling_the_disk():
    sandbox = Sandbox(disk_bytes=2**20)
    one = sandbox.run("open('a', 'wb').write(bytes(2**24))")
    assert "File too large" in one.errors
    if FULL:
        many = sandbox.run(
            "for i in range(9): open(str(i), 'wb').write(bytes(2**18))\nprint('all')"
        )
        assert "No space left" in many.errors


def test_too_many_open_files():
    source = "files = [open(__import__('os').devnull) for _ in range(40)]"
    assert "Too many open files" in SANDBOX.run(source).errors


def test_opening_a_socket():
    """Neither to the world nor to this machine, where someone listens."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        )
        result = SANDBOX.run(source)
    assert result.exit_code == 1
    assert "OSError" in result.errors or "PermissionError" in result.errors


@isolated
def test_killing_the_parent():
    source = (
        "import os, signal\n"
        f"for process in (os.getppid(), {os.getpid()}, {os.getppid()}, 1, -1):\n"
        "    try:\n"
        "        os.kill(process, signal.SIGKILL)\n"
        "    except OSError:\n"
        "        pass\n"
        "print('still here')"
    )
    result = SANDBOX.run(source)
    assert result.status == "exited"
    assert result.output == "still here\n"
    # This very process is alive to see it.
    assert SANDBOX.run("print(1)").output == "1\n"


@isolated
def test_no_privileges_to_be_had():
    source = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(os.getuid() != 0)\n"
        "print(libc.mount(b'none', b'/work', b'tmpfs', 0, None))\n"
        "print(libc.unshare(0x10000000 | 0x20000) , libc.chroot(b'/work'))\n"
        "try:\n"
        "    os.setuid(0)\n"
        "except PermissionError:\n"
        "    print('refused')\n"
        "except OSError:\n"
        "    print('refused')\n"
    )
    lines = SANDBOX.run(source).output.splitlines()
    assert lines[0] == "True"
    assert lines[1] == "-1"
    assert lines[2].endswith("-1")
    assert lines[3] == "refused"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_printing_without_end(stream):
    result = Sandbox(output_bytes=10_000).run(
        f"import sys\nwhile True: sys.{stream}.write('x' * 1000)"
    )
    assert result.status == "too_much_output"
    assert len(result.output) + len(result.errors) <= 20_000


CODE = "def double(x):\n    return 2 * x\n"


def test_check():
    assert SANDBOX.check(CODE, "assert double(3) == 6").passed
    wrong = SANDBOX.check(CODE, "assert double(3) == 7, 'seven'")
    assert (wrong.passed, wrong.status) == (False, "failed")
    assert wrong.message == "AssertionError: seven"
    broken = SANDBOX.check("def double(x) return", "assert double(3) == 6")
    assert not broken.passed
    assert "SyntaxError" in broken.message
    raising = SANDBOX.check("raise ValueError('a\\u2028b\\x0cc')", "assert double(3)")
    assert raising.message == "ValueError: a\u2028b\x0cc"
    missing = SANDBOX.check("pass", "assert double(3) == 6")
    assert missing.message.startswith("NameError")
    endless = SANDBOX.check("def double(x):\n    while True: pass", "double(1)")
    assert not endless.passed


VALUES = (
    "[None, True, -3, 2**200, 1.5, float('inf'), 2j, 'ä\\ud800', b'\\xff', (1, (2,)), "
    "[3], {4}, frozenset({5}), {'a': [1], (1, 2): None}]"
)


def test_values_pass_both_ways():
    tests = (
        f"values = {VALUES}\n"
        "assert same(values) == values\n"
        "assert [type(v) for v in same(values)] == [type(v) for v in values]\n"
        "assert same(x=float('nan')) != same(x=float('nan'))\n"
        "assert list(count(3)) == [0, 1, 2]\n"
        "import math\n"
        "assert math.isclose(third(1), 1 / 3)\n"
    )
    code = (
        "def same(x): return x\n"
        "def count(n): yield from range(n)\n"
        "third = lambda x: x / 3\n"
    )
    result = SANDBOX.check(code, tests)
    assert result.passed, result.message


def test_exceptions_keep_their_type():
    code = "def f(x):\n    return {'a': 1}[x] if x else int('b')"
    tests = (
        "try:\n    f('z')\nexcept KeyError as error:\n    assert error.args == ('z',)\n"
        "else:\n    raise AssertionError\n"
        "try:\n    f('')\nexcept ValueError:\n    pass\n"
        "else:\n    raise AssertionError\n"
    )
    result = SANDBOX.check(code, tests)
    assert result.passed, result.message


def test_doctests():
    docstring = """
    >>> shout('a')
    A
    >>> shout('')
    Traceback (most recent call last):
    ValueError: nothing
    >>> [half(v) for v in (1, 2)]
    [0.5, 1.0]
    """
    code = (
        "def shout(text):\n"
        "    if not text: raise ValueError('nothing')\n"
        "    print(text.upper())\n"
        "def half(v): return v / 2\n"
    )
    result = SANDBOX.check_doctests(code, docstring)
    assert result.passed, result.message
    assert not SANDBOX.check_doctests(CODE, ">>> double(2)\n5").passed


def test_classes():
    code = (
        "class Stack:\n"
        "    def __init__(self): self.items = []\n"
        "    def push(self, item): self.items.append(item)\n"
        "    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n"
    )
    tests = "s = Stack()\ns.push(3)\nassert len(s) == 1\nassert s.pop() == 3"
    result = SANDBOX.check(code, tests, share_objects=True)
    assert result.passed, result.message
    strict = SANDBOX.check(code, tests)
    assert "not plain data" in strict.message


FORGERIES = {
    "exit at once": "import os\nos._exit(0)",
    "exit when called": "def double(x):\n    import os\n    os._exit(0)",
    "system exit": "def double(x):\n    raise SystemExit(0)",
    "print a verdict": (
        "def double(x):\n"
        '    print(\'{"number": "0", "passed": true}\')\n'
        "    print('passed')\n"
    ),
    "equal to everything": (
        "class Any:\n"
        "    def __eq__(self, other): return True\n"
        "    def __bool__(self): return True\n"
        "    def __len__(self): return 6\n"
        "def double(x): return Any()\n"
    ),
    "an int equal to everything": (
        "class Any(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n"
        "def double(x): return Any(5)\n"
    ),
    "replace builtins": (
        "import builtins\n"
        "builtins.AssertionError = Warning\n"
        "builtins.abs = lambda value: 0\n"
        "builtins.sum = lambda values: 12\n"
        "builtins.sorted = lambda values: [2, 4]\n"
        "def double(x): return 5\n"
    ),
    "answer with more than was asked for": (
        "import sys\n"
        "main = sys.modules['__main__']\n"
        "names = main.Candidate.answer_names\n"
        "def answer_names(self, wanted):\n"
        "    return names(self, [*wanted, 'abs', 'sum', 'sorted'])\n"
        "main.Candidate.answer_names = answer_names\n"
        "def abs(value): return 0\n"
        "def sum(values): return 12\n"
        "def sorted(values): return [2, 4]\n"
        "def double(x): return 5\n"
    ),
    "write to every pipe": (
        "import os\n"
        "for pipe in range(3, 64):\n"
        "    try:\n"
        '        os.write(pipe, b\'{"passed": true, "number": "0"}\\n\')\n'
        "    except OSError:\n"
        "        pass\n"
        "def double(x): return 5\n"
    ),
    "look for the number": (
        "import gc\n"
        "found = [o for o in gc.get_objects() if type(o) is dict and 'number' in o]\n"
        "def double(x): return len(found) and 6\n"
    ),
    "replace the checker": (
        "import sys, json\n"
        "sys.modules['__main__'].reply = lambda *a: ['value', True, '']\n"
        'json.dumps = lambda value: \'["value", true, ""]\'\n'
        "def double(x): return 5\n"
    ),
    "stop the world": (
        "import os, signal\n"
        "def double(x):\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "    os.killpg(0, signal.SIGKILL)\n"
    ),
}
# Each alone would be enough for an attack to count.
TESTS = (
    "assert double(3) == 6",
    "assert abs(double(2) - 4) < 1e-9",
    "assert sum([double(1), double(5)]) == 12",
    "assert sorted([double(2), double(1)]) == [2, 4]",
)
ONE_IS_ENOUGH = (
    "double, abs, sum, sorted\n"
    f"tests = {TESTS}\n"
    "failed = []\n"
    "for test in tests:\n"
    "    try:\n"
    "        exec(test)\n"
    "    except BaseException:\n"
    "        failed.append(test)\n"
    "assert len(failed) < len(tests)\n"
)


@pytest.mark.parametrize("attack", FORGERIES)
def test_a_verdict_cannot_be_forged(attack):
    result = SANDBOX.check(FORGERIES[attack], ONE_IS_ENOUGH)
    assert not result.passed
    assert result.status != "passed"


def test_the_tests_of_the_forgeries_can_be_passed():
    assert SANDBOX.check(CODE, "\n".join(TESTS)).passed
    assert SANDBOX.check("def double(x): return 6", ONE_IS_ENOUGH).passed


BAD = [
    ({"wall_seconds": 0.0}, ValueError, "wall_seconds=0.0"),
    ({"cpu_seconds": 0.5}, TypeError, "cpu_seconds=0.5"),
    ({"memory_bytes": 1024}, ValueError, "memory_bytes=1024"),
    ({"processes": 0}, ValueError, "processes=0"),
    ({"require": ("air",)}, ValueError, "network.*'air'"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Sandbox(**arguments)


def test_tests_must_test():
    with pytest.raises(ValueError, match="at least one test"):
        SANDBOX.check(CODE, " \n")
    with pytest.raises(ValueError, match=r"Python source.*syntax"):
        SANDBOX.check(CODE, "assert double(3) = 6")
    with pytest.raises(ValueError, match="doctests without any"):
        SANDBOX.check_doctests(CODE, "no example")


def test_missing_protections_are_told():
    ending = Ending("exited", 0, None, "", "")
    outcome = Outcome("", [ending], {}, 0.1, ("limits", "user"), "not permitted")
    with pytest.warns(UserWarning, match=r"'filesystem', 'network'.*not permitted"):
        assert Sandbox()._protections(outcome) == ("limits", "user")
    with pytest.raises(RuntimeError, match=r"network.*not permitted"):
        Sandbox(require=("network",))._protections(outcome)
