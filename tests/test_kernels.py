"""The fused loss head equals the dense one, and never holds what it must not hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from safeshape.kernels import fused_label_logp, fused_shaped_loss
from safeshape.kernels.chunked import chunk_rows
from safeshape.losses import DIVERGENCES, label_logp, log_softmax, shaped_loss
from safeshape.types import Weights

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def problem(tokens, vocab, *, hidden=5, ref_hidden=6, ref_vocab=None, bias=True, seed=0, dtype=torch.float64, gap=1.0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    ref_vocab = ref_vocab or vocab
    x = {
        "hidden_NH": draw(tokens, hidden).requires_grad_(),
        "head_VH": draw(vocab, hidden).requires_grad_(),
        "ref_hidden_NH": gap * draw(tokens, ref_hidden),
        "ref_head_VH": draw(ref_vocab, ref_hidden),
        "labels_N": torch.randint(0, min(vocab, ref_vocab), (tokens,), generator=g),
    }
    biases = {"bias": draw(vocab).requires_grad_(), "ref_bias": draw(ref_vocab)} if bias else {}
    ce, kl = torch.rand(tokens, generator=g), torch.rand(tokens, generator=g)
    ce[torch.rand(tokens, generator=g) < 0.3] = 0
    kl[torch.rand(tokens, generator=g) < 0.3] = 0
    x["labels_N"][torch.rand(tokens, generator=g) < 0.2] = -100
    return x, biases, Weights(ce_BT=ce, kl_BT=kl)


def capped(hidden, head, bias, scale, softcap):
    """In the order of Cohere (`* logit_scale`), Granite (`/ logits_scaling`) and Gemma 2 (`tanh`)."""
    z = hidden @ head.t()
    z = (z if bias is None else z + bias) * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def dense(
    x, biases, weights, *, num_tokens, divergence="reverse", logit_scale=1.0, softcap=None, ref_logit_scale=None, **kw
):
    ref_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    ref_softcap = kw.get("ref_softcap", softcap)
    return shaped_loss(
        capped(x["hidden_NH"], x["head_VH"], biases.get("bias"), logit_scale, softcap)[None],
        capped(x["ref_hidden_NH"], x["ref_head_VH"], biases.get("ref_bias"), ref_scale, ref_softcap)[None],
        x["labels_N"][None],
        Weights(ce_BT=weights.ce_BT[None], kl_BT=weights.kl_BT[None]),
        divergence=divergence,
        num_tokens=num_tokens,
    )


def gradients(loss, *tensors):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else []


def assert_equal(got, want, inputs, tolerance):
    """Value, metrics and every gradient, relative to the largest entry."""
    assert got.metrics.keys() == want.metrics.keys()
    for a, b in [(got.loss, want.loss), *((got.metrics[k], want.metrics[k]) for k in want.metrics)]:
        assert a.shape == b.shape
        assert abs(float(a.detach()) - float(b.detach())) <= tolerance * max(1.0, abs(float(b.detach())))
    for a, b in zip(gradients(got.loss, *inputs), gradients(want.loss, *inputs), strict=True):
        assert a is not None
        assert a.dtype == b.dtype
        if b.numel():
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


shapes = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 9),
        "vocab": st.integers(2, 17),
        "extra": st.integers(-3, 3),
        "bias": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=120, deadline=None)
@given(
    shapes,
    st.sampled_from(sorted(DIVERGENCES)),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1, 200, 500, None]),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([None, 3.0]),
    st.tuples(st.booleans(), st.booleans()),
)
def test_equals_the_dense_loss(shape, divergence, dtype, chunk_bytes, logit_scale, softcap, frozen):
    ref_vocab = max(1, shape["vocab"] + shape["extra"])
    x, biases, weights = problem(
        shape["tokens"], shape["vocab"], ref_vocab=ref_vocab, bias=shape["bias"], seed=shape["seed"], dtype=dtype
    )
    x["hidden_NH"].requires_grad_(not frozen[0])
    x["head_VH"].requires_grad_(not frozen[1])
    how = {"divergence": divergence, "num_tokens": 7, "logit_scale": logit_scale, "softcap": softcap}
    inputs = (x["hidden_NH"], x["head_VH"], biases.get("bias"))
    got = fused_shaped_loss(**x, weights=weights, **biases, **how, chunk_bytes=chunk_bytes)
    assert got.loss.dtype == dtype
    assert_equal(got, dense(x, biases, weights, **how), inputs, CLOSE[dtype])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ref_vocab", [7, 6])
def test_gradcheck(divergence, softcap, ref_vocab):
    x, biases, weights = problem(5, 7, ref_vocab=ref_vocab, seed=3)

    def loss(hidden, head, bias):
        return fused_shaped_loss(
            hidden,
            head,
            x["ref_hidden_NH"],
            x["ref_head_VH"],
            x["labels_N"],
            weights,
            divergence=divergence,
            num_tokens=5,
            bias=bias,
            ref_bias=biases["ref_bias"],
            softcap=softcap,
            logit_scale=0.5,
            chunk_bytes=250,
        ).loss

    assert torch.autograd.gradcheck(loss, (x["hidden_NH"], x["head_VH"], biases["bias"]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_head_for_both_models_is_one_product_with_the_same_result(divergence):
    x, _, weights = problem(8, 11, ref_hidden=5, bias=False)
    x["ref_head_VH"] = x["head_VH"]
    how = {"divergence": divergence, "num_tokens": 3}
    with Seen() as seen:
        got = fused_shaped_loss(**x, weights=weights, **how)
    held = int(got.metrics["kl_tokens"])
    assert ((2 * held, 5), (5, 11)) in seen.products
    assert_equal(got, dense({**x, "ref_head_VH": x["head_VH"].detach()}, {}, weights, **how), (x["head_VH"],), 1e-12)


@pytest.mark.parametrize("other", ["weight", "scale", "bias", "softcap", "rows"])
def test_heads_that_differ_in_one_thing_are_not_taken_for_one(other):
    x, biases, weights = problem(8, 11, ref_hidden=5)
    how = {"num_tokens": 3}
    if other != "weight":
        x["ref_head_VH"] = x["head_VH"].detach()
    if other != "bias":
        biases = {}
    if other == "scale":
        how["ref_logit_scale"] = 2.0
    if other == "softcap":
        how["ref_softcap"] = 1.0
    if other == "rows":
        x["ref_head_VH"] = x["ref_head_VH"][:10]
        x["labels_N"] = x["labels_N"].clamp(max=9)
    got = fused_shaped_loss(**x, weights=weights, **biases, **how)
    assert_equal(got, dense(x, biases, weights, **how), (x["head_VH"],), 1e-12)


def test_scale_and_softcap_of_the_reference_may_differ():
    x, biases, weights = problem(6, 9)
    how = {"num_tokens": 3, "logit_scale": 0.5, "softcap": 4.0, "ref_logit_scale": 2.0, "ref_softcap": None}
    got = fused_shaped_loss(**x, weights=weights, **biases, **how)
    assert_equal(got, dense(x, biases, weights, **how), (x["hidden_NH"],), 1e-12)
    same = fused_shaped_loss(**x, weights=weights, **biases, **{**how, "ref_softcap": "same", "ref_logit_scale": None})
    assert abs(same.loss - got.loss) > 1e-3


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    x, _, weights = problem(6, 9, bias=False)
    ids = torch.arange(6)
    grads = []
    for loss in (fused_shaped_loss, None):
        hidden = torch.tanh(x["head_VH"][ids])  # the head is the embedding too
        tied = {**x, "hidden_NH": hidden}
        out = loss(**tied, weights=weights, num_tokens=4) if loss else dense(tied, {}, weights, num_tokens=4)
        grads.append(torch.autograd.grad(out.loss, x["head_VH"])[0])
    assert torch.allclose(*grads, atol=1e-12)


class Seen(TorchDispatchMode):
    """Sizes of all tensors made, and the shapes of the factors of all matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            self.products.append(tuple(shapes[-2:]))
        return out


