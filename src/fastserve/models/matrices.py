"""Which of a model's matrices may become whole numbers when it is written in another format."""

from __future__ import annotations

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import Matrices
from fastserve.graph.node import Embedding, Linear, MixtureOfExperts
from fastserve.models.family import arrange_tensors, build_graph, build_source_encoder, read_config


def find_matrices(checkpoint: Checkpoint) -> Matrices:
    """Those of the model's graph.

    Raises:
        CheckpointError, UnsupportedError: the model is none that we have.
    """
    config = read_config(checkpoint.config)
    arranged = arrange_tensors(config, checkpoint.tensors)
    graph = build_graph(config, arranged.keys())
    if (encoder := build_source_encoder(config, arranged.keys())) is not None:
        graph = graph.beside(encoder)
    embeddings = [node for node in graph.nodes if isinstance(node, Embedding)]
    tables = {node.weight for node in embeddings if node.ids == "token_ids"}
    multiplied = [node for node in graph.nodes if isinstance(node, Linear)]
    tables |= {head.weight} if (head := graph.head()) is not None else set()
    linears = {name for node in multiplied if node.weight not in tables for name in node.weight.names}
    turned: set[str] = set()
    if arranged is not checkpoint.tensors:  # what is in another order is no matrix of outputs by inputs
        turned = {name for name in linears if arranged[name] is not checkpoint.tensors.get(name)}
    mixtures = [node for node in graph.nodes if isinstance(node, MixtureOfExperts)]
    experts = [weight for node in mixtures for weight in (*node.gates, *node.ups, *node.downs)]
    return Matrices(
        linears=frozenset(linears - turned),
        tables=frozenset(name for weight in tables for name in weight.names),
        experts=frozenset(name for weight in experts for name in weight.names),
        rearranged=frozenset(turned),
    )
