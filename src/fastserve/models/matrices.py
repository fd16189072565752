"""Which of a model's matrices may become whole numbers when it is written in another format."""

from __future__ import annotations

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import Matrices
from fastserve.graph.node import Embedding, Linear
from fastserve.models.family import build_graph, read_config


def find_matrices(checkpoint: Checkpoint) -> Matrices:
    """Those of the model's graph.

    Raises:
        CheckpointError, UnsupportedError: the model is none that we have.
    """
    graph = build_graph(read_config(checkpoint.config), checkpoint.tensors.keys())
    embeddings = [node for node in graph.nodes if isinstance(node, Embedding)]
    tables = {node.weight for node in embeddings if node.ids == "token_ids"}
    multiplied = [node for node in graph.nodes if isinstance(node, Linear)]
    tables |= {node.weight for node in multiplied if node.out == graph.outputs.get("logits")}
    linears = {node.weight for node in multiplied} - tables
    return Matrices(
        linears=frozenset(name for weight in linears for name in weight.names),
        tables=frozenset(name for weight in tables for name in weight.names),
    )
