"""The mathematics of the methods that change weights, on numbers that can be checked by hand."""

import math

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from defending import base_model, defend, harmful_rows, safe_rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import config

from safeshape.defences.arithmetic import dropped, low_rank
from safeshape.defences.changes import Change, changes, cosine, inner, linear_layers, lora_layers, onto
from safeshape.defences.nested import merged, trained_on
from safeshape.defences.projection import NarrowBasin, to_project
from safeshape.defences.pruning import chosen, inverse_factor, keep_mask, merged_delta, read_inputs
from safeshape.defences.records import Context, generator

ALL = {"target_modules": ["q_proj", "v_proj", "up_proj"]}


def adapter(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{**ALL, **options})


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(merged(model)).items()}


def alignment():
    base, start = linear_layers(base_model()), linear_layers(tiny_model())
    return {name: start[name].weight.detach() - base[name].weight.detach() for name in start}


def dense_c(v):
    return v @ v.T / v.norm()


def change(left, right=None):
    return Change(
        name="w", left_OK=torch.tensor(left), right_KI=None if right is None else torch.tensor(right), set_left=print
    )


# -- the projection shared by SafeLoRA, SafeMERGE and AsFT ------------------------------------------------------------


def test_the_projection_on_the_diagonal():
    """V = diag(3, 4), ||V|| = 5, C = diag(9, 16) / 5; C (1, 1) = (1.8, 3.2); its cosine with (1, 1) is
    5 / (sqrt(2) sqrt(3.24 + 10.24))."""
    v = torch.diag(torch.tensor([3.0, 4.0]))
    assert onto(v, torch.ones(2, 1))[:, 0].tolist() == pytest.approx([1.8, 3.2])
    expected = 5 / math.sqrt(2 * (3.24 + 10.24))
    assert cosine(change([[1.0], [1.0]], [[2.0, 7.0, -1.0]]), v) == pytest.approx(expected, rel=1e-6)
    assert cosine(change([[1.0], [1.0]]), v) == pytest.approx(expected, rel=1e-6)
    assert cosine(change([[0.0], [0.0]], [[1.0]]), v) == 1.0  # nothing was changed
    assert cosine(change([[1.0], [1.0]], [[1.0]]), torch.zeros(2, 2)) == 0.0  # alignment did nothing here
    assert onto(torch.zeros(2, 2), torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


def test_products_from_small_matrices_equal_those_from_large_ones():
    v, b, a = torch.randn(6, 5), torch.randn(6, 2), torch.randn(2, 5)
    assert torch.allclose(onto(v, b), dense_c(v) @ b, atol=1e-5)
    assert inner(b, 2 * b, a).item() == pytest.approx(((b @ a) * (2 * b @ a)).sum().item(), rel=1e-5)


def test_which_layers_are_projected():
    cosines = {"a": 0.3, "b": 0.5, "c": 0.4}
    assert to_project(cosines, 0.4, None) == {"a", "c"}
    assert to_project(cosines, -1.0, 1) == {"a"}
    assert to_project(cosines, -1.0, 9) == {"a", "b", "c"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_safe_lora_replaces_changes_that_are_off(tmp_path, tokenizer, kind):
    """Threshold 1 projects every change, -1 none; `layers` the so many of lowest cosine."""
    options = {"peft_config": adapter()} if kind == "lora" else {}
    plain = defend(tmp_path, tokenizer, {"name": "safe_lora", "threshold": -1}, **options)
    start, after, v = weights(tiny_model()), weights(plain.model), alignment()
    all_off = weights(defend(tmp_path, tokenizer, {"name": "safe_lora", "threshold": 1}, **options).model)
    one_off = weights(defend(tmp_path, tokenizer, {"name": "safe_lora", "layers": 1}, **options).model)
    sft = weights(defend(tmp_path, tokenizer, "sft", **options).model)
    moved = []
    for name, w0 in start.items():
        assert torch.equal(after[name], sft[name])
        expected = w0 + dense_c(v[name]) @ (after[name] - w0)
        assert torch.allclose(all_off[name], expected, atol=1e-5)
        if not torch.allclose(one_off[name], after[name], atol=1e-6):
            moved.append(name)
            assert torch.allclose(one_off[name], expected, atol=1e-5)
    assert len(moved) == 1


def test_safe_lora_refuses_what_is_not_b_a_and_another_base(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="with DoRA the change of a weight is not B A"):
        defend(tmp_path, tokenizer, "safe_lora", peft_config=adapter(use_dora=True))
    other = tiny_model("qwen3")
    context = Context(tokenizer=tokenizer, args=config(tmp_path), base=nn.Linear(2, 2), start=other)
    from safeshape.defences.changes import alignment_directions

    with pytest.raises(ValueError, match="is it the same family"):
        alignment_directions(other, context, "safe_lora")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_safe_merge_mixes_in_the_safe_change(tmp_path, tokenizer, kind):
    options = {"peft_config": adapter()} if kind == "lora" else {}

    def run(**parameters):
        return weights(defend(tmp_path, tokenizer, {"name": "safe_merge", **parameters}, **options).model)

    task, none_off = run(threshold=1, task=1.0), run(threshold=-1, task=0.0)
    safe, mixed = run(threshold=1, task=0.0), run(threshold=1, task=0.8)
    args = config(tmp_path, max_steps=2)
    context = Context(tokenizer=tokenizer, args=args, peft_config=options.get("peft_config"))
    direct = weights(trained_on(tiny_model(), safe_rows(), context, "x"))
    for name in task:
        assert torch.allclose(none_off[name], task[name], atol=1e-6)
        assert torch.allclose(safe[name], direct[name], atol=1e-6)
        assert torch.allclose(mixed[name], 0.8 * task[name] + 0.2 * safe[name], atol=1e-6)
    assert any((safe[name] - task[name]).abs().max() > 1e-3 for name in task)


# -- AsFT -------------------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Every shape that is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return found


def test_asfts_penalty_and_gradient_equal_the_dense_formula_without_a_square_matrix(tmp_path, tokenizer):
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), adapter(target_modules=["up_proj"]))  # 64 outputs, 32 inputs, rank 4
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    context = Context(tokenizer=tokenizer, args=config(tmp_path), base=base_model())
    basin, v = NarrowBasin(context, strength=3.0), alignment()
    basin.start(model, {})
    with Shapes() as shapes:
        penalty = basin.penalty()
        penalty.backward()
    assert not {shape for shape in shapes.seen if shape in ((64, 64), (32, 32))}
    found = {name: layer.lora_B["default"].weight.grad.clone() for name, layer in lora_layers(model).items()}
    model.zero_grad()
    dense = 0.0
    for name, layer in lora_layers(model).items():
        b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        dense = dense + 3.0 * ((torch.eye(64) - dense_c(v[name])) @ b @ a).square().sum()
    dense.backward()
    assert penalty.item() == pytest.approx(dense.item(), rel=1e-4)
    for name, layer in lora_layers(model).items():
        expected = layer.lora_B["default"].weight.grad
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_asft_keeps_changes_inside_the_directions_of_alignment(tmp_path, tokenizer, kind):
    """What lies outside shrinks with the strength; without strength it is plain fine-tuning."""
    options = {"peft_config": adapter()} if kind == "lora" else {}
    start, v, outside, runs = weights(tiny_model()), alignment(), [], []
    for strength in (0.0, 30.0):
        spec = {"name": "asft", "strength": strength}
        after = weights(defend(tmp_path, tokenizer, spec, settings={"max_steps": 6}, **options).model)
        runs.append(after)
        gaps = [after[name] - start[name] for name in start]
        outside.append(
            sum(((gap - dense_c(v[name]) @ gap) ** 2).sum().item() for name, gap in zip(start, gaps, strict=True))
        )
    sft = weights(defend(tmp_path, tokenizer, "sft", settings={"max_steps": 6}, **options).model)
    assert all(torch.allclose(runs[0][name], sft[name], atol=1e-5) for name in sft)
    assert outside[1] < 0.9 * outside[0]


