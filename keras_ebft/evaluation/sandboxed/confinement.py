"""Takes everything away from a process, then becomes the script to be confined.

Runs as a program of its own (`python -I -S confinement.py <JSON>`), so that it
may import nothing but the standard library. Three processes:

- the outermost enters new namespaces and waits,
- the first process of the new process namespace builds a root directory that
  holds the interpreter, the scripts and an empty working directory, and waits:
  it cannot be killed from within, and everything dies with it,
- the last takes its limits, gives up its privileges and runs the script.

Where bubblewrap is used, it does what the first two do until the root directory
stands (`inside`), and the second begins here.

What was achieved and how the script ended goes to a pipe, one JSON per line.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
LOCKED_FLAGS = {  # statvfs flag -> mount flag, to be kept when remounting
    os.ST_NOSUID: MS_NOSUID,
    getattr(os, "ST_NODEV", 4): MS_NODEV,
    getattr(os, "ST_NOEXEC", 8): 8,
    getattr(os, "ST_NOATIME", 1024): 1024,
    getattr(os, "ST_NODIRATIME", 2048): 2048,
    getattr(os, "ST_RELATIME", 4096): 1 << 21,
}
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
KEYCTL_JOIN_SESSION_KEYRING = 1
# The C library has no function for this system call.
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store")
SYSTEM_FILES = ("/etc/ld.so.cache",)
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534
FIRST_USER, NUMBER_OF_USERS = 20_000, 40_000
WORK, SCRIPTS = "/work", "/scripts"

libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """The kernel's `sock_fprog`: how many instructions, and where."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call(name, *arguments):
    """Calls a C library function; raises `OSError` if it fails or is missing."""
    function = getattr(libc, name, None)
    if function is None:
        raise OSError(f"{name} does not exist on {sys.platform}")
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def die_with_parent():
    """Asks the kernel to kill this process when its parent ends."""
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave_keyring():
    """Joins a session keyring that is new and empty.

    Returns:
        str, why not; empty where it was joined, or where keyrings cannot be reached.
    """
    number = KEYCTL.get(os.uname().machine)
    if sys.platform != "linux" or number is None or sys.maxsize < 2**32:
        return f"no new keyring on {sys.platform} and {os.uname().machine}"
    if libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        code = ctypes.get_errno()
        # Missing, or refused to this process and so to all it starts.
        if code not in (errno.ENOSYS, errno.EPERM):
            return f"no new keyring: {os.strerror(code)}"
    return ""


def can_filter():
    """Whether the kernel would take a filter of system calls."""
    if sys.platform != "linux":
        return False
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    # It has looked for one, and there was none.
    return ctypes.get_errno() == errno.EFAULT


