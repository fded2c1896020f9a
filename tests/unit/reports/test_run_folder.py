import math
import re
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from app.checkpoints import run_lock
from app.errors import ConfigError
from app.metric_names import DECODE_ACCEPTANCE_RATE, DECODE_SPEEDUP, TRAIN_EXIT_LOSS, TRAIN_LOSS, VAL_LOSS
from app.reports.run_folder import read_runs
from app.reports.scalars import read_scalars
from app.tables import Table
from tests.support.run_folders import EXITS, logged, make_run


def test_values_and_steps_are_those_that_were_logged(tmp_path: Path) -> None:
    scalars = read_scalars(make_run(tmp_path / "run"))
    assert scalars.of(TRAIN_LOSS) == pytest.approx({20: logged(20)[TRAIN_LOSS], 40: logged(40)[TRAIN_LOSS]})
    assert [*scalars.by_exit(TRAIN_EXIT_LOSS)] == [*EXITS]
    assert scalars.latest_by_setting(DECODE_SPEEDUP) == pytest.approx({(1, 2): 1.1, (1, 3): 1.1, (2, 2): 1.4})
    assert scalars.notes == []


def test_of_a_deep_model_the_table_of_decoding_tells_the_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    columns = {"exit": ["2", "3"], "drafts": ["4", "4"], "acceptance": ["35.5%", "-"], "speedup": ["1.31x", "0.90x"]}
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("decode/self_speculative", Table.of_columns("title", columns).as_markdown(), 40)
        writer.add_scalar(DECODE_SPEEDUP, 1.31, 39)  # of the fastest
    scalars = read_scalars(folder)
    assert scalars.latest_by_setting(DECODE_SPEEDUP) == {(2, 4): 1.31, (3, 4): 0.9}
    assert scalars.latest_by_setting(DECODE_ACCEPTANCE_RATE) == {(2, 4): 0.355}


def test_what_a_resumed_run_logged_again_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with SummaryWriter(str(folder), filename_suffix=".resumed") as writer:
        event = Event(step=29, session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.add_event(event, 29)
        writer.add_scalar(VAL_LOSS, 1.25, 39)
    scalars = read_scalars(folder)
    assert scalars.of(VAL_LOSS) == pytest.approx({20: logged(20)[VAL_LOSS], 40: 1.25})
    assert [*scalars.of(TRAIN_LOSS)] == [20]  # step 40 has not been reached again


def test_the_end_of_a_file_that_is_cut_off_is_dropped_and_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-30])
    lines = "step,epoch,val/loss\n19,0,3.5\n29,0,nan\n39,0,2.5\n49,0,2."
    (folder / "metrics.csv").write_text(lines)
    (run,) = read_runs([str(folder)])
    assert run.scalars.of(TRAIN_LOSS) == pytest.approx({20: 4.0, 40: 3.0})
    assert run.scalars.of(VAL_LOSS) == pytest.approx({20: 3.5, 30: math.nan, 40: 2.5}, nan_ok=True)
    told = "\n".join(run.notes)
    assert re.search(r"events\S*: its last \d+ of [\d,]+ bytes are cut off or damaged", told)
    assert "metrics.csv: line 5 of 5 is cut off or damaged" in told
    assert "val/loss is not finite at step 30:" in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"0, allowed 1..6 folders"),
        (["absent"], "there is no folder absent"),
        (["empty"], "it has no event files and no metrics.csv"),
        (["."], "name one of run1"),
        (["a/run", "b/../a/run"], r"run is there twice"),
        (["x=a/run", "x=b/run"], "x is there twice"),
        (["x=absent"], "there is no folder absent"),
    ],
)
def test_folders_that_cannot_be_reported_on_are_refused(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/run", "b/run"):
        make_run(Path(name))
    Path("empty").mkdir()
    if given == ["."]:
        Path("a/run").rename("run1")
    with pytest.raises(ConfigError, match=f"run_dirs: got .*{message}"):
        read_runs(given)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [str(make_run(tmp_path / name / "run")) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([f"first={folders[0]}", folders[1]])] == ["first", "run"]


def test_the_state_of_a_run_is_finished_stopped_or_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, stopped = make_run(tmp_path / "finished"), make_run(tmp_path / "stopped", steps=(20,))
    states = [run.state for run in read_runs([str(finished), str(stopped)])]
    assert states == ["finished after 40 steps", "stopped at step 20 of 40"]
    run_lock.hold(stopped / "checkpoints")
    try:
        assert [run.state for run in read_runs([str(stopped)])] == ["going on: step 20 of 40"]
    finally:
        run_lock.release()


def test_a_config_that_is_damaged_or_missing_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: [")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"half")
    (run,) = read_runs([str(folder)])
    assert re.search(r"config.yaml is damaged .*checkpoint \S+last.ckpt", "\n".join(run.notes), re.DOTALL)
    (folder / "config.yaml").unlink()
    (run,) = read_runs([str(folder)])
    assert "config.yaml is missing" in run.notes[0]


def test_logs_without_a_measurement_are_told(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "metrics.csv").write_bytes(b"\x89PNG")
    (run,) = read_runs([str(folder)])
    assert run.notes[0] == "no measurement could be read from metrics.csv"