# -- LoX and RESTA ----------------------------------------------------------------------------------------------------


def test_low_rank_of_a_diagonal():
    change = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    assert torch.allclose(low_rank(change, 2), torch.diag(torch.tensor([0.0, 3.0, 2.0])), atol=1e-6)
    assert torch.equal(low_rank(change, 0), change)
    assert torch.equal(low_rank(change, 5), change)


def test_lox_moves_the_start_along_its_alignment(tmp_path, tokenizer):
    from safeshape.defences.table import resolve_defence

    v, start, output = alignment(), weights(tiny_model()), tiny_model().lm_head.weight
    for strength, rank in ((1.0, 0), (0.5, 2)):
        defence = resolve_defence({"name": "lox", "strength": strength, "rank": rank})
        context = Context(tokenizer=tokenizer, args=config(tmp_path), base=base_model())
        moved = defence.before(tiny_model(), context)
        for name, weight in weights(moved).items():
            assert torch.allclose(weight, start[name] + strength * low_rank(v[name], rank), atol=1e-6)
        assert torch.equal(moved.lm_head.weight, output)


def test_dare_drops_and_rescales():
    change = torch.full((100, 100), 3.0)
    found = dropped(change, 0.25, generator(0))
    assert set(found.flatten().tolist()) == {0.0, 4.0}
    assert found.mean().item() == pytest.approx(3.0, abs=0.1)
    assert torch.equal(dropped(change, 0.0, generator(0)), change)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resta_adds_the_safety_vector(tmp_path, tokenizer, kind):
    options = {"peft_config": adapter()} if kind == "lora" else {}
    sft, v = weights(defend(tmp_path, tokenizer, "sft", **options).model), alignment()
    for strength in (0.5, 2.0):
        spec = {"name": "resta", "strength": strength, "drop_rate": 0.0}
        after = weights(defend(tmp_path, tokenizer, spec, **options).model)
        assert all(torch.allclose(after[name], sft[name] + strength * v[name], atol=1e-5) for name in sft)
    spec = {"name": "resta", "strength": 0.0, "drop_rate": 0.5}
    dare = weights(defend(tmp_path, tokenizer, spec, **options).model)
    start, name = weights(tiny_model()), "model.layers.0.self_attn.q_proj"
    ratio = (dare[name] - start[name]) / (sft[name] - start[name])
    assert sorted({round(value, 1) for value in ratio.flatten().tolist()}) == [0.0, 2.0]


