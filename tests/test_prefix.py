"""Tests of course_lib.prefix: virtual tokens equal those of peft, and a prefix of a text equals the
text in front, whichever way it is padded, packed, cached or checkpointed.
"""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft import initialize_kv_prefix_from_text as from_text
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from course_lib import evaluation, models, surgery
from course_lib.batching import collate, collate_packed, encode_records
from course_lib.memory import checkpoint_blocks
from course_lib.objective import supervised_loss
from course_lib.prefix import (
    add_prefix,
    add_soft_prompt,
    fold,
    remove_virtual_tokens,
    states_of,
    virtual_tokens,
)
from course_lib.runtime import CourseError
from tests.fixtures.models import IDS, fresh_tiny, logits, small_gpt2, with_random_biases
from tests.fixtures.runs import RECORDS

P = 4
TEXT = [3, 11, 7, 2]


def small_qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return with_random_biases(AutoModelForCausalLM.from_config(config))


BASES = {
    "tiny": lambda: fresh_tiny().model,
    "qwen2": small_qwen2,
    "gpt2": lambda: with_random_biases(small_gpt2()),
}
every_base = pytest.mark.parametrize("base", BASES)
KINDS = {  # name: what adds it here, and in peft
    "prompt": ((add_soft_prompt, {}), (PromptTuningConfig, {})),
    "P-tuning, MLP": (
        (add_soft_prompt, {"encoder": "mlp", "hidden": 6}),
        (PromptEncoderConfig, {"encoder_hidden_size": 6}),
    ),
    "P-tuning, LSTM": (
        (add_soft_prompt, {"encoder": "lstm", "hidden": 6}),
        (
            PromptEncoderConfig,
            {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
        ),
    ),
    "prefix": ((add_prefix, {}), (PrefixTuningConfig, {})),
    "prefix, MLP": (
        (add_prefix, {"hidden": 6}),
        (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 6}),
    ),
}
KINDS |= {
    f"{name}, zero": ((add, ours | {"start": "zero"}), (config, theirs | {"init_weights": "zero"}))
    for name, ((add, ours), (config, theirs)) in KINDS.items()
    if name.startswith("prefix")
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def with_tokens(kind, model, seed=0):
    (add, options), _ = KINDS[kind]
    add(model, P, seed=seed, **options)
    return model


def in_peft(kind, model, seed=0):
    _, (config, options) = KINDS[kind]
    torch.manual_seed(seed)
    return get_peft_model(
        model, config(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    ).eval()


def pairs(ours, theirs):
    """The weights of our virtual tokens, and those of the same place in peft."""
    encoder = theirs.prompt_encoder["default"]
    parts = [(virtual_tokens(ours).table, encoder.embedding.weight)]
    theirs = dict(encoder.named_parameters())
    theirs.pop("embedding.weight")
    network = virtual_tokens(ours).network
    own = dict(network.named_parameters()) if network else {}
    assert len(own) == len(theirs)
    return parts + [(own[mine], theirs[name]) for mine, name in zip(own, theirs, strict=True)]


def answer_loss(model, ids=IDS):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


def padded(rows, side, pad_id=0):
    """input_ids and attention_mask of rows of unequal length."""
    longest = max(map(len, rows))
    filler = [[pad_id] * (longest - len(row)) for row in rows]
    order = (lambda row, pads: pads + row) if side == "left" else (lambda row, pads: row + pads)
    ids = [order(row, pads) for row, pads in zip(rows, filler, strict=True)]
    mask = [order([1] * len(row), [0] * len(pads)) for row, pads in zip(rows, filler, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


# --- the start, and agreement with peft


@every_kind
def test_the_start_is_pefts_number_for_number(kind):
    ours, theirs = with_tokens(kind, small_qwen2(), seed=3), in_peft(kind, small_qwen2(), seed=3)
    for mine, other in pairs(ours, theirs):
        assert torch.equal(mine, other)


@every_base
@every_kind
def test_logits_gradients_and_replies_equal_pefts(kind, base):
    ours, theirs = with_tokens(kind, BASES[base]()), in_peft(kind, BASES[base](), seed=7)
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            mine.copy_(other.normal_(std=0.5))
    found = ours(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    assert (found - expected).abs().max() <= 1e-5
    answer_loss(ours).backward()
    answer_loss(theirs).backward()
    for mine, other in pairs(ours, theirs):
        assert (mine.grad - other.grad).abs().max() <= 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(IDS)
    assert torch.equal(
        ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options)
    )


def test_a_prompt_that_starts_from_a_text_has_pefts_vectors(tiny):
    text = "Name the capital of Peru."
    ids = tiny.tokenizer(text)["input_ids"]
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(ids),
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(models.tiny_folder()),
    )
    theirs = get_peft_model(fresh_tiny().model, config)
    add_soft_prompt(tiny.model, len(ids), start=ids)
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(virtual_tokens(tiny.model).table, expected)


def test_a_prompt_that_starts_from_the_vocabulary_holds_embeddings_as_pefts_does(tiny):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prompt_tuning_init="SAMPLE_VOCAB"
    )
    theirs = get_peft_model(fresh_tiny().model, config).prompt_encoder["default"].embedding.weight
    rows = {tuple(row) for row in tiny.model.get_input_embeddings().weight.tolist()}
    add_soft_prompt(tiny.model, P, start="vocabulary")
    for table in (virtual_tokens(tiny.model).table, theirs):
        assert {tuple(row) for row in table.tolist()} <= rows
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(tiny.model.get_input_embeddings().weight), (P,), generator=generator)
    expected = tiny.model.get_input_embeddings().weight[drawn]
    assert torch.equal(virtual_tokens(tiny.model).table, expected)


def test_a_prefix_of_a_text_has_the_states_that_peft_takes(tiny):
    text = "Name the capital of Peru."
    ids = tiny.tokenizer(text)["input_ids"]
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(ids))
    theirs = get_peft_model(fresh_tiny().model, config).eval()
    from_text(theirs, tiny.tokenizer, text=text, use_chat_template=False)
    states = states_of(tiny.model, ids)
    assert (states - theirs.prompt_encoder["default"].embedding.weight).abs().max() <= 1e-5
    add_prefix(tiny.model, len(ids), start=states)
    assert (logits(tiny.model) - logits(theirs)).abs().max() <= 1e-5


