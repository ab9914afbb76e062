"""Parameters, memory and time of the part that reads images."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_step_time import SLOW, TINY, WORK, job

from megatron_prefix.config import ParallelConfig, parse_config
from megatron_prefix.config.parts import PictureWork, VisionTower
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import named_hardware
from megatron_prefix.estimate.adapters import training_flops
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.known import with_images
from megatron_prefix.estimate.memory import rank_memory
from megatron_prefix.estimate.planning import plan_run
from megatron_prefix.estimate.search import LayoutSearch
from megatron_prefix.estimate.step_time import step_time
from megatron_prefix.estimate.vision import KnownVision, with_vision
from megatron_prefix.testing import write_random_set

TOWER = VisionTower(
    num_layers=2,
    hidden_size=4,
    ffn_hidden_size=8,
    patch_values=3,
    projector_sizes=(4, 5, 6),
    tile_patches=10,
    projected_tile_patches=9,
)
VISION = KnownVision(
    sizes=TOWER, tower=1000, projector=100, trains_tower=False, trains_projector=True
)
FORWARD = ForwardFlops(linear=600.0, attention=200.0, head=100.0, tower=50.0, projector=10.0)


def llava_7b(folder):
    """The sizes of LLaVA-1.5-7B."""
    transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=32064), architectures=None
    ).save_pretrained(folder)
    return folder


def config(folder, **sections):
    return parse_config(
        {
            "data": {"train": "none", "row_capacity": 4096, "global_batch_size": 8},
            "model": {"hf": str(folder), "dtype": "bfloat16", **sections.pop("model", {})},
            "optimizer": {"lr": 1e-6},
            "train": {"steps": 1},
            "logging": {"output": "none"},
            **sections,
        }
    )


def test_parameters_are_those_of_transformers(tmp_path):
    folder = llava_7b(tmp_path)
    plan = plan_run(config(folder))
    with torch.device("meta"):
        settings = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.LlavaForConditionalGeneration(settings)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(plan["parameters"].values()) == total == 7_063_427_072
    assert plan["parameters"]["projector"] == 20_979_712
    assert plan["trained_parameters"] == total - plan["parameters"]["vision tower"]


def test_beside_adapters_all_of_it_is_frozen(tmp_path):
    plan = plan_run(config(llava_7b(tmp_path), lora={"r": 16}))
    assert plan["trained_parameters"] == plan["parameters"]["adapters"]


def test_the_whole_of_it_can_be_trained(tmp_path):
    vision = {"freeze_tower": False}
    plan = plan_run(config(llava_7b(tmp_path), model={"vision": vision}))
    assert plan["trained_parameters"] == sum(plan["parameters"].values())


def test_a_run_on_texts_trains_none_of_it(tmp_path):
    data = write_random_set(tmp_path / "set", 0, 8)
    given = config(llava_7b(tmp_path / "model"), model={"vision": {"freeze_tower": False}})
    given = replace(given, data=replace(given.data, train=data))
    plan = plan_run(given)
    frozen = plan["parameters"]["vision tower"] + plan["parameters"]["projector"]
    assert plan["trained_parameters"] == sum(plan["parameters"].values()) - frozen


def test_a_search_counts_it(tmp_path):
    data = write_random_set(tmp_path / "set", 0, 8)
    given = config(llava_7b(tmp_path / "model"))
    given = replace(given, data=replace(given.data, train=data))
    search = LayoutSearch.of_config(given, 8, named_hardware("H100"))
    assert search.known.vision is not None and search.known.vision.tower > 1e8
    text = replace(search, known=replace(search.known, vision=None))
    layout = next(search.candidates())
    needed = [x._gib(layout, x.rows_of(layout)) for x in (search, text)]
    assert needed[0] > needed[1] + 0.5, "300 million weights of 2 bytes"


def test_operations_of_training():
    of_text = replace(FORWARD, tower=0.0, projector=0.0)
    text = training_flops(of_text, None)
    assert training_flops(FORWARD, None, vision=VISION) == text + 50 + 3 * 10
    both = replace(VISION, trains_tower=True)
    assert training_flops(FORWARD, None, vision=both) == text + 3 * 60
    known = training_flops(FORWARD, None, has_reference=True, vision=VISION)
    assert known == text + 900 + 2 * 50 + 4 * 10


def test_the_first_stage_has_it_whole_on_every_tensor_rank():
    work = replace(WORK, flops=FORWARD)
    alone = job(vision=VISION)
    one = step_time(alone, ParallelConfig(), work)
    assert one.compute == pytest.approx((3 * 900 + 50 + 3 * 10) / 500)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    two = step_time(replace(alone, world_size=2), parallel, work)
    assert two.compute == pytest.approx((3 * 900 / 2 + 50 + 3 * 10) / 500)
    # the last of two stages has as many layers and the head
    stages = ParallelConfig(pipeline_model_parallel_size=2)
    assert step_time(job(world_size=2), stages, WORK).compute == pytest.approx(3 * 500 / 500)
    heavy = replace(work, flops=replace(FORWARD, tower=500.0))
    pipeline = step_time(job(world_size=2, vision=VISION), stages, heavy)
    assert pipeline.compute == pytest.approx((3 * 400 + 500 + 3 * 10) / 500)
    assert SLOW.bf16_flops == 1000.0


@pytest.mark.parametrize("has_reference", [False, True])
def test_memory_of_the_first_stage(has_reference):
    sizes, parallel = TINY.sizes(), ParallelConfig(use_distributed_optimizer=True)
    given = {"vocab_size": 8, "world_size": 2, "row_tokens": 16, "stage": 0}
    text = rank_memory(TINY, sizes, parallel, **given, has_reference=has_reference)
    settings = {"world_size": 2, "has_reference": has_reference, "rows": 3, "kept": 7}
    both = with_vision(text, VISION, TINY, parallel, **settings)
    assert both.weights - text.weights == 2 * 1100
    assert both.gradients - text.gradients == 4 * 100
    assert both.optimizer - text.optimizer == 12 * 100 // 2
    assert both.reference - text.reference == 2 * 1100 * has_reference
    assert both.activations - text.activations == 7


def test_work_of_a_tile():
    # 10 patches: 2 * 3 * 4 to read one, 2 layers of 8 * 16 + 4 * 4 * 8, and 100 entries of 4 * 4
    tower = 10 * (24 + 2 * (128 + 128)) + 2 * 100 * 16
    assert TOWER.of_tiles(1) == PictureWork(tower, 2 * (20 + 30) * 9, 10, 9)


def test_a_directory_without_images_has_none(tmp_path):
    folder = tmp_path / "text"
    transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1).save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    text["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(text))
    assert "projector" not in plan_run(config(folder))["parameters"]


def test_sizes_without_a_vision_part_do_not_go_with_images():
    """As the run itself refuses it: nobody knows what its pictures cost."""
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16}
    settings = config("", model={"hf": None, **sizes})
    store = SimpleNamespace(prefix="pairs", processor={"family": "llava"})
    with pytest.raises(InputError, match="data set pairs has images, .* give the llava model"):
        with_images(settings, None, SimpleNamespace(images=store))
    assert with_images(settings, None, SimpleNamespace(images=None)) is None
