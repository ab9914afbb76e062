"""The shadow run on one process: every kind of objective passes, faults are named, and nothing of
it stays. Layouts of several processes: tests/distributed/test_shadow_layouts.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from labelled_sets import write_labelled_set
from ranked_sets import write_ranked_set
from reference_files import write_references
from small_runs import configure, lines, prepare, timeless, trained

from megatron_prefix.data.steps.collate import TARGETS, TreeTargets, tree_targets
from megatron_prefix.engine.optimizer import Policy
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.train import mismatches, trainer
from megatron_prefix.train.run import train
from megatron_prefix.train.scoring import score_reference

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
MOE |= {"moe_aux_loss_coeff": 0.1, "moe_count": "responses"}
UNPACKED = {"sharing": "none", "packing": False, "micro_batch_size": 2}
CASES = {  # name: loss, data, model
    "sigmoid": ({}, {}, {}),
    "heads, bfloat16": ({"loss_type": ["ipo", "sft"], "ld_alpha": 0.3}, {}, {"dtype": "bfloat16"}),
    "on policy": ({"use_weighting": True, "weighting": "group"}, {"sharing": "pair"}, {}),
    "sets": ({"loss_type": "plackett_luce"}, {}, {}),
    "the whole step": ({"loss_type": "aot"}, {"sharing": "response"}, {}),
    "some pairs": ({"comparisons": "adjacent", "ld_alpha": 0.5}, UNPACKED, {}),
    "without a reference": ({"loss_type": "simpo", "beta": 2.0}, {}, {"dtype": "bfloat16"}),
    "rewards": ({"loss_type": "regression"}, {}, {"kind": "reward", "dtype": "bfloat16"}),
    "experts": ({}, {}, MOE),
}


@pytest.fixture(scope="module")
def ranked_set(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ranked")
    return write_ranked_set(folder / "set", 0, 9, weighted=False)


def settings(name: str, shadow_steps: int = 2) -> dict:
    loss, data, model = CASES[name]
    sections = {"loss": loss, "model": {"init_method_std": 0.1, **model}}
    return sections | {"data": data, "train": {"steps": 3, "shadow_steps": shadow_steps}}


@pytest.mark.parametrize("name", CASES)
def test_a_sound_run_goes_on_bit_for_bit(ranked_set, tmp_path, capsys, name):
    """Step 3 of 9 groups, 4 per step, has a group twice."""
    without = trained(configure(tmp_path / "without", ranked_set, **settings(name, 0)))
    capsys.readouterr()
    with_it = trained(configure(tmp_path / "with", ranked_set, **settings(name, 3)))
    assert timeless(with_it) == timeless(without)
    out = capsys.readouterr().out
    assert out.count("train.shadow_steps = 3: ") == 1 and "the same to rounding" in out
    for quantity in ("loss", "gradient norm", "gradient of ", "of response "):
        assert f"  {quantity}" in out or f" {quantity}" in out


LABELLED = {  # loss, model
    "apo_zero_unpaired": ({"loss_type": "apo_zero_unpaired", "beta": 0.5}, {}),
    "kto": ({"loss_type": "kto", "beta": 0.5, "undesirable_weight": 0.8}, {}),
    "kto, bfloat16": ({"loss_type": ["kto", "apo_zero_unpaired"]}, {"dtype": "bfloat16"}),
    "bco": ({"loss_type": "bco", "beta": 0.5}, {}),
    "bco, bfloat16": ({"loss_type": ["bco", "kto"], "beta": 0.5}, {"dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def labelled_set(tmp_path_factory) -> str:
    """Some groups have no mismatch."""
    return write_labelled_set(tmp_path_factory.mktemp("labelled") / "set", 0, 9, mismatches=True)


def labelled_settings(name: str, shadow_steps: int = 2) -> dict:
    loss, model = LABELLED[name]
    sections = settings("sigmoid", shadow_steps)
    return sections | {"loss": loss, "model": {**sections["model"], **model}}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_responses(labelled_set, tmp_path, capsys, name):
    """Of KTO the mismatches are compared, too; of BCO the mean of rewards goes on as it was."""
    without = trained(configure(tmp_path / "without", labelled_set, **labelled_settings(name, 0)))
    capsys.readouterr()
    with_it = trained(configure(tmp_path / "with", labelled_set, **labelled_settings(name)))
    assert timeless(with_it) == timeless(without)
    out = capsys.readouterr().out
    has_mismatches = "kto" in name or "kto" in LABELLED[name][0]["loss_type"]
    assert ("of the mismatch of group " in out) == has_mismatches
    assert ("KL of the mismatches" in out) == has_mismatches
    if "bco" in name:
        deltas = [row["delta"] for row in without]
        assert deltas[0] == 0.0 and len({*deltas}) == 3


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_labelled_responses_with_a_precomputed_reference(labelled_set, tmp_path, name):
    sections = labelled_settings(name)
    score_reference(configure(tmp_path / "score", labelled_set, **sections), str(tmp_path / "ref"))
    known = {**sections["loss"], "reference": "precomputed", "ref_logps": str(tmp_path / "ref")}
    trained(configure(tmp_path / "run", labelled_set, **{**sections, "loss": known}))


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_resumed_run_of_labelled_responses(labelled_set, tmp_path, capsys, name):
    """The mean of rewards in the checkpoint is that of the steps without the second runs."""
    sections = labelled_settings(name)
    for folder, shadow_steps in (("with", 2), ("without", 0)):
        saved = str(tmp_path / folder / "saved")
        section = {"steps": 1, "save": saved, "load": saved, "shadow_steps": shadow_steps}
        for num_steps in (1, 3):
            section = {**section, "steps": num_steps}
            config = configure(tmp_path / folder, labelled_set, **{**sections, "train": section})
            train(config)
    assert timeless(lines(tmp_path / "with")) == timeless(lines(tmp_path / "without"))
    assert capsys.readouterr().out.count("train.shadow_steps = 2: ") == 1


def test_with_a_precomputed_reference(ranked_set, tmp_path):
    loss = {"loss_type": "ipo", "ld_alpha": 0.3, "comparisons": "best_vs_rest"}
    sections = {**settings("sigmoid"), "loss": loss}
    score_reference(configure(tmp_path / "score", ranked_set, **sections), str(tmp_path / "ref"))
    known = {**loss, "reference": "precomputed", "ref_logps": str(tmp_path / "ref")}
    trained(configure(tmp_path / "run", ranked_set, **{**sections, "loss": known}))


@pytest.mark.parametrize(
    "loss",
    [
        {"ld_alpha": 0.3, "reference_mixture": "harmonic", "reference_weights": "adaptive"},
        {"loss_type": "aot", "reference_weights": "thompson"},
    ],
    ids=["harmonic", "multi_dpo"],
)
def test_with_several_references(ranked_set, tmp_path, loss):
    """Their heads are needed too, and the weights of each step."""
    sections = settings("sigmoid")
    scored = {**sections, "loss": {"ld_alpha": 0.3}}
    references = write_references(
        tmp_path / "references", configure(tmp_path / "score", ranked_set, **scored)
    )
    sections["loss"] = {**loss, "references": references}
    trained(configure(tmp_path / "run", ranked_set, **sections))


def test_fixed_rows(ranked_set, tmp_path):
    data = {"global_batch_size": None, "rows_per_step": 2, "row_capacity": 256}
    trained(configure(tmp_path, ranked_set, **{**settings("sigmoid"), "data": data}))


def test_a_resumed_run_has_the_rest_of_its_first_steps(ranked_set, tmp_path, capsys):
    saved = str(tmp_path / "saved")
    sections = settings("sigmoid")
    train_section = {"steps": 2, "save": saved, "load": saved, "shadow_steps": 1}
    trained(configure(tmp_path / "run", ranked_set, **{**sections, "train": train_section}))
    for shadow_steps, reports in ((2, 0), (3, 1)):
        capsys.readouterr()
        more = {**train_section, "steps": 3, "shadow_steps": shadow_steps, "save": None}
        train(configure(tmp_path / "run", ranked_set, **{**sections, "train": more}))
        assert capsys.readouterr().out.count("train.shadow_steps") == reports


def first_token_from_a_sibling(tree) -> TreeTargets:
    """Targets in which the first own token of a response is predicted by the token before it in the
    row, which may be another response's."""
    targets = tree_targets(tree)
    logit_token = targets.logit_token.copy()
    for response in range(1, tree.num_responses):
        first = int(tree.node_offsets[tree.response_first[response]])
        if first:
            logit_token[(targets.response == response).argmax()] = first - 1
    return TreeTargets(logit_token, targets.target_token, targets.response)


