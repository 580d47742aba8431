"""Processes that begin with torch imported: whole ones, but for the seconds that its import takes.

A server imports what is not ours (torch, torchvision, timm, Hydra) and forks for every command; the
fork imports driftline and runs it. `conftest.python()` starts a server and gives a program that
hands its command to it, for tests in which the start of Python, signals and threads do not matter.
The server ends with the process that started it, a command with the process that asked for it.

    python tests/forked.py SOCKET PARENT MODULES     # PARENT is the process that starts it
    python -IS tests/forked.py --ask SOCKET WORDS    # `python WORDS`
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from typing import NoReturn


def ask(path: str, first: str, *words: str) -> NoReturn:
    """Hand a command to the server, and end as it ends."""
    if first.startswith("-") and first not in ("-c", "-m"):
        os.execv(sys.executable, [sys.executable, first, *words])
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [b"."], [0, 1, 2])
        command = {"words": [first, *words], "folder": os.getcwd(), "env": dict(os.environ)}
        line.sendall(json.dumps(command).encode() + b"\n")
        status = int(line.makefile().readline() or 70)
    if status < 0:
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


def serve(path: str, parent: int) -> list[str]:
    """Fork for every command; returns in each fork, as the process that was asked for."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{path}.new")
        door.listen()
        door.settimeout(1)
        os.rename(f"{path}.new", path)  # now it can be asked
        while os.getppid() == parent:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                line, _ = door.accept()
            except TimeoutError:
                continue
            with line:
                line.settimeout(None)
                _, fds, _, _ = socket.recv_fds(line, 1, 3)
                text = line.makefile().readline()
                if text.endswith("\n") and os.fork() == 0:  # else who asked has ended
                    door.close()
                    if program := os.fork():
                        for fd in fds:
                            os.close(fd)
                        watch(program, line)
                    line.close()
                    return become(fds, **json.loads(text))
            for fd in fds:
                os.close(fd)
    raise SystemExit


def watch(program: int, line: socket.socket) -> NoReturn:
    """Say how the program ends; without one who listens it is killed, with what it started."""
    with contextlib.suppress(OSError):
        os.setpgid(program, program)  # both do it: neither knows which of them comes first
    while not (ended := os.waitpid(program, os.WNOHANG))[0]:
        if select.select([line], [], [], 0.02)[0]:  # nothing more is sent: the end of the line
            os.killpg(program, signal.SIGKILL)
            os._exit(0)
    with contextlib.suppress(OSError):
        line.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
    os._exit(0)


def become(fds: list[int], words: list[str], folder: str, env: dict[str, str]) -> list[str]:
    """Take over files, folder, environment and path of the process that asked; returns `words`."""
    os.setpgid(0, 0)
    for fd, own in zip(fds, (0, 1, 2), strict=True):
        os.dup2(fd, own)
        os.close(fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    first = os.path.dirname(os.path.abspath(words[0])) if words[0] not in ("-c", "-m") else ""
    more = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [folder if words[0] == "-m" else first, *more, *sys.path[1:]]
    random.seed()
    return words


def run(words: list[str]) -> None:
    """What Python does with these words."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, place, code = ["-c", *words[2:]], "<string>", words[1].encode()
    else:
        sys.argv, place = words, os.path.abspath(words[0])
        with open(place, "rb") as file:
            code = file.read()
        main.__file__ = place
    exec(compile(code, place, "exec"), vars(main))


def end(status: int) -> NoReturn:
    """The end of a process without the second that it takes to free every module."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--ask":
        ask(*sys.argv[2:])

    path, parent, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    words = serve(path, int(parent))
    try:
        run(words)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        end(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
