"""Checks of the public functions' arguments, which they also cast as autocast asks.

Every error says what was given, what is accepted and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reformer_kernels._limits import FLOAT_DTYPES, MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels.config import LSHConfig, check_integer
from reformer_kernels.layout import Layout


def check_config(config: object) -> None:
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config must be an LSHConfig, such as LSHConfig.paper(), got {kind_of(config)}")


def check_size(name: str, value: object, low: int, high: int) -> None:
    """As `check_integer`, but a symbolic integer, which stands for a checked size, may pass."""
    if not isinstance(value, torch.SymInt):
        check_integer(name, value, low, high)


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind_of(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; use {name}.to_dense()")


def check_rows(name: str, x: Any) -> Tensor:
    """A (B, H, L, D) tensor of floats with H, L >= 1 and D in 1..256."""
    check_tensor(name, x)
    if x.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {accepted}, got {x.dtype}; convert with {name}.float()")
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}; "
            f"one sequence of one head is {name}[None, None]"
        )
    _, heads, length, dim = x.shape
    if heads < 1 or not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"{name} must have at least one head and one token, got shape {tuple(x.shape)}")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head dimension of 1..{MAX_HEAD_DIM}, got {dim}")
    return x


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device type. Autocast knows no meta device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(x: Tensor) -> Tensor:
    """`x` in the autocast dtype where autocast is on for its device. float64 stays, as in torch's own."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def check_qkv(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    *,
    names: tuple[str, str, str] = ("q", "v", "k"),
    own_key_length: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked against each other, and cast as autocast asks. `own_key_length`: k's and v's may not be q's."""
    shared, shared_sizes = (2, "batch and heads") if own_key_length else (3, "batch, heads and length")
    check_rows(names[0], q)
    check_rows(names[1], v)
    others: list[tuple[str, Any]] = [(names[1], v)]
    if k is not None:
        check_rows(names[2], k)
        others.append((names[2], k))
    for name, x in others:
        if x.dtype != q.dtype and not autocast_enabled(q.device.type):
            raise TypeError(
                f"{names[0]} and {name} must have one dtype, got {q.dtype} and {x.dtype}; "
                f"convert with {name}.to({names[0]}.dtype)"
            )
        if x.device != q.device:
            raise ValueError(
                f"{names[0]} and {name} must be on one device, got {q.device} and {x.device}; "
                f"move with {name}.to({names[0]}.device)"
            )
        if x.shape[:shared] != q.shape[:shared]:
            raise ValueError(
                f"{names[0]} and {name} must have the same {shared_sizes}, "
                f"got shapes {tuple(q.shape)} and {tuple(x.shape)}"
            )
    if own_key_length and k is not None:
        if k.shape[2] != v.shape[2]:
            raise ValueError(
                f"k and v must have one length, got shapes {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if k.shape[3] != q.shape[3]:
            raise ValueError(
                f"q and k must have one head dimension, got shapes {tuple(q.shape)} and {tuple(k.shape)}"
            )
    elif k is not None and k.shape != q.shape:
        raise ValueError(f"q and k must have one shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    q, v, k = autocast(q), autocast(v), None if k is None else autocast(k)
    for name, x in ((names[1], v), (names[2], k)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(
                f"under autocast {names[0]} is {q.dtype} and {name} {x.dtype}; make them one dtype"
            )
    return q, v, k


def check_separate_qkv(
    q: Tensor, k: Tensor, v: Tensor, *, own_key_length: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v checked against each other and cast as autocast asks, where k must be given."""
    check_rows("k", k)
    q, v, checked = check_qkv(q, v, k, own_key_length=own_key_length)
    assert checked is not None
    return q, checked, v


def check_padding(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask of keys, bool or a float bias, for keys `x`."""
    if mask is None:
        return None
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"key_padding_mask must be bool, True = padding, or a float bias of the logits, -inf = padding, "
            f"got {mask.dtype}; from a mask with 1 for tokens, pass mask == 0"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("key_padding_mask carries no gradient, got one that requires it; pass mask.detach()")
    if mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"key_padding_mask must be (batch, length) = {(x.shape[0], x.shape[2])}, "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"key_padding_mask must be on {x.device}, got {mask.device}; move it with .to()")
    return mask.contiguous()


def check_rotations(rotations: Tensor, x: Tensor, *, width: int, rounds: int | None = None) -> None:
    check_tensor("rotations", rotations)
    if rotations.dtype != torch.float32 and not (rotations.dtype == x.dtype == torch.float64):
        raise TypeError(f"rotations must be float32, got {rotations.dtype}; convert with rotations.float()")
    if rotations.device.type != "cpu" and rotations.device != x.device:
        raise ValueError(
            f"rotations must be on the CPU or on {x.device}, got {rotations.device}; draw them with "
            "sample_rotations(..., device=x.device)"
        )
    heads, dim = x.shape[1], x.shape[3]
    wanted = f"({heads} or 1, {dim}, {'R' if rounds is None else rounds}, {width})"
    if (
        rotations.dim() != 4
        or rotations.shape[0] not in (1, heads)
        or rotations.shape[1] != dim
        or rotations.shape[2] < 1
        or (rounds is not None and rotations.shape[2] != rounds)
        or rotations.shape[3] < width
    ):
        raise ValueError(
            f"rotations must be (heads or 1, head_dim, n_hashes, width) = {wanted}, got shape "
            f"{tuple(rotations.shape)}; draw them with sample_rotations(config, num_heads, head_dim, seed)"
        )


def check_layout(layout: Layout, q: Tensor, rounds: int) -> None:
    """Types and shapes; the values are checked where they are used."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, as lsh_layout makes it, got {kind_of(layout)}")
    B, H, L, _ = q.shape
    R = rounds
    for name, x in (("order", layout.order), ("bucket_starts", layout.bucket_starts)):
        check_tensor(f"layout.{name}", x)
        if x.dtype != torch.int32:
            raise TypeError(f"layout.{name} must be int32, got {x.dtype}; convert with .int()")
        if x.device != q.device:
            raise ValueError(f"layout.{name} must be on {q.device}, got {x.device}; move it with .to()")
    if layout.order.shape != (B, H, R, L):
        raise ValueError(
            f"layout.order must be (batch, heads, rounds, length) = {(B, H, R, L)}, got shape "
            f"{tuple(layout.order.shape)}; make the layout for this input and configuration with lsh_layout"
        )
    starts = layout.bucket_starts
    if starts.dim() != 4 or starts.shape[:3] != (B, H, R) or starts.shape[3] < 2:
        raise ValueError(
            f"layout.bucket_starts must be (batch, heads, rounds, S) = ({B}, {H}, {R}, S) with S >= 2, "
            f"got shape {tuple(starts.shape)}; make the layout with lsh_layout"
        )


def check_layout_pair(layout: tuple[Layout, Layout], q: Tensor, k: Tensor, rounds: int) -> None:
    if not isinstance(layout, (tuple, list)) or len(layout) != 2:
        raise TypeError(
            "layout must be a pair of Layouts, the queries' and the keys', as lsh_cross_layout makes it, "
            f"got {kind_of(layout)}"
        )
    check_layout(layout[0], q, rounds)
    check_layout(layout[1], k, rounds)
    sizes = [one.bucket_starts.shape[3] for one in layout]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the queries' and the keys' layout must have the same buckets, got bucket_starts of {sizes[0]} "
            f"and {sizes[1]} entries; make them together with lsh_cross_layout"
        )


def check_dropout(dropout_p: float) -> None:
    number = isinstance(dropout_p, (int, float)) and not isinstance(dropout_p, bool)
    if not number or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}; 1 would drop everything")


def on_one_device(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, but a ValueError is raised unless all tensors among its arguments are on one device.

    For the kernels of `operator`, the fake one included: torch runs an operator's fake kernel as soon as one
    tensor is on the meta device, and memory that nobody wrote would be the result. A scalar on the CPU goes
    with every device, as in torch.
    """

    def run(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        devices = [x.device for x in tensors if x.dim() > 0 or x.device.type != "cpu"]
        if any(device != devices[0] for device in devices):
            given = ", ".join(str(device) for device in dict.fromkeys(devices))
            raise ValueError(
                f"the tensors of {operator} must be on one device, got {given}; move them with .to(x.device)"
            )
        return kernel(*arguments)

    return run


def refuse_transforms(operation: str, instead: str, *tensors: Tensor | None) -> None:
    """Autograd formulas of custom operators serve `backward()` and `torch.autograd.grad` alone.

    torch would drop the tangents of forward mode in silence, and says of `torch.func.grad` and its kin only
    what an author of operators can use. Raises NotImplementedError that says what `operation` does not offer
    and to use `instead`. `torch.func.vmap` works, and `backward()` through it.
    """
    if torch.compiler.is_compiling():
        return
    given = [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise NotImplementedError(
            f"{operation} no forward-mode derivative; use {instead} for torch.func.jvp and dual numbers"
        )
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise NotImplementedError(
            f"{operation} no gradient by torch.func.grad, vjp and jacrev; use backward() or "
            f"torch.autograd.grad, or {instead}"
        )


def without_transforms(x: Tensor) -> Tensor:
    """The values of `x` under torch.func's transforms; what vmap maps over comes first."""
    if torch.compiler.is_compiling():
        return x
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        mapped = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1
        x = functorch.get_unwrapped(x)
        x = x if mapped < 0 else x.movedim(mapped, 0)
    return x


def kind_of(x: object) -> str:
    return type(x).__name__
