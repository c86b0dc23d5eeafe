"""Tests of course_lib.objective: the library's loss, with fewer rows in the head."""

import pytest
import torch

from course_lib.batching import IGNORED, Example, collate, encode
from course_lib.objective import checked_sum, supervised_loss
from course_lib.runtime import CourseError, TrainingError
from tests.fixtures.rows import first_fast


def library_loss_and_gradients(base, batch):
    base.model.zero_grad()
    loss = base.model(**batch).loss
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in base.model.parameters()]


@pytest.mark.parametrize("name", first_fast(["tiny", "smollm2"]))
def test_loss_and_gradients_equal_the_librarys(request, name, records):
    base = request.getfixturevalue(name)
    batch = collate(
        [encode(record, base.tokenizer) for record in records], base.tokenizer.pad_token_id
    )
    expected_loss, expected_gradients = library_loss_and_gradients(base, batch)
    base.model.zero_grad()
    loss = supervised_loss(base.model, batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, atol=1e-6, rtol=0)
    scale = max(gradient.abs().max() for gradient in expected_gradients)
    for weight, expected in zip(base.model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(weight.grad / scale, expected / scale, atol=1e-6, rtol=0)
    base.model.zero_grad()


def test_loss_equals_cross_entropy_written_out(tiny):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1536, (3, 17), generator=generator)
    labels = torch.where(torch.rand(3, 17, generator=generator) < 0.5, ids, IGNORED)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    log_p = tiny.model(input_ids=ids).logits.log_softmax(-1)
    terms = [
        -log_p[n, t - 1, labels[n, t]]
        for n in range(3)
        for t in range(1, 17)
        if labels[n, t] != IGNORED
    ]
    torch.testing.assert_close(supervised_loss(tiny.model, batch), torch.stack(terms).mean())
    torch.testing.assert_close(
        supervised_loss(tiny.model, batch, reduction="sum"), torch.stack(terms).sum()
    )


def test_the_loss_leaves_no_hook_behind(tiny, records):
    batch = collate([encode(records[0], tiny.tokenizer)], tiny.tokenizer.pad_token_id)
    supervised_loss(tiny.model, batch)
    assert tiny.model(input_ids=batch["input_ids"]).logits.shape == (
        *batch["input_ids"].shape,
        1536,
    )


def test_a_batch_without_supervised_tokens_is_refused(tiny):
    batch = collate([Example([5, 6, 7], [IGNORED] * 3)], pad_id=2)
    with pytest.raises(CourseError, match="no supervised token"):
        supervised_loss(tiny.model, batch)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (3.0, "found a loss float"),
        (None, "found a loss NoneType"),
        (torch.ones(2, requires_grad=True), r"found a loss of shape \(2,\)"),
        (torch.ones(()), "depends on no weight that trains"),
    ],
)
def test_what_no_training_can_go_back_from_is_refused(loss, found):
    with pytest.raises(TrainingError, match=found):
        checked_sum(loss)


def test_a_loss_of_one_number_goes_through():
    loss = torch.ones(1, requires_grad=True)
    assert checked_sum(loss) is loss
