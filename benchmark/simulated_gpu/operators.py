"""Torch's operators on the simulated GPU: the CPU's, on the same memory, run when their stream gets to them."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

OWN = {
    "_nested_compute_contiguous_strides_offsets",
    "_nested_view_from_buffer",
    "as_strided",
    "empty",
    "empty_strided",
    "is_set_to",
    "record_stream",
    "resize_",
    "set_",
    "unfold",
    "view",
    "view_as_complex",
    "view_as_real",
}
"""Operators that only handle memory and views: torch's own work here too."""
WAITING = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim"}
"""Operators whose caller needs a result that the GPU computes."""

_runtime = ctypes.CDLL(None)
_queued: dict[int, Callable[[], None]] = {}
_recorded: dict[int, Callable[[], None]] = {}
"""What CUDA graphs run, as often as they are launched. Kept until the process ends."""
_numbers = itertools.count(1)
_being_copied: list[tuple[torch.cuda.Event, torch.Tensor]] = []


def use_cpu_operators() -> torch.library.Library:
    """Put the CPU's operators in the place of the GPU's, for as long as the returned object lives."""
    # Streams and the threads that queue work take turns; by default each would have to wait for 5 ms.
    sys.setswitchinterval(1e-4)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            namespace, _, operator = name.partition("::")
            packet, _, overload = operator.partition(".")
            if namespace == "aten" and packet not in OWN:
                run = getattr(getattr(torch.ops.aten, packet), overload or "default")
                call = run_now if packet in WAITING else run_in_order
                library.impl(operator, partial(call, run), "CUDA", allow_override=True)
        library.impl("copy_", copy_, "CUDA", allow_override=True)
        # Otherwise it would pick a library for GPUs.
        library.impl("convolution", partial(run_in_order, torch.ops.aten.convolution.default), "CUDA")
    return library


def run_now(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Wait for the current stream, then run; what is new lies on the GPU."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{operator} waits for the GPU, and a graph is being captured")
    check_waiting()
    synchronize()
    call = Call("cpu", [])
    result = operator(*tree_map(call.enter, args), **tree_map(call.enter, kwargs))

    def leave(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if (tensor := call.entered_as(value)) is None:
            return to_gpu(value)
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
            on_cpu(tensor).copy_(value)
        return tensor

    return tree_map(leave, result)


def run_in_order(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Queue the operator on the current stream; if its results cannot be foretold, wait for it."""
    if any(isinstance(arg, (list, tuple)) and any(map(_picks_by_truth, arg)) for arg in args):
        return run_now(operator, *args, **kwargs)
    foretold = Call("meta", [])
    try:
        shapes = operator(*tree_map(foretold.enter, args), **tree_map(foretold.enter, kwargs))
    except RuntimeError:  # Also where the call is wrong: it fails once more then, and says why.
        return _run_after_all(operator, args, kwargs)
    leaves, structure = tree_flatten(shapes)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return _run_after_all(operator, args, kwargs)
    for meta, tensor in foretold.entered:
        if meta.shape != tensor.shape:
            tensor.resize_(meta.shape)
    results = [foretold.entered_as(leaf) for leaf in leaves]
    made = [_empty_like(leaf) if tensor is None else tensor for leaf, tensor in zip(leaves, results, strict=True)]
    new = [(index, on_cpu(made[index])) for index, tensor in enumerate(results) if tensor is None]
    call = Call("cpu", [])
    here, named = tree_map(call.enter, args), tree_map(call.enter, kwargs)

    def work() -> None:
        computed, _ = tree_flatten(operator(*here, **named))
        for index, memory in new:
            memory.copy_(computed[index])

    enqueue(work)
    return tree_unflatten(made, structure)


def _run_after_all(operator: Any, args: Any, kwargs: Any) -> Any:
    """Only the simulation has to wait here, so torch's check must not complain."""
    mode = torch.cuda.get_sync_debug_mode()
    torch._C._cuda_set_sync_debug_mode(0)
    try:
        return run_now(operator, *args, **kwargs)
    finally:
        torch._C._cuda_set_sync_debug_mode(mode)


class Call(NamedTuple):
    """Arguments of an operator, on their way to another device."""

    device: str
    entered: list[tuple[torch.Tensor, torch.Tensor]]
    """Tensors there, and those of the GPU that they stand for."""

    def enter(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._enter(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device(self.device)
        if isinstance(value, torch.Generator):
            return _next_of(value) if self.device == "cpu" else None
        return value

    def _enter(self, tensor: torch.Tensor) -> torch.Tensor:
        for there, entered in self.entered:
            if entered is tensor:
                return there
        if not tensor.is_cuda:
            # A kernel gets the value that a scalar has at the launch.
            return tensor.clone() if self.device == "cpu" else tensor
        there = on_cpu(tensor) if self.device == "cpu" else _on_meta(tensor)
        self.entered.append((there, tensor))
        return there

    def entered_as(self, result: torch.Tensor) -> torch.Tensor | None:
        """The tensor of the GPU that a result stands for; None if it is new."""
        for there, tensor in self.entered:
            if there is result:
                return tensor
        return None


def _next_of(generator: torch.Generator) -> torch.Generator:
    """The same numbers for the same seed and the same number of draws."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed(generator.initial_seed() + offset)


def _picks_by_truth(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Like torch's: the runtime copies where layouts are equal, and a non-blocking copy does not wait."""
    if target.numel() == 0:
        return target
    across = target.device.type != source.device.type
    if across and not non_blocking:
        check_waiting()
    alike = target.dtype == source.dtype and target.shape == source.shape
    if alike and target.is_contiguous() and source.is_contiguous():
        addresses = [ctypes.c_void_p(side.data_ptr()) for side in (target, source)]
        size = ctypes.c_size_t(target.numel() * target.element_size())
        _runtime.cudaMemcpyAsync(*addresses, size, ctypes.c_int(4), _stream())
        if across and non_blocking:
            _keep(target if source.is_cuda else source)
        elif across:
            synchronize()
    elif across:
        synchronize()
        on_cpu(target).copy_(on_cpu(source))
    else:
        enqueue(partial(on_cpu(target).copy_, on_cpu(source)))
    return target


def _keep(pinned: torch.Tensor) -> None:
    """Keep the memory until the copy has ended, as torch's allocator of pinned memory does."""
    if torch.cuda.is_current_stream_capturing():
        return
    _being_copied[:] = [(event, tensor) for event, tensor in _being_copied if not event.query()]
    _being_copied.append((torch.cuda.current_stream().record_event(), pinned))


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor, which does not keep it: torch may hand it out again, as on a GPU."""
    if not tensor.is_cuda:
        return tensor
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * _extent(tensor)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _extent(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the GPU laid out like `tensor`, but without overlapping elements."""
    if 0 in tensor.stride():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    made = _empty_like(tensor)
    on_cpu(made).copy_(tensor)
    return made


def check_waiting() -> None:
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError("called a synchronizing CUDA operation")


def enqueue(work: Callable[[], Any]) -> None:
    """Have the current stream run `work`."""
    number = next(_numbers)
    (_recorded if torch.cuda.is_current_stream_capturing() else _queued)[number] = work
    _runtime.cudaLaunchHostFunc(_stream(), _run_queued, ctypes.c_void_p(number))


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run_queued(number: int) -> None:
    try:
        with torch.inference_mode():
            (_recorded.get(number) or _queued.pop(number))()
    except BaseException:  # noqa: BLE001  An error on a GPU ends its process, too.
        traceback.print_exc()
        os.abort()


def synchronize() -> None:
    _runtime.cudaStreamSynchronize(_stream())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
