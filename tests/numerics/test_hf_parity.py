"""Hugging Face models in and out: transformers is the judge, one response at a time.

Random small models of every architecture are imported, score real preferences packed and shared,
are trained, and go out again; transformers runs each response alone, from the exported files.
"""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.checkpoint.model_weights import model_state
from megatron_prefix.checkpoint.starting_model import resolve_starting_model
from megatron_prefix.checkpoint.writing import Snapshot
from megatron_prefix.config import Config, ModelConfig, load_config, parse_config
from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.run import train

pytestmark = pytest.mark.sample

TOLERANCE = 1e-4
"""Of a response's log-probability, relative if it exceeds 1."""
SIZES = {
    "vocab_size": 270,  # above the data's 258, so that the padding to 320 starts after it
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16}
WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 33,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
"""Windows are shorter than the prompts of HH-RLHF and OpenAssistant in bytes."""
KINDS = {
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama 2": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 6}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral, window": ("mistral", {"sliding_window": 20, "head_dim": 12}),
    "qwen3, windows": ("qwen3", {**WINDOWED, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}),
    "qwen3 moe, raw": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": False, "head_dim": 12}),
}


def make(kind: str, directory: Path, dtype=torch.float32, **more) -> Path:
    """Save a random model whose norms and biases are off 1 and 0; the same every time."""
    name, parts = KINDS[kind]
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **parts, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory, max_shard_size="40KB")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "none"}')
    (directory / "modeling_own.py").write_text("raise SystemExit('this must never run')")
    return directory


def few(source: Path, folder: Path, num_groups: int, num_read: int, longest: int) -> str:
    """PREFIX of a file's first groups of which something is left under `longest` bytes a path."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        read = list(itertools.islice(file, num_read))
    options = BuildOptions(max_length=longest, overflow="drop")
    for name in ("all", "few"):
        (folder / f"{name}.jsonl").write_text("".join(read), encoding="utf-8")
        build_dataset([folder / f"{name}.jsonl"], "bytes", folder / name, options)
        records = PreferenceDataset(folder / name).group_records[:num_groups].tolist()
        read = [read[record] for record in records]
    assert len(PreferenceDataset(folder / "few")) == num_groups
    return str(folder / "few")


@pytest.fixture(scope="session")
def hh(data_dir, tmp_path_factory) -> str:
    """PREFIX of 32 HH-RLHF pairs of at most 300 bytes a path."""
    return few(data_dir / "hh_pairs.jsonl.gz", tmp_path_factory.mktemp("hh32"), 32, 600, 300)


@pytest.fixture(scope="session")
def oasst(data_dir, tmp_path_factory) -> str:
    """PREFIX of 10 OpenAssistant trees of at most 1200 bytes a path."""
    return few(data_dir / "oasst_trees.jsonl.gz", tmp_path_factory.mktemp("oasst10"), 10, 40, 1200)


@cache
def responses(prefix: str) -> list[tuple[np.ndarray, int]]:
    """Every response's whole path and where its own part starts, walked up from its last node."""
    dataset = PreferenceDataset(prefix)
    paths = []
    for group in range(len(dataset)):
        tree = dataset[group]
        ends = np.cumsum(tree.node_lengths)
        first = int(dataset.group_responses[group])
        for response, last in enumerate(tree.response_last):
            parts, node = [], int(last)
            while node != -1:
                parts.append(tree.tokens[ends[node] - tree.node_lengths[node] : ends[node]])
                node = int(tree.parents[node])
            own = int(dataset.response_prompts[first + response])
            paths.append((np.concatenate(parts[::-1]), own))
    return paths