def test_pefts_prefix_counts_positions_of_a_row_padded_on_the_left_from_its_padding(tiny):
    """Measured: a row alone and the same row behind three paddings differ by 0.035 in peft."""
    ours, theirs = tiny.model, in_peft("prefix", fresh_tiny().model)
    states = states_of(ours, TEXT)
    add_prefix(ours, P, start=states)
    pairs(ours, theirs)[0][1].data.copy_(states)
    ids, mask = padded([[5, 6, 7], [9, 8, 7, 6, 5, 4]], "left")
    differences = []
    for model in (ours, theirs):
        with torch.no_grad():
            alone = model(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:]).logits[0]
            batch = model(input_ids=ids, attention_mask=mask).logits[0, 3:]
        differences.append((alone - batch).abs().max())
    assert differences[0] <= 1e-4
    assert differences[1] > 1e-2


# --- the mathematical property: a prefix of a text is the text in front


@every_base
def test_a_prefix_of_a_text_computes_what_the_text_in_front_computes(base):
    plain, model = BASES[base](), BASES[base]()
    add_prefix(model, len(TEXT), start=states_of(model, TEXT))
    front = torch.tensor([TEXT] * len(IDS))
    with torch.no_grad():
        expected = plain(torch.cat([front, IDS], 1)).logits[:, len(TEXT) :]
    assert (logits(model) - expected).abs().max() <= 1e-4


@every_base
def test_a_soft_prompt_of_a_text_computes_what_the_text_in_front_computes(base):
    plain, model = BASES[base](), BASES[base]()
    add_soft_prompt(model, len(TEXT), start=TEXT)
    front = torch.tensor([TEXT] * len(IDS))
    with torch.no_grad():
        expected = plain(torch.cat([front, IDS], 1)).logits[:, len(TEXT) :]
    assert (logits(model) - expected).abs().max() <= 1e-4


ADD_TEXT = {
    "prefix": lambda model: add_prefix(model, len(TEXT), start=states_of(model, TEXT)),
    "soft prompt": lambda model: add_soft_prompt(model, len(TEXT), start=TEXT),
}
both = pytest.mark.parametrize("added", ADD_TEXT)


@both
@every_base
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_computes_what_it_computes_alone(added, base, side):
    model = BASES[base]()
    ADD_TEXT[added](model)
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask).logits
        for row, found, kept in zip(rows, batch, mask.bool(), strict=True):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            assert (found[kept] - alone).abs().max() <= 1e-4


GENERATION = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "two of them": {"num_beams": 2, "num_return_sequences": 2},
    "a static cache": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 2},
}


WAYS = [("prefix", how) for how in GENERATION]
WAYS += [("soft prompt", how) for how in list(GENERATION)[:4]]  # the others are refused


