"""Attention over ranks that share a row equals attention over the whole row, in float64."""

import itertools
import json
from functools import partial

import pytest
from processes import on_ranks
from runs import TIMEOUT_S
from transports import main

COMMS = ["all_gather", "needed_rows", "all_to_all"]
SIZES = [2, 3]
SEEDS = range(8)
WINDOWS = [1, 4, 7, 200]


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory) -> list[dict]:
    """Each transport with two backends on random forests, from every rank."""
    kinds = itertools.product(COMMS, ["dense", "path"], SEEDS)
    cases = [{"comm": comm, "backend": backend, "seed": seed} for comm, backend, seed in kinds]
    windowed = zip(itertools.product(COMMS, range(4)), itertools.cycle(WINDOWS), strict=False)
    cases += [
        {"comm": comm, "backend": "path", "seed": seed, "window": window, "softcap": cap}
        for ((comm, seed), window), cap in itertools.product(windowed, [None, 1.5])
    ]
    folder = tmp_path_factory.mktemp("transports")
    output = folder / "results.json"
    on_ranks(request.param, partial(main, cases, str(output)), folder, TIMEOUT_S)
    measured = json.loads(output.read_text())
    assert len(measured) == request.param * len(cases)
    return measured


@pytest.mark.parametrize("comm", COMMS)
def test_every_transport_is_exact(results, comm):
    worst = max(x["error"] for x in results if x["comm"] == comm)
    assert worst <= 1e-12, worst


@pytest.mark.parametrize("comm", COMMS)
def test_bytes_are_those_predicted(results, comm):
    """`dense` keeps its own copies and gathers no keys again."""
    exchanges = [x for x in results if x["comm"] == comm and x["backend"] == "path"]
    assert [x["sent"] for x in exchanges] == [x["predicted"] for x in exchanges]
    assert any(x["sent"] for x in exchanges)


def test_needed_rows_sends_less_than_everything(results):
    sent = {comm: sum(x["sent"] for x in results if x["comm"] == comm) for comm in COMMS}
    assert sent["needed_rows"] < sent["all_gather"]


def test_needed_rows_sends_only_what_a_window_shows(results):
    sent = {
        (x["seed"], x["rank"], x.get("window")): x["sent"]
        for x in results
        if x["comm"] == "needed_rows" and x["backend"] == "path"
    }
    narrow = {key: bytes_ for key, bytes_ in sent.items() if key[2] in (1, 4, 7)}
    whole = {key: sent[(*key[:2], None)] for key in narrow}
    assert all(narrow[key] <= whole[key] for key in narrow)
    assert sum(narrow.values()) < 0.7 * sum(whole.values())
    alone = [bytes_ for key, bytes_ in narrow.items() if key[2] == 1]
    assert alone and not any(alone), "a token that sees itself alone needs no other rank"


def test_some_ranks_own_scattered_tokens(results):
    assert not all(x["is_contiguous"] for x in results if x["comm"] != "all_to_all")


def test_sums_run_over_all_ranks_and_gradients_do_not(results):
    for x in results:
        total, expected, gradient = x["tokens"]
        assert total == expected and gradient == 1.0
