"""The flat example is the library, line by line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import byte_bpe, conversation, tiny_model
from datasets import Dataset

from safeshape import SafeTrainer
from safeshape.signals.column import score_dataset
from safeshape.signals.guards import load_guard

PATH = Path(__file__).parent.parent / "examples" / "flat_train.py"


@pytest.fixture
def flat():
    spec = importlib.util.spec_from_file_location("flat_train", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flat_train_gives_the_librarys_scores_losses_and_weights(flat, tmp_path):
    from trl import SFTConfig

    guard_tokenizer, tokenizer = byte_bpe(), byte_bpe()
    guard_tokenizer.add_tokens(["safe", "unsafe"])
    guard_model = tiny_model("qwen3", vocab_size=520)
    guard = load_guard({"safe": "safe", "unsafe": "unsafe"}, model=guard_model, tokenizer=guard_tokenizer)
    rows = [{"messages": conversation("one two", "three four five six seven eight nine " * n)} for n in (1, 2, 3, 2)]
    scored = score_dataset(Dataset.from_list(rows), guard.score_many)
    for row in scored:
        ours = [(s["end"], s["p_safe"]) for s in row["safety"]["spans"]]
        theirs = flat.chunk_scores(guard_model, guard_tokenizer, row["messages"])
        assert [end for end, _ in ours] == [end for end, _ in theirs]
        assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], abs=1e-5)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=flat.LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SafeTrainer(tiny_model(), args, train_dataset=scored, processing_class=tokenizer, policy="star")
    trainer.train()
    library = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model = tiny_model()
    batch = [
        flat.encode(tokenizer, r["messages"], flat.chunk_scores(guard_model, guard_tokenizer, r["messages"]))
        for r in rows
    ]
    assert flat.train(model, [batch] * 3) == pytest.approx(library, rel=1e-5)
    for mine, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_it_stays_short():
    assert len(PATH.read_text().splitlines()) <= 130
