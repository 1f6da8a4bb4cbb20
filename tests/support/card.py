"""A card in pure Python: a kind of device of which nothing mixes with the host's.

Its tensors are ordinary ones of torch's PrivateUse1 backend, and their storages are memory that no tensor of the host
shares. An operation on them runs the processor's kernel over that memory: what this card computes is what the processor
computes, to the bit. It refuses what a card refuses: an operation on tensors of both sides, and more memory than it
has. Its streams order nothing, its random numbers are its own, and it counts what is allocated.

`install` makes it the accelerator of a process, once and for good, and has accelerate take it as it takes CUDA.
"""

import contextlib
import functools
import os
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import backend_registration

NAME, CARD = "card", "card:0"
FOR_TRAINERS = "ACCELERATE_TORCH_DEVICE"  # where transformers and accelerate look when they have not found CUDA
COMPUTE_DTYPE = "bfloat16"
GIB = 1024**3
BLOCK_BYTES = 512  # of CUDA's caching allocator, to which sizes are rounded up
TAKES_HOST_INDICES = {f"aten::{name}" for name in ("index", "_unsafe_index", "index_put_", "_index_put_impl_")}
VIEWS = ("as_strided", "view", "_reshape_alias", "unfold")
COMPOSITES = ("ImplicitAutograd", "ExplicitAutograd", "ExplicitAutogradNonFunctional")
IN_16_BITS = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_dot_product_attention")  # by autocast
aten = torch.ops.aten
on_cpu = torch._C.DispatchKey.CPU


class Memory:
    """What the card holds, by the address of its storages; and the figures that an allocator gives."""

    def __init__(self) -> None:
        self.total = 64 * GIB  # more than any test takes
        self.allocated = self.peak = self.largest = 0
        self.has_error = False  # of a call that the runtime refused: it tells the next kernel
        self.held: dict[int, torch.Tensor] = {}

    def take(self, tensor: torch.Tensor) -> torch.UntypedStorage:
        """The memory of a host tensor that nobody else uses, as a storage of the card."""
        source = tensor.untyped_storage()
        address = source.data_ptr()
        storage = torch._C._construct_storage_from_data_pointer(address, torch.device(NAME, 0), source.nbytes())
        if address:
            size = self.claim(source.nbytes())
            self.held[address] = tensor
            weakref.finalize(storage, self._give_back, address, size)
        return storage

    def claim(self, nbytes: int) -> int:
        """Raises torch.OutOfMemoryError where there is not as much."""
        size = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        self.largest = max(self.largest, size)
        if self.allocated + size > self.total:
            raise torch.OutOfMemoryError(f"card out of memory. Tried to allocate {size} bytes of {self.total}")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        return size

    def _give_back(self, address: int, size: int) -> None:
        del self.held[address]
        self.allocated -= size


memory = Memory()
generator = torch.Generator()  # the card's random numbers


