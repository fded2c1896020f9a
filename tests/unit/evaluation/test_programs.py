"""Programs that misbehave are bounded, and only those that come to their end have passed."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.evaluation import programs
from app.evaluation.programs import ProgramLimits, ProgramRunner

SMALL = ProgramLimits(memory_mib=256, folder_mib=8, processes=8)
SHORT = replace(SMALL, wall_seconds=1.0, output_bytes=1000)  # for programs without an end: others may need longer


@pytest.fixture(scope="module")
def runner() -> ProgramRunner:
    return ProgramRunner(SMALL)


@pytest.fixture
def hasty(runner: ProgramRunner, monkeypatch: pytest.MonkeyPatch) -> ProgramRunner:
    monkeypatch.setattr(runner, "limits", SHORT)
    return runner


def _isolated(runner: ProgramRunner) -> ProgramRunner:
    if not runner.is_isolated:
        pytest.skip("this kernel lets users have no namespaces")
    return runner


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return x + 1\nassert f(1) == 2",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "import atexit, time\natexit.register(time.sleep, 60)",
        "open('own', 'w').write('x')\nimport os\nassert os.listdir() == ['own'] and os.environ['HOME'] == os.getcwd()",
    ],
    ids=["tests hold", "a thread goes on", "an exit handler waits", "it writes a file into its folder"],
)
def test_a_program_that_comes_to_its_end_has_passed(runner: ProgramRunner, program: str) -> None:
    assert runner.run(program).outcome == "passed"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys\nsys.exit(0)\nassert False", ""),
        ("import os\nos._exit(0)", ""),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", ""),
        ("def f(:", "SyntaxError"),
        ("assert 1 == 2, 'unlike'", "AssertionError: unlike"),
        ("input()", "EOFError"),
        ("x = bytearray(2**30)", "MemoryError"),
    ],
)
def test_a_program_that_ends_before_its_end_has_failed(runner: ProgramRunner, program: str, said: str) -> None:
    result = runner.run(program)
    assert result.outcome == "failed"
    assert said in result.output


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(60)",
        "while True:\n    print('x' * 10_000)",
    ],
    ids=["endless loop", "sleep", "giant output"],
)
def test_what_does_not_end_is_ended(hasty: ProgramRunner, program: str) -> None:
    result = hasty.run(program)
    assert result.outcome == "timed out"
    assert len(result.output) <= SHORT.output_bytes


def test_a_fork_bomb_is_defused(hasty: ProgramRunner) -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    # The kernel holds every user but root to the number of processes; root's are ended when there are too many.
    assert _isolated(hasty).run(bomb).outcome in {"failed", "timed out"}


def test_more_processes_than_allowed_are_refused(runner: ProgramRunner) -> None:
    many = "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(60)"
    assert _isolated(runner).run(many).outcome == "failed"


def test_an_endless_loop_is_ended_by_its_time_on_the_cpu() -> None:
    result = ProgramRunner(ProgramLimits(wall_seconds=240, cpu_seconds=1)).run("while True:\n    pass")
    assert (result.outcome, result.seconds < 200) == ("timed out", True)


def test_all_files_together_are_bounded_and_no_file_outside_can_be_written(
    runner: ProgramRunner, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    many = "for i in range(100):\n    open(str(i), 'wb').write(bytes(2**20))"
    assert "No space left" in _isolated(runner).run(many).output
    assert runner.run("open('large', 'wb').write(bytes(2**24))").outcome == "failed"
    assert "Read-only" in runner.run(f"open({str(tmp_path / 'theirs')!r}, 'w')").output
    assert not [*tmp_path.iterdir()]


def test_the_network_is_out_of_reach(runner: ProgramRunner) -> None:
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=5)"
    assert "unreachable" in _isolated(runner).run(program).output


def test_neither_our_process_nor_our_environment_can_be_reached(
    runner: ProgramRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERSKIP_SECRET", "sesame")
    kill_us = (
        f"import os\ntry:\n    os.kill({os.getpid()}, 9)\nexcept ProcessLookupError:\n    os.kill(os.getppid(), 9)"
    )
    assert _isolated(runner).run(kill_us).outcome == "passed"  # the first process of a namespace ignores the signal
    spy = "import glob\nfor name in glob.glob('/proc/[0-9]*/environ'):\n    print(open(name).read())"
    result = runner.run(spy)
    assert result.outcome == "passed"
    assert "HOME=" in result.output
    assert "sesame" not in result.output


def test_a_daemon_does_not_outlive_its_program(runner: ProgramRunner) -> None:
    name = "layerskip-daemon-of-a-test"
    daemon = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execlp('sh', {name!r}, '-c', 'sleep 60')"
    assert _isolated(runner).run(daemon).outcome == "passed"
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if name in _read(path)]


def test_nothing_is_left_of_a_program(runner: ProgramRunner) -> None:
    result = runner.run("import os\nprint(os.getcwd())\nos.makedirs('deep/' * 200)\nos.chmod('deep', 0)")
    assert not Path(result.output.strip()).exists()


def test_without_namespaces_a_warning_says_what_is_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(programs, "_NAMESPACES", ("no-such-command",))
    runner = ProgramRunner(SMALL)
    assert not runner.is_isolated
    assert "without namespaces" in caplog.text
    assert "no-such-command" in caplog.text
    assert runner.run("assert True").outcome == "passed"
    runner.limits = SHORT
    assert runner.run("while True:\n    print('x' * 10_000)").outcome == "timed out"


def test_root_of_a_container_that_has_no_user_nobody_runs_programs_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*call: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(programs.os, "geteuid", lambda: 0)
    monkeypatch.setattr(programs.os, "chown", refused)
    assert ProgramRunner(SMALL).run("assert True").outcome == "passed"


def test_a_machine_that_runs_no_program_is_an_error_and_no_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.sys, "executable", "/no/such/python")
    with pytest.raises(ConfigError, match=r"allow_running_programs: got .*No such file"):
        ProgramRunner(SMALL)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""