def used_rows(products, hidden, vocab):
    """Rows projected by a head of that shape, over all chunks."""
    return sum(left[0] for left, right in products if left[1] == hidden and right == (hidden, vocab))


def test_full_logits_are_never_made():
    tokens, vocab = 512, 1000
    x, _, weights = problem(tokens, vocab, dtype=torch.float32, bias=False)
    weights = Weights(ce_BT=torch.ones(tokens), kl_BT=torch.ones(tokens))
    with Seen() as seen:
        fused_shaped_loss(**x, weights=weights, num_tokens=tokens).loss.backward()
    assert seen.largest <= tokens * vocab / 8 + vocab
    with Seen() as seen:
        dense(x, {}, weights, num_tokens=tokens).loss.backward()
    assert seen.largest >= tokens * vocab / 2


def test_only_what_a_weight_asks_for_is_projected():
    x, _, _ = problem(10, 13, bias=False)
    x["labels_N"] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, -100, -100])
    weights = Weights(
        ce_BT=torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 1, 1]), kl_BT=torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
    )
    with Seen() as seen:
        out = fused_shaped_loss(**x, weights=weights, num_tokens=8)
    assert used_rows(seen.products, 5, 13) == 5
    assert used_rows(seen.products, 6, 13) == 3
    assert (int(out.metrics["ce_tokens"]), int(out.metrics["kl_tokens"])) == (5, 3)
    no_kl = Weights(ce_BT=weights.ce_BT, kl_BT=torch.zeros(10))
    with Seen() as seen:
        fused_shaped_loss(**x, weights=no_kl, num_tokens=8)
    assert used_rows(seen.products, 6, 13) == 0


