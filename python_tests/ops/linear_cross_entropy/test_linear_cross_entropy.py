"""linear_cross_entropy against F.cross_entropy on the whole logits."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from reformer_kernels.benchmarks.memory import peak_allocated
from reformer_kernels.functional import linear_cross_entropy
from reformer_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy as reference

D, V, ROWS = 5, 11, 23


def inputs(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = (2 * torch.randn(rows, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    target = torch.randint(V, (rows,))
    target[::4] = -100
    return x, weight, target, bias


def loss_and_gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss) if loss.dim() else 3.0
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), tensors)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_cross_entropy(reduction: Any, weighted: bool) -> None:
    x, weight, target, bias = inputs()
    class_weights = torch.rand(V, dtype=torch.float64) if weighted else None
    for smoothing, with_bias, chunk in itertools.product((0.0, 0.3, 1.0), (True, False), (1, 7, 100)):
        tensors = [x, weight, bias] if with_bias else [x, weight]
        b = bias if with_bias else None
        ours = linear_cross_entropy(
            x,
            weight,
            target,
            b,
            class_weights=class_weights,
            label_smoothing=smoothing,
            reduction=reduction,
            chunk_size=chunk,
        )
        theirs = F.cross_entropy(
            F.linear(x, weight, b), target, class_weights, label_smoothing=smoothing, reduction=reduction
        )
        torch.testing.assert_close(
            loss_and_gradients(ours, tensors), loss_and_gradients(theirs, tensors), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_over_ignored_rows_alone_is_nan_and_has_no_gradient(rows: int, smoothing: float) -> None:
    x, weight, target, bias = inputs(rows=rows)
    target[:] = -100
    ours = linear_cross_entropy(x, weight, target, bias, label_smoothing=smoothing)
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, label_smoothing=smoothing)
    assert ours.isnan() and theirs.isnan()
    for loss in (ours, theirs):
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [x, weight, bias]))


def test_mean_over_classes_without_weight_has_no_gradient() -> None:
    x, weight, target, bias = inputs()
    loss = linear_cross_entropy(x, weight, target, bias, class_weights=torch.zeros(V))
    assert loss.isnan()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [x, weight, bias]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_and_everything_at_once(reduction: Any) -> None:
    x, weight, target, bias = inputs()
    target[target == -100] = 3
    settings = (torch.rand(V, dtype=torch.float64), 3, 0.2, 0.05, reduction)
    names = ("class_weights", "ignore_index", "label_smoothing", "z_loss", "reduction")
    ours = linear_cross_entropy(
        x, weight, target, bias, chunk_size=4, **dict(zip(names, settings, strict=True))
    )
    theirs = reference(x, weight, target, bias, *settings)
    plain = F.cross_entropy(
        F.linear(x, weight, bias),
        target,
        settings[0],
        ignore_index=3,
        label_smoothing=0.2,
        reduction=reduction,
    )
    assert not torch.allclose(ours, plain)
    tensors = [x, weight, bias]
    torch.testing.assert_close(
        loss_and_gradients(ours, tensors), loss_and_gradients(theirs, tensors), rtol=1e-10, atol=1e-12
    )


def test_gradcheck() -> None:
    x, weight, target, bias = inputs(rows=5)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r=reduction: linear_cross_entropy(
                x, w, target, b, z_loss=0.1, label_smoothing=0.1, reduction=r, chunk_size=2
            ),
            (x, weight, bias),
        )


@pytest.mark.parametrize("needs", range(3))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(needs: int, reduction: Any) -> None:
    x, weight, target, bias = inputs()
    tensors = [x.detach(), weight.detach(), bias.detach()]
    tensors[needs].requires_grad_()
    x, weight, bias = tensors
    ours = linear_cross_entropy(x, weight, target, bias, reduction=reduction, chunk_size=5)
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
    torch.testing.assert_close(
        loss_and_gradients(ours, [tensors[needs]]), loss_and_gradients(theirs, [tensors[needs]])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_as_accurate_as_whole_float32_logits(dtype: torch.dtype, reduction: Any) -> None:
    rows, d, classes = 512, 64, 1000
    x = (3 * torch.randn(rows, d)).to(dtype).requires_grad_()
    weight = torch.randn(classes, d).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        return loss_and_gradients(function(a, b), [a, b])

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(a, b), target, reduction=reduction)

    truth = results(plain, torch.float64)
    whole = results(plain, torch.float32)
    ours = results(
        lambda a, b: linear_cross_entropy(a, b, target, reduction=reduction, chunk_size=100), dtype
    )
    assert ours[0].dtype == torch.float32
    for number, (a, b, c) in enumerate(zip(ours, whole, truth, strict=True)):
        error, allowed = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        # Gradients are rounded to the input's dtype, once.
        rounding = torch.finfo(dtype).eps / 2 if number and dtype != torch.float32 else 0.0
        assert error <= 1.25 * allowed + rounding, (number, error, allowed)


def test_float16_gradients_of_a_mean_over_many_rows_do_not_underflow() -> None:
    x = torch.randn(4096, 8).half().requires_grad_()
    weight = torch.randn(500, 8).half().requires_grad_()
    target = torch.randint(500, (4096,))
    scale = 2.0**16  # a gradient scaler's
    (ours,) = torch.autograd.grad(scale * linear_cross_entropy(x, weight, target), x)
    a = x.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(scale * F.cross_entropy(a @ weight.detach().double().t(), target), a)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_extreme_logits() -> None:
    x, weight, target, _ = inputs(torch.float32)
    for factor in (1e4, 1e-30):
        big = (x.detach() * factor).requires_grad_()
        ours = linear_cross_entropy(big, weight, target, z_loss=1e-3)
        assert ours.isfinite()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(ours, [big, weight]))


def test_ignored_rows_hold_anything() -> None:
    x, weight, target, bias = inputs()
    clean = loss_and_gradients(
        linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1), [x, weight, bias]
    )
    dirty = x.detach().clone()
    dirty[::8] = float("nan")
    dirty[4::8] = float("inf")
    dirty.requires_grad_()
    found = loss_and_gradients(
        linear_cross_entropy(dirty, weight, target, bias, label_smoothing=0.1), [dirty, weight, bias]
    )
    assert all(map(torch.equal, clean, found))


def test_all_rows_ignored_and_no_rows() -> None:
    x, weight, target, _ = inputs()
    nothing = torch.full_like(target, -100)
    for t, a in ((nothing, x), (nothing[:0], x[:0])):
        assert linear_cross_entropy(a, weight, t).isnan()  # 0 / 0, as F.cross_entropy gives
        total = linear_cross_entropy(a, weight, t, reduction="sum")
        assert total == 0
        assert torch.equal(torch.autograd.grad(total, weight)[0], torch.zeros_like(weight))
        assert torch.equal(linear_cross_entropy(a, weight, t, reduction="none"), torch.zeros(len(t)).double())


def test_shapes_and_strides() -> None:
    x = torch.randn(3, 4, 2 * D)[..., ::2].transpose(0, 1).requires_grad_()
    weight = torch.randn(D, V).t().requires_grad_()
    target = torch.randint(V, (3, 4)).t()
    losses = linear_cross_entropy(x, weight, target, reduction="none", chunk_size=5)
    assert losses.shape == (4, 3)
    theirs = F.cross_entropy((x @ weight.t()).flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(
        loss_and_gradients(losses, [x, weight]), loss_and_gradients(theirs.view(4, 3), [x, weight])
    )
    torch.testing.assert_close(linear_cross_entropy(x[0, 0], weight, target[0, 0]), losses[0, 0])


def test_second_backward_and_accumulation() -> None:
    x, weight, target, bias = inputs()
    loss = linear_cross_entropy(x, weight, target, bias)
    first = torch.autograd.grad(loss, [x, weight, bias], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [x, weight, bias])
    torch.testing.assert_close([2 * g for g in first], list(second), rtol=0, atol=0)


def test_no_gradient_asked_for() -> None:
    x, weight, target, bias = inputs()
    with torch.no_grad():
        value = linear_cross_entropy(x, weight, target, bias)
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(F.linear(x, weight, bias), target))


def test_deterministic_for_any_number_of_threads() -> None:
    x, weight, target, bias = inputs(torch.float32, rows=300)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(loss_and_gradients(linear_cross_entropy(x, weight, target, bias), [x, weight, bias]))
            found.append(loss_and_gradients(linear_cross_entropy(x, weight, target, bias), [x, weight, bias]))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[2], found[3]))


def test_autocast_keeps_float32() -> None:
    x, weight, target, bias = inputs(torch.float32)
    expected = linear_cross_entropy(x, weight, target, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(x, weight, target, bias), expected)
        mixed = linear_cross_entropy(x.bfloat16(), weight, target, bias)
    grads = torch.autograd.grad(mixed, [x, weight])
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)


def test_operators_pass_opcheck() -> None:
    x, weight, target, bias = inputs(rows=7)
    operators = torch.ops.reformer_kernels
    constants = (-100, 0.1, 0.01, 3)
    class_weights = torch.rand(V, dtype=torch.float64)
    # The default list of checks without the one that differentiates results that are marked as not
    # differentiable.
    torch.library.opcheck(
        operators.linear_cross_entropy_sum,
        (x, weight, target, bias, class_weights, *constants, [True, True, True]),
    )
    torch.library.opcheck(
        operators.linear_cross_entropy_rows, (x, weight, target, bias, class_weights, *constants)
    )
    grad = torch.randn(7, dtype=torch.float64)
    torch.library.opcheck(
        operators.linear_cross_entropy_rows_backward,
        (
            grad,
            x.detach(),
            weight.detach(),
            target,
            bias.detach(),
            class_weights,
            *constants,
            [True, False, True],
        ),
    )
    torch.library.opcheck(
        operators.linear_cross_entropy_scale, (x.detach(), grad.sum(), x.detach(), torch.float32)
    )


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    x, weight, target, bias = inputs(torch.float32)
    for reduction in ("mean", "none"):
        call = functools.partial(linear_cross_entropy, reduction=reduction)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            loss_and_gradients(compiled(x, weight, target, bias), [x, weight, bias]),
            loss_and_gradients(call(x, weight, target, bias), [x, weight, bias]),
        )


def test_second_derivative_raises() -> None:
    x, weight, target, _ = inputs()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(reduction: Any) -> None:
    rows, d, classes = 2048, 8, 2000
    x = torch.randn(rows, d, requires_grad=True)
    weight = torch.randn(classes, d, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def step() -> None:
        loss = linear_cross_entropy(x, weight, target, reduction=reduction, memory_budget=2**20)
        loss.sum().backward()

    step()
    peak = peak_allocated(step)
    # One [rows, classes] tensor has 15.6 MiB.
    assert peak < 2**20 + 8 * (x.numel() + weight.numel()) * 4, peak


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be one of .*got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"x": torch.zeros(ROWS, D).long()}, TypeError, "x must be one of .*got torch.int64"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"target": [1]}, TypeError, "target must be a torch.Tensor, got list"),
        ({"target": torch.rand(ROWS, V)}, TypeError, "class probabilities"),
        ({"target": torch.zeros(ROWS).int()}, TypeError, "target must be int64, got torch.int32"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target must be \(23,\) .* got \(3,\)"),
        ({"weight": torch.zeros(V, 9)}, ValueError, r"weight must be \(V, 5\) .* got \(11, 9\)"),
        ({"weight": torch.zeros(0, D)}, ValueError, r"at least one class and one feature, got \(0, 5\)"),
        ({"x": torch.zeros(ROWS, 0), "weight": torch.zeros(V, 0)}, ValueError, r"got \(11, 0\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(11,\), got \(3,\)"),
        ({"class_weights": torch.zeros(3)}, ValueError, r"class_weights must be \(11,\)"),
        ({"class_weights": torch.ones(V, requires_grad=True)}, ValueError, "class_weights get no gradient"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, target, bias = inputs(torch.float32)
    settings: dict[str, Any] = {"x": x, "weight": weight, "target": target, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**settings)


@pytest.mark.parametrize("bad", [V, -1])
def test_target_out_of_range_raises(bad: int) -> None:
    x, weight, target, _ = inputs()
    target[1] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        linear_cross_entropy(x, weight, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(reduction: Any, which: int) -> None:
    x, weight, target, bias = (t.detach() for t in inputs())
    tensors = [x, weight, bias]

    def loss(tensor: Tensor) -> Tensor:
        first, second, third = (tensor if i == which else t for i, t in enumerate(tensors))
        return linear_cross_entropy(first, second, target, third, reduction=reduction)

    message = r"linear_cross_entropy has no forward-mode derivative; use F\.cross_entropy"
    tangent = torch.ones_like(tensors[which])
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(loss, (tensors[which],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        loss(forward_ad.make_dual(tensors[which], tangent))


@pytest.mark.parametrize("name", ["x", "weight", "target", "bias", "class_weights"])
def test_tensors_on_several_devices_are_refused(name: str) -> None:
    x, weight, target, bias = inputs()
    tensors = {"x": x, "weight": weight, "target": target, "bias": bias, "class_weights": torch.ones(V)}
    tensors[name] = tensors[name].to("meta")
    for reduction in ("mean", "none"):
        with pytest.raises(ValueError, match="must be on one device, got"):
            linear_cross_entropy(**tensors, reduction=reduction)  # type: ignore[arg-type]
    constants = (-100, 0.0, 0.0, 4)
    operators = torch.ops.reformer_kernels
    with pytest.raises(ValueError, match="linear_cross_entropy_sum must be on one device, got"):
        operators.linear_cross_entropy_sum(*tensors.values(), *constants, [False] * 3)
    with pytest.raises(ValueError, match="linear_cross_entropy_rows must be on one device, got"):
        operators.linear_cross_entropy_rows(*tensors.values(), *constants)


def test_the_meta_device_works_under_autocast_too() -> None:
    x, weight, target, bias = (t.to("meta") for t in inputs(torch.float32))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(x, weight, target, bias)
        grads = torch.autograd.grad(loss, [x, weight])
        assert all(t.is_meta for t in (loss, *grads)) and [g.shape for g in grads] == [x.shape, weight.shape]
