"""Metrics files: what a kill may leave, what resuming cuts, what is shown meanwhile."""

import json

import pytest

from megatron_prefix.errors import InputError
from megatron_prefix.trackers.jsonl import MetricsWriter, Progress, _duration, read_metrics


def line(step, **values):
    return json.dumps({"step": step, "loss": step / 10, **values}) + "\n"


def steps_of(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def writer(directory, resumed_step=None):
    return MetricsWriter(str(directory), resumed_step=resumed_step, tensorboard=False)


class TestReading:
    def test_a_run_or_its_file(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))
        rows = read_metrics(tmp_path)
        assert rows == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
        assert read_metrics(tmp_path / "metrics.jsonl") == rows

    @pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", "3", "[]", '{"loss": 1}'])
    def test_a_torn_last_line_is_left_out(self, tmp_path, torn):
        (tmp_path / "metrics.jsonl").write_text(line(1) + line(2) + torn)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]

    def test_a_torn_line_elsewhere_is_named(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(line(1) + '{"step": 2, "lo\n' + line(3))
        with pytest.raises(InputError, match="metrics.jsonl, line 2: not a metrics line"):
            read_metrics(tmp_path)

    @pytest.mark.parametrize("text", ["", '{"ste'])
    def test_no_complete_line(self, tmp_path, text):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError, match="no complete line"):
            read_metrics(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match="gone.*cannot be read"):
            read_metrics(tmp_path / "gone")
        with pytest.raises(InputError, match="metrics.jsonl: cannot be read"):
            read_metrics(tmp_path)


class TestWriting:
    def test_every_line_is_there_at_once(self, tmp_path):
        metrics = writer(tmp_path / "deep" / "run")
        for step in (1, 2):
            metrics.write({"step": step, "loss": 0.5})
            assert len(read_metrics(tmp_path / "deep" / "run")) == step
        metrics.close()

    def test_a_new_run_keeps_the_earlier_ones(self, tmp_path):
        for step in (1, 2, 3):
            metrics = writer(tmp_path)
            metrics.write({"step": step})
            metrics.close()
        assert steps_of(tmp_path / "metrics-1.jsonl") == [1]
        assert steps_of(tmp_path / "metrics-2.jsonl") == [2]
        assert steps_of(tmp_path / "metrics.jsonl") == [3]

    @pytest.mark.parametrize("torn", ["", '{"step": 5, "loss', '{"step": 3}', '{"step": 9'])
    def test_resuming_cuts_back_to_the_loaded_step(self, tmp_path, torn):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(line(s) for s in (0, 1, 2, 3, 3, 4, 5)) + torn)
        metrics = writer(tmp_path, resumed_step=3)
        metrics.write({"step": 4})
        metrics.close()
        assert steps_of(path) == [0, 1, 2, 3, 3, 4]
        assert path.read_text().startswith(line(0) + line(1) + line(2) + line(3))
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_resuming_without_a_file_begins_one(self, tmp_path):
        metrics = writer(tmp_path, resumed_step=3)
        metrics.write({"step": 4})
        metrics.close()
        assert steps_of(tmp_path / "metrics.jsonl") == [4]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, steps in ((None, (1, 2, 3, 4)), (2, (3, 4, 5))):
        metrics = MetricsWriter(str(tmp_path), resumed_step=resumed, tensorboard=True)
        for step in steps:
            metrics.write({"step": step, "loss": step + (0.5 if resumed else 0.0)})
        metrics.close()
    board = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert board.Tags()["scalars"] == ["loss"]


ROW = {
    "step": 1,
    "loss": 0.69315,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0,
    "pairs_per_second": 12.34,
    "step_time_s": 90.0,
}


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self, capsys):
        progress = Progress(3)
        for _ in range(3):
            progress.update(ROW)
        progress.close()
        lines = capsys.readouterr().out.splitlines()
        assert [text.split()[1] for text in lines] == ["1/3", "3/3"]  # none within ten seconds
        assert "loss 0.6932  accuracy 0.500  margin 0.000  pairs/s 12.3" in lines[0]
        assert lines[0].endswith("left 0:03:00") and lines[1].endswith("left 0:00:00")

    def test_a_resumed_run_counts_from_its_step(self, capsys):
        progress = Progress(10, 8)
        progress.update(ROW)
        progress.say("saved")
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("step 9/10") and first.endswith("left 0:01:30")
        assert second == "saved"

    def test_silent(self, capsys):
        progress = Progress(1, shown=False)
        progress.update(ROW)
        progress.say("nothing")
        assert capsys.readouterr().out == ""

    def test_durations(self):
        assert [_duration(s) for s in (0.4, 59.6, 3600, 366061)] == [
            "0:00:00",
            "0:01:00",
            "1:00:00",
            "101:41:01",
        ]