def test_a_frozen_head_costs_no_product_for_its_gradient():
    x, _, _ = problem(10, 13, bias=False)
    x["labels_N"] = torch.arange(10)
    weights = Weights(ce_BT=torch.ones(10), kl_BT=torch.tensor([0.0, 1.0] * 5))
    counts = {}
    for frozen in (False, True):
        x["head_VH"].requires_grad_(not frozen)
        with Seen() as seen:
            fused_shaped_loss(**x, weights=weights, num_tokens=8).loss.backward()
        counts[frozen] = len(seen.products)
    with Seen() as seen, torch.no_grad():
        fused_shaped_loss(**x, weights=weights, num_tokens=8)
    chunks = 2  # one with the reference, one without
    assert counts[False] - counts[True] == chunks
    assert counts[True] - len(seen.products) == chunks


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_do_is_a_zero_loss_with_a_graph(tokens):
    x, _, _ = problem(tokens, 6, bias=False)
    zero = Weights(ce_BT=torch.zeros(tokens), kl_BT=torch.zeros(tokens))
    out = fused_shaped_loss(**x, weights=zero, num_tokens=torch.tensor(0))
    out.loss.backward()
    assert out.loss.item() == 0
    assert x["hidden_NH"].grad.abs().sum() == 0
    assert x["head_VH"].grad.abs().sum() == 0
    assert {name: value.item() for name, value in out.metrics.items()} == {
        "ce": 0,
        "kl": 0,
        "ce_tokens": 0,
        "kl_tokens": 0,
    }


def test_no_tokens_in_the_batch_count_as_one():
    x, _, weights = problem(4, 6, bias=False)
    losses = [fused_shaped_loss(**x, weights=weights, num_tokens=n).loss for n in (0, 1, torch.tensor(0))]
    assert losses[0] == losses[1] == losses[2]


