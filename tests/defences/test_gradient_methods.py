"""The mathematics of the methods that change gradients, on numbers that can be checked by hand."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_model
from defending import defend, loop_of, weight
from torch import nn
from training import lora

from safeshape.defences.averaging import Averaging
from safeshape.defences.embedding import Disturbed, drawn_layers
from safeshape.defences.hardening import Boosted, mmd
from safeshape.defences.lisa import Alternating
from safeshape.defences.stepping import ROW, Loop, Pass, token_mean
from safeshape.defences.surgery import Surgery, without_conflict
from safeshape.defences.weighting import RefusalWeights, Scheduler, best_rows
from safeshape.types import IGNORE

LN2 = math.log(2)


class Bits(nn.Module):
    """After token k the next token is one of 2^k equally likely ones, 0 among them: label 0 costs k ln 2."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.full((3, 4), -1e9))
        with torch.no_grad():
            for k in range(3):
                self.table[k, : 2**k] = 0.0

    def forward(self, input_ids, use_cache=False):
        return type("Output", (), {"logits": self.table[input_ids]})


def batch_of(*tokens, first=0):
    """Rows of one prompt token and the label 0."""
    ids = torch.tensor([[token, 0] for token in tokens])
    labels = torch.tensor([[IGNORE, 0] for _ in tokens])
    return {"input_ids": ids, "labels": labels, ROW: torch.arange(first, first + len(tokens))}


def pass_of(model, *batches):
    return Pass(model=model, batches=list(batches), autocast=nullcontext)


def real_loop(model, user, safe=None, epoch=0.0):
    return Loop(
        model=model, parameters=dict(model.named_parameters()), step=0, total_steps=10,
        user=user, safe=safe or user, harmful=user, epoch=epoch, drawn_rows=(safe or user).examples,
    )  # fmt: skip


# -- Lisa -------------------------------------------------------------------------------------------------------------


def test_lisa_pulls_to_where_the_other_turn_ended():
    """rho 2, turns of 1 alignment and 2 user steps. The user's gradient is 10, the alignment gradient 20."""
    w = weight(1.0)
    turns = Alternating(rho=2.0, align_steps=1, user_steps=2, warm_up=0.0)
    turns.start(nn.Module(), {"w": w})

    def step(number):
        w.grad = None
        loop = loop_of(w, user=lambda w: 10 * w.sum(), safe=lambda w: 20 * w.sum(), step=number)
        return float(turns.gradients(loop)), w.grad.item()

    def move(to, done):
        w.data = torch.tensor([to])
        turns.after(loop_of(w, step=done))

    assert step(0) == (20.0, 20.0)  # the very first step is never pulled
    move(4.0, 1)  # the alignment turn ends at 4
    assert step(1) == (40.0, 10.0)  # 10 * 4 + 1 * (4 - 4)^2, gradient 10 + 2 * 0
    move(7.0, 2)
    assert step(2) == (70.0 + 9.0, 10.0 + 2 * 3)  # still to 4
    move(5.0, 3)  # the user's turn ends at 5
    w.data = torch.tensor([8.0])
    assert step(3) == (160.0 + 9.0, 20.0 + 2 * 3)


def test_lisas_turns_and_warm_up():
    turns = Alternating(rho=1.0, align_steps=2, user_steps=3, warm_up=0.5)
    assert [turns.aligning(step) for step in range(7)] == [True, True, False, False, False, True, True]
    w = weight(1.0)
    turns.start(nn.Module(), {"w": w})
    w.data += 1
    # As in the released code, the pull begins after the step that the share of all steps falls on.
    for step, gradient in ((4, 5.0), (5, 0.0), (6, 1.0), (7, 6.0)):
        w.grad = None
        turns.gradients(loop_of(w, user=lambda w: 5 * w.sum(), safe=lambda w: 0 * w.sum(), step=step, total=10))
        assert w.grad.item() == gradient


# -- SafeGrad ---------------------------------------------------------------------------------------------------------


