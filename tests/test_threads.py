"""Threads that wait: told to sleep soon on few cores, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scratchlm import threads


@pytest.mark.parametrize(("cores", "done"), [(1, True), (threads.FEW, True), (threads.FEW + 1, False)])
def test_on_few_cores(monkeypatch: pytest.MonkeyPatch, cores: int, done: bool) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    monkeypatch.setattr(threads.os, "environ", given := {"PATH": "x"})
    assert threads.wait_briefly() == done
    assert given == {"PATH": "x"} | ({"GOMP_SPINCOUNT": str(threads.SPINS)} if done else {})


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads.os, "environ", given := {name: "7"})
    assert not threads.wait_briefly() and given == {name: "7"}


SCRIPT = """
import os, sys
import scratchlm.threads as threads
threads.cores = lambda: 2
from scratchlm.cli import main
import builtins
seen = []
found = builtins.__import__
def watching(name, *rest, **named):
    if name == "torch" and not seen:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
    return found(name, *rest, **named)
builtins.__import__ = watching
main(["train", "small.toml", "--train.steps", "1", "--out", "run"])
print(seen[0], file=sys.stderr)
"""


def test_training_says_so_before_torch_is_imported(small: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment["PYTHONPATH"] = str(Path(threads.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment, cwd=small
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == str(threads.SPINS)


def test_a_process_leaves_at_once_but_not_before_its_threads_and_what_is_to_be_done_at_its_end() -> None:
    code = """
import atexit, sys, threading, time
import scratchlm.cli as cli

def work(arguments=None):
    print("answered")
    atexit.register(print, "at the end")
    if sys.argv[1] == "thread":
        threading.Thread(target=lambda: (time.sleep(0.3), print("worked"))).start()
    return 7

cli.main = work
cli.program()
"""
    for how, said in (("plain", ["answered", "at the end"]), ("thread", ["answered", "worked", "at the end"])):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120)
        assert done.returncode == 7 and done.stdout.split("\n")[:-1] == said
