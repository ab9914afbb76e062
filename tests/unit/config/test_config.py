"""The configuration: what is accepted, and the message of everything that is not."""

import copy
from dataclasses import asdict

import pytest
import yaml

from megatron_prefix.config import Config, load_config, parse_config
from megatron_prefix.errors import InputError

GOOD = {
    "data": {"train": "toy", "row_capacity": 512, "global_batch_size": 8},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
    },
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 6},
    "logging": {"output": "run"},
}
TEXT = yaml.safe_dump(GOOD)


def changed(**settings):
    """GOOD with `section__key=value`; None removes the key."""
    raw = copy.deepcopy(GOOD)
    for name, value in settings.items():
        section, _, key = name.partition("__")
        target = raw.setdefault(section, {})
        if value is None:
            del target[key]
        else:
            target[key] = value
    return raw


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults():
    config = parse_config(GOOD)
    assert config.data.sharing == "tree" and config.data.packing is True
    assert config.loss.loss_type == "sigmoid" and config.loss.beta is None
    assert config.model.num_query_groups is None
    assert config.train.epochs is None and config.optimizer.lr_decay_style == "constant"


def test_sections_are_frozen():
    config = parse_config(GOOD)
    with pytest.raises(AttributeError):
        config.data.seed = 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__hiden_size": 3}, r"unknown key model.hiden_size \(did you mean hidden_size\?\)"),
        ({"data__zzz": 1}, r"unknown key data.zzz \(known keys: train, valid, seed,"),
        ({"parallel__zzz": 2}, r"unknown key parallel.zzz \(known keys: "),
        ({"loss__ref_logps": "nowhere"}, "loss.ref_logps"),
        ({"train__steps": "six"}, "train.steps = 'six'"),
        ({"train__steps": True}, "train.steps = True"),
        ({"train__steps": 6.0}, "train.steps = 6.0"),
        ({"train__steps": 0}, "train.steps = 0"),
        ({"data__packing": 1}, "data.packing = 1"),
        ({"data__packing": "yes"}, "data.packing = 'yes'"),
        ({"data__train": 5}, "data.train = 5"),
        ({"data__sharing": "bush"}, "data.sharing = 'bush'.*'tree', 'pair', 'response' or 'none'"),
        ({"data__seed": -1}, "data.seed = -1"),
        ({"optimizer__lr": "1e-3"}, "optimizer.lr = '1e-3'"),
        ({"optimizer__lr": True}, "optimizer.lr = True"),
        ({"optimizer__lr": 0.0}, "optimizer.lr = 0.0"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr = nan"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr = inf"),
        ({"optimizer__adam_beta2": 1.0}, "optimizer.adam_beta2 = 1.0"),
        ({"loss__label_smoothing": 0.5}, "loss.label_smoothing = 0.5"),
        ({"loss__beta": 0}, "loss.beta = 0"),
        ({"loss__reference": "frozen"}, "loss.reference = 'frozen'"),
        ({"model__dtype": "float16"}, "model.dtype = 'float16'"),
        ({"model__attention_backend": "fast"}, "model.attention_backend = 'fast'"),
        ({"model__num_layers": None}, "model.num_layers is missing"),
        ({"logging__output": None}, "logging.output is missing"),
        ({"data__row_capacity": None}, "data.row_capacity is missing"),
        ({"data__micro_batch_size": 2}, "data.micro_batch_size = 2.*data.packing: false"),
        ({"data__packing": False}, "data.micro_batch_size is missing"),
        ({"data__rows_per_step": 2}, "global_batch_size = 8 and data.rows_per_step = 2: give exa"),
        ({"data__global_batch_size": None}, "rows_per_step = None: give exactly one"),
        ({"train__epochs": 2}, "train.steps = 6 and train.epochs = 2: give exactly one"),
        ({"train__steps": None}, "train.steps = None and train.epochs = None: give exactly one"),
        ({"model__num_attention_heads": 5}, "hidden_size = 64 is not a multiple of.*= 5"),
        ({"model__num_query_groups": 3}, "num_attention_heads = 4 is not.*num_query_groups = 3"),
        ({"model__kv_channels": 7}, "a head of 7 channels is odd"),
        ({"model__hidden_size": 12}, "a head of 3 channels is odd"),
        ({"model__recompute_method": "uniform"}, "model.recompute_method = uniform"),
        ({"model__recompute_granularity": "full"}, "recompute_method = None.*num_layers = None"),
        (
            {"model__recompute_granularity": "selective", "model__recompute_num_layers": 1},
            "model.recompute_num_layers = 1",
        ),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr = 1.0 is above optimizer.lr = 0.001"),
        ({"train__save_interval": 2}, "train.save_interval is set but train.save is not"),
        ({"train__eval_interval": 2}, "train.eval_interval is set but data.valid is not"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(InputError, match=message):
        parse_config(changed(**settings))


def listed(*entries, **settings):
    """Several data sets to train on, named a, b, …"""
    sets = [{"prefix": chr(97 + i), **entry} for i, entry in enumerate(entries)]
    return {"data__train": sets, **settings}


W, E = {"weight": 2}, {"epochs": 0.5}
ONE_EPOCH = {"train__steps": None, "train__epochs": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (listed(), r"data.train = \[\]: list at least one"),
        (listed({}), "data.train: a has weight = None and epochs = None: give exactly one"),
        (listed({**W, **E}), "a has weight = 2.0 and epochs = 0.5: give exactly one"),
        (listed(W, E), "entries with weight and entries with epochs: give all the same"),
        (listed(W, {"weight": 0}), r"data.train.1.weight = 0: input should be greater"),
        (listed(W, {"wieght": 1}), r"unknown key data.train.1.wieght \(did you mean weight\?\)"),
        (listed(W, {"prefix": 3, **W}), "data.train.1.prefix = 3"),
        (listed(W, {"prefix": "a", **W}), "data.train lists a twice: give it one entry"),
        (listed(W, W, **ONE_EPOCH), "train.steps is missing: a data.train with weights has no end"),
        (listed(E, E), "train.epochs = None and train.steps = 6: .* set train.epochs: 1"),
        (
            listed(W, W, data__global_batch_size=None, data__rows_per_step=2),
            "data.rows_per_step = 2: a data.train with weights",
        ),
        (listed(W, W, data__sort_by_length=True), "data.sort_by_length = True: .* weights fixes"),
        ({"data__valid": {}}, "data.valid = {}: name at least one"),
        ({"data__valid": {"a b": "c"}}, r"data.valid.a b.*string should match pattern"),
        ({"data__valid": ["c"]}, r"data.valid = \['c'\]: input should be a valid string"),
        ({"data__train": {"a": 1}}, "data.train = {'a': 1}: input should be a valid string"),
    ],
)
def test_refusals_of_several_data_sets(settings, message):
    with pytest.raises(InputError, match=message):
        parse_config(changed(**settings))


