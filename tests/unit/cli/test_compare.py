"""`compare` on metric files made by hand."""

import json

import pytest

from megatron_prefix.__main__ import main


def write_run(directory, losses, first_step=1, tokens=100, step_time_s=0.5, **others):
    """A run whose step s has the loss given for it, and an evaluation line in between."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"step": first_step - 1, "eval_loss": 0.7}]
    for step, loss in enumerate(losses, first_step):
        rows.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": 2.0,
                "rewards/margins": 0.1 * step,
                "tokens/executed": tokens,
                "num_pairs": 8,
                "step_time_s": step_time_s,
                **others,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def cells(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_by_hand(tmp_path, capsys):
    a = write_run(tmp_path / "tree", [0.7, 0.6, 0.5])
    b = write_run(
        tmp_path / "none", [0.7, 0.6 - 2e-6, 0.5, 9.0], tokens=250, step_time_s=1.0, grad_norm=2.25
    )
    assert main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 steps in common, compared with tree\n")
    assert cells(text, "tree") == ["tree", "", "", "", "300", "16.00"]
    wanted = ["none", "2.0e-06", "2.5e-01", "0.0e+00", "750 (2.50x)", "8.00 (0.50x)"]
    assert cells(text, "none") == wanted
    assert "max difference of loss" in text


def test_a_slow_first_step_does_not_count(tmp_path, capsys):
    paths = []
    for name, slow in (("a", 0.5), ("b", 100.0)):
        path = write_run(tmp_path / name, [0.7, 0.6])
        file = tmp_path / name / "metrics.jsonl"
        rows = [json.loads(text) for text in file.read_text().splitlines()]
        rows[1]["step_time_s"] = slow
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    assert main(["compare", *paths]) == 0
    assert cells(capsys.readouterr().out, "b")[-1] == "16.00 (1.00x)"


def test_a_difference_that_is_nan_is_shown(tmp_path, capsys):
    a = write_run(tmp_path / "a", [0.7, 0.6, 0.5])
    b = write_run(tmp_path / "b", [0.7, float("nan"), 0.5])
    assert main(["compare", a, b]) == 0
    assert cells(capsys.readouterr().out, "b")[1] == "nan"


def test_three_runs_with_a_plot(tmp_path, capsys):
    runs = [write_run(tmp_path / name, [0.7, 0.5]) for name in ("a", "b", "c")]
    output = tmp_path / "deep" / "out"
    assert main(["compare", *runs, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    table = (output / "comparison.md").read_text()
    assert table.strip() in printed and len(cells(table, "c")) == 6
    picture = (output / "comparison.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000


def test_runs_of_one_name_are_distinguished_by_their_paths(tmp_path, capsys):
    a = write_run(tmp_path / "x" / "same", [0.7])
    b = write_run(tmp_path / "y" / "same", [0.6])
    assert main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert cells(text, "same")[4] == "100" and cells(text, b)[1] == "1.0e-01"


@pytest.fixture
def two(tmp_path):
    return write_run(tmp_path / "a", [0.7]), write_run(tmp_path / "b", [0.7])


def fails(capsys, *arguments):
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("megatron-prefix compare: error: ")
    return captured.err


def test_errors(tmp_path, capsys, two):
    a, b = two
    assert "two runs or more" in fails(capsys, a)
    assert "given twice" in fails(capsys, a, a, a)
    assert "cannot be read" in fails(capsys, a, str(tmp_path / "gone"))
    late = write_run(tmp_path / "late", [0.5], first_step=7)
    assert "no training step in common" in fails(capsys, a, late)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 0.7}\n')
    assert "no training step in common" in fails(capsys, a, str(tmp_path / "evals"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    assert "step 1 has no grad_norm, num_pairs" in fails(capsys, a, str(tmp_path / "foreign"))


def test_an_output_that_cannot_be_written(tmp_path, capsys, two):
    (tmp_path / "file").write_text("")
    assert main(["compare", *two, "--output", str(tmp_path / "file")]) == 2
    assert "name a directory that can be written" in capsys.readouterr().err
