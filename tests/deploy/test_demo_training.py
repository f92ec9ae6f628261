"""Training of the demo model, on a tiny network."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo_model.train import hints
from deploy.demo_model.train.conversations import Conversation, turned
from deploy.demo_model.train.examples import MODEL_DIR, Example, examples
from deploy.demo_model.train.hints import NOWHERE, Sentences, pointing_loss
from deploy.demo_model.train.muon import orthogonalised
from deploy.demo_model.train.network import (
    Layer,
    Network,
    Shape,
    TiedLoss,
    blockwise_attention,
    causal_bias,
    logit_gradient,
    read_weights,
    write_model,
)
from deploy.demo_model.train.train import (
    ABSENT,
    CONTEXT,
    TRAINED,
    Cursor,
    DirectSource,
    Feed,
    Maker,
    Recipe,
    Stage,
    Trainer,
    packed,
)
from deploy.demo_model.train.words import Split, Words

PAD, BOS = 0, 1
SHAPE = Shape(vocab=16, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=8)
STAGES = (Stage(2048, 0.5, ((16, 8, 1.0),), 1), Stage(4096, 0.5, ((32, 4, 0.5), (16, 8, 0.5)), 2))
RECIPE = Recipe(stages=STAGES, warmup=4, pad=PAD)


def copies(seed: int, length: int) -> Iterator[Example]:
    """A few tokens, and the same ones again."""
    rng = random.Random(seed)
    while True:
        said = [rng.randrange(3, 16) for _ in range(rng.randrange(2, 4))]
        ids = [BOS, *said, 2, *said]
        middle = len(said) + 1
        yield Example(ids, [i > middle for i in range(len(ids))], ((middle, 0),))


def trainer(recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(Network(SHAPE), recipe, lambda: DirectSource(recipe, copies))


def mean_loss(made: Trainer, steps: int) -> float:
    before = made.tally.loss, made.tally.trained
    for _ in range(steps):
        assert made.step()
    return (made.tally.loss - before[0]) / (made.tally.trained - before[1])


def test_loss_falls_until_the_plan_is_fulfilled() -> None:
    made = trainer(replace(RECIPE, tokens_scale=2.0))
    first, last = mean_loss(made, 10), mean_loss(made, 80)
    assert last < 0.9 * first
    while made.step():
        pass
    assert made.cursor.tokens == 2 * (2048 + 4096)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    through, begun, resumed = trainer(), trainer(), trainer()
    mean_loss(through, 40)
    mean_loss(begun, 19)
    begun.save(tmp_path)
    resumed.load(tmp_path)
    mean_loss(resumed, 21)
    assert resumed.cursor == through.cursor
    for one, other in zip(through.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    made = trainer()
    for _ in range(2):
        made.step()
        made.save(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = trainer()
    made.step()
    made.save(tmp_path)
    other = Trainer(Network(replace(SHAPE, layers=1)), RECIPE, lambda: DirectSource(RECIPE, copies))
    with pytest.raises(ValueError, match="another shape"):
        other.load(tmp_path)


def test_micro_steps_add_up() -> None:
    whole, parts = trainer(), trainer(replace(RECIPE, micro_tokens=32))
    mean_loss(whole, 1)
    mean_loss(parts, 1)
    assert parts.tally.norm == pytest.approx(whole.tally.norm, rel=1e-4)


def test_transformers_loads_the_written_model(tmp_path: Path) -> None:
    made = trainer()
    mean_loss(made, 5)
    write_model(made.network, tmp_path, {"bos_token_id": BOS, "eos_token_id": 2, "pad_token_id": PAD})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        for p in made.network.parameters():
            p.copy_(p.bfloat16())
        ids = torch.randint(16, (2, 512), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(made.network.logits(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for rows, columns in ((48, 24), (24, 48), (32, 32)):
        matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonalised(matrices, torch.float32))
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_attention_in_blocks_is_causal_attention() -> None:
    q = torch.randn(2, 2, 3, 512, 8)
    k, v = torch.randn(2, 2, 512, 8), torch.randn(2, 2, 512, 8)
    expected = F.scaled_dot_product_attention(q, k[:, :, None], v[:, :, None], is_causal=True, scale=1.0)
    torch.testing.assert_close(blockwise_attention(q, k, v, causal_bias(512)), expected)


def test_tied_loss_is_the_weighted_cross_entropy() -> None:
    hidden, table = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets, weights = torch.randint(7, (9,)), torch.rand(9)
    total, each, hits = TiedLoss.apply(hidden, table, targets, weights, logit_gradient)  # type: ignore[no-untyped-call]
    losses = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    torch.testing.assert_close(each, losses)
    assert torch.equal(hits, (hidden @ table.T).argmax(-1) == targets)
    ours = torch.autograd.grad(total, (hidden, table))
    torch.testing.assert_close(ours, torch.autograd.grad((losses * weights).sum(), (hidden, table)))


def test_rows_hold_whole_examples_and_padding() -> None:
    rows = packed(copies(1, 20), 20, PAD)
    for _ in range(50):
        ids, kinds, looks = next(rows)
        assert len(ids) == len(kinds) == len(looks) == 20
        assert ids[0] == BOS
        for token, kind in zip(ids, kinds, strict=True):
            assert (kind == ABSENT) == (token in (PAD, BOS))
        assert {CONTEXT, TRAINED} <= set(kinds)
        # a token before the second half looks at the row's or its own example's first token
        assert {ids[target] for target in looks if target != NOWHERE} == {BOS}
        assert [i for i, target in enumerate(looks) if target != NOWHERE] == [i for i, t in enumerate(ids) if t == 2]


def test_a_batch_depends_on_its_number_only() -> None:
    in_order, alone = Maker(RECIPE, copies), Maker(RECIPE, copies)
    made = [in_order.batch(1, step) for step in range(41)]
    assert (alone.batch(1, 40).ids == made[40].ids).all()
    assert (alone.batch(1, 3).ids == made[3].ids).all()


def test_stages_follow_the_time_when_the_plan_is_of_minutes() -> None:
    timed, fraction = replace(RECIPE, minutes=1.0), 0.0
    feed = Feed(timed, DirectSource(timed, copies), Cursor(), lambda tokens: fraction)
    assert feed.take() is not None
    assert feed.cursor == Cursor(0, 1, 128)
    fraction = 0.6
    while feed.cursor.stage == 0:
        feed.take()
    assert feed.cursor.step == 1
    fraction = 1.0
    while feed.take():
        pass


def test_a_run_can_start_from_written_weights(tmp_path: Path) -> None:
    made, other = Network(SHAPE), Network(SHAPE)
    made.initialise(torch.Generator().manual_seed(1))
    write_model(made, tmp_path, {})

    read_weights(other, tmp_path)

    for ours, theirs in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.to(torch.bfloat16), theirs.to(torch.bfloat16))
    with pytest.raises(ValueError, match="shape"):
        read_weights(Network(replace(SHAPE, intermediate=32)), tmp_path)


def test_a_deeper_network_begins_as_the_shallower_one(tmp_path: Path) -> None:
    made, deeper = Network(SHAPE), Network(replace(SHAPE, layers=4))
    for network in (made, deeper):
        network.initialise(torch.Generator().manual_seed(1))
    write_model(made, tmp_path, {})
    read_weights(made, tmp_path)

    read_weights(deeper, tmp_path)

    ids = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(deeper.logits(ids), made.logits(ids))
    with pytest.raises(ValueError, match="layers"):
        read_weights(Network(replace(SHAPE, layers=1)), tmp_path)


def test_sentences_begin_behind_an_end_and_a_blank() -> None:
    sentences = Sentences(ends=torch.tensor([4, 5]), blanks=torch.tensor([6]))
    ids = torch.tensor([[1, 9, 4, 6, 9, 9, 6, 5, 9], [1, 5, 6, 4, 6, 7, 4, 4, 6]])
    assert sentences.starts(ids).tolist() == [[0, 0, 0, 0, 4, 4, 4, 4, 4], [0, 0, 0, 3, 3, 5, 5, 5, 5]]


def test_heads_learn_to_look_where_they_are_shown() -> None:
    recipe = replace(RECIPE, start_layer=0, look_layer=1, hint_weight=1.0)
    # what stands behind the 2 that ends the first half begins a sentence, and so does the row
    sentences = Sentences(ends=torch.arange(3, 16), blanks=torch.tensor([2]))
    shown = Trainer(Network(SHAPE), recipe, lambda: DirectSource(recipe, copies), sentences)
    shown.step()
    before = shown.tally.hints
    for _ in range(20):
        shown.step()
    assert [now < 0.8 * then for now, then in zip(shown.tally.hints, before, strict=True)] == [True, True]


def test_of_a_long_row_some_tokens_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(SHAPE)
    network.initialise(torch.Generator().manual_seed(1))
    layer, places = network.layers[0], network.places(8)
    assert isinstance(layer, Layer)
    x = torch.randn(2, 8, SHAPE.hidden, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([[0, 0, NOWHERE, 1, 2, 2, 3, 4], [NOWHERE] * 8])
    spread = torch.tensor([[0, NOWHERE, NOWHERE, NOWHERE, 2, NOWHERE, NOWHERE, 4], [NOWHERE] * 8])
    wanted = pointing_loss(layer, 0, x, places, spread, torch.float32)
    monkeypatch.setattr(hints, "SHOWN", 3)
    assert wanted.item() > 0
    torch.testing.assert_close(pointing_loss(layer, 0, x, places, targets, torch.float32), wanted)


def test_turned_facts_have_their_values_first() -> None:
    made = Conversation("turned")
    turned(Words(random.Random(3), Split.TRAIN), made, 240)
    text, *answers = (message["content"] for message in made.messages if message["role"] in ("user", "assistant"))
    assert len(made.messages) >= 4
    for answer in answers[::2]:
        value = re.split(r" is | belongs to ", answer.rstrip("."), maxsplit=1)[1]
        assert re.search(rf"(^|[ \n]){re.escape(value)} (is|owns) ", text)


def test_who_is_about_to_say_a_value_looks_at_its_statement() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    found = 0
    for example in islice(examples(9, 256), 200):
        said = [str(tokenizer.decode([token])) for token in example.ids]
        for source, target in example.looks:
            before, stated = "".join(said[: source + 1]), "".join(said[: target + 1])
            assert before.endswith((" is ", " belongs to "))
            key = re.split(r" (?:is|belongs to) $", before)[0].split()[-1]
            assert stated.endswith(f"{key}.")
            assert example.trained[source]
            found += 1
    assert found > 50
