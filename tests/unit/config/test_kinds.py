"""`model.kind`: its defaults, and settings that belong to the other kind."""

import pytest
import yaml
from test_config import changed

from megatron_prefix.config import parse_config
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check


def checked(**settings):
    """The configuration and its objective, as the commands read them."""
    config = parse_config(changed(**settings))
    return config, check(config.loss, config.model.kind)


def test_a_reward_model_has_its_own_defaults():
    config, objective = checked(model__kind="reward")
    assert (config.loss.loss_type, objective.reference) == ("bradley_terry", "none")
    assert objective.options == {"margin": False, "center_rewards_coefficient": None}
    assert parse_config(changed()).loss.loss_type == "sigmoid"


def test_what_is_given_agrees_with_the_defaults():
    given = {"loss__loss_type": "bradley_terry", "loss__reference": "none"}
    assert checked(model__kind="reward", **given)[0].loss.reference == "none"


@pytest.mark.parametrize(
    "loss", [{}, {"loss__margin": True, "loss__center_rewards_coefficient": 0.01}]
)
@pytest.mark.parametrize("kind", ["reward", "lm"])
def test_the_resolved_configuration_is_the_same_again(kind, loss):
    config, _ = checked(model__kind=kind, **(loss if kind == "reward" else {}))
    text = config.to_yaml()
    assert parse_config(yaml.safe_load(text)) == config
    given = {"loss_type", *(key.removeprefix("loss__") for key in loss if kind == "reward")}
    assert set(yaml.safe_load(text)["loss"]) == given


OLD_DEFAULTS = {
    "loss_type": "sigmoid",
    "beta": 0.1,
    "label_smoothing": 0.0,
    "weighting": "pair",
    "reference": "model",
    "ref_logps": None,
    "margin": False,
    "center_rewards_coefficient": None,
}
"""What config.yaml has of a run from before options could be left out."""
OLD_REWARD = {
    "loss_type": "bradley_terry",
    "weighting": "pair",
    "reference": "none",
    "margin": False,
    "center_rewards_coefficient": None,
}


@pytest.mark.parametrize(("kind", "old"), [("lm", OLD_DEFAULTS), ("reward", OLD_REWARD)])
def test_an_old_run_s_file_is_read(kind, old):
    config = parse_config({**changed(model__kind=kind), "loss": old})
    objective = check(config.loss, kind)
    assert objective.options == checked(model__kind=kind)[1].options


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss__beta": 0.1}, "loss.beta = 0.1: .*bradley_terry does not use it"),
        ({"loss__label_smoothing": 0.0}, "loss.label_smoothing = 0.0: .*does not use it"),
        ({"loss__ref_logps": "x"}, "loss.ref_logps = x: needed with loss.reference: precomputed"),
        ({"loss__reference": "model"}, "loss.reference = model: .*has no reference"),
        ({"loss__loss_type": "sigmoid"}, "loss.loss_type = sigmoid: needs model.kind: lm"),
        ({"model__lm_head_chunk_size": 8}, "model.lm_head_chunk_size = 8: a reward model has"),
        (
            {"model__untie_embeddings_and_output_weights": False},
            "model.untie_embeddings_and_output_weights = False: a reward model has none",
        ),
        ({"loss__center_rewards_coefficient": -1.0}, "center_rewards_coefficient = -1.0"),
    ],
)
def test_what_a_reward_model_does_not_have(settings, message):
    with pytest.raises(InputError, match=message):
        checked(model__kind="reward", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"loss__margin": True, "loss__loss_type": "robust"},
            "loss.margin = True: .*does not use it",
        ),
        (
            {"loss__center_rewards_coefficient": 0.01},
            "loss.center_rewards_coefficient = 0.01: .*does not use it",
        ),
        (
            {"loss__reference": "none", "loss__loss_type": "robust"},
            "loss.reference = none: .*robust compares with a reference",
        ),
        ({"loss__loss_type": "bradley_terry"}, "loss_type = bradley_terry: needs model.kind"),
        ({"loss__loss_type": "sigmod"}, "loss_type = 'sigmod': unknown .did you mean sigmoid"),
        ({"model__kind": "critic"}, "model.kind = 'critic'"),
    ],
)
def test_what_a_language_model_does_not_have(settings, message):
    with pytest.raises(InputError, match=message):
        checked(**settings)


def test_off_is_off_for_both():
    checked(loss__margin=False)


def test_a_shadow_run_has_one_score_per_response():
    """A rule of the configuration, so `train` and `plan` refuse the same."""
    several = {"model__kind": "reward", "model__num_labels": 2, "loss__loss_type": "regression"}
    parse_config(changed(**several))
    parse_config(changed(**{**several, "model__num_labels": 1}, train__shadow_steps=2))
    with pytest.raises(InputError, match=r"train.shadow_steps = 2 with model.num_labels = 2: .*0"):
        parse_config(changed(**several, train__shadow_steps=2))