def test_a_conflicting_part_is_taken_out_and_the_alignment_gradient_added():
    """g_u = (1, 0), g_a = (-1, 1): <g_u, g_a> = -1, ||g_a||^2 = 2, so g_u + g_a / 2 = (0.5, 0.5)."""
    user, aligned = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-1.0, 1.0])}
    assert without_conflict(user, aligned)["w"].tolist() == [0.5, 0.5]
    assert without_conflict(user, {"w": torch.tensor([1.0, 1.0])})["w"].tolist() == [1.0, 0.0]
    # One inner product over all parameters: the conflict in `a` is outweighed by `b`.
    user, aligned = (
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
        {"a": torch.tensor([-1.0]), "b": torch.tensor([2.0])},
    )
    assert without_conflict(user, aligned) == user
    for rho, expected in ((1.0, [-0.5, 1.5]), (3.0, [-2.5, 3.5])):
        w = weight(0.0, 0.0)
        surgery = Surgery(rho=rho, temperature=1.0)
        surgery.gradients(loop_of(w, user=lambda w: w[0], safe=lambda w: w[1] - w[0]))
        assert w.grad.tolist() == expected


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.5 * LN2 + 0.5 * math.log(2 / 3)), (2.0, None)])
def test_safe_grads_divergence_is_from_the_start_to_now(temperature, expected):
    """The start gives (1/2, 1/2), the model now (1/4, 3/4): KL = ln(2)/2 + ln(2/3)/2."""
    model = Bits()
    surgery = Surgery(rho=1.0, temperature=temperature)
    surgery.start(model, {})
    inputs = batch_of(1)
    assert surgery.divergence(model, inputs, torch.tensor(1)).item() == 0
    with torch.no_grad():
        model.table[1, :2] = torch.tensor([math.log(1 / 4), math.log(3 / 4)])
    found = surgery.divergence(model, inputs, torch.tensor(1)).item()
    if expected is None:  # at temperature 2 the odds are 1 : sqrt(3)
        p = 1 / (1 + math.sqrt(3))
        expected = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert found == pytest.approx(expected, rel=1e-5)
    assert surgery.divergence(model, inputs, torch.tensor(4)).item() == pytest.approx(expected / 4, rel=1e-5)


def test_safe_grads_temperature_is_of_both_models():
    """The start gives odds of 1 : 9, at temperature 2 of 1 : 3; the model now 1 : 1: KL = ln(1/2)/4 + 3 ln(3/2)/4."""
    model = Bits()
    with torch.no_grad():
        model.table[1, :2] = torch.tensor([0.0, math.log(9)])
    surgery = Surgery(rho=1.0, temperature=2.0)
    surgery.start(model, {})
    with torch.no_grad():
        model.table[1, :2] = 0.0
    found = surgery.divergence(model, batch_of(1), torch.tensor(1)).item()
    assert found == pytest.approx(math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4, rel=1e-5)


def test_safe_grad_holds_an_adapter_to_the_base(tmp_path, tokenizer):
    """Under an adapter the reference is the base with the adapter off; a strong rho keeps the safe answers closer."""
    drifts = []
    for rho in (0.0, 30.0):
        spec = {"name": "safe_grad", "rho": rho}
        ended = defend(tmp_path, tokenizer, spec, settings={"max_steps": 6}, peft_config=lora())
        surgery, trainer = ended.trainer.stepper, ended.trainer
        batch = trainer._prepare_inputs(trainer._streams["safe"].at(0)[0])
        with torch.no_grad():
            ended.model.eval()
            drifts.append(float(surgery.divergence(ended.model, batch, torch.tensor(1.0))))
    assert 0 < drifts[1] < drifts[0]


# -- EMA --------------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_recursion():
    """decay 0.75 from 1 over 5 and 9: 0.75 * 1 + 0.25 * 5 = 2, then 0.75 * 2 + 0.25 * 9 = 3.75."""
    w = weight(1.0)
    averaging = Averaging(decay=0.75)
    averaging.start(nn.Module(), {"w": w})
    for value, expected in ((5.0, 2.0), (9.0, 3.75)):
        w.data = torch.tensor([value])
        averaging.after(loop_of(w))
        assert averaging.average["w"].item() == expected
    module = nn.Module()
    module.w = w
    averaging.finish(module)
    assert w.item() == 3.75


def test_the_average_of_half_precision_weights_is_kept_in_single():
    """256 and 257 have no bfloat16 between them: a hundredth of the way would be rounded away at every step."""
    w = nn.Parameter(torch.tensor([256.0], dtype=torch.bfloat16))
    averaging = Averaging(decay=0.99)
    averaging.start(nn.Module(), {"w": w})
    w.data += 2
    for _ in range(3):
        averaging.after(loop_of(w))
    assert averaging.state()["w"].item() == pytest.approx(258 - 2 * 0.99**3, abs=1e-4)
    assert averaging.state()["w"].dtype == torch.float32


