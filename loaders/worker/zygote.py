"""The zygote: a process that imports an environment's frameworks once and starts model processes.

It runs no model code. By `fork`, a model process starts in milliseconds and shares the frameworks' memory. A
fork is safe only from a process with one thread, so the zygote counts its tasks after every import, and
leaves modules that start threads to the children. By `spawn`, each model process is a new Python. In both
cases the zygote is the parent and reaps the children's orphans: when a model process ends, its children end
too, and when the gateway ends, all processes end. Must not know the gateway's modules.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from loaders.compat.pythons import exit_code, receive_descriptors, send_descriptors
from loaders.worker import bootstrap, prewarm, process, temporary

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_OOM_SCORE: Final = "300"
_MAX_MESSAGE: Final = 1 << 16


def main(options: Mapping[str, Any]) -> None:
    """Runs a zygote until the gateway closes its socket.

    `control`: a socket of packets to the gateway; `parent`: the gateway's process id; `preload`: modules to
    import; `start`: fork or spawn; `scratch`: the directory for temporary directories.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # imports may take long or hang
    if os.getppid() != options["parent"]:
        os._exit(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(options["control"], False)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, "ascii")  # end the zygote before the gateway
    missing = _preload(options)
    if options["start"] == "fork":
        _preload_own()
    start = options["start"] if len(os.listdir("/proc/self/task")) == 1 else "spawn"
    # A model of the same user must not inspect the process that starts other models.
    memory = os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
    _prctl(_PR_SET_DUMPABLE, 0)
    # From here on, the zygote ends when the control socket closes, after ending its children.
    _prctl(_PR_SET_PDEATHSIG, 0)
    with socket.socket(fileno=options["control"]) as control:
        ready = {"op": "ready", "start": start, "missing": missing}
        try:
            send_descriptors(control, json.dumps(ready).encode(), [memory])
        except (BrokenPipeError, ConnectionResetError):  # the gateway stopped during the imports
            return
        os.close(memory)
        gc.collect()
        gc.freeze()  # a child's collector would write to these pages, and so copy them
        _Nursery(control, start, options["scratch"]).run()
    if os.getppid() != options["parent"]:
        temporary.remove(os.path.join(options["scratch"], temporary.PACKS))
        with suppress(OSError):  # fails until the last zygote ends
            os.rmdir(options["scratch"])


def _preload(options: Mapping[str, Any]) -> list[str]:
    """Imports the frameworks. Returns those that are missing or must not be imported before a fork.

    A thread that an import started cannot be stopped, so the process restarts without that module.
    """
    missing = list(options.get("missing", ()))
    for name in options["preload"]:
        if name in missing or options["start"] == "spawn":
            continue
        before = len(os.listdir("/proc/self/task"))
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
        except Exception as error:  # noqa: BLE001  (fails again, with its cause, in the models that need it)
            sys.stderr.write(f"{name} cannot be imported here: {type(error).__name__}: {error}\n")
            missing.append(name)
        if before == 1 and len(os.listdir("/proc/self/task")) > 1:
            _again({**options, "missing": [*missing, name]})
    return missing


def _preload_own() -> None:
    """Imports the modules of this package that every child needs, so that the children share them."""
    from loaders import flavors, model, signature  # noqa: F401
    from loaders.compat import standin  # noqa: F401

    for name in flavors.FLAVORS:
        flavors.get(name)
    process.thread_pools()
    try:
        prewarm.predict_once()
    except Exception as error:  # noqa: BLE001  (fails again in the models that need it)
        sys.stderr.write(f"nothing was prewarmed: {type(error).__name__}: {error}\n")


def _again(options: Mapping[str, Any]) -> NoReturn:
    os.set_inheritable(options["control"], True)
    os.execv(sys.executable, _command("zygote", options))


def _command(module: str, options: Mapping[str, Any]) -> list[str]:
    return [sys.executable, bootstrap.__file__, module, json.dumps(options)]


class _Nursery:
    """The running model processes and their directories, by process id."""

    def __init__(self, control: socket.socket, start: str, scratch: str) -> None:
        self._control = control
        self._start = start
        self._scratch = scratch
        self._children: dict[int, str] = {}
        self._garbage: list[str] = []
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        woken, wake = self._wakeup
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        waiting.register(woken, select.POLLIN)
        while True:
            ready = dict(waiting.poll())
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._request():
                break
        self._end()

    def _request(self) -> bool:
        try:
            data, descriptors = receive_descriptors(self._control, _MAX_MESSAGE, 2)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        try:
            pid, own = self._make(*descriptors)
        except OSError as error:
            self._tell({"op": "failed", "token": message["token"], "reason": os.strerror(error.errno or 0)})
        else:
            self._tell({"op": "started", "token": message["token"], "pid": pid, "temporary": own})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _make(self, connection: int, log: int) -> tuple[int, str]:
        own = temporary.make(self._scratch)
        options = {"connection": connection, "log": log, "temporary": own}
        try:
            if self._start == "fork":
                pid = os.fork()
                if pid == 0:
                    # A model must not have descriptors that the zygote and other models depend on.
                    signal.set_wakeup_fd(-1)
                    self._control.close()
                    for descriptor in self._wakeup:
                        os.close(descriptor)
                    process.main(options)
                with suppress(OSError):  # both parent and child set it, so that timing does not matter
                    os.setpgid(pid, pid)
            else:
                pid = self._spawn(options)
        except OSError:
            temporary.remove(own)
            raise
        self._children[pid] = own
        return pid, own

    def _spawn(self, options: Mapping[str, Any]) -> int:
        needed = [options["connection"], options["log"]]
        for descriptor in needed:
            os.set_inheritable(descriptor, True)
        try:
            return os.posix_spawn(
                sys.executable,
                _command("process", options),
                os.environ,
                setpgroup=0,
                setsigdef=[signal.SIGCHLD],
            )
        finally:
            for descriptor in needed:
                os.set_inheritable(descriptor, False)

    def _reap(self) -> None:
        """Reads the exit status of ended processes, tells the gateway how its model processes ended, and ends
        their orphans."""
        ended = False
        while (pid := _ended()) is not None:
            ended = True  # a model process, or an orphan, whose own children are now children of the zygote
            own = self._children.pop(pid, None)
            if own is not None:
                _kill_group(pid)  # before reading its status: until then no other group has this number
            status = os.waitpid(pid, 0)[1]
            if own is not None:
                self._tell({"op": "ended", "pid": pid, "code": exit_code(status)})
                self._garbage.append(own)
        if ended:
            for pid in _offspring():
                if pid not in self._children:
                    _kill(pid)
            self._remove_garbage()

    def _remove_garbage(self) -> None:
        """Removes directories of ended processes. The rest of a group may still write, so retries later."""
        self._garbage = [path for path in self._garbage if not temporary.remove(path)]

    def _end(self) -> None:
        """Ends all processes, because the gateway is gone."""
        signal.set_wakeup_fd(-1)
        while children := _offspring():
            for pid in children:
                if pid in self._children:
                    _kill_group(pid)
                _kill(pid)
            with suppress(ChildProcessError):
                os.waitpid(-1, 0)
        self._garbage += self._children.values()
        self._remove_garbage()

    def _tell(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # the gateway is gone; the next read reports it
            self._control.send(json.dumps(message).encode())


def _ended() -> int | None:
    """Returns a child that ended and whose status is not read yet."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _offspring() -> list[int]:
    """Returns the children of this process, from `/proc`, including ended ones."""
    own, found = os.getpid(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text("utf-8", "replace")
                if int(stat.rpartition(")")[2].split()[1]) == own:
                    found.append(int(entry))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
