"""Run a program that nobody has read, confined: the child process of ``sandbox.py``, standard library only.

``python -I confined.py FOLDER SECONDS BYTES FD`` reads a line with a token and then the program from stdin. It writes
READY to the descriptor FD once it is confined, and the token when the program has run to its end. Before that: limits
of time, memory and file size; no capability remains; Landlock lets it write below FOLDER only; a seccomp filter refuses
new processes, sockets, namespaces (in a new one it would have every capability), signals to other processes, all but a
few ioctls, and what would change files or processes beyond Landlock's reach.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

UNCONFINED = 97  # exit code: the kernel cannot confine
READY = b"+"  # what follows is the program's doing, its exit code too
FILE_BYTES = 16 << 20
FILES = 64
_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_LANDLOCK_VERSION = 3
_ALLOW, _REFUSE, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_THREAD = 0x00010000  # CLONE_THREAD
# Audit number of the architecture; calls whose arguments decide; calls that are refused, by what they would do.
_CALLS: dict[str, tuple[int, dict[str, int], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "tgkill": 234, "prlimit64": 302, "fcntl": 72, "ioctl": 16, "socketpair": 53},
        (
            *(57, 58),  # fork, vfork
            *(41, 42, 62, 200, 129, 297),  # socket, connect, kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
            *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
            *(272, 308),  # unshare, setns
            *(321, 298, 323),  # bpf, perf_event_open, userfaultfd
            *(90, 91, 268),  # chmod, fchmod, fchmodat
            *(92, 93, 94, 260),  # chown, fchown, lchown, fchownat
            *(132, 235, 261, 280),  # utime, utimes, futimesat, utimensat
            *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr: each of a path, a link, a file
            *(
                141,
                142,
                144,
                203,
                314,
                251,
            ),  # setpriority, sched_set{param,scheduler,affinity,attr}, ioprio_set
            *(29, 64, 68, 240),  # shmget, semget, msgget, mq_open: what they make outlives the process
            # shmat, shmctl, semop, semctl, semtimedop, msgsnd, msgrcv, msgctl, mq_unlink: they reach what other
            # processes have made, by a number or a name that can be guessed
            *(30, 31, 65, 66, 220, 69, 70, 71, 241),
            *(248, 249, 250),  # add_key, request_key, keyctl: keys outlive the process
        ),
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "tgkill": 131, "prlimit64": 261, "fcntl": 25, "ioctl": 29, "socketpair": 199},
        (
            *(198, 203, 129, 130, 138, 240),
            *(117, 270, 271, 272),
            *(97, 268),
            *(280, 241, 282),
            *(52, 53),
            *(54, 55),
            *(88,),
            *(5, 6, 7, 14, 15, 16),
            *(140, 118, 119, 122, 274, 30),
            *(194, 190, 186, 180),
            *(196, 195, 193, 191, 192, 189, 188, 187, 181),
            *(217, 218, 219),
        ),
    ),
}
# The same on all architectures: pidfd_send_signal, io_uring_{setup,enter,register} (whose requests no filter sees),
# pidfd_open, pidfd_getfd, process_madvise, process_mrelease, fchmodat2, setxattrat, removexattrat, file_setattr.
_NEWER_CALLS = (424, 425, 426, 427, 434, 438, 440, 448, 452, 463, 466, 469)
_X32 = 0x40000000  # from here on: x86_64's calls by other numbers
_SET_OWNER, _SET_SIGNAL, _SET_OWNER_EX = 8, 10, 15  # of fcntl: whom the kernel signals about a file
# Requests of ioctl that Python and the C library make of any file: TCGETS, TCGETS2 and TIOCGWINSZ (is it a terminal, of
# what size), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Others change files that are open for reading only.
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_SOCKET_TYPE, _STREAM = 0xF, 1  # of socketpair: a pair of datagram sockets can send to any other socket
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


def drop_capabilities() -> None:
    """Give up every capability, so that root is an ordinary user."""
    header = struct.pack("Ii", 0x20080522, 0)  # version 3 of the call, this process
    _checked(_LIBC.capset(header, bytes(24)), "capset")


def confine_files(folder: str) -> None:
    """Let this process write, create and remove files below a folder only.

    Raises:
        OSError: the kernel has no Landlock, or an old one that lets files outside be truncated.
    """
    version = _checked(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    if version < _LANDLOCK_VERSION:
        raise OSError(f"Landlock must have version {_LANDLOCK_VERSION} (Linux 6.2) or newer, got {version}")
    # write a file, remove folders and files, make anything, link across folders, truncate
    rights = 1 << 1 | sum(1 << bit for bit in range(4, 15))
    ruleset = _checked(_LIBC.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0), "Landlock")
    for path, allowed in ((folder, rights), (os.devnull, 1 << 1)):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, opened)
        _checked(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "Landlock")
        os.close(opened)
    _checked(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def confine_calls() -> None:
    """Refuse the calls of this file's list; threads, and limits of this process, are allowed.

    Raises:
        OSError: the kernel has no seccomp, or the architecture is not known here.
    """
    if platform.machine() not in _CALLS:
        raise OSError(f"no list of system calls for {platform.machine()}")
    audit, by_argument, refused = _CALLS[platform.machine()]

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    load, equal, at_least, mask_set, mask, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    refuse, unknown = step(give, _REFUSE | _EPERM), step(give, _REFUSE | _ENOSYS)
    number, first, second = step(load, 0), step(load, 16), step(load, 24)  # low halves of the arguments
    program = [
        step(load, 4),  # architecture
        step(equal, audit, true=1),
        refuse,
        number,
        step(at_least, _X32, false=1),
        refuse,
        step(equal, _CLONE3, false=1),
        unknown,  # the C library then uses clone, whose flags can be read
    ]
    for call in (*refused, *_NEWER_CALLS):
        program += [step(equal, call, false=1), refuse]
    arguments = {
        "clone": [first, step(mask_set, _THREAD, true=1)],
        "tgkill": [first, step(equal, os.getpid(), true=1)],  # process that is signalled
        "prlimit64": [first, step(equal, 0, true=1)],  # process that is limited; 0: this one
        "fcntl": [
            second,
            step(equal, _SET_OWNER, true=2),
            step(equal, _SET_SIGNAL, true=1),
            step(equal, _SET_OWNER_EX, false=1),
        ],
        "ioctl": [second, *(step(equal, _IOCTLS[-i], true=i) for i in range(len(_IOCTLS), 0, -1))],
        "socketpair": [second, step(mask, _SOCKET_TYPE), step(equal, _STREAM, true=1)],
    }
    for name, steps in arguments.items():
        program += [step(equal, by_argument[name], false=len(steps) + 2), *steps, refuse, number]
    program.append(step(give, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _checked(_LIBC.prctl(_SECCOMP, _FILTER, header, 0, 0), "seccomp")


def main() -> None:
    """Confine this process and run the program."""
    folder, seconds, memory, descriptor = sys.argv[1:]
    token, _, source = sys.stdin.buffer.read().partition(b"\n")
    try:
        _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
        drop_capabilities()
        confine_files(folder)
        confine_calls()
        limit(float(seconds), int(memory))
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(UNCONFINED)
    os.write(int(descriptor), READY)
    sys.argv = ["program"]
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    os.write(int(descriptor), token)


if __name__ == "__main__":
    main()
