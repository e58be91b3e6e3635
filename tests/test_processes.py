"""Helper processes, with real ones: what arrives, what ends whom, and what lies in the working folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers_at_work import Broken, Named

from scratchlm import processes
from scratchlm.errors import UserError
from scratchlm.processes import Workers, cores
from scratchlm.tokenizer.counting import Documents, WordCounter

HERE = Path(__file__).parent


def test_cores() -> None:
    assert cores() == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if hasattr(os, "sched_setaffinity"):
        one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
        code = f"{one}; from scratchlm.processes import cores; print(cores())"
        assert subprocess.check_output([sys.executable, "-c", code]) == b"1\n"


@pytest.mark.parametrize("number", [1, 3])
def test_results_come_in_the_order_of_the_jobs(number: int) -> None:
    with Workers(Named, ("é",), number) as pool:
        assert list(pool.map([])) == []
        delays = [0.05, 0.0, 0.02, 0.0] * 5
        assert list(pool.map(delays)) == [("é", delay) for delay in delays]
        assert list(pool.map([b"x" * 3_000_000])) == [("é", b"x" * 3_000_000)]
        finished = pool.finish()
    assert len(finished) == number
    assert sum(jobs for jobs, _ in finished) == 21
    pids = {pid for _, pid in finished}
    assert len(pids) == number and os.getpid() not in pids


def test_jobs_are_taken_as_they_are_worked_on() -> None:
    taken = []
    with Workers(Named, ("",), 2) as pool:
        results = pool.map(taken.append(n) or 0 for n in range(1000))
        for _ in range(50):
            next(results)
        assert len(taken) < 50 + 2 * processes.IN_FLIGHT


def test_failures_of_a_helper() -> None:
    with Workers(Broken, (), 2) as pool:
        with pytest.raises(UserError, match="a bad job") as caught:
            list(pool.map([UserError("a bad job")]))
        assert "helpers_at_work.py" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="Odd in a helper process"):  # cannot be pickled
            list(pool.map(["odd"]))
        with pytest.raises((AttributeError, TypeError), match="pickle"):  # a result that cannot be
            list(pool.map(["lambda"]))
        with pytest.raises(UserError, match="no memory left; run again with fewer processes"):
            list(pool.map([MemoryError()]))
        assert list(pool.map(["print"])) == ["print"]  # the print went to standard error
    with Workers(Broken, ("nonsense",), 2) as pool, pytest.raises(TypeError):  # the handler cannot be built
        list(pool.map([1]))
    with (
        Workers(Broken, (), 2, advice="buy some") as pool,
        pytest.raises(UserError, match=r"ended with status -9 \(killed; is memory short\?\); buy some"),
    ):
        list(pool.map(["die"] * 5))
    with (
        Workers(Broken, (), 1) as pool,
        pytest.raises(UserError, match=r"ended with status 3; run again"),
    ):
        list(pool.map(["exit"]))


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen

    def second_fails(*args: object, **more: object) -> object:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*args, **more))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(UserError, match=r"cannot start a helper process .*; run again with fewer"):
        Workers(Named, ("",), 2)
    assert started[0].poll() is not None, "the first was ended"


def test_at_the_end_they_are_gone() -> None:
    pool = Workers(Named, ("",), 2)
    list(pool.map([0] * 6))
    pids = [helper._process.pid for helper in pool._helpers]
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pool:
        pool._threads.submit(pool._ask_idle, 60.0)  # in the middle of a job
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 10
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in listed for child in path.read_text().split()]


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_helpers_leave_in_the_middle_of_a_job_when_their_caller_is_killed() -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        from helpers_at_work import Named
        from scratchlm.processes import Workers
        with Workers(Named, ("",), 2) as pool:
            print(list(pool.map([0.0] * 6)), flush=True)
            list(pool.map([600.0] * 2))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    helpers = children(process.pid)
    assert len(helpers) == 2 and all(map(alive, helpers))
    time.sleep(0.2)
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(map(alive, helpers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, helpers))


def test_a_stray_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("regex", "numpy", "queue", "scratchlm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "mine.py").write_text("def handler():\n    return str.upper\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in an interactive session
    import mine  # type: ignore[import-not-found]

    with Workers(WordCounter, ("gpt2", ()), 2) as pool:
        assert list(pool.map([Documents(["one two"])] * 4)) == [7] * 4
        assert sum(counts["one"] for counts in pool.finish()) == 4
    with Workers(mine.handler, (), 1) as pool:  # but what only lies there is found
        assert list(pool.map(["a"])) == ["A"]


# Whole commands, interrupted

INTERRUPTED = "scratchlm: interrupted; nothing is lost, the same command goes on from there"

COMMAND = f"""\
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind a shell's &
sys.path.append({str(HERE)!r})
import scratchlm.data.shards as shards
import scratchlm.tokenizer.counting as counting
from scratchlm.cli import main
counting.cores = lambda: 2
counting._WORTH_HELPERS = 1 << 20
counting._JOB = 1 << 18
shards.CHUNK_BYTES = 1 << 14
if "SLOW" in os.environ:
    from helpers_at_work import SlowCounter
    counting.WordCounter = SlowCounter
