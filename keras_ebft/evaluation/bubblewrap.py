"""Confinement by bubblewrap, the engine that Flatpak runs its programs in.

Where it is installed and allowed it makes the namespaces and the root directory, in
place of `sandboxed/confinement.py`, which then sets limits and gives up the
privileges that are left.
"""

import functools
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PROBE_SECONDS = 10.0
NAMESPACES = ("ipc", "pid", "net", "uts")
# What it takes to become another user, which is what comes next.
PRIVILEGES = ("CAP_SETUID", "CAP_SETGID", "CAP_CHOWN")
NOBODY = "65534"
SCRIPTS_INSIDE = "/scripts"


@functools.cache
def find_bubblewrap(scripts: Path, python: str, prefix: str) -> str:
    """The path of a bubblewrap that this user may use on this system, or `""`.

    Args:
        scripts: path of `sandboxed/`.
        python: str, path of the interpreter.
        prefix: str, path of what the interpreter needs.
    """
    path = shutil.which("bwrap") if sys.platform == "linux" else None
    if path is None:
        return ""
    command = command_of(path, scripts, prefix, disk_bytes=2**20)
    try:
        probe = subprocess.run(
            [*command, python, "-I", "-S", "-c", "print('inside')"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            env={},
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return path if probe.stdout == b"inside\n" else ""


def command_of(path: str, scripts: Path, prefix: str, disk_bytes: int) -> list[str]:
    """A command line that runs what is appended to it, as the first process inside."""
    # It needs limits of POSIX to be imported.
    from keras_ebft.evaluation.sandboxed import confinement

    places = confinement.SYSTEM_FOLDERS, confinement.SYSTEM_FILES, confinement.DEVICES
    folders, files, devices = places
    command = [path, "--die-with-parent", "--as-pid-1"]
    command += [f"--unshare-{name}" for name in NAMESPACES]
    if os.geteuid() == 0:
        # Of what root runs in a user namespace, the kernel counts no processes.
        command += ["--cap-drop", "ALL"]
        for name in PRIVILEGES:
            command += ["--cap-add", name]
    else:
        command += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    for place in (*folders, prefix, *files, *devices):
        # By itself it makes them for its own user only.
        for parent in reversed(Path(place).parents[:-1]):
            command += ["--dir", str(parent)]
    for folder in (*folders, prefix):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind", str(scripts), SCRIPTS_INSIDE]
    for file in files:
        command += ["--ro-bind-try", file, file]
    for device in devices:
        command += ["--dev-bind-try", device, device]
    command += ["--perms", "0700", "--size", str(disk_bytes)]
    command += ["--tmpfs", confinement.WORK, "--remount-ro", "/"]
    return [*command, "--chdir", confinement.WORK]


def user_inside() -> int | None:
    """The user that code runs as; `None` in a user namespace."""
    from keras_ebft.evaluation.sandboxed import confinement

    if os.geteuid() != 0:
        return None
    return confinement.FIRST_USER + secrets.randbelow(confinement.NUMBER_OF_USERS)


def wrapped(config: dict[str, Any], scripts: Path) -> list[str]:
    """The command that confines by bubblewrap, or an empty one.

    Without a filter of system calls there is none: inside bubblewrap's root
    directory, unlike in one made by `chroot`, user namespaces can be had.
    """
    if not config["filters"]:
        return []
    path = find_bubblewrap(scripts, config["python"], config["prefix"])
    if not path:
        return []
    config |= {"inside": True, "uid": user_inside()}
    return command_of(path, scripts, config["prefix"], config["disk_bytes"])
