"""tests/numerics on CUDA: layouts, heads, reward models, transformers; float32 and bfloat16."""

import pytest
from budget import needs_cuda, skip_without
from device_checks import (
    LAYOUTS,
    LORA,
    MODELS,
    assert_follows,
    assert_learns,
    check_alone,
    check_hf,
    trained,
    write_decided_set,
)
from torch import bfloat16

pytestmark = needs_cuda

KINDS = {
    "float32": {"dtype": "float32"},
    "flash": {"dtype": "bfloat16", "attention_backend": "flash"},
    "flex": {"dtype": "bfloat16", "attention_backend": "flex"},
}


@pytest.fixture(scope="module")
def decided(tmp_path_factory) -> str:
    return write_decided_set(tmp_path_factory.mktemp("decided") / "set")


@pytest.fixture(scope="module", params=["lm", "reward"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def runs(request, kind, decided, tmp_path_factory):
    """(a function that trains a layout, the unpacked run, the dtype)."""
    model = {**KINDS[request.param], "kind": kind}
    if "attention_backend" in model:
        skip_without(model["attention_backend"], bfloat16, 64)
    folder = tmp_path_factory.mktemp(f"{kind}_{request.param}")

    def run(name, layout, **more):
        return trained(folder / name, decided, layout, **model, **more)

    expected = run("unpacked", "unpacked")
    assert_learns(expected)
    return run, expected, model["dtype"]


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "unpacked"])
def test_every_layout_follows_the_unpacked_run(runs, layout):
    run, expected, dtype = runs
    assert_follows(run(layout, layout), expected, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_memory_savers_follow_it_too(runs, name):
    run, expected, dtype = runs
    assert_follows(run(name, "tree", **MODELS[name]), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_follow_the_unpacked_run(decided, tmp_path, kind):
    """With Transformer Engine installed these are adapters on its layers."""
    model = KINDS[kind]
    if "attention_backend" in model:
        skip_without(model["attention_backend"], bfloat16, 64)
    expected = trained(tmp_path / "unpacked", decided, "unpacked", LORA, **model)
    assert_learns(expected)
    for name, more in {"tree": {}, "recompute": MODELS["recompute"]}.items():
        metrics = trained(tmp_path / name, decided, "tree", LORA, **model, **more)
        assert_follows(metrics, expected, model["dtype"])


@pytest.mark.parametrize("settings", [{}, *MODELS.values()], ids=["plain", *MODELS])
@pytest.mark.parametrize("backend", ["dense", "path"])
def test_packed_trees_equal_every_response_alone(world, backend, settings):
    from megatron_prefix.model.spec import has_transformer_engine

    if has_transformer_engine():
        pytest.skip("Transformer Engine's layers have no float64: uninstall it for this test")
    check_alone(world, backend, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_responses_score_as_in_transformers(decided, tmp_path, kind):
    model = KINDS[kind]
    if "attention_backend" in model:
        skip_without(model["attention_backend"], bfloat16, 64)
    check_hf(tmp_path, decided, **model)
