"""Inside Megatron-Bridge, on CPU against a stub with its signatures."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import json
import os
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import bridge_stub as stub
import pytest
import torch
import torch.nn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

import megatron_prefix as mp
from megatron_prefix.bridge import preference_data, preference_forward_step, prefix_preference
from megatron_prefix.bridge.provider import prefix_layer_spec
from megatron_prefix.bridge.settings import FOLLOWED, FORCED, IDLE, NEEDED, faults
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.engine.step import run_schedule
from megatron_prefix.objectives import check
from megatron_prefix.reference import score_dataset, write_sidecar
from megatron_prefix.testing import write_random_set

SIZES = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4)
ROWS, CAPACITY, STEPS = 4, 128, 3


@pytest.fixture(autouse=True)
def _stub(monkeypatch):
    stub.install(monkeypatch)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("bridge") / "set", 0, 24)


def llama(**changes) -> stub.GPTModelProvider:
    """A provider as LlamaBridge.provider_bridge leaves it."""
    settings = dict(
        **SIZES,
        num_query_groups=2,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,  # fused kernels of Llama's provider need CUDA
        masked_softmax_fusion=True,
        apply_rope_fusion=True,
        share_embeddings_and_output_weights=False,
        vocab_size=320,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    return stub.GPTModelProvider(**settings | changes)


# --- the provider ---------------------------------------------------------------------------


def test_the_wrapped_provider_is_a_copy_with_hooks_and_defaults_of_its_own():
    provider = llama()
    provider.register_pre_wrap_hook(print)
    wrapped = prefix_preference(provider)
    assert isinstance(wrapped, stub.GPTModelProvider)
    assert wrapped._pre_wrap_hooks == [print] and wrapped._pre_wrap_hooks is not (
        provider._pre_wrap_hooks
    )
    assert {name: getattr(wrapped, name) for name in FORCED} == FORCED
    assert provider.calculate_per_token_loss is False and provider.apply_rope_fusion is True
    again = copy.deepcopy(wrapped)
    assert type(again) is type(wrapped) and again.hidden_size == 32


def test_rope_scaling_and_vocabulary_are_bridges():
    plain = prefix_preference(llama())
    assert not plain.rope_scaling and plain.padded_vocab_size == 320
    llama3 = prefix_preference(llama(rope_scaling=True, rope_scaling_factor=8))
    assert llama3.rope_scaling.type == "llama3" and llama3.rope_scaling.factor == 8.0
    assert llama3.rope_scaling.original_max_position_embeddings == 8192
    linear = prefix_preference(llama(seq_len_interpolation_factor=2.0))
    assert linear.rope_scaling.type == "linear" and linear.rope_scaling.factor == 2.0
    with pytest.raises(ValueError, match="seq_len_interpolation_factor = 2.0"):
        prefix_preference(llama(rope_scaling=True, seq_len_interpolation_factor=2.0))
    padded = prefix_preference(llama(should_pad_vocab=True, tensor_model_parallel_size=2))
    assert padded.padded_vocab_size == 512


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_embedding_type", "yarn"),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("window_size", (127, 0)),
        ("multi_latent_attention", True),
        ("mtp_num_layers", 1),
        ("softmax_type", "learnable"),
        ("attention_output_gate", True),
        ("no_rope_freq", 4),
        ("qk_l2_norm", True),
        ("layernorm_zero_centered_gamma", True),
        ("normalization", "LayerNorm"),
        ("activation_func", F.gelu),
        ("hidden_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("fp16", True),
        ("fp8_dot_product_attention", True),
        ("use_transformer_engine_full_layer_spec", True),
        ("cp_comm_type", "p2p"),
        ("moe_token_dispatcher_type", "flex"),
        ("tp_comm_overlap", True),
        ("cuda_graph_impl", "local"),
        ("overlap_moe_expert_parallel_comm", True),
        ("transformer_layer_spec", print),
    ],
)
def test_what_the_model_does_not_follow_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"model\.{name} = .*set it to"):
        prefix_preference(llama(**{name: value}))


def test_experts_without_a_balance_loss_pass_and_with_one_are_refused():
    experts = dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=64)
    prefix_preference(llama(**experts))
    prefix_preference(llama(moe_aux_loss_coeff=0.001))  # without experts it does nothing
    with pytest.raises(ValueError, match=r"model\.moe_aux_loss_coeff = 0.001"):
        prefix_preference(llama(**experts, moe_aux_loss_coeff=0.001))


def test_settings_changed_later_are_checked_when_the_model_is_built(world):
    wrapped = prefix_preference(llama())
    wrapped._pg_collection = world.groups
    wrapped.calculate_per_token_loss = False
    with pytest.raises(ValueError, match=r"model\.calculate_per_token_loss = False"):
        wrapped.provide(pre_process=True, post_process=True)


def test_providers_with_their_own_model_are_refused():
    class Other(stub.GPTModelProvider):
        def provide(self, pre_process=None, post_process=None, vp_stage=None): ...

    with pytest.raises(ValueError, match="provider is a Other"):
        prefix_preference(Other())
    with pytest.raises(ValueError, match="provider is a PrefixGPTModelProvider"):
        prefix_preference(prefix_preference(llama()))


def test_no_field_is_in_two_lists():
    assert not (FOLLOWED & IDLE or (FOLLOWED | IDLE) & set(NEEDED))


BF16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(**BF16, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1),
        dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
        dict(num_moe_experts=4, moe_ffn_hidden_size=64, expert_model_parallel_size=2),
        dict(**BF16, fp8="hybrid", fp8_recipe="tensorwise"),
        dict(attention_backend=None, cuda_graph_scope="full", offload_modules=None),  # recipes
    ],
)
def test_what_finalize_derives_is_not_taken_for_a_wish(changes):
    """Megatron-Core fills fields in and checks them; which ones differs between its versions."""
    wrapped = prefix_preference(llama(**changes))
    wrapped.finalize()
    assert list(faults(wrapped, prefix_layer_spec)) == []


def test_the_saved_configuration_opens_without_this_package():
    saved = prefix_preference(llama(rope_scaling=True)).to_cfg_dict()
    assert saved["_target_"] == "bridge_stub.GPTModelProvider"
    assert saved["transformer_layer_spec"] is stub.default_layer_spec
    assert saved["rope_scaling"] is True
    values = {k: v for k, v in saved.items() if k != "_target_"}
    stub.GPTModelProvider(**values)


def test_parameter_names_are_those_of_bridges_model(world):
    """Bridge's weight mappings and PEFT find parameters by name; names as in its LlamaBridge."""
    wrapped = prefix_preference(llama())
    wrapped.finalize()
    wrapped._pg_collection = world.groups
    model = wrapped.provide()
    assert model.config is wrapped and model.pg_collection is world.groups
    names = {name for name, _ in model.named_parameters() if ".layers.1." not in name}
    layer = "decoder.layers.0."
    assert names == {
        "embedding.word_embeddings.weight",
        f"{layer}input_layernorm.weight",
        f"{layer}self_attention.linear_qkv.weight",
        f"{layer}self_attention.linear_proj.weight",
        f"{layer}pre_mlp_layernorm.weight",
        f"{layer}mlp.linear_fc1.weight",
        f"{layer}mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


# --- training -------------------------------------------------------------------------------


def initial_weights(world) -> dict[str, torch.Tensor]:
    sizes = mp.ModelConfig(**SIZES, num_query_groups=2)
    config = mp.transformer_config(sizes, vocab_size=320, seed=7)
    model = mp.model_provider(config=config, pg_collection=world.groups)
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.fixture(scope="module")
def weights(world):
    return initial_weights(world)


def loading(weights):
    """A pre-wrap hook that loads weights, as AutoBridge registers one."""

    def hook(model):
        for name, parameter in model[0].named_parameters():
            parameter.data.copy_(weights[name])
        return model

    return hook


def run_state(dataset, **changes) -> SimpleNamespace:
    """What the forward step reads of Bridge's GlobalState."""
    cfg = SimpleNamespace(
        train=SimpleNamespace(micro_batch_size=1),
        validation=SimpleNamespace(eval_global_batch_size=ROWS),
        rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=True, check_for_spiky_loss=False),
        dist=SimpleNamespace(
            use_megatron_fsdp=False, use_torch_fsdp2=False, eval_context_parallel_size=None
        ),
        dataset=dataset,
    )
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(cfg, section), key, value)
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)

    class Straggler(contextlib.nullcontext):
        def __call__(self, bdata=False):
            return self

    return SimpleNamespace(
        cfg=cfg,
        train_state=SimpleNamespace(step=0),
        timers=lambda name, log_level=0: timer,
        straggler_timer=Straggler(),
    )