sys.exit(main(sys.argv[1:]))
"""


@linux
@pytest.mark.parametrize("when", ["helpers start to count", "helpers count", "helpers tokenise"])
def test_ctrl_c_leaves_one_line_and_no_orphan_and_the_command_goes_on(small: Path, when: str) -> None:
    text = (small / "corpus.txt").read_text(encoding="utf-8")
    many = "<|endoftext|>".join(f"{n} {text.replace('def', f'd{n}')}" for n in range(100))
    (small / "corpus.txt").write_text(many, encoding="utf-8")
    (small / "regex.py").write_text("raise SystemExit('the wrong one')")  # must not be imported by anyone
    command = [sys.executable, "-P", "-c", COMMAND, "data", "prepare", "small.toml"]
    command += ["--data.workers", "2", "--data.shard_tokens", "20000"]
    slow = {**os.environ, "SLOW": "1"} if "count" in when else None
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=slow)
    if when == "helpers tokenise":
        wait_until(lambda: len(list(small.glob("runs/cache/data/*/train-*.bin"))) >= 2, process)
    else:
        wait_until(lambda: len(children(process.pid)) == 2, process)
        time.sleep(0.8 if when == "helpers count" else 0)  # they need some three seconds
    helpers = children(process.pid)
    assert len(helpers) == (
        0 if when == "helpers tokenise" else 2
    )  # a tokenizer that frees the lock works in threads
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    said = [
        line for line in error.replace("\r", "\n").splitlines() if line and "%|" not in line and "B/s" not in line
    ]
    assert said == [INTERRUPTED]
    assert not any(map(alive, helpers))
    finished = {path: path.stat().st_mtime_ns for path in small.glob("runs/cache/data/*/train-*.bin")}
    assert bool(finished) == (when == "helpers tokenise")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(small.glob("runs/cache/data/*/manifest.json"))) == 1
    kept = [path for path, date in finished.items() if path.stat().st_mtime_ns == date]
    assert len(kept) >= len(finished) - 1  # one may have been finished, but not yet noted


@linux
def test_a_helper_killed_while_counting_is_one_line(small: Path) -> None:
    text = (small / "corpus.txt").read_text(encoding="utf-8")
    (small / "corpus.txt").write_text("<|endoftext|>".join([text] * 60), encoding="utf-8")
    command = [sys.executable, "-P", "-c", COMMAND, "data", "prepare", "small.toml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(children(process.pid)) == 2, process)
    helpers = children(process.pid)
    os.kill(helpers[0], signal.SIGKILL)  # as the kernel does when memory runs out
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith(
        "scratchlm: error: a helper process ended with status -9 (killed; is memory short?); run"
    )
    assert not any(map(alive, helpers))
