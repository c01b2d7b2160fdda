"""Starts a server so that every process that comes of it stays below this one: `launch.py COMMAND…`.

A daemon that leaves its parent becomes a child of this process, so its memory and its processor time can be
found and it can be ended. SIGTERM goes to the server; when the server is gone, so is all that it left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def main(command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: server.send_signal(signal.SIGTERM))
    code = None
    while code is None:
        pid, status = os.wait()  # also the orphans; what they used is then counted as this process's children
        if pid == server.pid:
            code = os.waitstatus_to_exitcode(status)
    end = time.monotonic() + 10
    while left := children():
        for pid in left:
            os.kill(pid, signal.SIGTERM if time.monotonic() < end else signal.SIGKILL)
        time.sleep(0.2)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
    return max(code, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
