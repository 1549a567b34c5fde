"""How a compiled backward pass hides what ranks exchange in it: options of torch.compile, by how they do that.

A gradient is sent, or a sum of it starts, as soon as it is there; sums are waited for last of all. A convolution's
gradients come the weights' first: those travel beside what computes the images'. As torch has them, they would come
together.
"""

from operator import getitem
from typing import Any, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from . import sharded  # noqa: F401  # which defines the operator `send`

BACKWARD = torch.ops.aten.convolution_backward.default


class Early(CustomGraphPass):
    """Computes what is sent as early as can be, and has it sent then. (With sums torch has passes that do so.)"""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=BACKWARD):
            _weights_first(graph, node)
        sends = graph.find_nodes(op="call_function", target=torch.ops.netdyno.send.default)
        for send in reversed(sends):  # what is small, the last one, comes behind those that need the same
            _move_up(graph, send)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _weights_first(graph: Graph, node: Node) -> None:
    """Makes two of a `convolution_backward` that gives gradients of weights and of images."""
    *given, mask = cast(tuple[Any, ...], node.args)
    if mask[:2] != [True, True]:
        return
    weights, images = (_part(graph, node, (*given, asked)) for asked in ([False, *mask[1:]], [True, False, False]))
    for user in list(node.users):
        assert user.target is getitem
        user.update_arg(0, images if user.args[1] == 0 else weights)
    graph.erase_node(node)


def _part(graph: Graph, node: Node, args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        part = graph.call_function(BACKWARD, args)
    values = [value if asked else None for value, asked in zip(node.meta["val"], args[-1], strict=True)]
    part.meta = node.meta | {"val": values}
    return part


def _move_up(graph: Graph, send: Node) -> None:
    """To where all is there that it needs, with what is computed for it alone, or besides is given in the end."""
    nodes = list(graph.nodes)
    block, kept = {send}, {node for node in nodes if node.op == "output"}
    for node in reversed(nodes):
        if node.op == "call_function" and node.users.keys() & block and node.users.keys() <= block | kept:
            block.add(node)
    places = {node: place for place, node in enumerate(nodes)}
    given = {needed for node in block for needed in node.all_input_nodes} - block
    last = max(given | {node for node in nodes if node.op == "placeholder"}, key=places.__getitem__)
    for node in (node for node in nodes if node in block):
        last.append(node)
        last = node


SENDING: dict[str, Any] = {
    "post_grad_custom_pre_pass": Early(),
    "reorder_for_peak_memory": False,  # which may put the images' gradient first again
}
SUMS = SENDING | {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
