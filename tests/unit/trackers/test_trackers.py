"""Trackers: what a kill may leave in metrics.jsonl, what resuming cuts, what a run shows."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_prefix.config import Config, parse_config
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.text import duration
from megatron_prefix.trackers import Trackers, configured_trackers, read_metrics
from megatron_prefix.trackers.jsonl import JsonlTracker
from megatron_prefix.trackers.progress import ProgressTracker
from megatron_prefix.trackers.run_folder import open_run_folder, read_resumes
from megatron_prefix.trackers.tensorboard import TensorBoardTracker


def run_config(output, **logging) -> Config:
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    return parse_config(
        {
            "data": {"train": "set", "row_capacity": 64, "global_batch_size": 1},
            "model": sizes,
            "optimizer": {"lr": 0.001},
            "train": {"steps": 3},
            "logging": {"output": str(output), **logging},
        }
    )


def line(step, **values):
    return json.dumps({"step": step, "loss": step / 10, **values}) + "\n"


def steps_of(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def started(tracker, output, step=0):
    config = run_config(output)
    open_run_folder(config, step)
    tracker.start(config, step)
    return tracker


class TestReading:
    def test_a_run_or_its_file(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))
        rows = read_metrics(tmp_path)
        assert rows == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
        assert read_metrics(tmp_path / "metrics.jsonl") == rows

    @pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", "3", "[]", '{"loss": 1}'])
    def test_an_incomplete_last_line_is_left_out(self, tmp_path, torn):
        (tmp_path / "metrics.jsonl").write_text(line(1) + line(2) + torn)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]

    def test_an_incomplete_line_elsewhere_is_named(self, tmp_path):
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


class TestMetricsFile:
    def test_every_line_is_there_at_once(self, tmp_path):
        metrics = started(JsonlTracker(), tmp_path / "deep" / "run")
        for step in (1, 2):
            metrics.log(step, {"loss": 0.5})
            assert len(read_metrics(tmp_path / "deep" / "run")) == step
        metrics.finish("done")
        text = (tmp_path / "deep" / "run" / "metrics.jsonl").read_text()
        assert text == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'

    def test_a_new_run_renames_the_files_of_earlier_ones(self, tmp_path):
        for step in (1, 2, 3):
            metrics = started(JsonlTracker(), tmp_path)
            metrics.log(step, {})
            metrics.finish("done")
            (tmp_path / "tensorboard").mkdir()
        assert steps_of(tmp_path / "metrics-1.jsonl") == [1]
        assert steps_of(tmp_path / "metrics-2.jsonl") == [2]
        assert steps_of(tmp_path / "metrics.jsonl") == [3]
        names = ["config", "config-1", "config-2", "metrics", "metrics-1", "metrics-2"]
        names += ["tensorboard", "tensorboard-1", "tensorboard-2"]
        names += ["versions", "versions-1", "versions-2"]
        assert sorted(path.stem for path in tmp_path.iterdir()) == names

    @pytest.mark.parametrize("torn", ["", '{"step": 5, "loss', '{"step": 3}', '{"step": 9'])
    def test_resuming_cuts_back_to_the_loaded_step(self, tmp_path, torn):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(line(s) for s in (0, 1, 2, 3, 3, 4, 5)) + torn)
        metrics = started(JsonlTracker(), tmp_path, step=3)
        metrics.log(4, {})
        metrics.finish("stopped")
        assert steps_of(path) == [0, 1, 2, 3, 3, 4]
        assert path.read_text().startswith(line(0) + line(1) + line(2) + line(3))
        names = ["config.yaml", "metrics.jsonl", "resumes.json", "versions.json"]
        assert sorted(p.name for p in tmp_path.iterdir()) == names

    def test_the_steps_after_which_a_run_was_resumed(self, tmp_path):
        """Those after the loaded step are gone with the lines of that time; a new run has none."""
        known = []
        for step in (0, 2, 5, 5, 3, 0):
            metrics = started(JsonlTracker(), tmp_path, step=step)
            metrics.log(step, {})
            metrics.finish("stopped")
            known.append(read_resumes(tmp_path))
        assert known == [[], [2], [2, 5], [2, 5], [2, 3], []]
        assert (tmp_path / "resumes-1.json").exists()
        (tmp_path / "resumes.json").write_text('{"steps": {}')
        assert read_resumes(tmp_path) == []

    def test_resuming_without_a_file_begins_one(self, tmp_path):
        metrics = started(JsonlTracker(), tmp_path, step=3)
        metrics.log(4, {})
        metrics.finish("done")
        assert steps_of(tmp_path / "metrics.jsonl") == [4]


class TestTensorBoard:
    def board(self, folder):
        loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        board = loading.EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        return board

    def test_a_resumed_run_is_shown_as_one(self, tmp_path):
        for resumed, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
            tracker = started(TensorBoardTracker(), tmp_path, resumed)
            for step in steps:
                tracker.log(step, {"loss": step + (0.5 if resumed else 0.0)})
            tracker.finish("done")
        board = self.board(tmp_path)
        events = [(event.step, event.value) for event in board.Scalars("loss")]
        assert events == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
        assert board.Tags()["scalars"] == ["loss"]

    def test_a_figure_is_an_image_of_the_last_step(self, tmp_path):
        Image.fromarray(np.zeros((2, 3, 4), np.uint8), "RGBA").save(tmp_path / "row.png")
        tracker = started(TensorBoardTracker(), tmp_path / "run")
        tracker.log(7, {"loss": 1.0})
        tracker.figure("row", tmp_path / "row.png")
        tracker.finish("done")
        [image] = self.board(tmp_path / "run").Images("row")
        assert (image.step, image.width, image.height) == (7, 3, 2)


VALUES = {
    "loss": 0.69315,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0,
    "pairs_per_second": 12.34,
    "step_time_s": 90.0,
}


class TestProgress:
    def progress(self, num_steps, step=0):
        tracker = ProgressTracker(num_steps)
        tracker.start(run_config("run"), step)
        return tracker

    def test_plain_lines_if_there_is_no_terminal(self, capsys):
        progress = self.progress(3)
        for step in (1, 2, 3):
            progress.log(step, VALUES)
        progress.finish("done")
        lines = capsys.readouterr().out.splitlines()
        assert [text.split()[1] for text in lines] == ["1/3", "3/3"]  # none within ten seconds
        assert "loss 0.6932  accuracy 0.500  margin 0.000  pairs/s 12.3" in lines[0]
        assert lines[0].endswith("pairs/s 12.3"), "the first step takes longer than the others"
        assert lines[1].endswith("left 0:00:00")

    def test_a_resumed_run_counts_from_its_step(self, capsys):
        progress = self.progress(12, 8)
        progress.log(9, VALUES | {"step_time_s": 900.0})
        progress._last_line = float("-inf")
        progress.log(10, VALUES)
        progress.figure("row", "row.png")
        _, first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("step 10/12") and first.endswith("left 0:03:00")
        assert second == "figure row: row.png"

    def test_a_value_that_the_run_does_not_have_is_left_out(self, capsys):
        progress = self.progress(1)
        progress.log(1, {"loss": 2.0, "rewards/margins": 0.25, "step_time_s": 1.0})
        assert capsys.readouterr().out == "step 1/1  loss 2.0000  margin 0.250\n"

    def test_an_evaluation_has_its_own_line(self, capsys):
        progress = self.progress(1)
        progress.log(0, {f"eval_{key}": value for key, value in VALUES.items()})
        progress.log(0, {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_num_pairs": 12})
        assert capsys.readouterr().out.splitlines() == [
            "evaluation at step 0: loss 0.6932, accuracy 0.500, margin 0.000",
            "evaluation at step 0: loss 0.5000, accuracy 0.750 over 12 pairs",
        ]

    def test_durations(self):
        assert [duration(s) for s in (0.4, 59.6, 3600, 366061)] == [
            "0:00:00",
            "0:01:00",
            "1:00:00",
            "101:41:01",
        ]


class Recorder:
    """A tracker that notes its calls, and fails in the method that it is told."""

    def __init__(self, calls, name, failing=None):
        self.calls, self.name, self.failing = calls, name, failing

    def __getattr__(self, method):
        def call(*args):
            self.calls.append((self.name, method, *args))
            if method == self.failing:
                raise RunError(f"{self.name} is full")

        return call


class TestSeveral:
    def test_every_call_reaches_every_tracker(self, tmp_path):
        calls, config = [], run_config(tmp_path)
        trackers = Trackers([Recorder(calls, "a"), Recorder(calls, "b")])
        trackers.start(config, 2)
        trackers.log(3, {"loss": 1.0})
        trackers.figure("row", "row.png")
        trackers.finish("stopped")
        expected = [("start", config, 2), ("log", 3, {"loss": 1.0}), ("figure", "row", "row.png")]
        assert calls == [
            *((name, *call) for call in expected for name in "ab"),
            ("b", "finish", "stopped"),
            ("a", "finish", "stopped"),
        ]

    def test_a_tracker_that_fails_stops_the_run(self, tmp_path):
        trackers = Trackers([Recorder([], "a", failing="log"), Recorder([], "b")])
        with pytest.raises(RunError, match="a is full"):
            trackers.log(1, {})

    def test_a_tracker_that_fails_to_start_finishes_those_before_it(self, tmp_path, capsys):
        calls, config = [], run_config(tmp_path)
        first = Recorder(calls, "a", failing="finish")
        others = [Recorder(calls, "b"), Recorder(calls, "c", failing="start"), Recorder(calls, "d")]
        with pytest.raises(RunError, match="c is full"):
            Trackers([first, *others]).start(config, 0)
        assert capsys.readouterr().err == "warning: a is full\n"
        assert calls == [
            *((name, "start", config, 0) for name in "abc"),
            ("b", "finish", "failed"),
            ("a", "finish", "failed"),
        ]

    @pytest.mark.parametrize("status", ["done", "stopped", "failed"])
    def test_all_trackers_finish_even_if_one_fails(self, capsys, status):
        calls = []
        trackers = Trackers([Recorder(calls, "a"), Recorder(calls, "b", failing="finish")])
        if status == "done":
            with pytest.raises(RunError, match="b is full"):
                trackers.finish(status)
        else:
            trackers.finish(status)
            assert capsys.readouterr().err == "warning: b is full\n"
        assert [call[0] for call in calls] == ["b", "a"]

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_those_of_the_configuration(self, tmp_path, tensorboard, capsys):
        config = run_config(tmp_path / "run", tensorboard=tensorboard)
        trackers = configured_trackers(config, 1)
        trackers.start(config, 0)
        trackers.log(1, VALUES)
        trackers.finish("done")
        assert read_metrics(tmp_path / "run") == [{"step": 1, **VALUES}]
        assert capsys.readouterr().out.startswith("step 1/1  loss 0.6932")
        assert (tmp_path / "run" / "tensorboard").exists() is tensorboard
        assert (tmp_path / "run" / "config.yaml").exists()

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        config = run_config(tmp_path / "file" / "run")
        with pytest.raises(InputError, match="logging.output = .*file/run: .*name a directory"):
            configured_trackers(config, 1).start(config, 0)
        config = replace(config, logging=replace(config.logging, output=str(tmp_path)))
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(InputError, match="logging.output = "):
            configured_trackers(config, 1).start(config, 3)
