"""What is compared with what, by layer."""

from __future__ import annotations

from dataclasses import dataclass

import cell_peers
import sequence_peers
from cases import Peer


@dataclass(frozen=True)
class Layer:
    """`peers` of a layer, of which the key `replaced` is what rnn_ext's takes the place of; `file` has the results."""

    peers: dict[str, Peer]
    replaced: str
    file: str


LAYERS = {
    "cell": Layer(cell_peers.PEERS, "rnn_cell", "bench.json"),
    "sequence": Layer(sequence_peers.PEERS, "rnn", "sequence.json"),
}
