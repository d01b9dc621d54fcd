"""Names and mappings to defences; what is refused; the defences that only touch rows, layers or prompts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from defending import REFUSAL, base_model, defend, harmful_rows, safe_rows
from training import config, lora, rows
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from safeshape.data import conversation
from safeshape.defences import DEFENCES, Defence, resolve_defence, run_defence, save_defended, with_system_prompt
from safeshape.defences.freezing import layer_of, safety_layers
from safeshape.defences.nested import text_only
from safeshape.defences.records import Context
from safeshape.policies import POLICIES


def test_every_policy_is_a_defence_and_knows_who_may_score():
    assert set(POLICIES) < set(DEFENCES)
    assert resolve_defence({"name": "star", "kl": 0.25}).policy == {"name": "star", "kl": 0.25}
    assert resolve_defence("star").scores_by == ("guard",)
    assert resolve_defence("adaptive").scores_by == ("probe", "judge")
    assert resolve_defence("fixed_kl").needs == frozenset()


@pytest.mark.parametrize("name", sorted(DEFENCES))
def test_every_defence_says_where_it_is_from_and_is_named_by_its_row(name):
    defence = resolve_defence(name)
    assert defence.name == name
    assert defence.source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lissa", "unknown defence 'lissa'; known: sft"),
        ({"name": "lisa", "roh": 1}, "defence 'lisa' has no parameter 'roh'; it has: rho"),
        ({"name": "lisa", "rho": "high"}, "parameter 'rho' must be a number, got 'high'"),
        ({"name": "lisa", "rho": -1}, "rho must lie in"),
        ({"name": "lisa", "align_steps": 0}, "align_steps must be a whole number"),
        ({"name": "star", "kl": -1}, "kl must lie in"),
        ({"name": "safe_lora", "layers": 0}, "layers must be a whole number"),
        ({"name": "resta", "drop_rate": 1.0}, "drop_rate must lie in"),
        ({"name": "sppft", "first": 1.5}, "first must be a whole number"),
        ({"name": "ptst", "system_prompt": " "}, "system_prompt must be a text"),
        ({"name": "antibody", "refusal": ""}, "refusal must be a text"),
        ({"name": "seal", "keep": 0.0}, "keep must lie in"),
        ({"name": "t_vaccine", "every": 0}, "every must be a whole number"),
        ({"name": "lox", "rank": -1}, "rank must be a whole number"),
        ({"name": "antidote", "samples": 0}, "samples must be a whole number of at least 1"),
        ({"name": "safe_delta", "samples": 1.5}, "samples must be a whole number of at least 1"),
        ({"name": "bds", "first": float("nan")}, "first must lie in"),
        ({"name": "one_shot", "row": -1}, "row must be a whole number of at least 0"),
        ({"name": 3}, "name must be a string"),
        ("nowhere:thing", "cannot import defence"),
        ("training:rows", "does not give a Defence but list"),
        ("training:WORDS", "'training:WORDS' is not a function"),
        ("training:make", "defence 'training:make': missing a required argument: 'folder'"),
    ],
)
def test_bad_specifications_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_defence(spec)


def bare(folder, tokenizer, spec, *, data=None, **options):
    return run_defence(
        spec,
        tiny_model(),
        tokenizer,
        config(folder, max_steps=1),
        train_dataset=Dataset.from_list(data or rows()),
        **options,
    )


@pytest.mark.parametrize("name", [n for n in sorted(DEFENCES) if resolve_defence(n).needs])
def test_what_is_missing_is_named_before_anything_is_written(tmp_path, tokenizer, name):
    given = {"base": base_model(), "safe_data": safe_rows(), "harmful_data": harmful_rows()}
    arguments = {"base_model": "base", "safe_data": "safe_data", "harmful_data": "harmful_data"}
    for need in resolve_defence(name).needs:
        if need == "scores":
            plain = [{"messages": row["messages"]} for row in rows()]
            with pytest.raises(ValueError, match=f"{name!r} needs scores by a"):
                bare(tmp_path / "out", tokenizer, name, data=plain, **given)
        else:
            less = {key: value for key, value in given.items() if key != arguments[need]}
            with pytest.raises(ValueError, match=f"{name!r} needs {need.replace('_', ' ')}"):
                bare(tmp_path / "out", tokenizer, name, **less)
    assert not (tmp_path / "out").exists()


def test_a_defence_for_adapters_refuses_full_fine_tuning(tmp_path, tokenizer):
    only = replace(resolve_defence("sft"), trained="lora", name="mine")
    with pytest.raises(ValueError, match="'mine' works with a LoRA adapter only"):
        bare(tmp_path, tokenizer, only)
    with pytest.raises(ValueError, match="'mine' works with full fine-tuning only"):
        bare(tmp_path, tokenizer, replace(only, trained="full"), peft_config=lora())


def test_callbacks_of_the_defence_and_of_the_caller_both_run(tmp_path, tokenizer):
    seen = []

    class Seen(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_train_end(self, *arguments, **kwargs):
            seen.append(self.name)

    own = replace(resolve_defence("sft"), callbacks=lambda context: [Seen("defence")])
    bare(tmp_path, tokenizer, own, callbacks=[Seen("caller")])
    assert sorted(seen) == ["caller", "defence"]


# -- rows and prompts -------------------------------------------------------------------------------------------------


def context(tokenizer, folder, **given):
    return Context(tokenizer=tokenizer, args=config(folder), **given)


def test_safe_instruct_adds_that_share_of_different_safe_rows(tmp_path, tokenizer):
    safe, user = safe_rows(8), Dataset.from_list(rows())
    for share, count in ((0.25, 2), (1.0, 8), (0.0, 0)):
        mixed = resolve_defence({"name": "safe_instruct", "share": share}).prepare(
            user, context(tokenizer, tmp_path, safe_data=safe)
        )
        added = [row["messages"] for row in mixed][8:]
        assert len(added) == count
        assert all(messages[1]["content"] == REFUSAL for messages in added)
        assert len({messages[0]["content"] for messages in added}) == count
    with pytest.raises(ValueError, match="is 16 safe rows, and there are 8"):
        resolve_defence({"name": "safe_instruct", "share": 2.0}).prepare(
            user, context(tokenizer, tmp_path, safe_data=safe)
        )


def test_rows_of_every_form_are_learned_in_their_own():
    """Two plain strings are not put into a chat, and an earlier answer that is to be learned still is."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "p_safe": 0.5},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    plain = Dataset.from_list([{"prompt": "one", "completion": "two", "topic": "x"}])
    asked = Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:2]}])
    mixed = text_only(plain, Dataset.from_list([{"messages": talk, "safety": None}]), asked)
    assert mixed.column_names == ["messages", "prompt", "completion"]
    assert [conversation(row) is None for row in mixed] == [True, False, False]
    assert (mixed[0]["prompt"], mixed[0]["completion"]) == ("one", "two")
    assert mixed[1]["messages"][1]["p_safe"] == 0.5
    assert [message["content"] for message in mixed[2]["messages"]] == ["a", "b"]
    assert text_only(Dataset.from_list([{"messages": talk}])).column_names == ["messages"]
    with pytest.raises(ValueError, match="row 1: needs `messages`"):
        text_only(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}]))