@every_base
@pytest.mark.parametrize(("added", "how"), WAYS)
def test_it_goes_on_as_the_text_in_front_does(added, base, how):
    plain, model = BASES[base](), BASES[base]()
    ADD_TEXT[added](model)
    ids, mask = padded([[5, 6, 7], [9, 8, 7, 6, 5, 4]], "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= GENERATION[how]
    found = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    front = torch.tensor([TEXT] * 2)
    for place, pads in enumerate((3, 0)):  # without padding, each alone
        row = torch.cat([front[place], ids[place, pads:]])[None]
        expected = plain.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
        number = len(expected)
        replies = found[place * number : (place + 1) * number]
        assert torch.equal(replies, expected[:, row.shape[1] :])


@every_base
def test_a_prefix_goes_on_from_a_cache_that_the_user_gives(base):
    model = BASES[base]()
    ADD_TEXT["prefix"](model)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True}
    ids = IDS[:1]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)
    later = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **options,
    )
    assert torch.equal(later.sequences, whole.sequences)


@every_base
def test_step_by_step_with_a_cache_the_logits_are_those_of_one_pass(base):
    for add in ADD_TEXT.values():
        model = BASES[base]()
        add(model)
        with torch.no_grad():
            first = model(IDS[:, :3], use_cache=True)
            last = model(IDS[:, 3:], past_key_values=first.past_key_values).logits
        stepped = torch.cat([first.logits, last], 1)
        torch.testing.assert_close(stepped, logits(model), atol=1e-5, rtol=0)


def test_generation_from_embeddings_equals_that_from_ids(tiny):
    for add in ADD_TEXT.values():
        model = copy.deepcopy(tiny.model)
        add(model)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(IDS)
        embedded = model.get_input_embeddings()(IDS)
        found = model.generate(inputs_embeds=embedded, **options)
        assert torch.equal(found, model.generate(IDS, **options)[:, IDS.shape[1] :])


def test_replies_of_a_batch_are_those_of_one_by_one(tiny):
    prompts = [
        tiny.tokenizer(text)["input_ids"] for text in ("Say 3.", "Say the number 12, please.")
    ]
    for add in ADD_TEXT.values():
        base = fresh_tiny()
        add(base.model)
        together = evaluation.generate(base, prompts, 8)
        assert together == evaluation.generate(base, prompts, 8, batch_size=1)