def filter_system_calls(digits):
    """Lets the kernel refuse system calls from now on, as a program says."""
    program = bytes.fromhex(digits)
    given = FilterProgram(len(program) // 8, program)
    mode = SECCOMP_MODE_FILTER
    call("prctl", PR_SET_SECCOMP, mode, ctypes.byref(given), 0, 0)


def enter_namespaces():
    """Leaves the system's network, mounts and processes, where that is allowed.

    Returns:
        `(entered, reason)`: `"as root"`, `"as nobody"` (in a user namespace) or
        `""`, and then why not.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        if not (uid == 0 and unshare_as_root()):
            call("unshare", NAMESPACES | CLONE_NEWUSER)
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
            write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    except OSError as error:
        return "", str(error)
    return ("as root" if os.geteuid() == 0 else "as nobody"), ""


def unshare_as_root():
    """Whether a root user may enter namespaces; in many containers it may not."""
    try:
        call("unshare", NAMESPACES)
    except OSError:
        return False
    return True


def write(path, text):
    """Writes to a file of the kernel."""
    with open(path, "w") as file:
        file.write(text)


def build_root(root, config, owner):
    """Makes `root` hold what the script needs, and this process live in it."""
    mount_tmpfs(root, "size=1m,mode=0755")
    folders = {path: path for path in (*SYSTEM_FOLDERS, config["prefix"])}
    folders[config["scripts"]] = SCRIPTS
    for path, place in folders.items():
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + place)
        elif os.path.isdir(path) and not os.path.exists(root + place):
            os.makedirs(root + place)
            bind(path, root + place, MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path in (*SYSTEM_FILES, *DEVICES):
        if os.path.exists(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            write(root + path, "")
            bind(path, root + path, MS_NOSUID)
    os.makedirs(root + WORK)
    mount_tmpfs(
        root + WORK,
        f"size={config['disk_bytes']},mode=0700,uid={owner},gid={owner}",
    )
    flags = MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV
    call("mount", b"none", root.encode(), None, flags, None)
    os.chroot(root)
    os.chdir(WORK)


def mount_tmpfs(place, options):
    """Mounts an empty file system that lives in memory."""
    flags = MS_NOSUID | MS_NODEV
    call("mount", b"tmpfs", place.encode(), b"tmpfs", flags, options.encode())


def bind(path, place, flags):
    """Shows `path` at `place`; flags that are already set stay set."""
    call("mount", path.encode(), place.encode(), None, MS_BIND | MS_REC, None)
    present = os.statvfs(place).f_flag
    for found, flag in LOCKED_FLAGS.items():
        if present & found:
            flags |= flag
    remount = MS_REMOUNT | MS_BIND | flags
    call("mount", b"none", place.encode(), None, remount, None)


def set_limits(config, others):
    """Sets what the kernel enforces on the script and its children.

    Args:
        config: dict of limits.
        others: int, processes of the same user that are not the script's.
    """
    cpu = config["cpu_seconds"]
    limits = {
        "RLIMIT_AS": (config["memory_bytes"],) * 2,
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_FSIZE": (config["disk_bytes"],) * 2,
        "RLIMIT_NOFILE": (config["open_files"],) * 2,
        "RLIMIT_NPROC": (config["processes"] + others,) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), value)


def drop_privileges(uid):
    """Becomes a user that owns nothing, and can never become another."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def reachable_by_all(path):
    """Whether a user without rights could enter `path`."""
    while path != os.path.dirname(path):
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def become_script(config, isolated, uid):
    """The last process: takes its limits, gives up everything, runs the script."""
    if uid is not None:
        set_limits(config, 0)
        drop_privileges(uid)
    else:
        # In a user namespace, the processes of ours around this one count as well.
        around = 1 if config["inside"] else 2
        set_limits(config, around if isolated else count_own_processes())
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if config["filters"]:
        filter_system_calls(config["filters"]["isolated" if isolated else "bare"])
    scripts = SCRIPTS if isolated else config["scripts"]
    arguments = {**config["arguments"], "block_sockets": not isolated}
    command = [config["python"], "-I", "-S", "-B", "-X", "utf8"]
    command += [f"{scripts}/{config['script']}", json.dumps(arguments)]
    environment = {"HOME": os.getcwd(), "LANG": "C.UTF-8", "TMPDIR": os.getcwd()}
    os.execve(config["python"], command, environment)


def count_own_processes():
    """Processes of this user, which a limit on processes counts as well."""
    uid = os.getuid()
    if not os.path.isdir("/proc/self"):
        return 4096
    return sum(
        os.stat(f"/proc/{name}").st_uid == uid
        for name in os.listdir("/proc")
        if name.isdigit() and os.path.exists(f"/proc/{name}")
    )


def user_for(namespaces, prefix):
    """The user the script runs as; `None` stays what it is.

    Every run gets a user of its own, so that its limits are not shared and runs
    beside it cannot be signalled. Without namespaces the interpreter stays where
    it is, and such a user may not be able to reach it.
    """
    if os.geteuid() != 0 or not (namespaces or reachable_by_all(prefix)):
        return None
    return FIRST_USER + os.getpid() % NUMBER_OF_USERS


def report(pipe, **values):
    """Writes one line for the process that started all this."""
    os.write(pipe, json.dumps(values).encode() + b"\n")


def inner(config, isolated, uid):
    """The first process of the new namespaces."""
    die_with_parent()
    pipe = config["status_pipe"]
    if config["inside"]:
        if uid is not None:
            os.chown(WORK, uid, uid)
    elif isolated:
        build_root(config["folder"], config, NOBODY if uid is None else uid)
    else:
        os.chdir(config["folder"])
        if uid is not None:
            os.chown(config["folder"], uid, uid)
    script = os.fork()
    if script == 0:
        try:
            become_script(config, isolated, uid)
        except BaseException as error:
            report(pipe, error=f"{type(error).__name__}: {error}")
            os._exit(1)
    while True:
        process, status = os.wait()
        if process == script:
            break
    if os.WIFSIGNALED(status):
        report(pipe, signal=os.WTERMSIG(status))
    else:
        report(pipe, exit_code=os.WEXITSTATUS(status))


def main():
    """The outermost process."""
    config = json.loads(sys.argv[1])
    pipe = config["status_pipe"]
    os.set_inheritable(pipe, False)
    os.umask(0o022)
    die_with_parent()
    if config["inside"]:
        # Of a root directory and namespaces that bubblewrap has made.
        uid, reason = config["uid"], ""
        namespaces = "as nobody" if uid is None else "as root"
    else:
        namespaces, reason = enter_namespaces()
        uid = user_for(namespaces, config["prefix"])
    if not namespaces and os.geteuid() == 0 and uid is None:
        report(
            pipe,
            error="generated code would run as root with nothing around it: "
            f"{reason}, and other users cannot reach {config['prefix']}",
        )
        return
    no_keyring = leave_keyring()
    if config["filters"] and not can_filter():
        config |= {"filters": {}, "no_filter": "the kernel filters no system calls"}
    filtered = bool(config["filters"])
    own_user = uid is not None or namespaces == "as nobody"
    protections = {
        "limits": True,
        "network": namespaces or filtered,
        "filesystem": namespaces,
        "processes": namespaces,
        "user": own_user,
        # A user's own keyring is not left with the session's.
        "keyring": filtered or (own_user and not no_keyring),
        "syscalls": filtered,
    }
    active = [name for name, holds in protections.items() if holds]
    reasons = filter(None, (reason, no_keyring, config["no_filter"]))
    report(pipe, active=active, reason="; ".join(reasons))
    process = 0 if config["inside"] else os.fork()
    if process == 0:
        try:
            inner(config, bool(namespaces), uid)
        except BaseException as error:
            report(pipe, error=f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(process, 0)


if __name__ == "__main__":
    main()