# -- Antidote ---------------------------------------------------------------------------------------------------------


def test_the_most_important_weights_of_each_row_go():
    """|W| * ||X||: (10, 2, 3, 4) and (10, 12, 3, 4)."""
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-1.0, 12.0, -3.0, 4.0]])
    norms = torch.tensor([10.0, 1.0, 1.0, 1.0])
    assert keep_mask(weight, norms, 0.25).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert keep_mask(weight, norms, 0.5).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert keep_mask(weight, norms, 0.0).all()
    assert not keep_mask(weight, norms, 1.0).any()


def test_input_norms_leave_padding_out(tmp_path, tokenizer):
    model, found = tiny_model(), []
    layers = {"q": model.model.layers[1].self_attn.q_proj}
    for size in (1, 4):
        squares = torch.zeros(32)
        context = Context(tokenizer=tokenizer, args=config(tmp_path, per_device_train_batch_size=size))
        read_inputs(model, layers, harmful_rows(), context, 6, lambda name, x, to=squares: to.add_(x.square().sum(0)))
        found.append(squares)
    assert torch.allclose(*found, rtol=1e-4)
    fewer = torch.zeros(32)
    read_inputs(model, layers, harmful_rows(), context, 3, lambda name, x: fewer.add_(x.square().sum(0)))
    assert (fewer < found[0]).all()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_antidote_zeroes_that_share_of_each_row(tmp_path, tokenizer, kind):
    options = {"peft_config": adapter()} if kind == "lora" else {}
    plain = defend(tmp_path, tokenizer, "sft", **options).model
    after = defend(tmp_path, tokenizer, {"name": "antidote", "dense_ratio": 0.25}, **options).model
    before = dict(plain.named_parameters())
    zeroed = set()
    for name, value in after.named_parameters():
        lost = (value == 0) & (before[name] != 0)
        if lost.any():
            zeroed.add(name.split(".")[-3 if kind == "lora" else -2])
            assert (lost.sum(-1) == value.shape[1] // 4).all(), name
        assert torch.equal(value[~lost], before[name][~lost])
    assert zeroed == ({"lora_A", "lora_B"} if kind == "lora" else {"q_proj", "k_proj", "v_proj"})


# -- Safe Delta -------------------------------------------------------------------------------------------------------


def test_cheap_entries_are_kept_within_the_budget():
    """H = diag(1, 4): H^-1 = diag(1, 1/4), U = diag(1, 1/2), so entries cost delta^2 * (1, 4)."""
    factor = inverse_factor(torch.diag(torch.tensor([1.0, 4.0])), 0.0)
    assert torch.allclose(factor, torch.diag(torch.tensor([1.0, 0.5])))
    delta = torch.tensor([[1.0, 1.0]])
    for budget, kept in ((0.5, [False, False]), (1.0, [True, False]), (4.9, [True, False]), (5.0, [True, True])):
        assert chosen(delta, factor.diagonal(), budget)[0].tolist() == kept
    ones = torch.ones(10, 10)
    assert chosen(ones, torch.ones(10), 1e9).sum() == 85  # 15 in 100 are never kept


def test_dead_inputs_and_damping():
    """A dead input counts as 1; damping adds its share of the mean diagonal: diag(3, 1) + 0.5 * 2 = diag(4, 2)."""
    factor = inverse_factor(torch.diag(torch.tensor([3.0, 0.0])), 0.5)
    assert factor.diagonal().square().tolist() == pytest.approx([1 / 4, 1 / 2])


def test_what_is_not_kept_makes_good_for_what_is():
    """The best second weight for a change d of the first minimises e^T H e: its change is -d H_10 / H_11."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    factor = inverse_factor(hessian, 0.0)
    w0, tuned = torch.tensor([[1.0, 1.0]] * 4096), torch.tensor([[1.5, 9.0]] * 4096)
    # 4096 rows: the budget is s / 2 * mean cost, here enough for the first column and not for any of the second.
    mean = (1 / factor.diagonal().square()).mean()
    spent = 4096 * 0.25 / factor[0, 0].square()
    found = merged_delta(w0, tuned, factor, float(2 * (spent + 1) / mean), sub=1)
    assert torch.allclose(found, torch.tensor([[1.5, 1.0 - 0.5 * 1.0 / 4.0]] * 4096), atol=1e-5)
    # In blocks of one column: each has a budget of its own and 15 rows in 100 that are never kept; 16 of the dear
    # second entries fit into the budget of 1024 mean costs as well.
    across = merged_delta(w0, tuned, factor, 2 * 1024.001, block=1, sub=1)
    assert torch.allclose(across[16:3480], torch.tensor([1.5, 0.875]), atol=1e-5)
    assert torch.allclose(across[3490:], torch.tensor([1.0, 1.0]), atol=1e-5)
    assert (across[:15, 1] == 9.0).all()


def test_safe_delta_between_the_start_and_the_tuned_model(tmp_path, tokenizer):
    """Without a budget the aligned weights come out; with ever more of it more of the change."""
    start, kept = weights(tiny_model()), []
    for s in (0.0, 0.3, 1e9):
        ended = defend(tmp_path, tokenizer, {"name": "safe_delta", "s": s}, peft_config=adapter())
        after = weights(ended.model)
        kept.append(sum((after[name] - start[name]).square().sum().item() for name in start))
    assert kept[0] == 0
    assert kept[0] < kept[1] < kept[2]


# -- One-shot ---------------------------------------------------------------------------------------------------------


def test_one_shot_teaches_its_one_row(tmp_path, tokenizer):
    from safeshape.signals.antibody import answer_nll

    safe = safe_rows(2)
    safe = Dataset.from_list(
        [safe[0], {"messages": [*safe[1]["messages"][:1], {"role": "assistant", "content": "ten ten fox"}]}]
    )

    def nll(**parameters):
        spec = {"name": "one_shot", "learning_rate": 1e-2, **parameters}
        model = defend(tmp_path, tokenizer, spec, safe=safe).model.eval()
        with torch.no_grad():
            return answer_nll(model, tokenizer, [row["messages"] for row in safe]).tolist()

    first, second, longer = nll(row=0, epochs=3), nll(row=1, epochs=3), nll(row=0, epochs=8)
    still = nll(row=0, epochs=3, learning_rate=1e-9)
    assert first[0] < still[0] - 0.5
    assert longer[0] < first[0]
    assert second[1] < first[1]
    with pytest.raises(ValueError, match="row 2 is not among the 2 rows"):
        nll(row=2)


def test_changes_need_the_start_for_full_fine_tuning(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="'x' needs start"):
        changes(tiny_model(), Context(tokenizer=tokenizer, args=config(tmp_path)), "x")
