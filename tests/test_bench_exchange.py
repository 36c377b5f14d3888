"""What an exchange of replicas costs: the model's arithmetic, the counters of bytes, and that the command measures both."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_packages import bench

import deeprelax_cuda as dr

exchange, model, wire = map(bench, ("exchange", "exchange_model", "wire"))
DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"

#: More than gloo says of itself in a message, in bytes; a ring all-reduce cuts each of its messages in two.
OF_A_MESSAGE = 300

counted = pytest.mark.skipif(wire.handed_to_tcp() is None, reason="the system does not tell what a socket has sent")


# ---- The model ----------------------------------------------------------------------------------------------------------


def test_a_time_is_that_of_messages_bytes_and_memory():
    cost = model.Cost(messages=3, sent=100.0, moved=1000.0)
    assert cost.seconds(model.Link(latency=2.0, bandwidth=50.0, memory=500.0)) == 3 * 2.0 + 2.0 + 2.0
    assert cost.seconds(model.Link(latency=2.0, bandwidth=50.0, memory=250.0)) == 3 * 2.0 + 2.0 + 4.0


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_both_send_two_of_each_slice_to_all_others(ranks):
    slice_ = 4 * 840
    parameters = ranks * 840
    call = 40 * (ranks - 1)
    assert model.all_reduce_cost(ranks, parameters).sent == pytest.approx(2 * (ranks - 1) * slice_, rel=1e-12)
    assert model.exchange_cost(ranks, parameters).sent == pytest.approx(2 * (ranks - 1) * slice_ + call, rel=1e-12)
    assert [cost(ranks, parameters).messages for cost in model.COSTS.values()] == [3 * (ranks - 1), 2 * (ranks - 1)]


def test_memory_of_two_ranks_with_ten_numbers():
    """In numbers read or written: 30 in and checked, 20 own slices, 15 + 10 to sum and divide, 15 repeated; 15 for the ring."""
    assert model.exchange_cost(2, 10).moved == 4 * 90
    assert model.all_reduce_cost(2, 10).moved == 4 * 15


def test_over_a_slow_link_a_step_costs_the_periodth_part():
    slow = model.Link(latency=0.0, bandwidth=1e6, memory=1e15)
    ddp, parle = (cost(4, 25_557_032).seconds(slow) for cost in (model.all_reduce_cost, model.exchange_cost))
    assert ddp / (parle / model.PERIOD) == pytest.approx(25.0, rel=1e-5)
    rows = model.predictions()
    assert len(rows) == 6
    assert all(1 < row["predicted_s_a_step"]["ddp"] / row["predicted_s_a_step"]["parle"] < 25 for row in rows)


def test_the_period_is_the_default_of_parle():
    assert inspect.signature(dr.Parle).parameters["inner_steps"].default == model.PERIOD


# ---- Bytes --------------------------------------------------------------------------------------------------------------


@counted
def test_what_is_handed_to_tcp_is_counted_and_nothing_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        there, _ = server.accept()
        with there:
            opened = len(os.listdir("/proc/self/fd"))
            before = wire.handed_to_tcp()
            client.sendall(b"x" * 12_345)
            there.sendall(b"y" * 55)
            there.recv(12_345, socket.MSG_WAITALL)
            client.recv(55, socket.MSG_WAITALL)
            assert wire.handed_to_tcp() - before == 12_400
            assert len(os.listdir("/proc/self/fd")) == opened


# ---- The command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """Returns what the command says, and what it keeps, for two ranks."""
    folder = tmp_path_factory.mktemp("exchange")
    command = [sys.executable, exchange.__file__, "--quick", "--sizes", "1023", "65536", "--out", "made/exchange.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "made" / "exchange.json").read_text())


@pytest.mark.slow
def test_the_command_keeps_a_row_for_all_that_it_measures(run):
    said, kept = run
    rows = kept["rows"]
    assert [(row["kind"], row["ranks"], row.get("elements")) for row in rows] == [
        ("link", 2, None),
        ("list", 2, 1023),
        ("list", 2, 65536),
        ("training", 2, 131_220),
    ]
    assert set(kept) >= {"date", "versions", "platform", "settings", "assumed_links", "predicted_not_measured"}
    assert all(figure > 0 for figure in rows[0]["link"].values())
    for row in rows[1:3]:
        link = model.Link(**rows[0]["link"])
        for kind, cost in model.COSTS.items():
            of_kind = row[kind]
            assert of_kind["predicted_s"] == pytest.approx(cost(2, row["elements"]).seconds(link), rel=1e-12)
            assert of_kind["measured_over_predicted"] == pytest.approx(of_kind["median_s"] / of_kind["predicted_s"], rel=1e-12)
            low, middle, high = of_kind["quartiles_s"]
            assert 0 < low <= middle == of_kind["median_s"] <= high
        parts = row["parts_median_s"]
        assert set(parts) == {"roll call", "all-to-all", "all-gather", "copies and sum"}
        assert all(0 < seconds < row["exchange"]["quartiles_s"][2] for seconds in parts.values())
        assert row["rounds"] >= 5
    assert said.splitlines()[1].startswith("2 ranks: ")
    assert [exchange.line(row) in said for row in rows] == [True] * 4


@pytest.mark.slow
@counted
def test_ranks_send_as_many_bytes_as_is_predicted(run):
    """But for what gloo says of itself."""
    _, kept = run
    for row in kept["rows"][1:3]:
        for kind, cost in model.COSTS.items():
            predicted, measured = row[kind]["predicted_bytes"], row[kind]["bytes"]["tcp"]
            assert predicted == cost(2, row["elements"]).sent
            assert predicted < measured < predicted + OF_A_MESSAGE * cost(2, row["elements"]).messages
    training = kept["rows"][3]
    for name in ("parle", "ddp"):
        assert training[name]["bytes"]["tcp"] == pytest.approx(training[name]["predicted_bytes"], rel=0.01)
    assert training["ddp_bytes_over_parle"]["tcp"] == pytest.approx(model.PERIOD, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not wire.LOOPBACK.exists(), reason="the system does not tell what goes over the loopback")
def test_the_loopback_is_read(run):
    """How much is on it depends on what other programs send."""
    _, kept = run
    assert all(isinstance(kept["rows"][1][kind]["bytes"]["loopback"], float) for kind in model.COSTS)


def test_where_bytes_are_not_told_the_table_says_so():
    part = {"median_s": 2e-3, "measured_over_predicted": 2.0, "predicted_bytes": 8.0, "bytes": {"tcp": 10.0, "loopback": None}}
    both = {"exchange": part, "all_reduce": part}
    row = {"kind": "list", "parameters": "2", **both, "exchange_over_all_reduce": 1.0}
    assert exchange.line(row).split() == ["2", "2.00", "2.00", "2.00", "2.00", "1.00", "0.000", "1.250", "?", "1.250", "?"]


@pytest.mark.parametrize("options", [["--ranks", "2", "1"], ["--sizes", "0"]], ids=" ".join)
def test_bad_numbers_are_refused_by_the_option(options, capsys):
    with pytest.raises(SystemExit):
        exchange.parse(options)
    least = {"--ranks": 2, "--sizes": 1}[options[0]]
    assert f"{options[0]}: expected numbers of at least {least}, got {options[-1]}\n" in capsys.readouterr().err


def test_what_is_measured():
    assert exchange.parse([]).ranks == [2, 3, 4]
    assert exchange.parse(["--quick"]).ranks == [2]
    plan = exchange.make_plan(None, quick=False)
    assert [name for name, _ in plan.lists][::8] == ["1,024", "ResNet-50"]
    assert [exchange.elements(shapes) for _, shapes in plan.lists] == [*(4**k for k in range(5, 13)), 25_557_032]


# ---- What is written ----------------------------------------------------------------------------------------------------


def test_the_predicted_table_of_the_docs_is_the_model_s():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for row in model.predictions():
        ddp, parle = (1e3 * row["predicted_s_a_step"][name] for name in ("ddp", "parle"))
        assert f"| {row['link']} | {row['ranks']} | {ddp:.2f} | {parle:.2f} | {ddp / parle:.1f} |" in lines


def test_the_bytes_of_the_docs_are_the_model_s():
    found = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    million = 10**6
    assert [int(ranks) for ranks, _, _ in found] == [2, 3, 4, 8]
    for ranks, ddp, parle in found:
        sent = model.all_reduce_cost(int(ranks), million).sent / million
        assert (ddp, parle) == (f"{sent:.2f}", f"{sent / model.PERIOD:.3f}")