@pytest.mark.parametrize("name", ["sigmoid", "heads, bfloat16", "sets", "without a reference"])
def test_a_wrong_target_is_caught(ranked_set, tmp_path, monkeypatch, name):
    monkeypatch.setitem(TARGETS, "lm", first_token_from_a_sibling)
    with pytest.raises(RunError, match=r"not the same step: the log-probability of response \d"):
        train(configure(tmp_path, ranked_set, **settings(name)))
    assert not (tmp_path / "metrics.jsonl").read_text(), "a step was written"


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_wrong_target_of_labelled_responses_is_caught(labelled_set, tmp_path, monkeypatch, name):
    monkeypatch.setitem(TARGETS, "lm", first_token_from_a_sibling)
    with pytest.raises(RunError, match=r"not the same step: the log-probability of response \d"):
        train(configure(tmp_path, labelled_set, **labelled_settings(name)))


def wrong_scores(first):
    """The last token of a mismatch is left out, as it were."""
    return replace(first, scores=[values + 0.01 for values in first.scores])


def wrong_kl(first):
    """As if the mean were that of another rank."""
    return replace(first, kl=first.kl + 0.01)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_scores, "the log-probability of the mismatch of group"),
        (wrong_kl, "the KL of the mismatches"),
    ],
)
def test_wrong_mismatches_are_caught(labelled_set, tmp_path, monkeypatch, fault, message):
    sound = mismatches.mismatch_pass
    monkeypatch.setattr(mismatches, "mismatch_pass", lambda *args: fault(sound(*args)))
    with pytest.raises(RunError, match=f"not the same step: {message}"):
        train(configure(tmp_path, labelled_set, **labelled_settings("kto")))
    assert not (tmp_path / "metrics.jsonl").read_text(), "a step was written"


