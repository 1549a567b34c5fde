"""How a compiled backward pass hides the sums over ranks that are in it: options of torch.compile.

A sum starts as soon as its gradient is there and is waited for last of all. A convolution's gradients come the weights'
first: the sum of those goes on beside what computes the images'. As torch has them, they would come together.
"""

from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

BACKWARD = torch.ops.aten.convolution_backward.default


class WeightsFirst(CustomGraphPass):
    """Makes two of each `convolution_backward` that gives gradients of weights and of images."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=BACKWARD):
            *given, mask = node.args
            if mask[:2] == [True, True]:
                weights, images = (
                    self._part(graph, node, (*given, part)) for part in ([False, *mask[1:]], [True, False, False])
                )
                for user in list(node.users):
                    assert user.target is getitem
                    user.update_arg(0, images if user.args[1] == 0 else weights)
                graph.erase_node(node)

    @staticmethod
    def _part(graph: Graph, node: Node, args: tuple[Any, ...]) -> Node:
        with graph.inserting_before(node):
            part = graph.call_function(BACKWARD, args)
        part.meta = node.meta | {
            "val": [value if asked else None for value, asked in zip(node.meta["val"], args[-1], strict=True)]
        }
        return part

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


OVERLAP: dict[str, Any] = {
    "post_grad_custom_pre_pass": WeightsFirst(),
    "reorder_for_peak_memory": False,  # which may put the images' gradient first again
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