def test_drop_risky_keeps_rows_at_or_above_its_threshold(tmp_path, tokenizer):
    data = rows(4)
    for row, p_safe in zip(data, (0.2, 0.5, 0.8, 0.49), strict=True):
        row["safety"]["p_safe"] = p_safe
    for threshold, kept in ((0.5, [1, 2]), (0.6, [2]), (0.0, [0, 1, 2, 3])):
        found = resolve_defence({"name": "drop_risky", "threshold": threshold}).prepare(
            Dataset.from_list(data), context(tokenizer, tmp_path)
        )
        assert found["messages"] == [data[index]["messages"] for index in kept]
    with pytest.raises(ValueError, match=r"every row scores below 0\.9"):
        resolve_defence({"name": "drop_risky", "threshold": 0.9}).prepare(
            Dataset.from_list(data), context(tokenizer, tmp_path)
        )
    data[2]["safety"] = None
    with pytest.raises(ValueError, match="train row 2: has no `safety` score"):
        resolve_defence("drop_risky").prepare(Dataset.from_list(data), context(tokenizer, tmp_path))


def test_ptst_trains_plainly_and_is_served_with_its_prompt(tmp_path, tokenizer):
    found = bare(tmp_path, tokenizer, {"name": "ptst", "system_prompt": "be safe"})
    plain = bare(tmp_path / "sft", tokenizer, "sft")
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), plain.model.parameters(), strict=True))
    asked = [{"role": "user", "content": "hi"}]
    assert with_system_prompt(asked, found.system_prompt) == [{"role": "system", "content": "be safe"}, *asked]
    assert with_system_prompt(asked, plain.system_prompt) == asked
    save_defended(found, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "safeshape.json").read_text())["system_prompt"] == "be safe"
    data = rows(2)
    data[1]["messages"] = [{"role": "system", "content": "x"}, *data[1]["messages"]]
    with pytest.raises(ValueError, match="train row 1: has a system message"):
        bare(tmp_path, tokenizer, "ptst", data=data)
    asked = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in data]
    with pytest.raises(ValueError, match="train row 1: has a system message"):
        bare(tmp_path, tokenizer, "ptst", data=asked)


