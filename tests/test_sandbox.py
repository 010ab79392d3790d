"""One attack for every promise of the sandbox."""

import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from keras_ebft.evaluation import (
    PROTECTIONS,
    Sandbox,
    bubblewrap,
    sandbox,
    sandbox_processes,
    system_calls,
)
from keras_ebft.evaluation.sandbox_processes import SCRIPTS, Ending, Outcome
from keras_ebft.evaluation.system_calls import filter_programs

pytestmark = [
    pytest.mark.backend_independent,
    pytest.mark.filterwarnings("ignore:The sandbox runs without"),
]

SANDBOX = Sandbox(wall_seconds=5.0, cpu_seconds=1, memory_bytes=2**28)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    FOUND = set(SANDBOX.run("").protections)
NAMESPACES = {"network", "filesystem", "processes", "user"}
FULL = FOUND >= NAMESPACES
isolated = pytest.mark.skipif(
    not FULL, reason="this system offers neither root nor user namespaces"
)
FILTERS = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
filtered = pytest.mark.skipif(not FILTERS, reason="this kernel filters no system calls")

# Numbers of system calls, which Python has no names for.
MACHINE = platform.machine()
KEYCTL = {"x86_64": 250, "aarch64": 219}
ADD_KEY = {"x86_64": 248, "aarch64": 217}
USERFAULTFD = {"x86_64": 323, "aarch64": 282}
SESSION, KEYCTL_UNLINK = -3, 9


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
    # The network of its own may have an address of the same name, without listeners.
    refusals = ("OSError", "PermissionError", "ConnectionRefusedError")
    assert any(refusal in result.errors for refusal in refusals)


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


HOLDERS = {
    "shared memory": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.shmat.restype = ctypes.c_void_p\n"
        "libc.shmdt.argtypes = (ctypes.c_void_p,)\n"
        "def hold():\n"
        "    number = libc.shmget(0, 2**23, 0o1600)\n"
        "    if number < 0: raise OSError\n"
        "    place = libc.shmat(number, None, 0)\n"
        "    ctypes.memset(place, 1, 2**23)\n"
        "    libc.shmdt(place)\n"
    ),
    "files in memory": (
        "import os\n"
        "files = []\n"
        "def hold():\n"
        "    files.append(os.memfd_create(''))\n"
        "    for _ in range(8): os.write(files[-1], bytes(2**20))\n"
    ),
}


@isolated
@filtered
@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_belongs_to_no_process(holder):
    """It outlives its mapping, so that the address space does not tell."""
    allowed = 2**26
    source = HOLDERS[holder] + (
        "held = 0\n"
        "try:\n"
        "    for _ in range(12):\n        hold()\n        held += 2**23\n"
        "except OSError:\n    pass\n"
        "print(held)"
    )
    result = Sandbox(memory_bytes=allowed).run(source)
    assert int(result.output) <= allowed, result.errors


@isolated
@filtered
@pytest.mark.skipif(MACHINE not in KEYCTL, reason="its numbers are not written down")
def test_system_calls_that_are_refused():
    calls = {
        "vsock": "libc.socket(40, 1, 0)",
        "netlink": "libc.socket(16, 3, 0)",
        "crypto": "libc.socket(38, 5, 0)",
        "pair": "libc.socketpair(30, 1, 0, room)",
        "io_uring": "libc.syscall(425, 4, room)",
        "userfaultfd": f"libc.syscall({USERFAULTFD[MACHINE]}, 1)",
        "keys": f"libc.syscall({KEYCTL[MACHINE]}, 0, -3, 1)",
        "namespaces": "libc.unshare(0x10000000)",
        "other processes": "libc.process_vm_readv(1, room, 1, room, 1, 0)",
    }
    source = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "room = ctypes.create_string_buffer(256)\n"
        f"for name, call in {calls}.items():\n"
        "    print(name, eval(call), ctypes.get_errno())\n"
    )
    lines = SANDBOX.run(source).output.splitlines()
    assert lines == [f"{name} -1 {errno.EPERM}" for name in calls]
    # What programs use goes on.
    source = (
        "import asyncio, socket, threading\n"
        "socket.socket(), socket.socket(socket.AF_UNIX), socket.socketpair()\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "thread = threading.Thread(target=print, args=('all',))\n"
        "thread.start(), thread.join()\n"
    )
    assert Sandbox(processes=2).run(source).output == "all\n"


@isolated
@filtered
@pytest.mark.skipif(MACHINE != "x86_64", reason="has no second kind of system calls")
def test_system_calls_of_32_bits_are_no_way_around():
    source = (
        "import ctypes, mmap\n"
        "code = mmap.mmap(-1, 4096, prot=7)\n"
        # getpid of 32 bits: mov eax, 20; int 0x80; ret
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "place = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(place)())\n"
    )
    result = SANDBOX.run(source)
    assert (result.status, result.output) == ("killed", "")


