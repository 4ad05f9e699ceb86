"""Output of ranks and of the supervisor."""

from __future__ import annotations

import io

from rich.console import Console

from ernie_train.launch.console import SafeConsole
from ernie_train.launch.logs import RankLogs


def test_what_is_said_keeps_paths_whole():
    path = f"/{'long' * 20}/[b]run/logs/rank_1.log"
    heard = io.StringIO()
    console = SafeConsole(Console(file=heard, width=40))
    console.print(f"printed last ({path}):")
    console.error(f"no {path}")
    assert heard.getvalue() == f"printed last ({path}):\nerror: no {path}\n"


def test_logs_wait_for_the_run_directory_and_keep_ranks_apart(tmp_path, capsysbinary):
    run_dir = tmp_path / "run"
    logs = RankLogs(run_dir, "2 ranks", SafeConsole(Console(stderr=True)))
    sources = [tmp_path / "workerlog.0", tmp_path / "workerlog.1"]
    for rank, source in enumerate(sources):
        source.write_text(f"a line of rank {rank}\n")
        logs.follow(rank, source)
    logs.forward()
    assert capsysbinary.readouterr().out == b"a line of rank 0\n"
    assert not run_dir.exists()
    run_dir.mkdir()
    logs.forward()
    with sources[1].open("a") as stream:
        stream.write("half a ")
        stream.flush()
        logs.forward()
        stream.write("line\n\n")
    assert logs.last_lines(1) == ["a line of rank 1", "half a line"]
    logs.close()
    written = (run_dir / "logs/rank_1.log").read_text().splitlines()
    assert written[0].startswith("---- 2")
    assert written[1:] == ["a line of rank 1", "half a line", ""]
    assert not (run_dir / "logs/rank_0.log").exists()


def test_a_rank_that_prints_without_end_does_not_keep_its_supervisor(tmp_path, monkeypatch):
    """Else no signal would reach the ranks, and no hang be seen."""
    monkeypatch.setattr("ernie_train.launch.logs._CHUNK_BYTES", 4)
    logs = RankLogs(None, "1 rank", SafeConsole(Console(stderr=True)))
    source, shown = tmp_path / "workerlog.0", []
    source.write_bytes(b"line\n")
    logs.follow(0, source)

    def show(text):
        shown.append(text)
        if len(shown) < 5:
            source.open("ab").write(text)

    monkeypatch.setattr(logs, "_write", show)
    assert logs.forward()
    assert shown == [b"line"]
    logs.close()
    assert b"".join(shown) == source.read_bytes()