def test_several_data_sets(tmp_path):
    config = parse_config(changed(**listed(W, {"weight": 1}, data__valid={"x": "p", "y.2": "q"})))
    assert config.data.weights == (2.0, 1.0) and config.data.set_epochs is None
    assert config.data.valid_sets == {"x": "p", "y.2": "q"}
    (tmp_path / "written.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "written.yaml") == config
    config = parse_config(changed(**listed(E, {"epochs": 2}, **ONE_EPOCH)))
    assert config.data.set_epochs == (0.5, 2.0) and config.data.weights is None
    single = parse_config(GOOD).data
    assert [item.prefix for item in single.train_sets] == [single.train]
    assert (single.weights, single.set_epochs, single.valid_sets) == (None, None, {})


def test_rows_per_step_needs_packing():
    raw = changed(data__packing=False, data__micro_batch_size=2, data__rows_per_step=2)
    del raw["data"]["global_batch_size"]
    with pytest.raises(InputError, match="data.rows_per_step = 2 counts packed rows"):
        parse_config(raw)


def test_unknown_and_missing_sections():
    with pytest.raises(InputError, match=r"unknown key modle \(did you mean model\?\)"):
        parse_config({**GOOD, "modle": {}})
    with pytest.raises(InputError, match="optimizer is missing"):
        parse_config({k: v for k, v in GOOD.items() if k != "optimizer"})
    with pytest.raises(InputError, match="data = \\[1\\]"):
        parse_config({**GOOD, "data": [1]})


def test_all_faults_are_named_at_once():
    with pytest.raises(InputError, match="model.num_layers = 0.*train.steps = 'six'") as error:
        parse_config(changed(train__steps="six", model__num_layers=0), "run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert "pydantic" not in str(error.value)


def test_valid_variants():
    parse_config(changed(data__packing=False, data__micro_batch_size=2, data__row_capacity=None))
    parse_config(changed(model__num_attention_heads=5, model__kv_channels=16))
    config = parse_config(changed(optimizer__lr=1, model__num_query_groups=2))
    assert config.optimizer.lr == 1.0
    full = {"granularity": "full", "method": "uniform", "num_layers": 1}
    parse_config(changed(**{f"model__recompute_{k}": v for k, v in full.items()}))


class TestFiles:
    def test_numbers_as_users_write_them(self, tmp_path):
        text = TEXT.replace("lr: 0.001", "lr: 1e-5\n  min_lr: 2E-6\n  adam_eps: 1.e-9")
        config = load_config(write(tmp_path, text))
        assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-5, 2e-6)
        assert config.optimizer.adam_eps == 1e-9

    def test_names_that_look_like_numbers_stay_names(self, tmp_path):
        text = TEXT.replace("train: toy", "train: 1e-5b")
        assert load_config(write(tmp_path, text)).data.train == "1e-5b"

    def test_overrides(self, tmp_path):
        path = write(tmp_path, TEXT)
        overrides = [
            "optimizer.lr=1e-5",
            "train.steps=9",
            "data.packing=false",
            "data.micro_batch_size=3",
            "data.train=a=b.c",
            "loss.beta=0.5",
            "train.save=null",
        ]
        config = load_config(path, overrides)
        assert config.optimizer.lr == 1e-5 and config.train.steps == 9
        assert config.data.packing is False and config.data.micro_batch_size == 3
        assert config.data.train == "a=b.c" and config.loss.beta == 0.5
        assert config.train.save is None
        assert load_config(path).train.steps == 6

    @pytest.mark.parametrize(
        ("vision", "frozen"), [({}, None), ({"vision": None}, None), (True, True)]
    )
    def test_an_override_inside_a_section_of_a_section(self, tmp_path, vision, frozen):
        """It may be in the file or not, and its other values stay."""
        given = {"vision": {"freeze_projector": True}} if vision is True else vision
        raw = {**GOOD, "model": {"hf": "somewhere", **given}}
        path = write(tmp_path, yaml.safe_dump(raw))
        vision = load_config(path, ["model.vision.freeze_tower=false"]).model.vision
        assert (vision.freeze_tower, vision.freeze_projector) == (False, frozen)

    def test_a_mapping_that_a_file_uses_twice_is_changed_once(self, tmp_path):
        valid = "  valid: &sets {a: x}\n  train: *sets\n"
        path = write(tmp_path, TEXT.replace("  train: toy\n", valid))
        with pytest.raises(InputError) as error:
            load_config(path, ["data.valid.b=y"])
        assert "{'a': 'x'}" in str(error.value) and "'b'" not in str(error.value)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.steps", "expected section.key=value"),
            ("steps=3", "expected section.key=value, .*; for steps write train.steps"),
            ("per_device_train_batch_size=4", "write data.global_batch_size"),
            (".steps=3", "expected section.key=value"),
            ("train.=3", "expected section.key=value"),
            ("train.stepz=3", r"unknown key train.stepz \(did you mean steps\?\)"),
            ("trian.steps=3", r"unknown key trian \(did you mean train\?\)"),
            ("train.steps=six", "train.steps = 'six'"),
            ("train.steps=[", "the value is not YAML"),
            ("train..steps=3", "train..steps has an empty part"),
            ("data.train.seed=3", "data.train is not a section in the file"),
            (
                "model.vision.freeze_towr=true",
                r"unknown key .*towr \(did you mean freeze_tower\?\)",
            ),
        ],
    )
    def test_wrong_overrides(self, tmp_path, override, message):
        with pytest.raises(InputError, match=message):
            load_config(write(tmp_path, TEXT), [override])

    def test_an_override_of_something_that_is_not_a_section(self, tmp_path):
        with pytest.raises(InputError, match="train is not a section in the file"):
            load_config(write(tmp_path, "train: [1]\n"), ["train.steps=3"])

    def test_an_empty_section_has_its_defaults(self, tmp_path):
        assert load_config(write(tmp_path, TEXT + "loss:\nparallel:\n")).loss.beta is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("data: [", "not YAML"),
            ("just words", "expected sections .* found 'just words'"),
            ("", "expected sections .* found None"),
            ("- 1\n- 2\n", "expected sections"),
            ("data: {train: a}\ndata: {train: b}\n", "data.*twice"),
            ("data:\n  train: a\n  seed: 1\n  train: b\n", "train.*twice"),
        ],
    )
    def test_files_that_are_not_a_configuration(self, tmp_path, text, message):
        with pytest.raises(InputError, match=message):
            load_config(write(tmp_path, text))

    def test_bytes_that_are_not_text(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_bytes(b"\xff\xfe\x00data")
        with pytest.raises(InputError, match="not YAML"):
            load_config(path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="gone.yaml: No such file.*--config"):
            load_config(tmp_path / "gone.yaml")
        with pytest.raises(InputError, match="directory"):
            load_config(tmp_path)

    def test_what_is_dumped_is_read_again(self, tmp_path):
        raw = changed(optimizer__lr=5e-6, loss__label_smoothing=0.1, train__save="ckpt é")
        config = parse_config(raw)
        again = load_config(write(tmp_path, config.to_yaml()))
        assert asdict(again) == asdict(config) and isinstance(again, Config)
        assert "seed: 1234" in config.to_yaml()  # defaults are written out


def test_the_timeout_has_to_be_positive():
    sections = {"parallel": {"distributed_timeout_minutes": 0}}
    with pytest.raises(InputError, match="parallel.distributed_timeout_minutes = 0"):
        parse_config(sections)


@pytest.mark.parametrize(
    ("key", "today"),
    [
        ("rpo_alpha", r"write loss_type: \[sigmoid, sft\] and loss_weights: \[1.0, X\]"),
        ("reference_free", "write reference: none"),
        ("gamma_beta_ratio", "write simpo_gamma: X, which is gamma_beta_ratio times beta"),
        ("f_divergence_params", "write f_alpha_divergence_coef"),
    ],
)
def test_keys_of_other_programs_are_refused_with_today_s_spelling(key, today):
    with pytest.raises(InputError, match=rf"unknown key loss.{key} .{today}"):
        parse_config({**GOOD, "loss": {key: 1.0}})


@pytest.mark.parametrize("value", [[], ["sigmoid", 3], 3, {"sigmoid": 1}, None, ["x"] * 17])
def test_loss_types_are_a_name_or_a_list_of_names(value):
    with pytest.raises(InputError, match=r"loss.loss_type = .*expected (a name|1 to 16 names)"):
        parse_config({**GOOD, "loss": {"loss_type": value}})


def test_a_list_of_losses_is_read_and_written():
    loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    config = parse_config({**GOOD, "loss": loss})
    assert yaml.safe_load(config.to_yaml())["loss"] == loss
    for weights in ([], [0.0], [-1.0], ["1"], 1.0, [float("nan")]):
        with pytest.raises(InputError, match="loss.loss_weights"):
            parse_config({**GOOD, "loss": {**loss, "loss_weights": weights}})


def test_null_unsets_what_needs_the_setting(tmp_path):
    path = tmp_path / "run.yaml"
    best = {"keep_best": {"metric": "eval_loss"}, "keep_last": 2, "save": "s", "save_interval": 2}
    raw = {**copy.deepcopy(GOOD), "train": {"steps": 2, "eval_interval": 1, **best}}
    raw["data"]["valid"] = "held"
    path.write_text(yaml.safe_dump(raw))
    told: list[str] = []
    config = load_config(path, ["data.valid=null"], told.append)
    assert config.train.eval_interval is None and config.train.keep_best is None
    assert told == ["data.valid=null also unsets train.eval_interval, train.keep_best"]
    config = load_config(path, ["train.save=null", "train.save_interval=null"], told.append)
    assert config.train.keep_last is None
    assert told[1:] == ["train.save=null also unsets train.keep_last, train.keep_best"]
    with pytest.raises(InputError, match="train.eval_interval is set but data.valid is not"):
        load_config(path, ["data.valid=null", "train.eval_interval=3"], told.append)
    load_config(path, ["train.keep_last=null"], told.append)
    assert len(told) == 3, "the last but one refused after it told"


def test_what_a_vision_section_trains_beside_adapters_is_refused():
    sections = {
        "data": {"train": "x", "row_capacity": 512, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2},
        "logging": {"output": "y"},
    }

    def parse(vision, lora=None, model=None):
        model = {"hf": "z", "vision": vision} if model is None else {**model, "vision": vision}
        return parse_config(
            {**sections, "model": model, **({} if lora is None else {"lora": lora})}
        )

    assert parse({}).model.vision.trains_projector(has_adapters=False)
    assert not parse({}, lora={}).model.vision.trains_projector(has_adapters=True)
    assert not parse({"freeze_projector": True}).model.vision.trains_projector(False)
    for key in ("freeze_tower", "freeze_projector"):
        with pytest.raises(InputError, match=f"model.vision.{key} = False with a lora section"):
            parse({key: False}, lora={})
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(InputError, match="a model that reads no images"):
        parse({}, model=sizes)
    with pytest.raises(InputError, match="unknown key model.vision.freeze"):
        parse({"freeze": True})