@contextlib.contextmanager
def micro_batches(number: int):
    init_num_microbatches_calculator(0, None, number, 1, 1)
    try:
        yield
    finally:
        destroy_num_microbatches_calculator()


class BridgeRun:
    """setup and train of Bridge, cut down to what meets this package."""

    def __init__(self, world, weights, prefix, first_step=0, reference=None, **changes):
        destroy_rerun_state_machine()  # of the run before, which may have stopped within a step
        provider = llama()
        provider.register_pre_wrap_hook(loading(weights))
        self.model_config = prefix_preference(provider)
        self.data = preference_data(
            *(self.model_config, prefix),
            rows_per_step=ROWS,
            row_capacity=CAPACITY,
            valid=prefix,
            **reference or {},
        )
        self.model_config.finalize()
        self.groups = world.groups
        self.model = self.model_config.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            pg_collection=world.groups,
        )
        self.optimizer = adam(self.model)
        stub.update_model_config_funcs(self.model_config, self.optimizer, world.groups)
        self.iterator = stub.data_iterator_of(self.data, world.groups)
        self.state = run_state(self.data, **changes)
        self.state.train_state.step = first_step
        step = preference_forward_step(self.data)
        self.forward_step = stub.prepare_forward_step_func(step, self.state)

    def step(self) -> tuple[dict[str, float], float]:
        return stub.train_step(
            *(self.forward_step, self.iterator, self.model, self.optimizer, None),
            *(self.state, self.groups, get_forward_backward_func(), None),
        )

    def close(self):
        self.data.train.close()
        self.data.valid.close()


