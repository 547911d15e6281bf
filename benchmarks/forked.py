"Run a function in a forked child, so that torch is imported once for hundreds of trials, and see what becomes of it."
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Outcome:
    "What became of a child."
    code: int # exit code; minus the signal that ended it, as in subprocess
    out: str # standard output
    err: str # standard error
    seconds: float # how long it took
    late: bool # whether it was ended for taking too long

    @property
    def text(self) -> str: return self.out + self.err


class Child:
    "A forked process in a session of its own, which calls `f` in `folder` with its output in two files."
    def __init__(self,
        f: Callable, # takes nothing, returns an exit code
        folder: Path, # working directory
        logs: Path, # folder of the two files
        *,
        memory: int = 0 # bytes that it may map beyond what it has; 0: no limit
    ):
        self.logs, self.start, self.code = logs, time.monotonic(), None
        sys.stdout.flush(); sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid: self._child(f, folder, memory)

    def _child(self, f, folder, memory):
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            for n, name in ((1, 'out'), (2, 'err')):
                os.dup2(os.open(self.logs/name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), n)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(n, 'w', encoding='utf-8', errors='backslashreplace', closefd=False) for n in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            if memory:
                size = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
                resource.setrlimit(resource.RLIMIT_AS, (size+memory, size+memory))
            code = f()
        except SystemExit as e: code = e.code if isinstance(e.code, int) else 1
        except BaseException: traceback.print_exc()
        finally:
            for o in (sys.stdout, sys.stderr):
                try: o.flush()
                except Exception: pass
            os._exit(code or 0)

    def poll(self) -> bool: # whether it has ended
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, limit: float = 60, step: float = .005) -> Outcome:
        "Wait for its end; after `limit` seconds, end it and all that it started."
        late = False
        while not self.poll():
            if time.monotonic()-self.start > limit:
                late = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(step)
        seconds = time.monotonic()-self.start
        if late: end(members(self.pid))
        read = lambda name: (self.logs/name).read_text(encoding='utf-8', errors='backslashreplace') if (self.logs/name).exists() else ''
        return Outcome(self.code, read('out'), read('err'), seconds, late)


def members(session: int) -> list[int]: # process ids
    "The living processes of a session."
    found = []
    for o in Path('/proc').iterdir():
        if not o.name.isdigit(): continue
        try: fields = (o/'stat').read_text().rpartition(')')[2].split()
        except OSError: continue
        if int(fields[3]) == session and fields[0] != 'Z': found.append(int(o.name))
    return found


def end(pids: list[int]):
    for p in pids:
        try: os.kill(p, signal.SIGKILL)
        except ProcessLookupError: pass


def left_after(session: int, seconds: float) -> list[int]:
    "The processes of a session that are still there after so many seconds."
    until = time.monotonic()+seconds
    while (left := members(session)) and time.monotonic() < until: time.sleep(.05)
    return left