def test_no_reference_is_needed_without_kl_weights():
    x, _, weights = problem(6, 9, bias=False)
    no_kl = Weights(ce_BT=weights.ce_BT, kl_BT=torch.zeros(6))
    out = fused_shaped_loss(x["hidden_NH"], x["head_VH"], None, None, x["labels_N"], no_kl, num_tokens=3)
    assert_equal(out, dense(x, {}, no_kl, num_tokens=3), (x["hidden_NH"], x["head_VH"]), 1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_the_gradient_scales_with_the_loss_and_may_be_asked_for_twice(factor):
    x, _, weights = problem(6, 9, bias=False)
    loss = fused_shaped_loss(**x, weights=weights, num_tokens=torch.tensor(6)).loss
    want = torch.autograd.grad(dense(x, {}, weights, num_tokens=6).loss * factor, x["head_VH"])[0]
    for _ in range(2):
        got = torch.autograd.grad(loss * factor, x["head_VH"], retain_graph=True)[0]
        assert torch.allclose(got, want, atol=1e-12)


def test_gradients_add_up_over_two_losses():
    x, _, weights = problem(6, 9, bias=False)
    for _ in range(2):
        fused_shaped_loss(**x, weights=weights, num_tokens=12).loss.backward()
    want = torch.autograd.grad(dense(x, {}, weights, num_tokens=6).loss, x["head_VH"])[0]
    assert torch.allclose(x["head_VH"].grad, want, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence_and_no_gradient_even_in_float32(divergence):
    x, _, _ = problem(20, 1000, ref_hidden=5, bias=False, dtype=torch.float32)
    x["ref_hidden_NH"], x["ref_head_VH"] = x["hidden_NH"].detach().clone(), x["head_VH"].detach().clone()
    only_kl = Weights(ce_BT=torch.zeros(20), kl_BT=torch.ones(20))
    out = fused_shaped_loss(**x, weights=only_kl, divergence=divergence, num_tokens=1)
    out.loss.backward()
    assert out.loss.item() == 0
    assert x["hidden_NH"].grad.abs().max() < 1e-6


def test_large_logits_and_a_far_away_label_stay_finite():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = torch.tensor([[0.0], [3000.0], [2999.0]])
    one = Weights(ce_BT=torch.ones(1), kl_BT=torch.ones(1))
    out = fused_shaped_loss(hidden, head, 2 * hidden, head, torch.tensor([0]), one, divergence="forward", num_tokens=1)
    out.loss.backward()
    assert out.metrics["ce"].item() == pytest.approx(3000 + math.log1p(math.exp(-1)))
    assert torch.isfinite(hidden.grad).all()


def test_rows_that_only_the_policy_has_count_in_the_cross_entropy_alone():
    # Policy 1/4, 1/4, 1/2; the reference has the first two rows: 1/2, 1/2 on both sides, so no divergence.
    hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [math.log(2)]])
    one = Weights(ce_BT=torch.ones(1), kl_BT=torch.ones(1))
    out = fused_shaped_loss(hidden, head, hidden, head[:2], torch.tensor([1]), one, num_tokens=1)
    assert out.metrics["ce"].item() == pytest.approx(math.log(4))
    assert out.metrics["kl"].item() == pytest.approx(0, abs=1e-7)


def test_bfloat16_inputs_are_compared_in_float32():
    # The divergence of two models this close is 1e-5, and logits rounded to bfloat16 miss it by half and more.
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=g).bfloat16().requires_grad_()
    head = (torch.randn(5000, 32, generator=g) / 4).bfloat16()
    ref = hidden.detach().clone()
    ref[:, :4] *= 1 + 2**-7
    only_kl = Weights(ce_BT=torch.zeros(64), kl_BT=torch.ones(64))
    labels = torch.zeros(64, dtype=torch.long)
    out = fused_shaped_loss(hidden, head, ref, head, labels, only_kl, num_tokens=64)
    wide = hidden.detach().float().requires_grad_()
    want = fused_shaped_loss(wide, head.float(), ref.float(), head.float(), labels, only_kl, num_tokens=64)
    rounded = shaped_loss(
        (hidden @ head.t())[None],
        (ref @ head.t())[None],
        labels[None],
        Weights(ce_BT=only_kl.ce_BT[None], kl_BT=only_kl.kl_BT[None]),
        num_tokens=64,
    )
    assert out.loss.dtype == torch.float32
    assert 1e-6 < want.loss.item() < 1e-3
    assert abs(out.loss - want.loss) < 1e-3 * want.loss
    assert abs(rounded.loss - want.loss) > 0.5 * want.loss
    (grad,), (wide_grad,) = gradients(out.loss, hidden), gradients(want.loss, wide)
    assert grad.dtype == torch.bfloat16
    assert (grad - wide_grad).abs().max() <= 2**-8 * wide_grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_cast_in_parts(dtype, monkeypatch):
    monkeypatch.setattr("safeshape.kernels.project.CAST_ROWS", 100)
    x, _, weights = problem(40, 1000, bias=False, dtype=torch.float32)
    half = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in x.items()}
    up = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    for t in (half, up):
        t["hidden_NH"].requires_grad_()
        t["head_VH"].requires_grad_()
    got, want = (fused_shaped_loss(**t, weights=weights, num_tokens=40) for t in (half, up))
    assert abs(got.loss - want.loss) < 1e-5 * abs(want.loss)
    got.loss.backward()
    want.loss.backward()
    for name in ("hidden_NH", "head_VH"):
        a, b = half[name].grad, up[name].grad
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() <= 2**-8 * b.abs().max()


