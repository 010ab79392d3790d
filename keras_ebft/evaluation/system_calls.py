"""What generated code may not ask of the kernel, as programs for seccomp.

libseccomp makes the programs, here, where it can be imported; the confined process
only loads them. A program refuses what is listed and allows the rest.
"""

import errno
import functools
import importlib
import platform
import socket
import tempfile
from typing import Any

# Python bindings of libseccomp that are used alike.
BINDINGS = ("pyseccomp", "seccomp")
REFUSED = (
    # Keys of the user or the session.
    *("add_key", "keyctl", "request_key"),
    # Memory that belongs to no process, so that its limits do not count it.
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl"),
    *("msgget", "msgsnd", "msgrcv", "msgctl", "semget", "semop", "semtimedop"),
    "semctl",
    # Doing what is refused elsewhere, or holding up the kernel.
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"),
    *("bpf", "perf_event_open"),
    # Other processes.
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    # Namespaces, in which the code would have privileges again.
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree"),
    *("move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr"),
)
# Kinds of sockets that a network namespace keeps in.
KEPT_IN = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
NEW_NAMESPACES = [1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)]


@functools.cache
def filter_programs() -> tuple[dict[str, str], str]:
    """Programs for seccomp, in hexadecimal digits.

    Returns:
        `(programs, reason)`: a dict with `"isolated"`, for code with a network
        namespace of its own, and `"bare"`, without, which also refuses all sockets;
        or an empty one and why.
    """
    try:
        binding = _binding()
        programs = {"isolated": _program(binding, KEPT_IN), "bare": _program(binding)}
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return {}, (
            "no filter of system calls, for which pip install 'keras_ebft[sandbox]' "
            f"({error})"
        )
    return programs, ""


def _binding() -> Any:
    for name in BINDINGS[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(BINDINGS[-1])


def _program(binding: Any, sockets: tuple[int, ...] = ()) -> str:
    """A filter that allows no other sockets than those of the given families."""
    rules = binding.SyscallFilter(binding.ALLOW)
    refusal = binding.ERRNO(errno.EPERM)
    for name in REFUSED:
        rules.add_rule(refusal, name)
    # The C library asks for threads in the older way then, whose flags can be seen.
    rules.add_rule(binding.ERRNO(errno.ENOSYS), "clone3")
    place = 1 if platform.machine() == "s390x" else 0
    for flag in NEW_NAMESPACES:
        flagged = binding.Arg(place, binding.MASKED_EQ, flag, flag)
        rules.add_rule(refusal, "clone", flagged)
    last = max(sockets, default=-1)
    for family in set(range(last)).difference(sockets):
        rules.add_rule(refusal, "socket", binding.Arg(0, binding.EQ, family))
    if sockets:
        rules.add_rule(refusal, "socket", binding.Arg(0, binding.GT, last))
    else:
        rules.add_rule(refusal, "socket")
    # Pairs are connected to each other only.
    rules.add_rule(refusal, "socketpair", binding.Arg(0, binding.NE, socket.AF_UNIX))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read().hex()