def adam(model: list):
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0)
    return get_megatron_optimizer(settings, model, use_gloo_process_groups=False)


@pytest.fixture
def bridge_run(world, weights, prefix):
    with micro_batches(ROWS), contextlib.ExitStack() as stack:

        def start(**changes):
            run = BridgeRun(world, weights, prefix, **changes)
            stack.callback(run.close)
            return run

        yield start


def own_losses(world, prefix, loss) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of this package's own loop on the same rows."""
    data = mp.PreferenceDataset(prefix)
    steps = StepSettings(seed=1234, row_capacity=CAPACITY, rows_per_step=ROWS).composition(data)
    sampler = mp.Sampler(
        dataset=data, composition=steps, row_capacity=CAPACITY, count_multiple=ROWS
    )
    sizes = mp.ModelConfig(**SIZES, num_query_groups=2)
    config = mp.transformer_config(sizes, vocab_size=320, seed=7)
    config.finalize_model_grads_func = mp.sum_gradients
    build = [mp.model_provider(config=config, pg_collection=world.groups) for _ in range(2)]
    reference, policy = build[0].requires_grad_(False), build[1]
    wrapping = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    policy = [DistributedDataParallel(config, wrapping, policy)]
    optimizer, objective = adam(policy), check(loss)
    losses = []
    for step in range(STEPS):
        plan = sampler.step(step)
        rows = sampler.micro_batches(plan)
        rows = [mp.to_device(row, world.device, plan.denominators) for row in rows]
        rows = mp.with_reference([reference], rows)
        policy[0].zero_grad_buffer()
        optimizer.zero_grad()
        logs = run_schedule(policy, rows, objective)
        _, norm, _ = optimizer.step()
        losses.append((sum(float(log["loss"]) for log in logs), float(norm)))
    return losses


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_steps_through_bridges_loop_equal_our_own(world, prefix, bridge_run, loss_type):
    loss = mp.LossConfig(loss_type=loss_type, beta=0.1)
    run = bridge_run(reference={"loss": loss})
    results = [run.step() for _ in range(STEPS)]
    own = own_losses(world, prefix, loss)
    assert own[0][0] == pytest.approx(check(loss).first_value, rel=1e-6)
    for (metrics, norm), (loss, own_norm) in zip(results, own, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert float(norm) == pytest.approx(own_norm, rel=1e-4)
    assert own[-1][0] < own[0][0] - 1e-3
    assert set(results[0][0]) == {
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("rewards/accuracies", "logps/chosen", "logps/rejected"),
        *("kl", "logratios/mean", "logratios/chosen", "logratios/rejected"),
    }


def test_pairs_have_a_beta_of_their_own(world, weights, prefix, bridge_run, tmp_path):
    records = [
        {"prompt": f"question {i}", "chosen": "yes, it is", "rejected": "no"}
        | ({"beta": 0.1 * (1 + i % 5)} if i % 3 else {})
        for i in range(24)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    own = str(tmp_path / "betas")
    build_dataset([source], "bytes", own, BuildOptions())
    runs = {}
    for pair_beta in (True, False):
        loss = mp.LossConfig(beta=0.7, pair_beta=pair_beta)
        run = BridgeRun(world, weights, own, reference={"loss": loss})
        results = [run.step() for _ in range(STEPS)]
        run.close()
        for (metrics, _), (value, _) in zip(results, own_losses(world, own, loss), strict=True):
            assert metrics["loss"] == pytest.approx(value, rel=1e-5)
        runs[pair_beta] = results[-1][0]["loss"]
    assert abs(runs[True] / runs[False] - 1) > 1e-3, "the betas of pairs change nothing"
    with pytest.raises(ValueError, match=r"pair_beta: true: no pair in prefix = .* has a beta of"):
        bridge_run(reference={"loss": mp.LossConfig(pair_beta=True)})


def test_a_count_of_pairs_would_divide_twice(world, weights, prefix, bridge_run):
    """The control of the test above: with pairs as num_tokens the gradient is another."""
    run, honest = bridge_run(), bridge_run()
    zero_tokens = run.forward_step

    def counting(data_iterator, model):
        output, loss_function = zero_tokens(data_iterator, model)

        def with_pairs(output):
            loss, count, logs = loss_function(output)
            return loss, count + int(logs["rewards/chosen"][1]), logs

        return output, with_pairs

    run.forward_step = counting
    norms = [float(r.step()[1]) for r in (run, honest)]
    assert norms[0] < 0.5 * norms[1]


def test_a_resumed_run_asks_for_its_step(bridge_run):
    whole, resumed = bridge_run(), bridge_run(first_step=2)
    for _ in range(2):
        whole.step()
    seen = [next_row_groups(run) for run in (whole, resumed)]
    assert seen[0] == seen[1]


def test_scored_log_probabilities_are_a_reference_too(world, weights, prefix, bridge_run, tmp_path):
    sizes = mp.ModelConfig(**SIZES, num_query_groups=2)
    config = mp.transformer_config(sizes, vocab_size=320, seed=7)
    frozen = [mp.model_provider(config=config, pg_collection=world.groups)]
    data = mp.PreferenceDataset(prefix)
    in_order = mp.GroupBatches(len(data), 4, data.fingerprint, seed=1, limit=1)
    sampler = mp.Sampler(dataset=data, composition=in_order, row_capacity=CAPACITY)
    scores = score_dataset(frozen, sampler, world)
    path = str(tmp_path / "ref.safetensors")
    write_sidecar(path, "f" * 64, [(data, scores)])
    loss = mp.LossConfig(reference="precomputed", ref_logps=path)
    scored = bridge_run(reference={"loss": loss, "ref_fingerprint": "f" * 64})
    by_model = bridge_run()
    for _ in range(2):
        (ours, _), (theirs, _) = scored.step(), by_model.step()
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="score again"):
        bridge_run(reference={"loss": loss, "ref_fingerprint": "0" * 64})


def next_row_groups(run) -> list:
    run.data.train.expect(run.state.train_state.step, ROWS)
    return next(run.iterator).tokens.tolist()


def test_evaluation_goes_through_the_held_out_rows_again_and_again(bridge_run):
    run = bridge_run()
    run.data.train.close()
    chunk = run.model[0].eval()
    count = run.data.valid._cycle
    losses = []
    with torch.no_grad():
        for _ in range(count + 1):
            rows = []
            for _ in range(ROWS):
                output, loss_function = run.forward_step(run.data.valid, chunk)
                rows.append(loss_function(output)[2]["loss"])
            total = torch.stack(rows).sum(0)
            losses.append(float(total[0] / total[1]))
    assert losses[0] == losses[-1] == pytest.approx(0.693147, abs=1e-6)


def test_wrong_settings_of_the_run_are_named(bridge_run):
    for changes, message in [
        ({"train__micro_batch_size": 2}, "train.micro_batch_size = 2"),
        ({"rerun_state_machine__check_for_spiky_loss": True}, "check_for_spiky_loss"),
        ({"dist__use_torch_fsdp2": True}, "use_torch_fsdp2"),
    ]:
        with pytest.raises(ValueError, match=message):
            bridge_run(**changes).step()


def test_another_number_of_micro_batches_is_refused(world, weights, prefix):
    with micro_batches(ROWS + 1):
        run = BridgeRun(world, weights, prefix)
        with pytest.raises(ValueError, match="step 0 has 4 rows on this rank and the trainer"):
            run.step()
        run.close()


def test_a_row_before_its_step_is_named_is_refused(bridge_run):
    with pytest.raises(RuntimeError, match="before the forward step named its step"):
        next(bridge_run().iterator)


def test_a_nan_stops_the_run_as_bridge_asks(bridge_run):
    run = bridge_run()
    with torch.no_grad():
        next(run.model[0].parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN"):
        run.step()


def test_a_reference_needs_weights_and_one_pipeline_stage(world, prefix):
    model = prefix_preference(llama())
    data = preference_data(model, prefix, rows_per_step=ROWS, row_capacity=CAPACITY)
    context = stub.DatasetBuildContext(0, 0, 0, pg_collection=world.groups)
    with pytest.raises(ValueError, match="no hook that loads weights"):
        data.build_datasets(context)
    model.pipeline_model_parallel_size = 2
    with pytest.raises(ValueError, match="loss.reference = precomputed"):
        data.build_datasets(context)


def test_losses_that_bridge_cannot_train_are_refused(prefix):
    model = prefix_preference(llama())
    for loss in [
        mp.LossConfig(loss_type="bradley_terry", reference="none"),
        mp.LossConfig(reference="precomputed"),
    ]:
        with pytest.raises(ValueError, match="loss.re"):
            preference_data(model, prefix, rows_per_step=4, row_capacity=128, loss=loss)


# --- the stub against Bridge's source -------------------------------------------------------


@pytest.fixture
def source(monkeypatch) -> Path:
    """The folder of megatron.bridge: installed, or given by MEGATRON_BRIDGE_SOURCE."""
    monkeypatch.undo()  # the stub away
    given = os.environ.get("MEGATRON_BRIDGE_SOURCE")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("megatron.bridge")
    if spec is None:
        pytest.skip(
            "Megatron-Bridge is not installed, and MEGATRON_BRIDGE_SOURCE does not name the "
            "folder megatron/bridge of its source"
        )
    return Path(spec.submodule_search_locations[0])


def definition(path: Path, name: str) -> ast.AST:
    """The function or class `name`, or `Class.method`, of a source file."""
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(x for x in node.body if getattr(x, "name", None) == part)
    return node


def arguments(node: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """(name, default) of every parameter."""
    args, given = node.args, node.args.defaults
    defaults = [None] * (len(args.args) - len(given)) + [ast.unparse(x) for x in given]
    return [(a.arg, d) for a, d in zip(args.args, defaults, strict=True)]


def field_values(node: ast.ClassDef) -> list[tuple[str, str | None]]:
    """(name, default) of every field of a dataclass."""
    fields_ = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    return [(x.target.id, None if x.value is None else ast.unparse(x.value)) for x in fields_]


STUB = Path(stub.__file__)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("models/gpt_provider.py", "GPTModelProvider"),
        ("data/base.py", "DataloaderConfig"),
        ("data/base.py", "DatasetBuildContext"),
        ("data/base.py", "DatasetProvider"),
    ],
)
def test_fields_of_the_stub_are_bridges(source, file, name):
    assert field_values(definition(STUB, name)) == field_values(definition(source / file, name))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("models/gpt_provider.py", "GPTModelProvider.provide"),
        ("models/model_provider.py", "ModelProviderMixin.provide"),
        ("models/model_provider.py", "ModelProviderMixin.provide_distributed_model"),
        ("models/model_provider.py", "ModelProviderMixin.register_pre_wrap_hook"),
        ("data/base.py", "DatasetProvider.build_datasets"),
        ("training/utils/train_utils.py", "prepare_forward_step_func"),
        ("training/train.py", "train_step"),
    ],
)
def test_signatures_of_the_stub_are_bridges(source, file, name):
    assert arguments(definition(STUB, name)) == arguments(definition(source / file, name))


