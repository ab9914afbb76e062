"""The functions of the installed TRL compute the same losses and gradients."""

from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from loss_tables import objective, table

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]
COUNTS = torch.tensor([4, 1, 7, 3, 9, 2])
"""Tokens of three chosen responses and of three rejected ones."""
MASK = (torch.arange(9) < COUNTS[:, None]).long()
SINGLE = 1e-6
"""Relative error where TRL computes a part in float32."""


def token_logps() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (-3 * torch.rand(6, 9, generator=generator, dtype=torch.float64)).requires_grad_()


def ref_logps() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return -2 * COUNTS * (0.5 + torch.rand(6, generator=generator, dtype=torch.float64))


def head_sums(tokens) -> torch.Tensor:
    """Sums over as many first tokens as the shorter side of a pair has, [3, 2]."""
    shared = torch.minimum(*COUNTS.chunk(2))
    is_head = torch.arange(9) < shared[:, None]
    return torch.stack([(side * is_head).sum(1) for side in tokens.chunk(2)], 1)


def collisions() -> torch.Tensor:
    """log of sum p^2 for every token."""
    generator = torch.Generator().manual_seed(5)
    return -2 * torch.rand(6, 9, generator=generator, dtype=torch.float64)


def ref_tokens() -> torch.Tensor:
    """Reference log-probabilities whose sums are `ref_logps`, unequal over the tokens."""
    shares = torch.arange(1.0, 10.0, dtype=torch.float64) * MASK
    return ref_logps()[:, None] * shares / shares.sum(1, keepdim=True)


def ours(tokens, **loss) -> torch.Tensor:
    """Our loss of the same pairs: responses 0, 1, 2 are chosen over 3, 4, 5."""
    inputs = table(
        scores=(tokens * MASK).sum(1),
        heads=head_sums(tokens * MASK),
        ref_heads=head_sums(ref_tokens()),
        alignments=((tokens - collisions()) * MASK).sum(1) / COUNTS,
        ref_logps=ref_logps(),
        num_tokens=COUNTS,
        pairs=torch.tensor([[0, 3], [1, 4], [2, 5]]),
        margins=torch.zeros(3, dtype=torch.float64),
        pair_weights=torch.ones(3, dtype=torch.float64),
        ranks=torch.tensor([0, 0, 0, 1, 1, 1]),
        labels=torch.zeros(6, dtype=torch.float64),
        members=torch.tensor([[0, 3], [1, 4], [2, 5]]),
        set_weights=torch.ones(3, dtype=torch.float64),
    )
    return objective(**loss).loss(inputs)[0]


def trl_dpo(tokens, **loss) -> torch.Tensor:
    """`DPOTrainer._compute_loss`, with a model that is a table of token log-probabilities."""
    from trl import DPOConfig, DPOTrainer

    names = loss["loss_type"]
    zeros = torch.zeros_like(tokens)
    outputs = SimpleNamespace(
        log_probs=tokens * MASK,
        log_sum_sq_probs=collisions(),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=loss.get("discopop_tau", DPOConfig.discopop_tau)),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=loss.get("ld_alpha"),
        precompute_ref_logps=True,
        f_divergence_type=loss.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=loss.get("f_alpha_divergence_coef", 0.5),
        loss_types=[names] if isinstance(names, str) else names,
        loss_weights=loss.get("loss_weights", [1.0]),
        beta=loss["beta"],
        label_smoothing=loss.get("label_smoothing", 0.0),
        use_weighting=loss.get("use_weighting", False),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = torch.cat([torch.zeros(len(MASK), 1, dtype=MASK.dtype), MASK], 1)
    ref = ref_logps()
    if "ld_alpha" in loss:
        head = head_sums(ref_tokens()).T.flatten()
        ref = head + loss["ld_alpha"] * (ref - head)
    chosen, rejected = ref.to(tokens.dtype).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def assert_same(result: torch.Tensor, tokens, theirs: torch.Tensor, other, rel: float) -> None:
    """Losses and gradients of the tokens' log-probabilities."""
    assert float(result) == pytest.approx(float(theirs), rel=rel)
    result.backward()
    theirs.backward()
    expected = other.grad.double()
    assert torch.allclose(tokens.grad, expected, rtol=rel, atol=rel * float(expected.abs().max()))
    assert float(tokens.grad.abs().max()) > 0


