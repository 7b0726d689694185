"""Run a program that nobody has read, confined: the child process of ``sandbox.py``, standard library only.

``python -I confined.py FOLDER SECONDS BYTES FD TOKEN`` reads the program from stdin and writes TOKEN to the descriptor
FD when it has run to its end. Before it starts: limits of time, memory and file size; Landlock lets it write below
FOLDER only; a seccomp filter refuses new processes, sockets, and signals to other processes.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

UNCONFINED = 97  # exit code: the kernel cannot confine
FILE_BYTES = 16 << 20
FILES = 64
_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_ALLOW, _REFUSE, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_THREAD = 0x00010000  # CLONE_THREAD
# Audit number of the architecture, then numbers of: clone, tgkill, those that start a process, and the other ones.
_CALLS = {
    "x86_64": (0xC000003E, 56, 234, (57, 58), (41, 62, 200, 101, 129, 297, 424)),
    "aarch64": (0xC00000B7, 220, 131, (), (198, 129, 130, 117, 138, 240, 424)),
}
_CLONE3 = 435


def _checked(result: int, call: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return result


def limit(seconds: float, memory: int) -> None:
    """Limit processor time, memory, size and number of files."""
    cpu = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def confine_files(folder: str) -> None:
    """Let this process write, create and remove files below a folder only.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = _checked(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    # write a file, remove folders and files, make anything; from version 2 on link across folders, from 3 on truncate
    rights = (
        1 << 1
        | sum(1 << bit for bit in range(4, 13))
        | (1 << 13) * (version >= 2)
        | (1 << 14) * (version >= 3)
    )
    ruleset = _checked(_LIBC.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0), "Landlock")
    for path, allowed in ((folder, rights), (os.devnull, 1 << 1)):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, opened)
        _checked(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "Landlock")
        os.close(opened)
    _checked(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def confine_calls() -> None:
    """Refuse new processes, sockets, and signals to other processes; threads are allowed.

    Raises:
        OSError: the kernel has no seccomp, or the architecture is not known here.
    """
    if platform.machine() not in _CALLS:
        raise OSError(f"no list of system calls for {platform.machine()}")
    audit, clone, tgkill, starts, others = _CALLS[platform.machine()]

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    load, equal, mask_set, give = 0x20, 0x15, 0x45, 0x06
    refuse, unknown = step(give, _REFUSE | _EPERM), step(give, _REFUSE | _ENOSYS)
    program = [
        step(load, 4),  # architecture
        step(equal, audit, true=1),
        refuse,
        step(load, 0),  # number of the call
        step(equal, _CLONE3, false=1),
        unknown,  # the C library then uses clone, whose flags can be read
    ]
    for number in (*starts, *others):
        program += [step(equal, number, false=1), refuse]
    program += [
        step(equal, clone, false=3),
        step(load, 16),  # low half of the first argument: flags
        step(mask_set, _THREAD, true=1),
        refuse,
        step(load, 0),
        step(equal, tgkill, false=3),
        step(load, 16),  # process that is signalled
        step(equal, os.getpid(), true=1),
        refuse,
        step(give, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _checked(_LIBC.prctl(_SECCOMP, _FILTER, header, 0, 0), "seccomp")


def main() -> None:
    """Confine this process and run the program."""
    folder, seconds, memory, descriptor, token = sys.argv[1:]
    source = sys.stdin.buffer.read()
    try:
        _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
        confine_files(folder)
        confine_calls()
        limit(float(seconds), int(memory))
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(UNCONFINED)
    sys.argv = ["program"]
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    os.write(int(descriptor), token.encode())


if __name__ == "__main__":
    main()
