"""Run a script on a CUDA card that is none: `python tests/emulated_card.py s2pg_sac.py --seed 1`.

A tensor "on the card" is of a class of its own, around one on the CPU that does the arithmetic. So
a run comes to just what it comes to on the CPU, if it goes to its end: an operation on tensors of
both places is refused, as a card refuses it, and so is what a graph cannot capture (recording.py).
What the host does for the card is counted, by the innermost function of the script that does it:
waits for it, copies to it, and launches, of operations and of graphs. COUNTS=FILE in the
environment keeps these counts, as JSON. Neither speed is emulated, nor that host and card work at
the same time.
"""

import collections
import json
import os
import runpy
import sys
from unittest import mock

import torch
from recording import Recording, emulated_cuda
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")  # for autograd, which has to know the device
CARD = torch.device("card", 0)  # the script calls it cuda:0
COUNTS = {kind: collections.Counter() for kind in ("waits", "copies", "launches")}


def count(kind):
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_code.co_filename == sys.argv[0] and name != "to_device":
            break
        frame = frame.f_back
    else:
        name = "backward"  # which has a thread of its own
    if name == "__call__":
        function = frame.f_locals["self"].function
        name = f"replay of {getattr(function, 'func', function).__name__}"
    COUNTS[kind][name] += 1


class Graph(Recording):
    """Whatever is in it, a replay is one launch (and on CUDA two more if it has random numbers)."""

    within = False

    def __enter__(self):
        Graph.within = True
        return super().__enter__()

    def __exit__(self, *error):
        Graph.within = False
        return super().__exit__(*error)

    def replay(self):
        count("launches")
        Graph.within = True
        with torch._C.DisableTorchFunction():
            super().replay()
        Graph.within = False


class OnCard(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=CARD,
        )  # fmt: skip

    def __init__(self, host):
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # checkpoints are loaded to the CPU in any case
        return self.host.__reduce_ex__(protocol)


def on_host(x):
    return x.host if isinstance(x, OnCard) else x


def refuse_mixed(function, operands):
    """RuntimeError where one is on the card and one is not, unless it is a single number."""
    on_card = [isinstance(x, OnCard) for x in operands]
    if any(on_card) and any(x.dim() > 0 for x, there in zip(operands, on_card) if not there):
        raise RuntimeError(f"{function}: tensors on the card and on the CPU")


def dispatch(function, args, kwargs):
    """Do an operation on the CPU; its results are on the card if they would be."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    from_card = to_card = any(isinstance(x, OnCard) for x in operands)
    name = function.overloadpacket.__name__
    if name == "copy_":
        to_card = isinstance(operands[0], OnCard)
    elif kwargs.get("device") is not None:
        to_card = kwargs["device"].type == CARD.type
        kwargs = kwargs | dict(device=torch.device("cpu"))
    copies = name in ("copy_", "_to_copy")
    if not copies:
        refuse_mixed(function, operands)
    masked = name.startswith("index") and any(x.dtype == torch.bool for x in operands[1:])
    if from_card and (not to_card or masked or name == "_local_scalar_dense"):
        count("waits")
    elif copies and to_card and not isinstance(operands[-1], OnCard):
        count("copies")
    elif to_card and not function.is_view and not name.startswith("empty") and not Graph.within:
        count("launches")

    result = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    known = {id(on_host(x)): x for x in operands}  # what was changed in place stays the same object

    def placed(x):
        if isinstance(x, torch.Tensor) and id(x) not in known:
            return OnCard(x) if to_card else x
        return known.get(id(x), x)

    return tree_map(placed, result)


class Dispatch(TorchDispatchMode):
    """Sees what has no operand on the card: new tensors, and copies to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Recurrent(torch.autograd.Function):
    """A cell or a layer, for which a card has kernels of its own, by those of the CPU."""

    @staticmethod
    def forward(ctx, function, structure, *leaves):
        with torch.enable_grad():
            ctx.leaves = [
                on_host(x).detach().requires_grad_() if torch.is_tensor(x) else x for x in leaves
            ]
            out = function(*tree_unflatten(ctx.leaves, structure))
        ctx.out = out if isinstance(out, tuple) else (out,)
        result = tuple(OnCard(x.detach()) for x in ctx.out)
        return result if isinstance(out, tuple) else result[0]

    @staticmethod
    def backward(ctx, *grads):
        tensors = [x for x in ctx.leaves if torch.is_tensor(x)]
        found = iter(torch.autograd.grad(ctx.out, tensors, [on_host(g) for g in grads]))
        grads = (OnCard(next(found)) if torch.is_tensor(x) else None for x in ctx.leaves)
        return None, None, *grads


class Names(TorchFunctionMode):
    """The card is called cuda:0 by the script, in what it asks for and in what it is told."""

    recurrent = "gru_cell", "lstm_cell", "rnn_tanh_cell", "gru", "lstm", "rnn_tanh"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, structure = tree_flatten(args)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_card = any(isinstance(x, OnCard) for x in tensors)
        if function is torch.Tensor.numpy and on_card:
            raise TypeError("a tensor on the card is no array")
        if function is torch.Tensor.tolist and on_card:
            args = (args[0].cpu(),)
        if getattr(function, "__name__", "") in self.recurrent and on_card:
            refuse_mixed(function, tensors)
            return Recurrent.apply(function, structure, *leaves)

        def cuda(x):
            return isinstance(x, torch.device | str) and str(x).startswith("cuda")

        if any(map(cuda, leaves)):
            args = tree_map(lambda x: CARD if cuda(x) else x, args)
        kwargs = {name: CARD if cuda(x) else x for name, x in kwargs.items()}
        if function is torch.tensor and kwargs.get("device") == CARD:
            grad = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs | dict(device="cpu")).to(CARD).requires_grad_(grad)
        result = function(*args, **kwargs)
        if isinstance(result, torch.device) and result.type == CARD.type:
            return torch.device("cuda", 0)
        return result


def main():
    """The script that is named first, with the options behind it."""
    cuda = emulated_cuda(Graph) | dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        _lazy_init=lambda: None, manual_seed_all=lambda seed: None,
        # there is one generator, that of the CPU
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
    )  # fmt: skip
    sys.argv = [os.path.abspath(sys.argv[1]), *sys.argv[2:]]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    with mock.patch.multiple(torch.cuda, **cuda), Names(), Dispatch():
        runpy.run_path(sys.argv[0], run_name="__main__")
    if "COUNTS" in os.environ:
        with open(os.environ["COUNTS"], "w") as file:
            json.dump(COUNTS, file)


if __name__ == "__main__":
    main()