# -- BDS and SEAL -----------------------------------------------------------------------------------------------------


def scheduler(**options):
    base = {"rows": 2, "learning_rate": 0.5, "first": 0.1, "safe_share": None, "decay": 0.0}
    return Scheduler(**{**base, **options})


def test_row_weights_are_one_on_average_and_weigh_the_users_loss():
    """omega (0, ln 3): w = 2 * (1/4, 3/4). Losses ln 2 and 2 ln 2: (0.5 * 1 + 1.5 * 2) / 2 = 1.75 ln 2, safe: ln 2."""
    model, learned = Bits(), scheduler()
    with torch.no_grad():
        learned.omega.copy_(torch.tensor([0.0, math.log(3)]))
    assert learned.row_weights().tolist() == pytest.approx([0.5, 1.5])
    loop = real_loop(model, pass_of(model, batch_of(1, 2)), pass_of(model, batch_of(1, 1)))
    assert float(learned.gradients(loop)) == pytest.approx(1.75 * LN2 + LN2, rel=1e-5)


def test_the_safe_mean_is_over_the_safe_rows_when_the_users_batch_is_short():
    """One row of the user's, (ln 2), weight 2 / 2; three safe rows of ln 2, 2 ln 2 and 0: their mean is ln 2."""
    model = Bits()
    loop = real_loop(model, pass_of(model, batch_of(1)), pass_of(model, batch_of(1, 2), batch_of(0)))
    assert float(scheduler().gradients(loop)) == pytest.approx(LN2 + LN2, rel=1e-5)


def test_omega_steps_down_for_rows_that_lose_more():
    """w = (1, 1), losses (ln 2, 2 ln 2): d omega = (-1, 1) * ln 2 / 4, whose first Adam step is the learning rate."""
    model, learned = Bits(), scheduler()
    learned.gradients(real_loop(model, pass_of(model, batch_of(1, 2))))
    assert learned.omega.tolist() == pytest.approx([0.6, -0.4], abs=1e-5)
    slow = scheduler(learning_rate=0.25)
    slow.gradients(real_loop(model, pass_of(model, batch_of(1, 2))))
    assert slow.omega.tolist() == pytest.approx([0.35, -0.15], abs=1e-5)
    model.zero_grad()


def test_seals_shares_fall_with_the_epochs():
    learned = scheduler(safe_share=0.9, decay=0.1)
    assert [learned.shares(epoch)[0] for epoch in range(3)] == pytest.approx([0.9, 0.8, 0.7])
    assert scheduler().shares(3) == (1.0, 1.0)
    model = Bits()
    loop = real_loop(model, pass_of(model, batch_of(2, 2)), pass_of(model, batch_of(1, 1)), epoch=1.3)
    assert float(learned.gradients(loop)) == pytest.approx(0.8 * LN2 + 0.2 * 2 * LN2, rel=1e-5)


def test_the_best_rows_stay_in_the_order_of_the_data():
    weights = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5])
    assert best_rows(weights, 0.8) == [0, 1, 3, 4]
    assert best_rows(weights, 0.4) == [1, 3]
    assert best_rows(weights, 0.01) == [1]


# -- Antibody ---------------------------------------------------------------------------------------------------------


def test_antibody_weighs_rows_by_their_distance_from_a_refusal(monkeypatch):
    """Refusals cost 3 ln 2, the answers 1 and 2 ln 2: odds 4 : 2, so the loss is (2/3 + 2 * 1/3) ln 2."""
    model = Bits()
    monkeypatch.setattr(
        RefusalWeights, "_refusal_nll", lambda self, model, inputs: torch.full((len(inputs[ROW]),), 3 * LN2)
    )
    stepper = RefusalWeights(None, tau=1.0, refusal="no")
    user = pass_of(model, batch_of(1), batch_of(2, first=1))
    assert stepper.weights(user).tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-5)
    assert float(stepper.gradients(real_loop(model, user))) == pytest.approx(4 / 3 * LN2, rel=1e-5)
    assert RefusalWeights(None, tau=0.5, refusal="no").weights(user).tolist() == pytest.approx([0.8, 0.2], rel=1e-5)
    # Token weights are spread over all tokens: a row of two tokens counts twice in the divisor.
    longer = {"input_ids": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[IGNORE, 0, 0]]), ROW: torch.tensor([0])}
    user = pass_of(model, longer, batch_of(2, first=1))
    first, second = stepper.weights(user).tolist()
    expected = (first * 2 * LN2 + second * 2 * LN2) / (2 * first + second)
    assert float(stepper.gradients(real_loop(model, user))) == pytest.approx(expected, rel=1e-5)


