"""Processes for the transfer tests, all gone at the end of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transfer_peers import Peer


@pytest.fixture(scope="module")
def tmp_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture
def lone_peers(tmp_path: Path) -> Iterator[list[Peer]]:
    """Two processes that share no world."""
    peers = [Peer(tmp_path / f"peer{i}.log") for i in range(2)]
    yield peers
    for peer in peers:
        peer.kill()