# -- layers -----------------------------------------------------------------------------------------------------------


def test_sppft_freezes_the_share_of_layers_that_the_paper_froze():
    assert list(safety_layers(32, None, None)) == list(range(5, 15))
    assert list(safety_layers(4, None, None)) == [1]
    assert list(safety_layers(32, 3, 4)) == [3, 4]
    for first, last in ((0, 32), (5, 4), (-1, 2)):
        with pytest.raises(ValueError, match="are not among those of a model with 32"):
            safety_layers(32, first, last)
    assert layer_of("base_model.model.model.layers.12.self_attn.q_proj.weight") == 12
    assert layer_of("model.embed_tokens.weight") is None


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_sppft_moves_the_other_layers_only(tmp_path, tokenizer, adapter):
    options = {"peft_config": lora()} if adapter else {}
    for frozen in (0, 1):
        spec = {"name": "sppft", "first": frozen, "last": frozen}
        found = bare(tmp_path, tokenizer, spec, **options).model
        start = tiny_model()(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
        trained = {layer_of(name) for name, value in found.named_parameters() if value.requires_grad}
        assert frozen not in trained
        assert 1 - frozen in trained
        if adapter and frozen == 0:
            states = found.eval()(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
            assert torch.equal(states[1], start[1])


# -- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resta", "safe_lora", "ema"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_what_comes_out_is_what_is_saved(tmp_path, tokenizer, name, adapter):
    from peft import PeftModel

    options = {"peft_config": lora()} if adapter else {}
    found = defend(tmp_path / "run", tokenizer, name, **options)
    save_defended(found, tmp_path / "saved")
    is_adapter = (tmp_path / "saved" / "adapter_config.json").is_file()
    assert is_adapter == (adapter and name != "resta")
    if is_adapter:
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, found.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["lox", "booster"])
def test_a_model_whose_base_was_moved_is_saved_whole(tmp_path, tokenizer, name):
    """An adapter alone would be put on the model that the user named, and that is not what it was trained on."""
    found = defend(tmp_path / "run", tokenizer, name, peft_config=lora())
    save_defended(found, tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.allclose(logits, found.model.eval()(ids).logits, atol=1e-5)
        assert (logits - tiny_model()(ids).logits).abs().max() > 0.01


def test_a_hardening_that_was_cut_short_is_not_taken_for_a_model(tmp_path, tokenizer, monkeypatch):
    save = LlamaForCausalLM.save_pretrained

    def cut_short(model, folder, **options):
        save(model, folder, **options)
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        defend(tmp_path, tokenizer, {"name": "booster", "epochs": 1})
    assert not (tmp_path / "hardened").exists()
    monkeypatch.undo()
    defend(tmp_path, tokenizer, {"name": "booster", "epochs": 1})
    assert (tmp_path / "hardened" / "model.safetensors").is_file()
    assert not (tmp_path / "hardened.unfinished").exists()


def test_a_resumed_run_reads_its_hardened_model_and_its_chosen_rows_back(tmp_path, tokenizer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for spec, kept in (
        ({"name": "booster", "epochs": 1}, "hardened"),
        ({"name": "seal", "epochs": 1}, "seal_kept.json"),
    ):
        folder = tmp_path / spec["name"]
        whole = defend(folder, tokenizer, spec, settings=settings).model
        before = (folder / kept).stat().st_mtime_ns
        again = defend(
            folder, tokenizer, spec, settings=settings, resume_from_checkpoint=str(folder / "checkpoint-2")
        ).model
        assert (folder / kept).stat().st_mtime_ns == before
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_defence_is_frozen():
    with pytest.raises(AttributeError):
        Defence(name="a", stage="after", source="b").name = "c"