# -- Vaccine ----------------------------------------------------------------------------------------------------------


class DoublingAttention(nn.Module):
    def forward(self, states):
        return (2 * states, None)


class OneLayer(nn.Module):
    """Logits = 2 * embedding, through an attention that doubles."""

    def __init__(self):
        super().__init__()
        self.states = nn.Parameter(torch.tensor([[0.0, 0.0], [0.5, -0.5]]))
        self.attention = DoublingAttention()

    def forward(self, input_ids, use_cache=False):
        return type("Output", (), {"logits": self.attention(self.states[input_ids])[0]})


def test_vaccine_learns_at_the_worst_point_of_a_ball_around_the_attention_output():
    """Output z = (1, -1), label 0: e = softmax(z) - onehot = p * (-1, 1) with p = 1 / (1 + e^2), e / ||e|| =
    (-1, 1) / sqrt(2). At z + rho e / ||e|| the gradient is q * (-1, 1) with q = 1 / (1 + exp(2 - sqrt(2) rho)),
    times 2 for the doubling."""
    for rho in (0.0, 1.0, 3.0):
        model = OneLayer()
        disturbed = Disturbed(rho=rho)
        disturbed.start(model, {})
        loop = real_loop(model, pass_of(model, {**batch_of(1)}))
        loss = disturbed.gradients(loop)
        q = 1 / (1 + math.exp(2 - math.sqrt(2) * rho))
        assert model.states.grad[1].tolist() == pytest.approx([-2 * q, 2 * q], rel=1e-4)
        assert float(loss) == pytest.approx(-math.log(1 - q), rel=1e-4)


def test_vaccines_norm_is_over_all_micro_batches():
    """Two equal micro-batches of one row: each error is e / 2 of a mean, the norm sqrt(2) * ||e|| / 2."""
    model = OneLayer()
    disturbed = Disturbed(rho=1.0)
    disturbed.start(model, {})
    disturbed.gradients(real_loop(model, pass_of(model, batch_of(1), batch_of(1))))
    q = 1 / (1 + math.exp(2 - 2 * 1.0 / (math.sqrt(2) * math.sqrt(2))))
    assert model.states.grad[1].tolist() == pytest.approx([-2 * q, 2 * q], rel=1e-4)


def test_vaccine_disturbs_layers_below_the_first_adapter_too(tmp_path, tokenizer):
    """With adapters on the MLPs only, nothing that is trained lies before the first attention's output."""
    errors = {}

    class Watched(Disturbed):
        def errors(self, loop):
            errors.update(super().errors(loop))
            return errors

    from dataclasses import replace

    from peft import LoraConfig

    from safeshape.defences import resolve_defence

    mlps = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    defence = resolve_defence({"name": "vaccine", "epochs": 0.5})
    found = defend(tmp_path, tokenizer, replace(defence, stepper=lambda _: Watched(rho=1.0)), peft_config=mlps)
    assert {int(name.split("layers.")[1][0]) for _, name in errors} == {0, 1}
    assert all(error.abs().max() > 0 for error in errors.values())
    assert found.model is not None


def test_layers_are_drawn_in_proportion_and_without_repetition():
    assert drawn_layers(torch.tensor([0.0, 0.0, 1.0]), 1, 0) == [2]
    assert all(2 in drawn_layers(torch.tensor([0.0, 0.0, 1.0]), 2, seed) for seed in range(20))
    assert drawn_layers(torch.tensor([1.0, 3.0]), 8, 0) == [0, 1]
    ones = sum(drawn_layers(torch.tensor([1.0, 3.0]), 1, seed) == [1] for seed in range(400))
    assert 260 < ones < 340  # 300 expected, standard deviation below 9


def test_t_vaccine_moves_the_drawn_layers_only(tmp_path, tokenizer):
    spec = {"name": "t_vaccine", "layers": 1, "every": 100, "epochs": 1, "learning_rate": 1e-2}
    defend(tmp_path, tokenizer, spec)
    start = dict(tiny_model().named_parameters())
    hardened = type(tiny_model()).from_pretrained(tmp_path / "hardened")
    moved = {name for name, value in hardened.named_parameters() if not torch.equal(value, start[name])}
    layers = {name.split(".")[2] for name in moved}
    assert len(layers) == 1
    assert all(name.startswith("model.layers.") for name in moved)