def test_autocast_changes_nothing_on_a_cpu():
    x, _, weights = problem(12, 50, bias=False, dtype=torch.float32)
    want = fused_shaped_loss(**x, weights=weights, num_tokens=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused_shaped_loss(**x, weights=weights, num_tokens=12)
        logp = fused_label_logp(x["hidden_NH"], x["head_VH"], x["labels_N"])
    got.loss.backward()
    assert got.loss == want.loss
    assert torch.equal(x["head_VH"].grad, gradients(want.loss, x["head_VH"])[0])
    assert torch.equal(logp, fused_label_logp(x["hidden_NH"], x["head_VH"], x["labels_N"]))


def test_mixed_types_are_computed_in_the_wider_one():
    x, _, weights = problem(12, 50, bias=False, dtype=torch.float32)
    wide = {**x, "hidden_NH": x["hidden_NH"].detach().bfloat16().requires_grad_()}
    up = {**x, "hidden_NH": wide["hidden_NH"].detach().float()}
    got = fused_shaped_loss(**wide, weights=weights, num_tokens=12).loss
    assert got == fused_shaped_loss(**up, weights=weights, num_tokens=12).loss
    got.backward()
    assert wide["hidden_NH"].grad.dtype == torch.bfloat16
    double = {**x, "hidden_NH": x["hidden_NH"].detach().double().requires_grad_()}
    fused_shaped_loss(**double, weights=weights, num_tokens=12).loss.backward()
    assert double["hidden_NH"].grad.dtype == torch.float64


class Backbone(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x
        self.body = torch.nn.Linear(5, 5, dtype=torch.float64)

    def forward(self, weights):
        x = {**self.x, "hidden_NH": torch.tanh(self.body(self.x["hidden_NH"]))}
        return fused_shaped_loss(**x, weights=weights, num_tokens=6).loss * 2


def test_works_inside_torch_compile_and_gradient_checkpointing():
    x, _, weights = problem(6, 9, bias=False)
    model = Backbone(x)
    want = torch.autograd.grad(model(weights), model.body.weight)[0]
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(torch.autograd.grad(compiled(weights), model.body.weight)[0], want, atol=1e-12)
    loss = torch.utils.checkpoint.checkpoint(model, weights, use_reentrant=False)
    assert torch.allclose(torch.autograd.grad(loss, model.body.weight)[0], want, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_label_log_probabilities(chunk_bytes):
    x, biases, _ = problem(9, 12)
    how = {"bias": biases["bias"], "logit_scale": 0.5, "softcap": 3.0}
    got = fused_label_logp(x["hidden_NH"], x["head_VH"], x["labels_N"], **how, chunk_bytes=chunk_bytes)
    logp = log_softmax(capped(x["hidden_NH"], x["head_VH"], biases["bias"], 0.5, 3.0))
    want = torch.where(x["labels_N"] == -100, 0.0, label_logp(logp, x["labels_N"].clamp(min=0)))
    assert torch.allclose(got, want, atol=1e-12)
    assert not got.requires_grad
    nothing = fused_label_logp(x["hidden_NH"][:0], x["head_VH"], x["labels_N"][:0])
    assert nothing.shape == (0,)


def test_chunks_have_the_size_asked_for():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(1024, 1000, torch.float32, cpu, 40_000) == 10
    assert chunk_rows(1024, 1000, torch.float32, cpu, 1) == 1
    assert chunk_rows(1024, 1000, torch.float32, cpu, None) == 64  # a sixteenth
    assert chunk_rows(100, 1000, torch.float32, cpu, None) == 32
    assert chunk_rows(9, 1000, torch.float32, cpu, None) == 9
    assert chunk_rows(8192, 2**17, torch.float32, cuda, None) == 512  # 256 MiB


def test_bad_input_is_refused_by_name():
    x, _, weights = problem(6, 9, bias=False)
    cases = [
        ({"divergence": "jsd"}, "unknown divergence 'jsd'"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"ref_hidden_NH": None, "ref_head_VH": None}, "there is no reference"),
        ({"labels_N": x["labels_N"][:5]}, "labels have shape"),
        ({"weights": Weights(ce_BT=weights.ce_BT[:5], kl_BT=weights.kl_BT)}, "ce weights have shape"),
        ({"head_VH": torch.zeros(9, 4)}, "head"),
        ({"ref_head_VH": torch.zeros(9, 4)}, "reference head"),
        ({"ref_hidden_NH": torch.zeros(5, 6)}, "5 reference hidden states"),
        (
            {"labels_N": torch.full((6,), 8), "ref_head_VH": x["ref_head_VH"][:8], "divergence": "k3"},
            "read at the label",
        ),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            fused_shaped_loss(**{**x, "weights": weights, "num_tokens": 1, **change})
