"""Gloo: where it meets other nodes, and processes that end while its threads still hold tensors."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from m4train.training.engines import processes

PROGRAM = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from m4train.training.engines.processes import Processes

processes = Processes(timedelta(minutes=1))
group = dist.group.WORLD  # as device meshes and sharded parameters do
received, sent = [[torch.zeros(3) for _ in range(1000)] for _ in range(2)]
dist.all_gather_coalesced([received], sent, async_op=True)  # gloo's thread is the last to let go of 2,000 tensors
if sys.argv[1] == "orderly":
    processes.shutdown()
sys.exit(7)
"""


@pytest.mark.parametrize("way", ["orderly", "at once"])
def test_gloo_does_not_abort_a_process_that_ends(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 7, done.stderr


TWO_NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first"}
LOOPBACK, OUTER = "127.0.1.1", "10.1.2.3"


@pytest.mark.parametrize(
    ("environment", "own", "ways", "expected"),
    [
        (TWO_NODES, LOOPBACK, {"first": OUTER}, "ib0"),
        (TWO_NODES, LOOPBACK, {"first": LOOPBACK, processes._ELSEWHERE: OUTER}, "ib0"),  # the first node itself
        (TWO_NODES, OUTER, {"first": OUTER}, None),
        ({**TWO_NODES, "LOCAL_WORLD_SIZE": "4"}, LOOPBACK, {"first": OUTER}, None),
        ({**TWO_NODES, "GLOO_SOCKET_IFNAME": "eth1"}, LOOPBACK, {"first": OUTER}, "eth1"),
    ],
)
def test_ranks_of_other_nodes_are_not_sent_to_a_loopback(monkeypatch, environment, own, ways, expected) -> None:
    found = led_out(monkeypatch, environment, own, ways)
    assert found.get("GLOO_SOCKET_IFNAME") == expected


def test_a_node_that_none_can_reach_says_so(monkeypatch, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert "GLOO_SOCKET_IFNAME" not in led_out(monkeypatch, TWO_NODES, LOOPBACK, {"first": LOOPBACK})
    assert f"{socket.gethostname()}, stands for {LOOPBACK}" in caplog.text


def led_out(monkeypatch, environment, own, ways):
    """The environment after gloo was led out on a node whose name stands for `own`; `ways`: host -> its address there."""
    held = {"lo": [SimpleNamespace(address=LOOPBACK)], "ib0": [SimpleNamespace(address=OUTER)]}
    environment = dict(environment)
    monkeypatch.setattr(processes.os, "environ", environment)
    monkeypatch.setattr(processes, "_own_address", lambda: own)
    monkeypatch.setattr(processes, "_address_towards", ways.get)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: held)
    processes._lead_gloo_out()
    return environment


def test_the_address_towards_a_host_is_one_of_this_machine_s() -> None:
    assert processes._address_towards("127.0.0.1") == "127.0.0.1"
    assert processes._address_towards("no.such.host.invalid") is None
