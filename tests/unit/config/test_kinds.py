"""`model.kind`: its defaults, and settings that belong to the other kind."""

import pytest
import yaml
from test_config import changed

from megatron_prefix.config import parse_config
from megatron_prefix.errors import InputError


def test_a_reward_model_has_its_own_defaults():
    config = parse_config(changed(model__kind="reward"))
    assert (config.loss.loss_type, config.loss.reference) == ("bradley_terry", "none")
    assert config.loss.margin is False and config.loss.center_rewards_coefficient is None
    assert parse_config(changed()).loss.loss_type == "sigmoid"


def test_what_is_given_agrees_with_the_defaults():
    given = {"loss__loss_type": "bradley_terry", "loss__reference": "none"}
    assert parse_config(changed(model__kind="reward", **given)).loss.reference == "none"


@pytest.mark.parametrize(
    "loss", [{}, {"loss__margin": True, "loss__center_rewards_coefficient": 0.01}]
)
@pytest.mark.parametrize("kind", ["reward", "lm"])
def test_the_resolved_configuration_is_the_same_again(kind, loss):
    config = parse_config(changed(model__kind=kind, **(loss if kind == "reward" else {})))
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss__beta": 0.1}, "loss.beta = 0.1: a reward model has none"),
        ({"loss__label_smoothing": 0.0}, "loss.label_smoothing = 0.0: a reward model has none"),
        ({"loss__ref_logps": "x"}, "loss.ref_logps = 'x': a reward model has none"),
        ({"loss__reference": "model"}, "loss.reference = model: with model.kind: reward"),
        ({"loss__loss_type": "sigmoid"}, "loss.loss_type = sigmoid: with model.kind: reward"),
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
        parse_config(changed(model__kind="reward", **settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss__margin": True}, "loss.margin = True: needs model.kind: reward"),
        (
            {"loss__center_rewards_coefficient": 0.01},
            "loss.center_rewards_coefficient = 0.01: needs model.kind: reward",
        ),
        ({"loss__reference": "none"}, "loss.reference = none: needs model.kind: reward"),
        ({"loss__loss_type": "bradley_terry"}, "loss_type = bradley_terry: needs model.kind"),
        ({"model__kind": "critic"}, "model.kind = 'critic'"),
    ],
)
def test_what_a_language_model_does_not_have(settings, message):
    with pytest.raises(InputError, match=message):
        parse_config(changed(**settings))


def test_off_is_off_for_both():
    parse_config(changed(loss__margin=False))