def test_our_forward_step_has_the_signature_of_bridges(source):
    file = Path(mp.__file__).parent / "bridge" / "step.py"
    factory = definition(file, "preference_forward_step")
    ours = next(x for x in factory.body if isinstance(x, ast.FunctionDef))
    assert arguments(ours) == arguments(definition(source / "training/gpt_step.py", "forward_step"))


def test_bridge_calls_the_schedule_and_divides_as_the_stub_does(source):
    def schedule_keywords(path: Path) -> list[str]:
        calls = [x for x in ast.walk(definition(path, "train_step")) if isinstance(x, ast.Call)]
        (call,) = [x for x in calls if ast.unparse(x.func) == "forward_backward_func"]
        return [keyword.arg for keyword in call.keywords]

    assert schedule_keywords(STUB) == schedule_keywords(source / "training/train.py")
    step = ast.unparse(definition(source / "training/train.py", "train_step"))
    assert "val[0] / val[1]" in step and "val[0].numel() == 2" in step
    setup = ast.unparse(definition(source / "training/setup.py", "_update_model_config_funcs"))
    assert "partial(finalize_model_grads, pg_collection=pg_collection)" in setup
    loaders = (source / "data/loaders.py").read_text(encoding="utf-8")
    assert "return RerunDataIterator(dataloader)" in loaders


def test_bridges_provider_reads_nothing_else_of_the_model(source):
    """What Bridge's own `provide` passes to its model is followed or must have its default."""
    provide = definition(source / "models/gpt_provider.py", "GPTModelProvider.provide")
    read = {
        x.attr
        for x in ast.walk(provide)
        if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == "self"
    }
    known = {f.name for f in fields(stub.GPTModelProvider)} | {"_vp_stage"}
    assert read <= known