MPO = ["sigmoid", "bco_pair", "sft"]
DIVERGING = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
DPO = [
    *({"loss_type": x} for x in ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm")),
    *({"loss_type": x} for x in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    {"loss_type": "discopop"},
    *({"loss_type": x, "label_smoothing": s} for x in ("aot", "aot_unpaired") for s in (0.0, 0.1)),
    {"loss_type": "aot", "ld_alpha": 0.3},
    {"loss_type": ["aot_unpaired", "sft"], "loss_weights": [1.0, 0.5]},
    {"loss_type": "discopop", "discopop_tau": 0.7},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": MPO, "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": MPO, "loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.3},
    *({"loss_type": x, "ld_alpha": 0.4} for x in ("sigmoid", "ipo", "apo_zero", "sigmoid_norm")),
    {"loss_type": "sigmoid", "ld_alpha": 0.0},
    *({"loss_type": x, "use_weighting": True} for x in ("sigmoid", "ipo", "apo_zero")),
    {"loss_type": ["ipo", "nca_pair"], "loss_weights": [1.0, 0.5], "use_weighting": True},
    *(
        {"loss_type": x, "f_divergence_type": f}
        | ({"label_smoothing": 0.01} if x == "exo_pair" else {})
        for x in DIVERGING
        for f in ("forward_kl", "js_divergence")
    ),
    *(
        {
            "loss_type": "sigmoid",
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": a,
        }
        for a in (0.5, 0.0, 2.0, 1.0)
    ),
]


def name_of(loss: dict) -> str:
    return " ".join(str(x) for x in loss.values())


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss", DPO, ids=name_of)
def test_dpo_trainer(loss, beta):
    single = loss["loss_type"] == "exo_pair"  # the logarithm of its label smoothing
    dtype = torch.float64
    if loss.get("f_divergence_type") == "alpha_divergence":  # in float64 TRL has no bound for it
        dtype, single = torch.float32, True
    tokens, other = token_logps(), token_logps().to(dtype).detach().requires_grad_()
    result = ours(tokens, beta=beta, **loss)
    theirs = trl_dpo(other, beta=beta, **loss)
    rel = 2e-5 if dtype is torch.float32 else SINGLE if single else 1e-11
    assert_same(result, tokens, theirs, other, rel)


@pytest.mark.parametrize(
    ("ours_has", "theirs_has"),
    [
        ({"loss_type": "sigmoid", "beta": 0.1}, {"loss_type": "sigmoid", "beta": 0.1001}),
        ({"loss_type": "robust", "beta": 0.1}, {"loss_type": "hinge", "beta": 0.1}),
        (
            {"loss_type": MPO, "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1},
            {"loss_type": MPO, "loss_weights": [0.8, 0.2, 1.001], "beta": 0.1},
        ),
    ],
    ids=["beta", "loss", "weights"],
)
def test_a_difference_is_found(ours_has, theirs_has):
    """So the comparison can fail. Also: TRL's `sigmoid` ignores label smoothing, ours does not."""
    tokens, other = token_logps(), token_logps()
    with pytest.raises(AssertionError):
        assert_same(ours(tokens, **ours_has), tokens, trl_dpo(other, **theirs_has), other, 1e-6)
    ignored = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2}
    assert float(trl_dpo(other, **ignored)) == float(trl_dpo(other, loss_type="sigmoid", beta=0.1))
    assert abs(float(ours(tokens, **ignored) - trl_dpo(other, **ignored))) > 1e-3


def sums_and_means(tokens):
    sums = (tokens * MASK).sum(1)
    return sums.chunk(2), (sums / COUNTS).chunk(2)


def nll(tokens) -> torch.Tensor:
    return -(tokens * MASK)[:3].sum() / COUNTS[:3].sum()


@pytest.mark.parametrize(
    ("trl_type", "loss"),
    [
        ("sigmoid", {"loss_type": "cpo", "beta": 0.1, "label_smoothing": 0.1}),
        ("sigmoid", {"loss_type": "cpo", "beta": 0.1, "cpo_alpha": 0.3}),
        ("hinge", {"loss_type": "hinge", "beta": 0.1, "reference": "none"}),
        ("ipo", {"loss_type": "ipo", "beta": 0.3, "reference": "none"}),
        ("sigmoid", {"loss_type": "sigmoid", "beta": 0.3, "reference": "none"}),
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "alpha": 0.25, "label_smoothing": 0.1}),
        ("simpo", {"loss_type": ["simpo", "sft"], "beta": 2.0, "simpo_gamma": 1.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_cpo_trainer(trl_type, loss):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type=trl_type,
        beta=loss["beta"],
        alpha=loss.get("alpha", 0.0),
        simpo_gamma=loss.get("simpo_gamma", 0.5),
        label_smoothing=loss.get("label_smoothing", 0.0),
    )
    tokens, other = token_logps(), token_logps()
    sums, means = sums_and_means(other)
    sides = means if trl_type in ("simpo", "ipo") else sums
    theirs = CPOTrainer.cpo_loss(trainer, *sides)[0].mean()
    alpha = {"cpo": loss.get("cpo_alpha", 1.0)}.get(str(loss["loss_type"]), 0.0)
    alpha = 1.0 if isinstance(loss["loss_type"], list) else alpha
    assert_same(ours(tokens, **loss), tokens, theirs + alpha * nll(other), other, 1e-11)


def test_orpo_trainer():
    """TRL computes the odds ratio in float32; its likelihood counts prompts, ours does not."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=0.1)
    tokens, other = token_logps(), token_logps()
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *sums_and_means(other)[1])
    theirs = nll(other) - losses.double().mean()
    assert_same(ours(tokens, loss_type="orpo", beta=0.1), tokens, theirs, other, 1e-6)