def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(tiny):
    examples = encode_records(RECORDS[:4], tiny.tokenizer, 1000).examples
    ADD_TEXT["prefix"](tiny.model)
    pad_id = tiny.tokenizer.pad_token_id
    packed = collate_packed([examples[:2], examples[2:]], pad_id, tiny.model)
    loss, packed_loss = (
        supervised_loss(tiny.model, batch) for batch in (collate(examples, pad_id), packed)
    )
    assert (loss - packed_loss).abs() <= 1e-5
    expected, found = (
        gradients(tiny.model, lambda model, batch=batch: supervised_loss(model, batch))
        for batch in (collate(examples, pad_id), packed)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@both
@every_base
@pytest.mark.parametrize("how", ["some blocks", "all blocks", "reentrant"])
def test_checkpointed_activations_have_the_same_gradients(added, base, how):
    model = BASES[base]()
    ADD_TEXT[added](model)
    expected = gradients(model, answer_loss)
    model.config.use_cache = False
    if how == "some blocks":
        checkpoint_blocks(model, 1)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    for module in model.modules():  # train mode of the model, without its dropout
        module.training = not isinstance(module, nn.Dropout)
        if isinstance(getattr(module, "attn_dropout", None), nn.Dropout):
            module.attn_dropout.p = 0.0
    torch.testing.assert_close(gradients(model, answer_loss), expected, atol=1e-6, rtol=0)


@every_kind
def test_a_later_token_changes_no_earlier_logits(kind, tiny):
    model = with_tokens(kind, tiny.model)
    other = IDS.clone()
    other[:, 3] += 20
    with torch.no_grad():
        before, after = model(IDS).logits, model(other).logits
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


@every_kind
def test_folding_keeps_what_is_computed_and_leaves_a_table_that_trains(kind, tiny):
    model = with_tokens(kind, tiny.model)
    before = logits(model)
    fold(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    (weight,) = (weight for weight in model.parameters() if weight.requires_grad)
    assert weight is virtual_tokens(model).table


def test_the_loss_of_the_library_is_the_loss_of_training(tiny):
    examples = encode_records(RECORDS[:3], tiny.tokenizer, 1000).examples
    batch = collate(examples, tiny.tokenizer.pad_token_id)
    for add in ADD_TEXT.values():
        model = copy.deepcopy(tiny.model)
        add(model)
        assert (model(**batch).loss - supervised_loss(model, batch)).abs() <= 1e-5


@pytest.mark.parametrize("keep", [1, 3, 7, torch.tensor([0, 2])])
def test_a_soft_prompt_gives_the_logits_that_were_asked_for(keep, tiny):
    ADD_TEXT["soft prompt"](tiny.model)
    places = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    with torch.no_grad():
        found = tiny.model(IDS, logits_to_keep=keep).logits
    torch.testing.assert_close(found, logits(tiny.model)[:, places], atol=1e-5, rtol=0)


# --- numbers of weights


def gpt2(layers, width, heads):
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


COUNTS = [  # config, what is added, weights that train
    (gpt2(24, 1024, 16), lambda model: add_prefix(model, 5), 245_760),
    (gpt2(24, 1024, 16), lambda model: add_prefix(model, 10), 491_520),
    (gpt2(12, 768, 12), lambda model: add_prefix(model, 20), 368_640),
    (gpt2(12, 768, 12), lambda model: add_prefix(model, 20, hidden=512), 9_864_704),
    (
        gpt2(12, 768, 12),
        lambda model: add_soft_prompt(model, 20, encoder="mlp", hidden=128),
        229_376,
    ),
    (
        gpt2(12, 768, 12),
        lambda model: add_soft_prompt(model, 20, encoder="lstm", hidden=128),
        1_593_344,
    ),
    (
        LlamaConfig(hidden_size=4096, num_hidden_layers=2),
        lambda model: add_soft_prompt(model, 5),
        20_480,
    ),
]


@pytest.mark.parametrize(("config", "add", "expected"), COUNTS)
def test_the_published_numbers_of_weights_train(config, add, expected):
    model = surgery.empty_model(config)
    add(model)
    assert surgery.count_parameters(model).trained == expected


# --- what stays untouched


@both
def test_an_eager_model_is_eager_again(added):
    model = small_qwen2()
    model.set_attn_implementation("eager")
    before, settings = logits(model), dict(vars(model.config))
    ADD_TEXT[added](model)
    assert logits(model).shape == before.shape
    remove_virtual_tokens(model)
    assert torch.equal(logits(model), before)
    assert vars(model.config) == settings


def test_what_is_kept_of_a_text_does_not_depend_on_the_mode_and_leaves_it():
    model = small_gpt2()
    expected = states_of(model, TEXT)
    model.train()
    assert torch.equal(states_of(model, TEXT), expected)
    assert model.training


@both
def test_a_compiled_model_gets_and_loses_them_as_the_model_in_it(added, tiny):
    compiled, before = torch.compile(tiny.model), logits(tiny.model)
    ADD_TEXT[added](compiled)
    assert virtual_tokens(compiled) is virtual_tokens(tiny.model) is not None
    assert not torch.equal(logits(tiny.model), before)
    remove_virtual_tokens(compiled)
    assert torch.equal(logits(tiny.model), before)


def test_a_start_is_copied(tiny):
    states = states_of(tiny.model, TEXT).to(torch.bfloat16)
    add_prefix(tiny.model, len(TEXT), start=states)
    table = virtual_tokens(tiny.model).table
    assert (table.dtype, table.is_leaf, table.requires_grad) == (torch.float32, True, True)
    with torch.no_grad():
        table.zero_()
    assert states.any()


def test_a_copy_shares_nothing_with_the_model(tiny):
    for add in ADD_TEXT.values():
        model = copy.deepcopy(tiny.model)
        add(model)
        before, other = logits(model), copy.deepcopy(model)
        with torch.no_grad():
            virtual_tokens(other).table.add_(1)
        assert torch.equal(logits(model), before)
        assert not torch.equal(logits(other), before)
        remove_virtual_tokens(other)
        assert torch.equal(logits(other), logits(tiny.model))
        assert torch.equal(logits(model), before)


# --- hostile input; more of it is in tests/faults/test_fault_prefix.py


def test_a_prefix_that_is_switched_off_is_not_left_out_in_silence(tiny):
    ADD_TEXT["prefix"](tiny.model)
    tiny.model.set_attn_implementation("sdpa")
    with pytest.raises(CourseError, match="a prefix cannot enter"):
        tiny.model(IDS)


def test_a_tuple_instead_of_an_output_is_refused_where_logits_would_be_those_of_the_prompt(tiny):
    ADD_TEXT["soft prompt"](tiny.model)
    with pytest.raises(CourseError, match="leave return_dict=False out"):
        tiny.model(IDS, return_dict=False)