@torch.no_grad()
def judged(directory: Path, prefix: str) -> np.ndarray:
    """Log-probability of every response by transformers, each alone, from files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sums = []
    for tokens, start in responses(prefix):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logps = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        sums.append(float(logps.gather(1, ids[0, start:, None]).sum()))
    return np.array(sums)


def run_config(output: Path, prefix: str, **model) -> Config:
    """Three steps of 32 groups at a learning rate of 1e-3, saved below `output`/run."""
    data = {"train": prefix, "valid": prefix, "global_batch_size": 32, "row_capacity": 4096}
    sections = {
        "data": data,
        "model": model,
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 3, "save": str(output / "run" / "saved")},
        "logging": {"output": str(output / "run")},
    }
    return parse_config(sections)


def scored(config: Config, output: Path, load: str | None = None) -> np.ndarray:
    """Our log-probabilities, packed and shared, by way of `evaluate --per-response`."""
    file = output / "scored.jsonl"
    evaluate(config, load, str(file))
    return np.array([json.loads(line)["logp"] for line in file.read_text().splitlines()])


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_real_preferences_score_as_in_transformers(kind, hh, oasst, tmp_path):
    """HH through an imported checkpoint, OpenAssistant straight from safetensors."""
    directory = make(kind, tmp_path / "hf")
    import_hf(str(directory), tmp_path / "ck")
    by_checkpoint = run_config(tmp_path, hh, checkpoint=str(tmp_path / "ck"))
    assert worst(scored(by_checkpoint, tmp_path), judged(directory, hh)) < TOLERANCE
    straight = run_config(tmp_path, oasst, hf=str(directory))
    theirs = judged(directory, oasst)
    assert len(theirs) > 30 and len(np.unique(theirs.round(3))) > 25
    assert worst(scored(straight, tmp_path), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_export_after_import_is_bit_equal(kind, tmp_path):
    dtype = torch.bfloat16 if kind in ("llama 2", "qwen2") else torch.float32
    directory = make(kind, tmp_path / "hf", dtype)
    done = import_hf(str(directory), tmp_path / "ck")
    assert done.dtypes == (str(dtype).removeprefix("torch."),)
    export_hf(tmp_path / "ck", tmp_path / "back", 60_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert_same_tensors(directory, tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (directory / name).read_bytes()
    assert not list((tmp_path / "back").glob("*.py"))
    assert not list((tmp_path / "ck").rglob("*.py"))
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not leftovers


@pytest.mark.parametrize(
    "kind", ["llama 3", "mistral, window", "qwen2", "qwen3", "mixtral", "qwen3 moe, raw"]
)
def test_a_trained_model_is_exported_unchanged(kind, hh, tmp_path):
    """Three steps, exported: transformers finds the log-probabilities that we find."""
    directory = make(kind, tmp_path / "hf")
    config = run_config(tmp_path, hh, hf=str(directory))
    train(config)
    assert load_config(tmp_path / "run" / "config.yaml").model == config.model
    export_hf(tmp_path / "run" / "saved", tmp_path / "out", 10**9)
    theirs = judged(tmp_path / "out", hh)
    assert worst(scored(config, tmp_path, load=str(tmp_path / "run" / "saved")), theirs) < TOLERANCE
    assert worst(judged(directory, hh), theirs) > 30 * TOLERANCE, "training moved nothing"
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    "parts",
    [
        {"add_qkv_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"window_size": [6, 0]},
        {"add_qkv_bias": True, "window_size": [3, 0], "window_attn_skip_freq": [1, 0]},
        {"num_moe_experts": 4, "moe_ffn_hidden_size": 24},
        {"num_moe_experts": 4, "moe_router_pre_softmax": True, "qk_layernorm": True},
    ],
    ids=["qwen2", "mistral", "qwen2 windows", "mixtral", "qwen3 moe"],
)
def test_a_model_from_sizes_is_exported_too(parts, random_set, tmp_path):
    sizes = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4}
    config = run_config(tmp_path, random_set, **sizes, **parts)
    train(config)
    done = export_hf(tmp_path / "run" / "saved" / "iter_0000003", tmp_path / "out", 10**9)
    assert done.companions == ("config.json",)
    ours = scored(config, tmp_path, load=str(tmp_path / "run" / "saved"))
    assert worst(ours, judged(tmp_path / "out", random_set)) < TOLERANCE


def entries_of(path: Path) -> dict:
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: (x.size, x.properties.dtype) for key, x in metadata.items()}


@pytest.mark.parametrize("kind", ["llama 3", "qwen2", "qwen3", "mixtral", "qwen3 moe"])
def test_an_import_is_what_megatron_core_would_save(world, kind, random_set, tmp_path):
    """The same tensors under the same keys, but for the padding of the vocabulary."""
    from megatron_prefix.engine.optimizer import build_model

    directory = make(kind, tmp_path / "hf")
    import_hf(str(directory), tmp_path / "ck")
    model = ModelConfig(hf=str(directory), make_vocab_size_divisible_by=1)
    initial = resolve_starting_model(model, [PreferenceDataset(random_set)])
    chunks = build_model(initial.transformer_config(0), world)
    initial.load(chunks)
    (tmp_path / "theirs").mkdir()
    Snapshot.of(model_state(chunks)).write(tmp_path / "theirs")
    assert entries_of(tmp_path / "ck") == entries_of(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_in_give_the_same_weights(world, dtype, random_set, tmp_path):
    """bfloat16 tensors into either precision, and zero rows after the vocabulary."""
    from megatron_prefix.engine.optimizer import build_model

    directory = make("qwen2", tmp_path / "hf", torch.bfloat16)
    import_hf(str(directory), tmp_path / "ck")
    dataset, parameters = PreferenceDataset(random_set), []
    for origin in ({"hf": str(directory)}, {"checkpoint": str(tmp_path / "ck")}):
        initial = resolve_starting_model(ModelConfig(**origin, dtype=dtype), [dataset])
        chunks = build_model(initial.transformer_config(0), world)
        initial.load(chunks)
        parameters.append(dict(chunks[0].named_parameters()))
    straight, imported = parameters
    for name, parameter in straight.items():
        assert str(parameter.dtype) == f"torch.{dtype}" and torch.equal(parameter, imported[name])
    embedding = next(x for name, x in straight.items() if "word_embeddings" in name)
    assert embedding.size(0) == 320 and not embedding[270:].any() and embedding[269].any()


def refusal(model: ModelConfig, prefix: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve_starting_model(model, [PreferenceDataset(prefix)])
    return str(caught.value)


def test_data_that_the_model_cannot_take_is_refused(random_set, tmp_path):
    small = make("llama 3", tmp_path / "small", vocab_size=100)
    message = refusal(ModelConfig(hf=str(small)), random_set)
    assert "258" in message and "100" in message


def test_sizes_beside_an_import_have_to_be_its_own(random_set, tmp_path):
    import_hf(str(make("llama 2", tmp_path / "hf")), tmp_path / "ck")
    given = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6}
    given |= {"norm_epsilon": 1e-6, "checkpoint": str(tmp_path / "ck")}
    message = refusal(ModelConfig(**given), random_set)
    assert "model.rope_scaling = None" in message and "factor=4.0" in message
    right = ModelConfig(**given, rope_scaling={"type": "linear", "factor": 4.0})
    assert resolve_starting_model(right, [PreferenceDataset(random_set)]).vocab_size == 270


def test_nothing_is_overwritten_and_nothing_is_left_incomplete(tmp_path):
    directory = make("qwen2", tmp_path / "hf")
    import_hf(str(directory), tmp_path / "ck")
    with pytest.raises(InputError, match="exists already"):
        import_hf(str(directory), tmp_path / "ck")
    with pytest.raises(InputError, match="exists already"):
        export_hf(tmp_path / "ck", directory, 10**9)
    broken = tmp_path / "ck" / "__0_3.distcp"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(InputError, match="__0_3.distcp"):
        export_hf(tmp_path / "ck", tmp_path / "out", 10**9)
    (tmp_path / "ck" / "checksums.json").unlink()  # as one written elsewhere
    with pytest.raises(InputError, match="cannot be read"):
        export_hf(tmp_path / "ck", tmp_path / "out", 10**9)
    (tmp_path / "ck" / "hf" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        export_hf(tmp_path / "ck", tmp_path / "out", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "hf"]


MEASURED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from megatron_prefix.checkpoint.convert import *
from safetensors.torch import load_file
folder = Path(sys.argv[1])
HFModel.read(folder / "hf").sizes  # transformers itself is loaded before anything is measured
def peak_kib(action):
    Path("/proc/self/clear_refs").write_text("5")
    read = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
    before = read("VmRSS")
    action()
    return read("VmHWM") - before
whole = []
print(json.dumps([
    peak_kib(lambda: import_hf(str(folder / "hf"), folder / "ck")),
    peak_kib(lambda: export_hf(folder / "ck", folder / "out", 5 * 10**9)),
    peak_kib(lambda: whole.append(load_file(folder / "hf" / "model.safetensors"))),
    peak_kib(lambda: [x.sum() for x in whole[0].values()]),
]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """180 MB in one file, the largest parameter 8 MB: neither way adds eight times that."""
    parts = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = transformers.LlamaConfig(**{**SIZES, **parts, "num_attention_heads": 8})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    largest = 2 * 2048 * 512 * 4
    assert size > 20 * largest
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *streamed, mapped, touched = (1024 * kib for kib in json.loads(done.stdout))
    assert max(streamed) < 8 * largest, streamed
    assert mapped + touched > 0.9 * size, "what is measured does not see a whole model in memory"
    assert_same_tensors(tmp_path / "hf", tmp_path / "out")
