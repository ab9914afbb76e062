"""Adapters of PEFT on every family: log-probabilities and gradients as PEFT computes them.

A random adapter on a random transformers model is saved, read here, and scores trees, packed and
shared; transformers with PEFT runs each response alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from family_models import MODELS, make_family
from safetensors.torch import load_file
from small_models import logps_of, pack, weights_of
from test_family_parity import theirs

pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

import peft  # noqa: E402

from megatron_prefix.checkpoint import resolve_starting_model  # noqa: E402
from megatron_prefix.checkpoint.convert import export_hf, import_hf  # noqa: E402
from megatron_prefix.config import ModelConfig  # noqa: E402
from megatron_prefix.config.lora import LoraConfig  # noqa: E402
from megatron_prefix.data.store import PreferenceDataset  # noqa: E402
from megatron_prefix.errors import InputError  # noqa: E402
from megatron_prefix.model.hf.peft import peft_name  # noqa: E402
from megatron_prefix.model.parameters import canonical_parameters  # noqa: E402
from megatron_prefix.model.provider import model_provider  # noqa: E402
from megatron_prefix.testing import write_random_set  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4
"""Of a log-probability, relative if it exceeds 1, and of a factor's gradient, relative to its
largest entry."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
JOINED = {
    "phi3": ["o_proj", "down_proj"],
    "glm": [*ATTENTION, "down_proj"],
    "starcoder2": ATTENTION,
}
"""Layers that may have adapters, in families that join others."""
LOW = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LATENT = {
    **dict.fromkeys(("deepseek v2", "deepseek v3", "glm moe lite"), LOW),
    "deepseek v2, dense": ["q_proj", *LOW[2:]],
}
MIXTURES = ("mixtral", "qwen3 moe", "qwen2 moe", "gpt-oss", "glm moe")
OFTEN = ("llama, biases, yarn", "phi3", "gemma3", "cohere", "gpt-oss", "deepseek v3")
"""Models of `make test`; the others take part in `make test-all`."""
ONE_OF_EACH = {kind: name for name, (kind, _) in MODELS.items()} | {"llama": OFTEN[0]}
ONE_OF_EACH["dense"] = "deepseek v2, dense"


def targets_of(name: str) -> list[str]:
    """All linear layers of a model that may have adapters."""
    joined = JOINED | LATENT | {"glm4": JOINED["glm"]} | dict.fromkeys(MIXTURES, ATTENTION)
    return joined.get(name, ALL)


def make_adapter(base: torch.nn.Module, targets: list[str], directory: Path) -> peft.PeftModel:
    """Save a random adapter of `base`, whose B is not zero."""
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in OFTEN else [pytest.mark.slow]) for x in ONE_OF_EACH.values()],
)
def test_an_adapter_computes_what_peft_does(name, tmp_path, world):
    base = make_family(name, tmp_path / "hf")
    prefix = write_random_set(tmp_path / "set", 0, 5)
    dataset = PreferenceDataset(prefix)
    without = theirs(base, prefix).detach()
    adapted = make_adapter(base, targets_of(name), tmp_path / "adapter").eval()
    model_config = ModelConfig(hf=str(tmp_path / "hf"))
    lora = LoraConfig(adapter=str(tmp_path / "adapter"))
    initial = resolve_starting_model(model_config, [dataset], lora)
    model = model_provider(config=initial.transformer_config(0), pg_collection=world.groups)
    initial.load([model])
    ours = logps_of(model, pack([dataset[group] for group in range(len(dataset))]))
    judged = theirs(adapted, prefix)
    scale = judged.detach().abs().clamp(min=1)
    difference = float(((ours - judged).abs() / scale).max())
    assert difference < TOLERANCE and float((judged - without).abs().max()) > 0.1, difference
    weights = weights_of(len(judged))
    (ours * weights).sum().backward()
    (judged * weights).sum().backward()
    gradients = {
        key.replace(".default", ""): parameter.grad
        for key, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    own = {peft_name(key): x.grad for key, x in canonical_parameters(model) if x.requires_grad}
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        largest = float(gradient.abs().max())
        assert torch.allclose(own[key], gradient, rtol=0, atol=TOLERANCE * largest), key


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_an_adapter_goes_in_and_out(name, tmp_path):
    """The same tensors as bytes under PEFT's names, and PEFT computes the same with them."""
    base = make_family(name, tmp_path / "hf")
    targets = targets_of(name)
    adapted = make_adapter(base, targets, tmp_path / "adapter").eval()
    import_hf(str(tmp_path / "adapter"), tmp_path / "checkpoint", base=str(tmp_path / "hf"))
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    theirs_file, ours_file = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "back")
    )
    assert theirs_file.keys() == ours_file.keys() and len(ours_file) >= 2 * len(targets)
    for key, tensor in theirs_file.items():
        own = ours_file[key]
        assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape) and torch.equal(own, tensor)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        judged = adapted(ids, use_cache=False).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", attn_implementation="eager"
        )
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "back").eval()
        assert torch.equal(loaded(ids, use_cache=False).logits, judged)
        assert not torch.equal(loaded.unload()(ids, use_cache=False).logits, judged)


@pytest.mark.parametrize(
    ("name", "target"), [("phi3", "qkv_proj"), ("glm4", "gate_up_proj"), ("starcoder2", "c_fc")]
)
def test_an_adapter_of_a_joined_layer_is_refused_by_name(name, target, tmp_path):
    base = make_family(name, tmp_path / "hf")
    make_adapter(base, [target], tmp_path / "adapter")
    dataset = PreferenceDataset(write_random_set(tmp_path / "set", 0, 5))
    with pytest.raises(InputError, match=target):
        resolve_starting_model(
            ModelConfig(hf=str(tmp_path / "hf")),
            [dataset],
            LoraConfig(adapter=str(tmp_path / "adapter")),
        )
