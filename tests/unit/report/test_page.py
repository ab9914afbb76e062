"""The page of a run: nothing from the network, what data say is escaped, unlike runs are named."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from megatron_prefix.__main__ import main
from megatron_prefix.errors import InputError
from megatron_prefix.report import RunRecord, compare_runs, report_run
from megatron_prefix.report.page import differences

HOSTILE = "</pre><script>alert(1)</script><img src=http://x.example/y.png onerror=f(2)>&{{ 7*7 }}"


STEP = {"step": 1, "loss": 0.7, "grad_norm": 1.0}


class Elements(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def write_run(folder: Path, steps: int = 4, **settings) -> Path:
    folder.mkdir(parents=True)
    config = {"data": {"train": "set", "seed": 1}, "optimizer": {"lr": 1e-3}}
    for name, value in settings.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5}]
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "loss": 0.7 / step, "grad_norm": 1.0, "rewards/margins": 0.1 * step}
            | {"tokens/executed": 100, "tokens/logical": 250, "num_pairs": 4, "step_time_s": 0.5}
        )
    lines.append({"step": steps, "eval_loss": 0.2, "eval_rewards/accuracies": 0.875})
    lines[-1]["eval_rewards/length_correlation"] = -0.25  # the first evaluation has none
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = {"margin": -1.5, "group": 3, "record": 3, "set": HOSTILE}
    pair |= {"prompt": HOSTILE, "chosen": "yes", "rejected": HOSTILE}
    (folder / "examples.json").write_text(json.dumps({"step": steps, "pairs": [pair]}))
    (folder / "versions.json").write_text(json.dumps({"torch": HOSTILE}))
    return folder


def parsed(path: Path) -> tuple[str, Elements]:
    text = path.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    return text, elements


def test_what_data_say_is_escaped_and_nothing_is_fetched(tmp_path):
    folder = write_run(tmp_path / HOSTILE.replace("/", "|"), model__hf=HOSTILE)
    text, elements = parsed(report_run(folder))
    assert {"script", "iframe", "link", "object"}.isdisjoint(elements.tags)
    assert elements.handlers == [] and "{{ 7*7 }}" in text
    assert all(x.startswith(("#", "data:image/png")) for x in elements.addresses)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert elements.tags.count("pre") == 3


def test_the_page_has_the_run(tmp_path):
    text, elements = parsed(report_run(write_run(tmp_path / "first")))
    assert elements.tags.count("svg") == 7, "three metrics, two costs, and two of the evaluation"
    for content in (
        "optimizer.lr",
        "0.001",
        "0.7 → 0.2",
        "0.5 → 0.875",
        "loss over tokens",
        "- → -0.25",
    ):
        assert content in text
    assert "currentColor" in text and "prefers-color-scheme: dark" in text
    assert "unlike" not in text
    assert "margin without beta -1.5" in text


def test_resumed_runs_are_marked_on_every_axis(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "resumes.json").write_text('{"steps": [1, 3]}')
    records = [RunRecord.read(run) for run in runs]
    assert records[0].resumes == [] and records[1].resumed_at() == [1.0, 3.0]
    assert records[1].resumed_at("tokens") == [100, 300]
    assert records[1].resumed_at("seconds") == [0.5, 1.5]
    text, elements = parsed(compare_runs(runs, ["a", "b"], tmp_path))
    assert "b was resumed after step 1, 3: dotted lines" in text and "a was resumed" not in text
    assert text.count('id="resumed-1-') == 2 * elements.tags.count("svg")
    assert 'id="resumed-1-300"' in text and 'id="resumed-0-' not in text
    assert "was resumed" not in parsed(report_run(runs[0]))[0]


def test_accuracies_of_evaluations_have_a_standard_error(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [
        {"step": 0, "eval_a/rewards/accuracies": 0.75, "eval_a/num_pairs": 48},
        {"step": 4, "eval_a/rewards/accuracies": 1.0, "eval_a/num_pairs": 48},
    ]
    lines[0] |= {"eval_a/rewards/accuracies/similar_length": 0.5, "eval_a/loss": 0.6}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [lines[0], STEP, lines[1]])
    )
    text, _ = parsed(report_run(folder))
    assert "0.75 ± 0.062 → 1 ± 0<" in text
    assert "<td>0.5 → -</td>" in text and "<td>0.6 → -</td>" in text
    assert "± is the standard error" in text


def test_what_kl_is_stands_by_its_curve(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "(k1)" not in parsed(report_run(folder))[0]
    (folder / "metrics.jsonl").write_text(json.dumps(STEP | {"kl": 0.1}) + "\n")
    assert "logp − ref_logp (k1)" in parsed(report_run(folder))[0]


def test_sample_answers_of_the_first_and_last_step(tmp_path):
    folder = write_run(tmp_path / "run")
    messages = [{"role": "user", "content": HOSTILE}]
    samples = [
        {"step": step, "prompt": number, "text": text, "kind": "greedy", "ended": step > 0}
        | {"answer": f"answer {number} of {step} {HOSTILE}", "num_tokens": 3}
        for step in (0, 2, 4)
        for number, text in enumerate(["What?", messages])
    ]
    cut = '{"step": 6, "prom'
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples) + cut)
    text, elements = parsed(report_run(folder))
    assert {"script", "iframe", "link", "object"}.isdisjoint(elements.tags)
    for number in (0, 1):
        first, last = (text.index(f"answer {number} of {step}") for step in (0, 4))
        assert first < last
    assert "of 2 &lt;" not in text and "What?" in text and "user: &lt;/pre&gt;" in text
    assert text.count("step 0, greedy, cut at the limit") == 2
    assert text.count("step 4, greedy<") == 2
    (folder / "samples.jsonl").unlink()
    assert "Sample answers" not in parsed(report_run(folder))[0]


def test_the_margins_of_a_reward_model_have_no_beta(tmp_path):
    text, _ = parsed(report_run(write_run(tmp_path / "first", model__kind="reward")))
    assert "margin -1.5" in text and "without beta" not in text


def test_runs_that_differ_in_how_they_are_computed_are_like(tmp_path):
    a = write_run(tmp_path / "a", data__sharing="none")
    b = write_run(tmp_path / "b", data__sharing="tree")
    text, _ = parsed(compare_runs([a, b], ["a", "b"], tmp_path))
    assert "These runs compute the same thing" in text and "(1.00 ×)" in text
    assert [key for key, *_ in differences([RunRecord.read(a), RunRecord.read(b)])] == [
        "data.sharing"
    ]


@pytest.mark.parametrize("setting", ["data__train", "loss__beta", "optimizer__lr", "model__hf"])
def test_unlike_runs_are_named(tmp_path, setting):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **{setting: "other"})]
    text, _ = parsed(compare_runs(runs, ["a", "b"], tmp_path))
    assert f"they differ in {setting.replace('__', '.')}." in text


def test_damaged_files_of_a_run_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.yaml", "examples.json", "versions.json"):
        (folder / name).write_text("[")
    text, _ = parsed(report_run(folder))
    assert "worst margin" not in text
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no complete line"):
        report_run(folder)


def test_compare_writes_the_page(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["compare", *runs, "--output", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
