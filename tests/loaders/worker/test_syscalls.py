"""The filter of system calls: what libraries notice of it, and what it does on kernels that offer no more."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loaders.worker import syscalls

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in syscalls.ARCHITECTURES, reason="no table for it"
)


def filtered(code: str, place: Path, **wanted: bool) -> str:
    """Returns what code prints in a process with only the filter."""
    options = {"shared_user": True, "signals": False, "network": True, **wanted}
    head = f"""
        import ctypes
        from loaders.worker import syscalls
        wanted = syscalls.rules(**{options})
        assert syscalls.apply(ctypes.CDLL(None, use_errno=True), wanted) is None
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(place)},
        cwd=place, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_libraries_that_set_modes_and_times_go_on(tmp_path: Path) -> None:
    code = """
        import os, shutil, tarfile, tempfile, zipfile
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            with tempfile.NamedTemporaryFile("w") as file:
                file.write("x")
                file.flush()
                shutil.copy(file.name, "a")
            shutil.copy2("a", "b")
            os.makedirs("tree/deep", mode=0o700)
            shutil.copy("a", "tree/deep/a")
            shutil.copytree("tree", "copy")
            shutil.move("copy", "moved")
            with tarfile.open("t.tar", "w") as tar:
                tar.add("tree")
            with tarfile.open("t.tar") as tar:
                tar.extractall("from-tar", filter="data")
            with zipfile.ZipFile("z.zip", "w") as archive:
                archive.write("a")
            shutil.unpack_archive("z.zip", "from-zip")
            os.chmod("a", 0o600)
            os.utime("a")
            # As caches do: written to a temporary file, given its mode, moved into its place.
            descriptor, name = tempfile.mkstemp(dir=".")
            os.fchmod(descriptor, 0o644)
            os.replace(name, "cached")
            os.chdir("/")
        print(open("/proc/self/status").read().count("Seccomp:\t2"))
    """
    assert filtered(code, tmp_path) == "1"


def test_frameworks_go_on(tmp_path: Path) -> None:
    code = """
        import subprocess, sys, threading
        import joblib, numpy as np
        from sklearn.ensemble import RandomForestClassifier
        x, y = np.random.rand(200, 4), np.arange(200) % 2
        model = RandomForestClassifier(n_estimators=8, n_jobs=2).fit(x, y)
        joblib.dump(model, "m.joblib")
        assert (joblib.load("m.joblib", mmap_mode=None).predict(x) == model.predict(x)).all()
        assert joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(n) for n in (-1, -2)) == [1, 2]
        assert subprocess.run(["true"], start_new_session=True).returncode == 0
        threads = [threading.Thread(target=int) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(abs, [-1, -2]))
    """
    assert filtered(code, tmp_path) == "[1, 2]"


def test_without_scopes_only_it_itself_can_be_signalled(tmp_path: Path) -> None:
    code = """
        import os, signal, subprocess, time
        child = subprocess.Popen(["sleep", "30"], stdout=-3, stderr=-3)
        refused = []
        for pid in (child.pid, os.getppid(), -1, -os.getpgid(os.getppid())):
            try:
                os.kill(pid, signal.SIGWINCH)
            except PermissionError:
                refused.append(pid)
        assert len(refused) == 4, refused
        for send in (lambda: signal.pidfd_send_signal(os.pidfd_open(child.pid), 9),):
            try:
                send()
            except PermissionError:
                refused.append(0)
        os.kill(child.pid, 0)  # only a question
        seen = []
        signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        print(len(refused), len(seen), flush=True)
        os._exit(0)
    """
    assert filtered(code, tmp_path, signals=True) == "5 2"


def test_without_landlocks_third_version_no_file_is_cut_but_those_it_may_write(tmp_path: Path) -> None:
    code = """
        import os
        with open("f", "w") as file:
            file.write("kept")
        with open("f", "r+") as file:
            file.truncate(3)
        refused = 0
        for cut in (
            lambda: os.truncate("f", 0),
            lambda: os.open("f", os.O_RDONLY | os.O_TRUNC),
            lambda: os.open("f", 3 | os.O_TRUNC),
        ):
            try:
                cut()
            except PermissionError:
                refused += 1
        print(refused, open("f").read(), flush=True)
        open("f", "w").close()
        print(os.path.getsize("f"))
    """
    assert filtered(code, tmp_path, cuts=True).split() == ["3", "kep", "0"]
    assert filtered(code, tmp_path).split()[0] == "0"


def test_with_a_user_of_its_own_modes_are_real(tmp_path: Path) -> None:
    code = """
        import os
        if os.path.exists("f"):
            os.unlink("f")
        open("f", "w").close()
        os.chmod("f", 0o640)
        print(oct(os.stat("f").st_mode & 0o777))
    """
    assert filtered(code, tmp_path, shared_user=False) == "0o640"
    assert filtered(code, tmp_path) != "0o640"


def test_every_rule_has_a_number() -> None:
    for rule in syscalls.rules(shared_user=True, signals=True, network=False, cuts=True):
        assert rule.call in syscalls._NUMBERS
    for column in (0, 1):
        numbers = [found[column] for found in syscalls._NUMBERS.values() if found[column] is not None]
        assert len(numbers) == len(set(numbers))
