"""A program: `python -P -S jail.py` runs code that a model has written, then tests of it, behind locks of the kernel.

Standard input is one JSON object: `code`, `tests`, `secret`, `cpu_s`, `memory_mb`. Standard output, a file, gets the
secret if code and tests ran without an exception, or what went wrong. The standard library can be imported.

The locks come before the code: Landlock (Linux 5.13 or newer) lets it read the standard library and nothing else, and
write nothing; a seccomp filter refuses sockets, new processes, signals to others, changed modes and owners, and what
only an administrator does. Limits: CPU time, address space, the length of standard output, open files. Without the
locks it runs nothing and says so. docs/rewards.md says what they do not protect from.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

_READABLE = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom")
_MAX_OUTPUT = 8_192
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_HANDLED = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}
"""Rights that Landlock can withhold, by its version; 0xFFFF from 5 on."""
_AUDIT_ARCH_X86_64 = 0xC000003E
_NEWEST = 467
"""A system call that is younger than this list is refused."""
# fmt: off
_REFUSED = (
    41, 425, 240,                                      # socket, io_uring_setup, mq_open
    57, 58, 59, 322,                                   # fork, vfork, execve, execveat
    62, 200, 234, 129, 297, 424, 434, 438,             # kill, tkill, tgkill, rt_…sigqueueinfo, pidfd_…
    101, 310, 311, 141, 142, 144, 203, 251, 314,       # ptrace, process_vm_…, priorities and processors of others
    76, 90, 91, 268, 452, 92, 93, 94, 260,             # truncate, chmod, chown
    160,                                               # setrlimit
    132, 235, 261, 280, 188, 189, 190, 463, 197, 198, 199, 466,  # times and extended attributes of files
    29, 30, 31, 64, 65, 66, 68, 69, 70, 71,            # System V memory, semaphores, messages
    155, 161, 165, 166, 272, 304, 308, 428, 429, 430, 431, 432, 442,  # mounts, namespaces, files by handle
    103, 157, 159, 163, 164, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 227, 246, 248, 249, 250, 298, 305, 313,
    320, 321, 323,                                     # prctl; what only an administrator does; keys, bpf, perf
)
# fmt: on
_CLONE, _CLONE3, _PRLIMIT64, _CLONE_THREAD = 56, 435, 302, 0x0001_0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF_0000, 0x8000_0000, 0x0005_0000


def _filter() -> bytes:
    """The seccomp program. Each test skips what follows it unless it holds."""
    refuse, unknown = (_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    allow, first_argument = (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 16)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, _NEWEST), unknown, (_EQUAL, 0, 1, _CLONE3), unknown]
    program += [(_EQUAL, 0, 4, _CLONE), first_argument, (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, allow]
    # prlimit64 may only read limits, of this process: the first argument and both halves of the third are 0.
    new_low, new_high = (_LOAD, 0, 0, 32), (_LOAD, 0, 0, 36)
    program += [(_EQUAL, 0, 8, _PRLIMIT64), first_argument, (_EQUAL, 0, 4, 0), new_low, (_EQUAL, 0, 2, 0)]
    program += [new_high, (_EQUAL, 1, 0, 0), refuse, allow]
    for number in _REFUSED:
        program += [(_EQUAL, 0, 1, number), refuse]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in (*program, allow))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _lock(readable: tuple[str, ...]) -> None:
    """Withhold files, network and processes from this process, for good. Raises OSError if the kernel cannot."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, f"the locks are made for Linux on x86_64, not {sys.platform} {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> int:
        plain = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
        if (found := int(libc.syscall(*plain))) < 0:
            raise OSError(ctypes.get_errno(), f"system call {arguments[0]}: {os.strerror(ctypes.get_errno())}")
        return found

    prctl, create, add_rule, restrict = 157, 444, 445, 446
    version = call(create, None, 0, 1)
    attributes = struct.pack("=Q", _HANDLED.get(version, 0xFFFF))
    rules = call(create, attributes, len(attributes), 0)
    for path in filter(os.path.exists, readable):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE  # noqa: PTH112 (pathlib takes long)
        call(add_rule, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    call(prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call(restrict, rules, 0)
    os.close(rules)
    text = _filter()
    call(prctl, 22, 2, ctypes.byref(_Program(len(text) // 8, text)), 0, 0)  # PR_SET_SECCOMP


def _limit(cpu_s: int, memory_mb: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s + 1),
        (resource.RLIMIT_AS, memory_mb * 2**20),
        (resource.RLIMIT_FSIZE, _MAX_OUTPUT),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (min(most, cpu_s) if kind == resource.RLIMIT_CPU else most, most))


def main() -> None:
    """Run the code, then the tests."""
    given = json.loads(sys.stdin.buffer.read())
    secret, told = given.pop("secret"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the worker
    try:
        _limit(given["cpu_s"], given["memory_mb"])
        _lock((*_READABLE, os.path.dirname(os.__file__)))  # noqa: PTH120 (pathlib takes long)
    except OSError as error:
        os.write(told, f"no locks: {error}".encode())
        return
    space = {"__name__": "answer"}
    for what in ("code", "tests"):
        try:
            exec(compile(given[what], what, "exec", dont_inherit=True), space)  # noqa: S102 (behind the locks)
        except BaseException as error:
            trace, line = error.__traceback__, getattr(error, "lineno", None)
            while trace is not None:
                line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == what else line
                trace = trace.tb_next
            place = f"{what}, line {line}" if line else what
            os.write(told, f"{place}: {type(error).__name__}: {error}"[:1_000].encode(errors="replace"))
            os._exit(0)
    os.write(told, secret.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