def test_a_wrong_mean_of_rewards_is_caught(labelled_set, tmp_path, monkeypatch):
    """The steps before the second one are forgotten."""
    sound = trainer.first_pass

    def forgetful(*args, running_rewards, **keys):
        return sound(*args, running_rewards=(0.0, 0.0), **keys)

    monkeypatch.setattr(trainer, "first_pass", forgetful)
    with pytest.raises(RunError, match=r"step 2 .* not the same step: the (loss|gradient)"):
        train(configure(tmp_path, labelled_set, **labelled_settings("bco")))
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("name", ["without a reference", "rewards"])
def test_without_a_reference_the_first_group_is_checked(ranked_set, tmp_path, monkeypatch, name):
    """Without a shadow run."""
    train(configure(tmp_path / "sound", ranked_set, **settings(name, 0)))
    sound = TreeLayout.from_parents.__func__

    def blind(cls, lengths, parents):
        layout = sound(cls, lengths, parents)
        ends = np.where(layout.parents >= 0, layout.num_tokens, layout.subtree_ends)
        return replace(layout, subtree_ends=ends)

    monkeypatch.setattr(TreeLayout, "from_parents", classmethod(blind))
    sections = settings(name, 0)
    sections["model"] = {**sections["model"], "attention_backend": "dense"}
    with pytest.raises(RunError, match=r"the first group of the run .* of response \d of group"):
        train(configure(tmp_path / "wrong", ranked_set, **sections))
    assert not (tmp_path / "wrong" / "metrics.jsonl").read_text(), "a step was written"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_is_named(ranked_set, tmp_path, monkeypatch, dtype):
    """Scores and loss are the same; the gradient of one matrix is a third too large."""
    sound = Policy.gradients

    def wrong(self, batches, objective, is_first=False):
        logs = sound(self, batches, objective, is_first)
        if batches[0].slopes is None:
            weights = dict(self.chunks[0].module.named_parameters())
            (name,) = (x for x in weights if x.endswith("layers.1.mlp.linear_fc2.weight"))
            weights[name].main_grad.mul_(4 / 3)
        return logs

    monkeypatch.setattr(Policy, "gradients", wrong)
    sections = settings("sigmoid")
    sections["model"] = {**sections["model"], "dtype": dtype}
    with pytest.raises(RunError, match="the gradient of decoder.layers.1.mlp.linear_fc2.weight"):
        train(configure(tmp_path, ranked_set, **sections))


def test_random_numbers_go_on(ranked_set, tmp_path):
    """Also if the second run draws some."""
    from megatron_prefix.distributed.world import join_world

    config = configure(tmp_path, ranked_set, **settings("sigmoid"))
    with join_world(config.parallel, seed=0) as world:
        run = prepare(config, world)
        run.policy.chunks[0].register_forward_hook(lambda *_: torch.rand(()) and None)
        forwards = []
        run.policy.chunks[0].register_forward_hook(lambda *_: forwards.append(1) and None)
        state = torch.get_rng_state()
        run.train_step()
        run.close()
        num_rows = len(run.sampler.step(0).rows[0])
        assert len(forwards) > 2 * num_rows
        after = torch.rand(())
        torch.set_rng_state(state)
        torch.rand(num_rows)
        assert torch.equal(after, torch.rand(()))


def test_config_yaml_has_the_key(ranked_set, tmp_path):
    trained(configure(tmp_path, ranked_set, **settings("sigmoid", 1)))
    assert "shadow_steps: 1" in (tmp_path / "config.yaml").read_text()
    assert lines(tmp_path) and json.dumps(lines(tmp_path))