# -- Booster and RepNoise ---------------------------------------------------------------------------------------------


def test_boosters_gradient_on_a_parabola():
    """f = w, h = w^2 at w = 3: grad h = 6, after a step of 0.1 it is 2 * 2.9 = 5.8; g = 1 + 5 * 0.2 = 2."""
    for strength, alpha, expected in ((5.0, 0.1, 2.0), (5.0, 0.2, 3.0), (0.0, 0.1, 1.0)):
        w = weight(3.0)
        loss = Boosted(strength=strength, alpha=alpha).gradients(
            loop_of(w, user=lambda w: w.sum(), harmful=lambda w: (w**2).sum())
        )
        assert w.grad.item() == pytest.approx(expected, rel=1e-4)
        assert float(loss) == 3.0
        assert w.item() == 3.0


def test_mmd_of_equal_and_of_single_points():
    """One point each: the mean distance d is the width, so every cross kernel is the sum of exp(-4 / 2^i)."""
    points = torch.randn(3, 4)
    assert mmd(points, points).item() == pytest.approx(0, abs=1e-6)
    cross = sum(math.exp(-4 / 2**i) for i in range(5))
    for gap in (1.0, 7.0):
        assert mmd(torch.zeros(1, 1), torch.full((1, 1), gap)).item() == pytest.approx(2 * 5 - 2 * cross, rel=1e-5)


def test_repnoise_raises_the_harmful_loss_and_its_knobs_matter(tmp_path, tokenizer):
    losses = {}
    for alpha, beta in ((0.0, 0.0), (20.0, 0.0), (0.0, 1.0)):
        spec = {"name": "repnoise", "alpha": alpha, "beta": beta, "epochs": 3, "learning_rate": 1e-3}
        folder = tmp_path / f"{alpha}{beta}"
        ended = defend(folder, tokenizer, spec, settings={"per_device_train_batch_size": 8})
        hardened = type(tiny_model()).from_pretrained(folder / "hardened")
        rows = ended.trainer._stream(harmful(), "harmful")
        with torch.no_grad():
            batch = rows.at(0)[0]
            losses[alpha, beta] = float(token_mean(hardened, batch, (batch["labels"][:, 1:] != IGNORE).sum()))
    assert losses[20.0, 0.0] > losses[0.0, 0.0] + 0.5
    assert losses[0.0, 1.0] != pytest.approx(losses[0.0, 0.0], abs=1e-4)


def harmful():
    from defending import harmful_rows

    return harmful_rows()


def test_repnoise_harm_term_is_the_mean_over_layers_in_a_logarithm(tokenizer):
    """-log(1 + (CE of the logits + CE through each layer's lens) / states), against a loop over the layers."""
    from safeshape.defences.hardening import Noised

    model = tiny_model()
    noised = Noised(alpha=2.0, beta=0.0)
    noised.start(model, {})
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, 9]])
    with torch.no_grad():
        found = noised.harm(model, {"input_ids": ids, "labels": labels}, torch.tensor(3))
        states = model(ids, output_hidden_states=True).hidden_states
        logits = [model(ids).logits] + [model.lm_head(model.model.norm(state)) for state in states]
        ces = [-(one[0, :-1].log_softmax(-1)[torch.arange(1, 4), labels[0, 2:]]).mean() for one in logits]
    assert len(states) == 3
    assert found.item() == pytest.approx(-2 * math.log(1 + float(sum(ces)) / 3), rel=1e-5)


def test_repnoise_names_what_a_model_lacks():
    from transformers import AutoConfig, AutoModelForCausalLM

    from safeshape.defences.hardening import Noised

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16)
    )
    noised = Noised(alpha=1.0, beta=1.0)
    noised.start(model, {})
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[IGNORE, 2, 3]])}
    with pytest.raises(ValueError, match="GPT2LMHeadModel lacks one"):
        noised.harm(model, inputs, torch.tensor(2))


def test_repnoise_refuses_a_batch_in_pieces(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="set gradient_accumulation_steps to 1"):
        defend(tmp_path, tokenizer, "repnoise", settings={"gradient_accumulation_steps": 2})
