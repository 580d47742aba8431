"""Processes that are forked with torch imported end as those do that Python starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANG, ROOT, python, servers

LATE = """
import atexit, threading, time
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("main")
"""
WORDS = {
    "says": [
        "-c",
        "import sys, os; print(sys.argv, os.getcwd(), os.environ['A']); print(sys.path)",
    ],
    "reads": ["-c", "print(input()[::-1])"],
    "status": ["-c", "raise SystemExit(3)"],
    "text": ["-c", "raise SystemExit('why')"],
    "error": ["-c", "1 / 0"],
    "signal": ["-c", "import os; os.kill(os.getpid(), 9)"],
    "late": ["-c", LATE],
    "alone": ["script.py"],
    "module": ["-m", "json.tool", "--help"],
    "script": ["script.py", "a b", "--c"],
    "version": ["--version"],
}


def forked() -> str:
    """A server that imports nothing starts at once."""
    return python(())


def result(program: str, words: list[str], folder: Path) -> tuple[int, str, str]:
    env = os.environ | {"A": "ä b", "PYTHONPATH": str(folder / "more")}
    done = subprocess.run(
        [program, *words], cwd=folder, env=env, text=True, capture_output=True, input="abc\n"
    )
    last = done.stderr.splitlines()[-1:]  # above it, a stack trace
    return done.returncode, done.stdout.replace("/forked.py", "/-m"), "".join(last)


@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_a_forked_process_does_what_a_started_one_does(tmp_path, words):
    (tmp_path / "script.py").write_text(
        "import sys\nprint(__name__, __file__, sys.argv, sys.path[0])"
    )
    assert result(forked(), words, tmp_path) == result(sys.executable, words, tmp_path)


def gone(process: int) -> bool:
    """Waits until a process has ended, whether or not its parent has taken notice."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        command = ["ps", "-o", "stat=", "-p", str(process)]
        state = subprocess.run(command, capture_output=True, text=True).stdout
        if state.strip()[:1] in ("", "Z"):
            return True
        time.sleep(0.02)
    return False


def sleeper(program: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with a child, as a run with workers; both would sleep for long."""
    code = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(9999)"
    # Whoever starts the tests in the background may have them ignore Ctrl-C, and so all they start.
    kept = signal.signal(signal.SIGINT, signal.SIG_DFL)
    asked = subprocess.Popen([program, "-c", code], text=True, stdout=subprocess.PIPE)
    signal.signal(signal.SIGINT, kept)
    assert asked.stdout is not None
    return asked, [int(asked.stdout.readline()) for _ in range(2)]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_the_one_that_asked_for_it(kind):
    asked, processes = sleeper(forked())
    with asked:
        asked.send_signal(kind)
        asked.wait(HANG)
    assert all(map(gone, processes))


def test_a_server_that_has_died_is_started_again():
    before = forked()
    server = servers[()][1]
    asked, processes = sleeper(before)
    server.kill()
    server.wait()
    assert forked() != before
    assert subprocess.run([forked(), "-c", "raise SystemExit(3)"]).returncode == 3
    with asked:  # what it had begun is not lost
        assert asked.poll() is None
        asked.kill()
        asked.wait(HANG)
    assert all(map(gone, processes))


@pytest.mark.parametrize("early", [False, True])
def test_a_server_ends_with_the_session_that_started_it(early, tmp_path):
    """Also if that has ended before the server was ready."""
    parent = "os.getpid()" if not early else "os.getpid() + 1"
    path = str(tmp_path / "socket")
    code = "import os, subprocess, sys, time; server = subprocess.Popen([sys.executable, "
    code += f"'tests/forked.py', {path!r}, str({parent})]); print(server.pid, flush=True)\n"
    if not early:
        code += f"while not os.path.exists({path!r}): time.sleep(0.02)\n"
    code += "os._exit(0)"  # as a session that is killed
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=HANG)
    assert gone(int(done.stdout)), done.stderr
