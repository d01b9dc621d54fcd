"""STAR-DSS from beginning to end in one flat file, without the library: read this to see the whole method.

    python examples/flat_train.py MODEL_FOLDER GUARD_FOLDER DATA.jsonl OUTPUT_FOLDER

1. Score: a guard reads every partial answer; V = sigmoid(logit of "safe" - logit of "unsafe") at the end of each chunk
   of five words. 2. Align: each token of the answer takes the score of its chunk. 3. Train: V * cross-entropy +
   0.5 * (1 - V) * KL(policy || frozen start), summed over response tokens and divided by their number.
The test suite checks that its losses equal those of SafeTrainer. For anything but reading, use the library.
"""

import copy
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

CHUNK, KL_WEIGHT, BATCH, EPOCHS, LEARNING_RATE, SEED = 5, 0.5, 4, 2, 2e-4, 42


def load(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


# 1. Score. One forward per partial answer; the label tokens' raw logits give the probability of being safe.
def chunk_scores(guard, tokenizer, messages):
    """[(end character of the chunk, V), ...] for the last message."""
    answer = messages[-1]["content"]
    word_ends = [match.end() for match in re.finditer(r"\S+", answer)]
    ends = [end for end in word_ends[CHUNK - 1 :: CHUNK] if end < len(answer.rstrip())] + [len(answer)]
    safe, unsafe = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("safe", "unsafe"))
    scored = []
    for end in ends:
        partial = [*messages[:-1], {"role": "assistant", "content": answer[:end]}]
        text = tokenizer.apply_chat_template(partial, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = guard(ids).logits[0, -1]
        scored.append((end, torch.sigmoid(logits[safe] - logits[unsafe]).item()))
    return scored


# 2. Align. Characters are common ground between the guard's tokenizer and the model's.
def encode(tokenizer, messages, scores):
    """Token ids, labels (-100 before the answer) and V for each token. The end-of-turn token takes the last V."""
    answer = messages[-1]["content"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    head = len(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    per_character, start = [scores[-1][1]] * (len(text) - head), 0
    for end, value in scores:
        per_character[start:end] = [value] * (end - start)
        start = end
    assert text[head : head + len(answer)] == answer, "this short file does not handle templates that add or strip text"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels, values = encoded["input_ids"], [], []
    for token, (a, b) in zip(ids, encoded["offset_mapping"], strict=True):
        labels.append(token if a >= head else -100)
        values.append(min(per_character[a - head : b - head]) if a >= head else 0.0)
    return ids, labels, values


# 3. Train.
def pad(rows, fill):
    return torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])


def shaped_loss(model, reference, batch):
    ids = pad([ids for ids, _, _ in batch], 0)
    mask = pad([[1] * len(ids) for ids, _, _ in batch], 0)
    labels = pad([labels for _, labels, _ in batch], -100)[:, 1:]
    values = pad([values for _, _, values in batch], 0.0)[:, 1:]
    counted = labels != -100
    logp = F.log_softmax(model(ids, attention_mask=mask).logits[:, :-1][counted], -1)
    with torch.no_grad():
        ref_logp = F.log_softmax(reference(ids, attention_mask=mask).logits[:, :-1][counted], -1)
    ce = F.nll_loss(logp, labels[counted], reduction="none")
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    v = values[counted]
    return (v * ce + KL_WEIGHT * (1 - v) * kl).sum() / counted.sum()


def train(model, batches):
    """AdamW over the batches; returns the losses. The frozen start is the reference."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    model.train()
    for batch in batches:
        loss = shaped_loss(model, reference, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(model_folder, guard_folder, data_file, output_folder):
    guard, guard_tokenizer = load(guard_folder)
    model, tokenizer = load(model_folder)
    conversations = [json.loads(line)["messages"] for line in Path(data_file).read_text().splitlines()]
    rows = [encode(tokenizer, m, chunk_scores(guard, guard_tokenizer, m)) for m in conversations]
    order = torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(rows), generator=order).tolist()
        batches += [[rows[i] for i in shuffled[b : b + BATCH]] for b in range(0, len(rows), BATCH)]
    for step, loss in enumerate(train(model, batches)):
        print(f"step {step + 1:4d} of {len(batches)}  loss {loss:.4f}")
    model.save_pretrained(output_folder)
    tokenizer.save_pretrained(output_folder)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