def is_on_card(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, sizes and strides as a tensor of the processor."""
    address = tensor.untyped_storage().data_ptr()
    if not address:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    source = memory.held[address].untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(source, tensor.storage_offset(), tensor.shape, tensor.stride())


def in_storage(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the card with the sizes and strides of `like`."""
    return put_storage(torch._C._acc.create_empty_tensor([0], like.dtype), storage, like)


def put_storage(tensor: torch.Tensor, storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    where = (like.storage_offset(), like.shape, like.stride())
    return aten.set_.source_Storage_storage_offset._op_dk(on_cpu, tensor, storage, *where)


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """`op` by the processor's kernel, over the card's memory."""
    if memory.has_error:
        report_error(op)
    given: list[Any] = []
    _each(given.append, [*args, *kwargs.values()])
    refuse_mixture(op, given)
    sources = [(host(value), value) for value in given if is_on_card(value)]
    views = {id(tensor): view for view, tensor in sources}

    def plain(value: Any) -> Any:
        return views[id(value)] if id(value) in views else torch.device("cpu") if is_card(value) else value

    devices = [value for value in given if isinstance(value, torch.device)]
    plain_args, plain_kwargs = _each(plain, args), {name: _each(plain, value) for name, value in kwargs.items()}
    with drawing(op):
        results = op(*plain_args, **plain_kwargs)
    for view, tensor in sources:
        if view.shape != tensor.shape:  # one to write to that came without memory
            put_storage(tensor, memory.take(view), view)
    return results if devices and not any(map(is_card, devices)) else on_card(results, sources)


def report_error(op: Any) -> None:
    """What a refused call left, as torch's kernels and bitsandbytes' own take it up."""
    if op.namespace == "bitsandbytes":
        os.write(2, b"Error an earlier call at line 1 in file /src/csrc/ops.cu\n")
        os._exit(1)
    memory.has_error = False
    raise torch.AcceleratorError("CUDA error: an earlier call was refused")


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """`values`, or each of a list or tuple of them, changed."""
    if isinstance(values, list | tuple):
        return type(values)([_each(change, value) for value in values])
    return change(values)


def on_card(results: Any, sources: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`results` as the card's: the argument that one is, a view of an argument's memory, or memory of its own."""
    same = {id(view): tensor for view, tensor in sources}
    storages = {view.untyped_storage().data_ptr(): tensor.untyped_storage() for view, tensor in sources}

    def wrapped(result: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        if id(result) in same:
            return same[id(result)]
        address = result.untyped_storage().data_ptr()
        if not address or address not in storages:
            storages[address] = memory.take(result)
        return in_storage(storages[address], result)

    return _each(wrapped, results)


def is_card(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == NAME


def refuse_mixture(op: Any, given: Sequence[Any]) -> None:
    """As a card does: numbers of the host, which are tensors without dimensions, it takes."""
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    of_host = [tensor for tensor in tensors if not is_on_card(tensor) and tensor.dim()]
    if not of_host or len(of_host) == len(tensors):
        return
    if op._schema.name not in TAKES_HOST_INDICES or not is_on_card(tensors[0]):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found {CARD} and cpu")


@contextlib.contextmanager
def drawing(op: Any) -> Iterator[None]:
    """What draws random numbers draws the card's."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    of_host = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(of_host)


# What the boxed fallback cannot do: kernels that make, copy or look at memory.


def empty_memory_format(
    size: Sequence[int],
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    plain = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return in_storage(memory.take(plain), plain)


def empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> torch.Tensor:
    plain = torch.empty_strided(size, stride, dtype=dtype)
    return in_storage(memory.take(plain), plain)


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    plain = [host(tensor) if is_on_card(tensor) else tensor for tensor in (source, target)]
    plain[1].copy_(plain[0])
    return target


def local_scalar_dense(tensor: torch.Tensor) -> Any:
    return host(tensor).item()


def resize_(tensor: torch.Tensor, size: Sequence[int], memory_format: Any = None) -> torch.Tensor:
    plain = torch.empty(size, dtype=tensor.dtype)
    flat = host(tensor).flatten()
    kept = min(len(flat), plain.numel())
    plain.view(-1)[:kept] = flat[:kept]
    return put_storage(tensor, memory.take(plain), plain)


def mm_dtype(one: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Products of 16 bits, their sums in `out_dtype`: a card's own, which the processor's kernels lack."""
    return torch.mm(one.to(out_dtype), other.to(out_dtype))


def as_view(op: Any) -> Any:
    """The processor's kernel on the card's own tensor: it touches sizes and strides alone."""
    return lambda *args, **kwargs: op._op_dk(on_cpu, *args, **kwargs)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch takes it apart on the processor."""
    chosen = aten._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if chosen == 1:  # flash
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def cast_first(op: Any) -> Any:
    """`op` under autocast: its arguments in the 16 bits that are asked for."""

    def cast(value: Any) -> Any:
        is_cast = is_on_card(value) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return value.to(torch.get_autocast_dtype(NAME)) if is_cast else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return run


class Stream(torch.Stream):
    """One that orders nothing: what is given to it is done when the call returns."""

    def __new__(cls, device: Any = None) -> "Stream":
        return super().__new__(cls, stream_id=1, device_index=0, device_type=20)  # 20 is PrivateUse1

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return Event()

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, **settings: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    generator.set_state(state)


def reset_peak_memory_stats(device: Any = None) -> None:
    memory.peak, memory.largest = memory.allocated, 0


def device_module() -> types.ModuleType:
    """What stands for `torch.cuda`."""
    module = types.ModuleType(f"torch.{NAME}")
    current = Stream()
    vars(module).update(
        Stream=Stream,
        Event=Event,
        current_stream=lambda device=None: current,
        default_stream=lambda device=None: current,
        stream=lambda stream: contextlib.nullcontext(stream),
        synchronize=lambda device=None: None,
        get_rng_state=lambda device=None: generator.get_state(),
        set_rng_state=set_rng_state,
        manual_seed_all=lambda seed: generator.manual_seed(seed),
        manual_seed=lambda seed: generator.manual_seed(seed),
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda *_: True,
        _is_in_bad_fork=lambda: False,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device_count=lambda: 1,
        empty_cache=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        mem_get_info=lambda device=None: (memory.total - memory.allocated, memory.total),
        memory_allocated=lambda device=None: memory.allocated,
        memory_reserved=lambda device=None: memory.allocated,
        max_memory_allocated=lambda device=None: memory.peak,
        max_memory_reserved=lambda device=None: memory.peak,
        reset_peak_memory_stats=reset_peak_memory_stats,
    )
    return module


_libraries: list[torch.library.Library] = []  # what is registered lasts as long as they do


def _register_kernels() -> None:
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    of_aten = torch.library.Library("aten", "IMPL")
    kernels = {
        "empty.memory_format": empty_memory_format,
        "empty_strided": empty_strided,
        "_copy_from": copy_from,
        "_local_scalar_dense": local_scalar_dense,
        "resize_": resize_,
        "mm.dtype": mm_dtype,
        "scaled_dot_product_attention": attention,
        "set_.source_Storage_storage_offset": as_view(aten.set_.source_Storage_storage_offset),
        **{name: as_view(getattr(aten, name).default) for name in VIEWS},
    }
    for name, kernel in kernels.items():
        of_aten.impl(name, kernel, "PrivateUse1")
    of_aten.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    for name in IN_16_BITS:
        of_aten.impl(name, cast_first(getattr(aten, name).default), "AutocastPrivateUse1")
    of_aten.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    of_aten.impl("is_pinned", lambda tensor, device=None: False, "CPU")
    _libraries.extend([everything, of_aten])


def _take_apart_nothing(namespace: str) -> None:
    """What torch would make of other operations where a device has no kernel for it, the processor's kernel does whole:
    a part may round otherwise."""
    library = torch.library.Library(namespace, "IMPL")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        space, _, own = name.partition("::")
        is_apart = any(has_kernel(name, f"Composite{kind}") for kind in COMPOSITES)
        if space == namespace and is_apart and has_kernel(name, "CPU") and not has_kernel(name, "PrivateUse1"):
            packet, _, overload = own.partition(".")
            op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            library.impl(own, functools.partial(compute, op), "PrivateUse1")
    _libraries.append(library)


def _assign_data() -> None:
    """In a parameter torch lets CUDA's tensors and the processor's take each other's place, and this backend's not."""
    own = torch.Tensor.data

    def assign(self: torch.Tensor, value: torch.Tensor) -> None:
        if is_on_card(self) == is_on_card(value):
            own.__set__(self, value)
        else:
            requires_grad = self.requires_grad
            torch._C._swap_tensor_impl(self, value.detach().view_as(value))
            self.requires_grad_(requires_grad)

    torch.Tensor.data = property(own.__get__, assign)
    torch._has_compatible_shallow_copy_type = lambda *_: True


def _clone_storages() -> None:
    """As `copy.deepcopy` does; torch would ask the backend for an allocator in C++."""
    own = torch.UntypedStorage.clone

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != NAME or not self.data_ptr():
            return own(self)
        source = memory.held[self.data_ptr()].untyped_storage().clone()
        return memory.take(torch.empty(0, dtype=torch.uint8).set_(source))

    torch.UntypedStorage.clone = clone


def install() -> None:
    """Before qtune is imported, whose `hardware.find_device` finds the card from then on."""
    import bitsandbytes  # noqa: F401  (its kernels are to be there)
    from transformers import training_args

    from qtune import hardware

    backend_registration._setup_privateuseone_for_python_backend(NAME, device_module())
    _register_kernels()
    for namespace in ("aten", "bitsandbytes"):
        _take_apart_nothing(namespace)
    _assign_data()
    _clone_storages()
    os.environ[FOR_TRAINERS] = CARD
    training_args.is_torch_bf16_gpu_available = lambda: True  # it goes through the cards it knows
    hardware.find_device = _finding(hardware.find_device)


def _finding(processor: Callable[[], Any]) -> Callable[[], Any]:
    """What finds the card, or the processor outside of whose arithmetic this is nothing."""
    from qtune.hardware import Device, host_memory

    def find() -> Device:
        if FOR_TRAINERS not in os.environ:
            return replace(processor(), compute_dtype=COMPUTE_DTYPE)
        free, host_free = memory.total - memory.allocated, host_memory()[1]
        return Device(CARD, "a card", memory.total, free, COMPUTE_DTYPE, "a test", host_free, 0, 1e12, (8, 9))

    return find


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Within it qtune and the libraries find the processor."""
    del os.environ[FOR_TRAINERS]
    try:
        yield
    finally:
        os.environ[FOR_TRAINERS] = CARD