@filtered
def test_without_namespaces_there_are_no_sockets():
    """The filter alone, as it is loaded where a system allows no namespaces."""
    programs, _ = filter_programs()
    source = (
        "import socket, sys\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import confinement\n"
        "confinement.call('prctl', confinement.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)\n"
        "confinement.filter_system_calls(sys.argv[1])\n"
        "for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):\n"
        "    try:\n        socket.socket(family)\n"
        "    except PermissionError:\n        print('refused')\n"
        "socket.socketpair()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", source, programs["bare"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n" * 3


@pytest.fixture
def secret():
    """A key in the session's keyring, as the name of a kind and of the key."""
    libc = ctypes.CDLL(None, use_errno=True)
    if MACHINE not in ADD_KEY:
        pytest.skip("numbers of system calls are not known")
    name = f"keras_ebft_{os.getpid()}"
    content = b"secret"
    key = libc.syscall(
        ADD_KEY[MACHINE], b"user", name.encode(), content, len(content), SESSION
    )
    if key < 0:
        pytest.skip(f"no keyrings: {os.strerror(ctypes.get_errno())}")
    yield name
    libc.syscall(KEYCTL[MACHINE], KEYCTL_UNLINK, key, SESSION)


@isolated
@pytest.mark.parametrize("filters", [True, False])
def test_reading_the_keys_of_the_session(secret, filters, monkeypatch):
    """A filter refuses it; without one, the keyring is another."""
    if not filters:
        without = lambda: ({}, "not installed")  # noqa: E731
        monkeypatch.setattr(sandbox_processes, "filter_programs", without)
    keyctl = KEYCTL[MACHINE]
    source = (
        "import ctypes\n"
        "call = ctypes.CDLL(None).syscall\n"
        f"key = call({keyctl}, 10, {SESSION}, b'user', {secret!r}.encode(), 0)\n"
        "room = ctypes.create_string_buffer(16)\n"
        f"print(key, call({keyctl}, 11, key, room, 16), room.value)"
    )
    result = SANDBOX.run(source)
    assert result.output == "-1 -1 b''\n"
    assert "keyring" in result.protections
    assert ("syscalls" in result.protections) == (filters and FILTERS)


@isolated
@filtered
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_is_used_where_it_is_installed(monkeypatch):
    source = "import os\nprint(os.getuid() != 0, os.listdir('/'), os.listdir('/dev'))"
    began = []
    monkeypatch.setattr(
        sandbox_processes,
        "wrapped",
        lambda *given: began.append(bubblewrap.wrapped(*given)) or began[-1],
    )
    inside = SANDBOX.run(source)
    assert began[0][0] == shutil.which("bwrap")
    monkeypatch.setattr(sandbox_processes, "wrapped", lambda *_: [])
    own = SANDBOX.run(source)
    assert own.protections == inside.protections == PROTECTIONS
    for output in (inside.output, own.output):
        assert output.startswith("True")
        assert "'home'" not in output and "'tmp'" not in output


@isolated
def test_a_bubblewrap_that_is_not_allowed_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    bubblewrap.find_bubblewrap.cache_clear()
    try:
        result = SANDBOX.run("print(1)")
    finally:
        bubblewrap.find_bubblewrap.cache_clear()
    assert result.output == "1\n"
    assert set(result.protections) >= NAMESPACES


def test_what_a_filter_needs_is_named(monkeypatch):
    monkeypatch.setattr(system_calls, "BINDINGS", ("pyseccomp_that_is_missing",))
    programs, reason = filter_programs.__wrapped__()
    assert programs == {}
    assert "keras_ebft[sandbox]" in reason
    without = lambda: (programs, reason)  # noqa: E731
    monkeypatch.setattr(sandbox_processes, "filter_programs", without)
    with pytest.warns(UserWarning, match=r"'syscalls'.*keras_ebft\[sandbox\]"):
        result = SANDBOX.run("print(1)")
    assert result.output == "1\n"
    assert "syscalls" not in result.protections
    with pytest.raises(RuntimeError, match=r"'syscalls'.*keras_ebft\[sandbox\]"):
        Sandbox(require=("syscalls",)).run("print(1)")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_printing_without_end(stream):
    result = Sandbox(output_bytes=10_000).run(
        f"import sys\nwhile True: sys.{stream}.write('x' * 1000)"
    )
    assert result.status == "too_much_output"
    assert len(result.output) + len(result.errors) <= 20_000


CODE = "def double(x):\n    return 2 * x\n"


def test_check():
    right = SANDBOX.check(CODE, "assert double(3) == 6")
    assert right.passed
    # The verdict says what held around both processes.
    assert set(right.protections) == FOUND
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


VECTORS = """
import functools

class Stack:
    def __init__(self, *items): self.items = list(items)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, key): return self.items[key]
    def __delitem__(self, key): del self.items[key]
    def __iadd__(self, item): self.items.append(item); return self

class Flag:
    def __init__(self, value): self.value = value
    def __bool__(self): return self.value

@functools.total_ordering
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __radd__(self, other): return self if other == 0 else NotImplemented
    def __mul__(self, other): return Vector(self.x * other, self.y * other)
    __rmul__ = __mul__
    def __neg__(self): return -1 * self
    def __abs__(self): return (self.x**2 + self.y**2) ** 0.5
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __lt__(self, other): return abs(self) < abs(other)
    def __hash__(self): return hash((self.x, self.y))
    def __pow__(self, power, modulo=None): return (power, modulo)
    def __divmod__(self, other): return ("divided", other)

ok = Flag(False)
first = second = Vector(1, 0)
def count(n): yield from (Vector(i, 0) for i in range(n))
"""
OPERATORS = {
    "truth from a length": "assert not Stack()\nassert Stack(1)",
    "truth from a method": "assert not Flag(False)\nassert Flag(True)",
    "iterating": "assert list(Stack(1, 2)) == [1, 2]\nassert list(count(2))[1].x == 1",
    "containing": "assert 1 in Stack(1)\nassert 2 not in Stack(1)",
    "items": "s = Stack(1, 2, 3)\nassert s[1:] == [2, 3]\ndel s[0]\nassert s[0] == 2",
    "in place": "s = t = Stack()\ns += 4\nassert t[0] == 4",
    "equality": (
        "assert Vector(1, 2) == Vector(1, 2)\nassert Vector(1, 2) != Vector(2, 1)\n"
        "assert len({Vector(1, 2), Vector(1, 2)}) == 1\nassert first == second"
    ),
    "order": (
        "v = sorted([Vector(3, 4), Vector(0, 1)])\nassert v[0].y == 1\n"
        "assert v[0] < v[1] and v[1] >= v[0]"
    ),
    "arithmetic": (
        "v = Vector(1, 2)\nassert v + v == 2 * v == v * 2 == sum([v, v])\n"
        "assert (-v).y == -2 and abs(Vector(3, 4)) == 5\n"
        "assert pow(v, 2, 3) == (2, 3) and divmod(v, 2) == ('divided', 2)\n"
        "try:\n    v - v\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError"
    ),
    "attributes": (
        "v = Vector(1, 2)\nv.x = 5\nassert (v + v).x == 10\ndel v.x\n"
        "assert not hasattr(v, 'x')"
    ),
    "classes": "assert isinstance(ok, Flag) and not isinstance(3, Flag)",
}


def test_operators_of_shared_objects():
    names = "Stack, Flag, Vector, ok, first, second, count"
    tests = (
        f"names = dict(zip({names.split(', ')}, ({names})))\n"
        f"for case, source in {OPERATORS}.items():\n"
        "    try:\n        exec(source, dict(names))\n"
        "    except Exception as error:\n"
        "        raise AssertionError(f'{case}: {error!r}')\n"
    )
    result = SANDBOX.check(VECTORS, tests, share_objects=True)
    assert result.passed, result.message


@pytest.mark.parametrize("share_objects", [False, True])
def test_a_false_object_is_false(share_objects):
    result = SANDBOX.check(VECTORS, "assert ok", share_objects)
    assert (result.passed, result.message) == (False, "AssertionError: ")


def test_no_object_is_as_good_as_plain_data():
    code = (
        "class Any:\n"
        "    def __eq__(self, other): return True\n"
        "    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__\n"
        "    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 6\n"
        "    def __float__(self): return 6.0\n"
        "    def __index__(self): return 6\n"
        "    def __int__(self): return 6\n"
        "def double(x): return Any()\n"
    )
    believed = (
        "double(3) == 6", "6 == double(3)", "not double(3) != 6", "double(3) in (6, 7)",
        "6 in {double(3)}", "{'a': 6} == {'a': double(3)}", "5 < double(3) < 7",
        "7 > double(3)", "int(double(3)) == 6", "isclose(double(3), 6)",
        "range(9)[double(3)] == 6", "isinstance(double(3), int)",
    )  # fmt: skip
    tests = (
        f"from math import isclose\ndouble\nfor test in {believed}:\n"
        "    try:\n        passed = eval(test)\n"
        "    except TypeError:\n        continue\n"
        "    assert not passed, test\n"
    )
    result = SANDBOX.check(code, tests, share_objects=True)
    assert result.passed, result.message


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


def test_code_that_ends_after_the_tests_was_not_killed():
    checker, late = (
        Ending("exited", 0, None, "", ""),
        Ending("killed", None, None, "", ""),
    )
    verdict = {"message": "AssertionError: seven"}
    outcome = Outcome("", [checker, late], verdict, 0.1, (), "")
    assert sandbox._explain(outcome, verdict, False) == (
        "failed",
        "AssertionError: seven",
    )


def test_missing_protections_are_told():
    ending = Ending("exited", 0, None, "", "")
    outcome = Outcome("", [ending], {}, 0.1, ("limits", "user"), "not permitted")
    with pytest.warns(
        UserWarning, match=r"'filesystem', 'keyring', 'network'.*not permitted"
    ):
        assert Sandbox()._protections(outcome) == ("limits", "user")
    with pytest.raises(RuntimeError, match=r"network.*not permitted"):
        Sandbox(require=("network",))._protections(outcome)
