"""The objective against closed forms, a naive loop and its own invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshape.losses import DIVERGENCES, shaped_loss
from safeshape.types import Weights

HALF = torch.tensor([[[0.0, 0.0]]])  # probabilities 1/2, 1/2
QUARTER = torch.tensor([[[0.0, math.log(3.0)]]])  # probabilities 1/4, 3/4
GOLDEN = {  # policy 1/2, 1/2; reference 1/4, 3/4; label 0
    "reverse": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "forward": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    "k2": 0.5 * math.log(2) ** 2,
    "k3": 0.5 - 1 + math.log(2),
}


def weights(ce: float, kl: float, like: torch.Tensor) -> Weights:
    full = torch.ones(like.shape)
    return Weights(ce_BT=ce * full, kl_BT=kl * full)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_have_their_closed_forms(name):
    labels = torch.tensor([[0]])
    out = shaped_loss(HALF, QUARTER, labels, weights(0.0, 1.0, labels), divergence=name, num_tokens=1)
    assert out.loss.item() == pytest.approx(GOLDEN[name], abs=1e-6)
    assert out.metrics["kl"].item() == pytest.approx(GOLDEN[name], abs=1e-6)


def test_cross_entropy_of_a_uniform_guess_is_log_2():
    labels = torch.tensor([[1]])
    assert shaped_loss(HALF, None, labels, weights(1.0, 0.0, labels), num_tokens=1).loss.item() == pytest.approx(
        math.log(2)
    )


def test_both_terms_are_divided_by_the_same_given_count():
    labels = torch.tensor([[0]])
    out = shaped_loss(HALF, QUARTER, labels, weights(0.5, 2.0, labels), divergence="reverse", num_tokens=4)
    assert out.loss.item() == pytest.approx((0.5 * math.log(2) + 2 * GOLDEN["reverse"]) / 4, abs=1e-6)


def test_metrics_are_unweighted_means_over_the_tokens_that_carry_the_weight():
    labels = torch.tensor([[0, 0, 0, 0, -100]])
    logits = torch.cat([HALF, QUARTER, HALF, QUARTER, HALF], dim=1)
    ref = torch.cat([QUARTER, QUARTER, QUARTER, HALF, HALF], dim=1)
    w = Weights(ce_BT=torch.tensor([[0.1, 0.2, 0.0, 0.0, 1.0]]), kl_BT=torch.tensor([[0.3, 0.0, 0.2, 0.0, 1.0]]))
    out = shaped_loss(logits, ref, labels, w, num_tokens=2)
    assert out.metrics["ce"].item() == pytest.approx((math.log(2) + math.log(4) + math.log(2)) / 3)
    assert out.metrics["kl"].item() == pytest.approx(GOLDEN["reverse"])
    assert (out.metrics["ce_tokens"].item(), out.metrics["kl_tokens"].item()) == (3, 2)


def test_rows_that_one_model_does_not_have_are_left_out_of_the_divergence_and_stay_in_the_cross_entropy():
    # Policy 1/4, 1/4, 1/2 and reference 1/4, 3/4: on the two shared rows it is 1/2, 1/2 against 1/4, 3/4.
    labels = torch.tensor([[0]])
    longer = torch.tensor([[[0.0, 0.0, math.log(2)]]])
    for name, want in GOLDEN.items():
        out = shaped_loss(longer, QUARTER, labels, weights(1.0, 1.0, labels), divergence=name, num_tokens=1)
        assert out.metrics["ce"].item() == pytest.approx(math.log(4))
        assert out.metrics["kl"].item() == pytest.approx(want, abs=1e-6)
        padded_ref = torch.cat([QUARTER, torch.full((1, 1, 1), 5.0)], dim=-1)
        out = shaped_loss(HALF, padded_ref, labels, weights(0.0, 1.0, labels), divergence=name, num_tokens=1)
        assert out.loss.item() == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="1 labels are outside the rows that the two heads share"):
        shaped_loss(longer, QUARTER, labels + 2, weights(0.0, 1.0, labels), divergence="k2", num_tokens=1)


def naive(logits, ref_logits, labels, w, divergence, num_tokens):
    total = 0.0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            y = int(labels[b, t])
            if y == -100:
                continue
            p, q = torch.softmax(logits[b, t], -1), torch.softmax(ref_logits[b, t], -1)
            d = math.log(q[y]) - math.log(p[y])
            value = {
                "reverse": float((p * (p / q).log()).sum()),
                "forward": float((q * (q / p).log()).sum()),
                "k2": 0.5 * d * d,
                "k3": math.exp(d) - 1 - d,
            }[divergence]
            total += float(w.ce_BT[b, t]) * -math.log(p[y]) + float(w.kl_BT[b, t]) * value
    return total / num_tokens


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(2, 7), st.sampled_from(sorted(DIVERGENCES)), st.integers(0, 10**6)
)
def test_equals_the_naive_loop(rows, tokens, vocab, divergence, seed):
    g = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(rows, tokens, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, vocab, (rows, tokens), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
    w = Weights(ce_BT=torch.rand(labels.shape, generator=g), kl_BT=torch.rand(labels.shape, generator=g))
    got = shaped_loss(logits, ref, labels, w, divergence=divergence, num_tokens=7).loss.item()
    assert got == pytest.approx(naive(logits, ref, labels, w, divergence, 7), abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_is_right_and_zero_at_the_reference(name):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    labels = torch.tensor([[1, 4, -100], [0, 0, 2]])
    w = Weights(ce_BT=torch.rand(2, 3, generator=g).double(), kl_BT=torch.rand(2, 3, generator=g).double())
    assert torch.autograd.gradcheck(
        lambda x: shaped_loss(x, ref, labels, w, divergence=name, num_tokens=5).loss, (logits,)
    )
    only_kl = Weights(ce_BT=torch.zeros(2, 3), kl_BT=torch.ones(2, 3))
    shaped_loss(logits, logits.detach(), labels, only_kl, divergence=name, num_tokens=5).loss.backward()
    assert logits.grad.abs().max() < 1e-12


def test_ignored_labels_change_nothing_whatever_their_weights():
    g = torch.Generator().manual_seed(2)
    logits, ref = torch.randn(1, 4, 6, generator=g), torch.randn(1, 4, 6, generator=g)
    labels = torch.tensor([[3, -100, 5, -100]])
    w = Weights(ce_BT=torch.rand(1, 4, generator=g), kl_BT=torch.rand(1, 4, generator=g))
    loud = Weights(ce_BT=w.ce_BT.clone(), kl_BT=w.kl_BT.clone())
    loud.ce_BT[labels == -100] = 1e9
    loud.kl_BT[labels == -100] = 1e9
    assert torch.equal(
        shaped_loss(logits, ref, labels, w, num_tokens=2).loss,
        shaped_loss(logits, ref, labels, loud, num_tokens=2).loss,
    )


def test_bfloat16_logits_are_compared_in_float32():
    logits = torch.randn(1, 1, 64).bfloat16()
    w = Weights(ce_BT=torch.zeros(1, 1), kl_BT=torch.ones(1, 1))
    out = shaped_loss(logits, logits, torch.tensor([[3]]), w, num_tokens=1)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == 0


def test_an_empty_batch_is_a_zero_loss_with_a_graph():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    labels = torch.full((1, 2), -100)
    out = shaped_loss(logits, logits.detach(), labels, weights(1.0, 1.0, labels), num_tokens=0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_bad_input_is_refused_by_name():
    labels = torch.tensor([[0]])
    with pytest.raises(ValueError, match="unknown divergence 'jsd'"):
        shaped_loss(HALF, QUARTER, labels, weights(1.0, 1.0, labels), divergence="jsd", num_tokens=1)
    with pytest.raises(ValueError, match="no reference logits"):
        shaped_loss(HALF, None, labels, weights(1.0, 1.0, labels), num_tokens=1)
    with pytest.raises(ValueError, match="ce weights have shape"):
        wrong = Weights(ce_BT=torch.ones(1, 2), kl_BT=torch.ones(1, 1))
        shaped_loss(HALF, QUARTER, labels, wrong, num_tokens=1)
