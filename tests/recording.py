"""CUDA graphs on the CPU: what is recorded, and repeated in the same memory without the Python."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: records what runs under it, and repeats it."""

    # a number for the host, a shape that depends on values, a tensor of numbers of the host
    waiting = "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy"

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        index = tree_leaves(args[1]) if name.startswith("index") else []
        masks = [i for i in index if torch.is_tensor(i) and i.dtype == torch.bool]
        if name in self.waiting or masks:
            raise RuntimeError(f"{function} waits for the device, which a capture does not allow")
        result = function(*args, **(kwargs or {}))
        # what was in place, or is a view, has nothing to be copied
        aliases = any(value.alias_info for value in function._schema.returns)
        self.calls.append((function, args, kwargs or {}, [] if aliases else tree_leaves(result)))
        return result

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # a capture on CUDA runs nothing, this one did
            return
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                fresh = function(*args, **kwargs)
                for old, new in zip(results, tree_leaves(fresh)):
                    if torch.is_tensor(old):
                        old.copy_(new)


def emulated_cuda(graph):
    """What `torch.cuda` has for graphs, where `graph()` is one that is none."""
    return dict(
        CUDAGraph=graph, graph=lambda recording: recording, synchronize=lambda: None,
        Stream=object, stream=lambda stream: contextlib.nullcontext(),
    )  # fmt: skip
