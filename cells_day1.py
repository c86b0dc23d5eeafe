# ruff: noqa: E501
"""Optional and additional sections of notebooks/day1_alpaca.ipynb, to be put in after the sections that they name.

Each section: the heading after whose section it goes, its title, whether a reader may skip it, and its cells: ("markdown", text) or
("code", source, tags). They use what the notebook has defined up to that place: alpaca, batching, evaluation, experiments, models,
plots, runtime, training, json, random, Counter, plt, torch; machine, base, train, next_tokens, SEED.
"""

VARIES = ["nbval-ignore-output"]

SECTIONS = [
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.1 A language model predicts the next token",
        "title": "Optional · From n-grams through recurrent networks to attention",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · From n-grams through recurrent networks to attention

Why did the table of counts have to go, and what came between it and the Transformer? One toy question shows it: a story names a person, goes on with `d` other
words, and ends in `says`; who? With `d` = 4 the answer lies five words back. First the table, which stores whole stories. About 5 seconds in all.""",
            ),
            (
                "code",
                """NAMES, OTHERS = "ada ben eva max sam tom zoe kim".split(), "and then went to the old market again".split()


def stories(d, n, seed):
    \"\"\"n stories as ids (n, d + 2): a name 0..7, d other words 8..15, "says" 16; and the names (n,).\"\"\"
    draw = torch.Generator().manual_seed(seed)
    name, others = torch.randint(8, (n, 1), generator=draw), torch.randint(8, 16, (n, d), generator=draw)
    return torch.cat([name, others, torch.full((n, 1), 16)], 1), name[:, 0]


story = stories(4, 1, seed=3)[0][0].tolist()
print(" ".join([*NAMES, *OTHERS, "says"][word] for word in story), "->", NAMES[story[0]])""",
                [],
            ),
            (
                "code",
                """def counts(d):
    \"\"\"Share of new stories that are right in a table of 9,600 stories read before; what is not in it is answered with ada.\"\"\"
    read, new = ([(tuple(ids.tolist()), name.item()) for ids, name in zip(*stories(d, n, s))] for n, s in ((9_600, 1), (256, 0)))
    table = dict(read)
    return sum(table.get(story, 0) == name for story, name in new) / len(new)


right = {"counts": {d: counts(d) for d in (1, 4, 16, 32)}}
print("rows of the table:", {d: f"{8 ** (d + 1):.1e}" for d in right["counts"]}, " right:", right["counts"])""",
                [],
            ),
            (
                "markdown",
                """With one word between, 64 rows hold everything. With four there are 33 thousand stories, most of which the 9,600 did not contain; with sixteen
the table guesses. A **recurrent network** needs no row for a story: it reads word by word and keeps one vector, the state. Does the name survive in it? A *GRU*
has gates, which can leave the state alone.""",
            ),
            (
                "code",
                """class Recurrent(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.embed, self.cell, self.head = torch.nn.Embedding(17, 32), cell(32, 32, batch_first=True), torch.nn.Linear(32, 17)

    def forward(self, ids):
        return self.head(self.cell(self.embed(ids))[0][:, -1])  # (N, 17): only the last state is read""",
                [],
            ),
            (
                "code",
                """def learned(make, d, steps=150):
    \"\"\"Share right in new stories after 150 steps of 64 stories, as many as the table has read.\"\"\"
    torch.manual_seed(SEED)
    model = make()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.xavier_uniform_(weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        ids, name = stories(d, 64, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), name).backward()
        optimizer.step()
    ids, name = stories(d, 256, seed=0)
    return (model(ids).argmax(-1) == name).float().mean().item()


for label, cell in {"recurrent": torch.nn.RNN, "gated recurrent": torch.nn.GRU}.items():
    right[label] = {d: learned(lambda: Recurrent(cell), d) for d in (1, 4, 16, 32)}
    print(label, right[label])""",
                VARIES,
            ),
            (
                "markdown",
                """Over sixteen words the plain network is no better than a guess, one of eight; the gates keep the name. But both read one word after the other. **Attention**
goes there directly: the last word sends a *query*, every word offers a *key* and a *value*, and the softmax of query · key / √width says how much of each value
to take ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)).""",
            ),
            (
                "code",
                """class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = torch.nn.Embedding(17, 32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 17)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)  # each (N, T, 32)
        weights = (q[:, -1:] @ k.mT / 32**0.5).softmax(-1)  # (N, 1, T)
        return self.head((weights @ v)[:, 0])


right["attention"] = {d: learned(Attention, d) for d in (1, 4, 16, 32)}
plots.table([{"model": label} | {f"d = {d}": f"{100 * share:.0f} %" for d, share in row.items()} for label, row in right.items()])""",
                VARIES,
            ),
            (
                "markdown",
                """One step, whatever the distance, and all words at once. (This attention knows no order of words, which the question does not need; a Llama adds it by rotating queries
and keys.) Is it the seed? We tried three: attention was right at all distances in each, the gated network in two of them, the plain one never at 32 and once at 16.""",
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.2 Four ways to get a behaviour",
        "title": "Optional · Model families",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · Model families

An **encoder** reads the whole text at once and is asked about it; a **decoder** sees only what came before and writes on; an **encoder–decoder** reads one text and writes another. Fine-tuned
models carry the architecture of their base.

| model | year | type | what it was trained to do | source |
|---|---|---|---|---|
| BERT | 2018 | encoder | fill in masked words; fine-tuned as a classifier | [1810.04805](https://arxiv.org/abs/1810.04805) |
| T5 | 2019 | encoder–decoder | fill in masked spans; every task as text to text | [1910.10683](https://arxiv.org/abs/1910.10683) |
| GPT-2 | 2019 | decoder | next token | [openai/gpt-2](https://github.com/openai/gpt-2) |
| GLM, the base of ChatGLM | 2021 | one stack: sees all of the given text, then writes on | fill in blanks, token by token | [2103.10360](https://arxiv.org/abs/2103.10360) |
| OPT | 2022 | decoder | next token; 125M to 175B weights | [2205.01068](https://arxiv.org/abs/2205.01068) |
| BLOOM | 2022 | decoder | next token; 176B weights, many languages | [2211.05100](https://arxiv.org/abs/2211.05100) |
| LLaMA | 2023 | decoder | next token; 7B to 65B weights | [2302.13971](https://arxiv.org/abs/2302.13971) |
| Alpaca | 2023 | LLaMA, fine-tuned | 52K instructions written by a model | [Stanford](https://crfm.stanford.edu/2023/03/13/alpaca.html) |
| Vicuna | 2023 | LLaMA, fine-tuned | conversations that users shared | [LMSYS](https://lmsys.org/blog/2023-03-30-vicuna/) |
| BELLE | 2023 | BLOOM and LLaMA, fine-tuned | Chinese instructions written by a model | [2303.14742](https://arxiv.org/abs/2303.14742) |
| SmolLM2, ours | 2025 | decoder of Llama's architecture | next token, then conversations | [2502.02737](https://arxiv.org/abs/2502.02737) |""",
            ),
            (
                "code",
                """T, given = 6, 3  # six positions, of which the first three are the given text
causal = torch.ones(T, T).tril()
masks = {"encoder (BERT)": torch.ones(T, T), "decoder (LLaMA)": causal, "given text in full (GLM)": causal.clone()}
masks["given text in full (GLM)"][:given, :given] = 1
_, panels = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained")
for panel, (label, mask) in zip(panels, masks.items()):
    panel.imshow(mask, cmap="Greens", vmin=0, vmax=1.5)
    panel.set(title=label, xlabel="sees position", ylabel="position")
plt.show()""",
                [],
            ),
            (
                "markdown",
                """Only the middle picture can be trained on all positions of a text at once *and* write: no position knows its successor. That can be tested on our own model: change the last token of a
text, and nothing before it may move.""",
            ),
            (
                "code",
                """ids = torch.tensor([batching.encode_text("The color of the sky is blue", base.tokenizer)]).to(base.model.device)
other = ids.clone()
other[0, -1] = (ids[0, -1] + 1) % 1000
with torch.inference_mode():
    moved = (base.model(ids).logits - base.model(other).logits)[0].abs().amax(-1)  # (T,)
print([f"{change:.4f}" for change in moved.tolist()])
assert moved[:-1].max() < 1e-3 < moved[-1]""",
                VARIES,
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.3 A record and its two templates",
        "title": "Optional · Self-Instruct, live",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · Self-Instruct, live

Who writes 52,000 instructions? *Self-Instruct* lets a model do it: each prompt shows eight tasks, six by people and two by the model, and asks for the ninth. A new one
stays only if it is unlike all others, ROUGE-L below 0.7. So 175 tasks became 82,000 examples; Alpaca used a version of it with text-davinci-003. What does our small model write?""",
            ),
            (
                "code",
                """everything = alpaca.read_records(runtime.data_folder() / "instructions.json", extra=("kind", "language")).records
plain = [record.instruction for record in everything if record.extra["language"] == "English" and not record.input]
people = [text for text in plain if len(text) < 110]  # short ones, so that eight fit into a short prompt
GENERATED = ["Tell a story about a person who is a hero.", "What is the capital of France?"]  # SmolLM2's own
draw, prompts = random.Random(SEED), []
for _ in range(5):
    demonstrations = draw.sample(people, 6) + GENERATED
    prompts.append(alpaca.self_instruct_prompt(draw.sample(demonstrations, 8)))
print(len(people), "short instructions by people\\n")
print(prompts[0])""",
                [],
            ),
            (
                "code",
                """replies = evaluation.generate(base, [batching.encode_text(prompt, base.tokenizer) for prompt in prompts], max_new_tokens=30)
candidates = [candidate for reply in replies for candidate in alpaca.parse_instructions(reply)]
selection = alpaca.novel(candidates, pool=[*people, *GENERATED])
rows = [{"the model wrote": text, "": "kept"} for text in selection.kept]
rows += [{"the model wrote": text, "": f"dropped: {reason}"} for text, reason in selection.dropped]
plots.table(rows)""",
                VARIES,
            ),
            (
                "markdown",
                """About six seconds. The form was understood. But the model circles around "What is the most ...", and the filter removes what repeats itself or was cut off
at 30 tokens. Look at what it *keeps*: ROUGE-L compares words, so a dull, vague or impossible task passes. The filter buys variety, not quality, and the next cell shows how literally it compares.""",
            ),
            (
                "code",
                """pairs = [
    ("Name a river in Africa.", "Name a river in Asia."),  # another task, nearly the same words
    ("Name a river in Africa.", "Which stream flows through Kenya?"),  # nearly the same task, other words
]
for one, other in pairs:
    selection = alpaca.novel([other], pool=[one])
    print(f"{other:36}", "kept" if selection.kept else selection.dropped[0][1])""",
                [],
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.4 Tokens, the mask, and the end-of-sequence token",
        "title": "Optional · Padding, grouping, packing",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · Padding, grouping, packing

Padding costs arithmetic that teaches nothing. How much, with data of mixed lengths? Here are the course's 610 general instructions, in three ways: batches of eight in random order; batches of
examples of similar length; and *packed*, several examples one after the other in rows of 512 tokens, each put into the first row with room, longest first.""",
            ),
            (
                "code",
                """everything = alpaca.read_records(runtime.data_folder() / "instructions.json", extra=("kind", "language")).records
encoding = batching.encode_records(everything, base.tokenizer, max_tokens=512)
lengths = [len(example) for example in encoding.examples]
print(encoding, f"of {min(lengths)} to {max(lengths)} tokens", sep=", ")
in_random_order = random.Random(SEED).sample(lengths, len(lengths))
grouped = [lengths[index] for index in batching.length_grouped_order(lengths, 8, SEED)]
packed = [sum(map(len, row)) for row in batching.pack(encoding.examples, max_tokens=512)]
ways = {"random order": in_random_order, "grouped by length": grouped, "packed into 512": packed}
shares = {way: batching.real_token_share(rows, 8) for way, rows in ways.items()}
plots.table([{"batches of 8": way, "rows": len(ways[way]), "real tokens": f"{100 * share:.1f} %"} for way, share in shares.items()])""",
                [],
            ),
            (
                "markdown",
                """In random order nearly half the arithmetic is spent on filler. Grouping gains most of it back, and packing leaves almost none. But in a packed row the second example must not
see the first, or it would be trained on a context that it never meets. So attention gets a mask of blocks, and positions start at 0 in each block.""",
            ),
            (
                "code",
                """three = [batching.encode(record, base.tokenizer) for record in train[:3]]
row = batching.collate_packed([three], base.tokenizer.pad_token_id)
print("positions at the first seam:", row["position_ids"][0, len(three[0]) - 2 : len(three[0]) + 2].tolist())
plt.figure(figsize=(3.4, 3.4), layout="constrained")
plt.imshow(row["attention_mask"][0, 0] == 0, cmap="Greens", vmax=1.5)
plt.gca().set(title="Three examples in one row: three blocks", xlabel="sees token", ylabel="token")
plt.show()""",
                [],
            ),
            (
                "code",
                """def loss_of(batch):
    with torch.inference_mode():
        return training.supervised_loss(base.model, {name: tensor.to(base.model.device) for name, tensor in batch.items()}).item()


glued = batching.Example(sum([e.input_ids for e in three], []), sum([e.labels for e in three], []))  # no blocks, positions run on
apart, blocks = loss_of(batching.collate(three, base.tokenizer.pad_token_id)), loss_of(row)
print(f"apart {apart:.3f}, packed in blocks {blocks:.3f}, only glued together {loss_of(batching.collate([glued], 0)):.3f}")
assert abs(apart - blocks) < 1e-3""",
                [],
            ),
            (
                "markdown",
                """Packed in blocks, the loss is that of the examples apart. (The tests compare all logits; when one example changes, those of its neighbours stay the same to the last bit.) Only glued together it is far lower: the second and third
question have then seen an answer in the right form. A low loss, for the wrong task.""",
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.5 The loss, and a check that it is the library's",
        "title": "Prompt mask on and off",
        "optional": False,
        "cells": [
            (
                "markdown",
                """## Prompt mask on and off

Does it matter that the prompt's labels are -100? Stanford's Alpaca masks them; the widely used alpaca-lora trains on the prompt too. We trained `tiny`, our Llama of one million parameters, both
ways on 18 tasks about its little world: 150 steps of 16, three seeds, at two learning rates. The runs are kept in `data/tiny_llama/effects.json` and only read here.""",
            ),
            (
                "code",
                """masking = experiments.read_effect("prompt_masking")
columns = ("method", "response loss", "exact match", "seeds")
plots.table([{name: row[name] for name in columns} for row in experiments.summary(masking)])""",
                [],
            ),
            (
                "code",
                """example, unmasked = (batching.encode(train[0], base.tokenizer, mask_prompt=masked) for masked in (True, False))
print(f"supervised tokens: {len(example.supervised_ids)} with the mask, {len(unmasked.supervised_ids)} without")
exact = {run.method: [other.scores["exact match"] for other in masking if other.method == run.method] for run in masking}
for rate in ("0.0005", "0.001"):
    assert min(exact[f"answer only, {rate}"]) > max(exact[f"all tokens, {rate}"])  # all three seeds agree""",
                [],
            ),
            (
                "markdown",
                """With the mask the response loss is about half as large, and exact match is higher in every seed: by ten points at the first learning rate, six at the second. Without it most supervised tokens are
prompt, the same template again and again, so the answer is a small part of the mean. One small model, short answers: it says nothing about long ones.""",
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.6 The memory bill of full fine-tuning",
        "title": "Optional · Chinese vocabulary",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · Chinese vocabulary

A tokenizer made for English needs almost two tokens for a Chinese character, so Chinese takes more time, memory and context. Chinese-LLaMA therefore *extended* the vocabulary. We learn 1,000
pieces by byte-pair encoding from nine of the essays in `data/chinese_prose.txt`, and measure on the three others and on the Chinese instructions.""",
            ),
            (
                "code",
                """import copy
import math

from course_lib import vocabulary

essays = (runtime.data_folder() / "chinese_prose.txt").read_text(encoding="utf-8").strip().split("\\n\\n")
records = alpaca.read_records(runtime.data_folder() / "instructions.json", extra=("kind", "language")).records
texts = {"nine essays, learned from": essays[:9], "three other essays": essays[9:]}
texts["Chinese instructions"] = [record.instruction for record in records if record.extra["language"] == "Chinese"]
pieces = vocabulary.learn_pieces(essays[:9], base.tokenizer, count=1000)
print("first pieces:", *pieces[:12])""",
                [],
            ),
            (
                "code",
                """extended = vocabulary.extended_copy(base.tokenizer, pieces)
per = vocabulary.tokens_per_character
plots.table([{"text": name, "before": round(per(text, base.tokenizer), 2), "after": round(per(text, extended), 2)} for name, text in texts.items()])""",
                [],
            ),
            (
                "markdown",
                """Two fifths of the tokens remain where the pieces were learned, three fifths on other essays, three quarters on the instructions: a few pages hold few of the words that occur elsewhere. Chinese-LLaMA learned 20,000 pieces from far more
text. Each piece needs a new row in the embedding matrix and one in the output head, and that has a price.""",
            ),
            (
                "code",
                """rows_before, rows_after, width = 32_000, 49_953, 4_096  # LLaMA-7B, Chinese-LLaMA; Chinese-Alpaca adds one more row, for padding
for rows in (rows_after, rows_after + 1):
    new = (rows - rows_before) * width * 2  # embedding and output head
    print(f"{rows:,} rows: {new:,} new weights, {new / 6_738_415_616:.1%} of LLaMA-7B, {memory.training_bytes(new, 'fp32') / 1e9:.1f} GB to train")
assert (rows_after + 1 - rows_before) * width * 2 == 147_079_168""",
                [],
            ),
            (
                "markdown",
                """Where does a new row start? A measure that does not depend on the tokenizer is nats per *character*. A copy of our model reads three hundred characters of an unseen essay: as it is; with new rows at the mean of the rows they
replace (`add_pieces`); with new rows at random, of the same spread as the old. About 4 seconds.""",
            ),
            (
                "code",
                """reader, unseen = copy.deepcopy(base), "".join(essays[9:])[:300]


def nats_per_character():
    predicted = len(reader.tokenizer(unseen)["input_ids"]) - 1
    return math.log(evaluation.perplexity(reader, [unseen])) * predicted / len(unseen)""",
                [],
            ),
            (
                "code",
                """first, nats = len(reader.tokenizer), {"as it is": nats_per_character()}
vocabulary.add_pieces(reader, pieces)
nats["1,000 pieces, mean rows"] = nats_per_character()
weight = reader.model.get_input_embeddings().weight
with torch.no_grad():
    weight[first:].normal_(0, weight[:first].std().item(), generator=torch.Generator(weight.device).manual_seed(SEED))
nats["1,000 pieces, random rows"] = nats_per_character()
del reader, weight
print({name: round(value, 2) for name, value in nats.items()})""",
                VARIES,
            ),
            (
                "markdown",
                """Shorter is not better at once: even with the mean the model is worse than before, and at random it is lost. The rows must be trained, and the rest may stay frozen at first. Here that is done on `tiny`, which has never seen Chinese; the
check is that no old weight moves. About 3 seconds.""",
            ),
            (
                "code",
                """small = models.load("tiny", machine)
first, width = small.model.get_input_embeddings().weight.shape
vocabulary.add_pieces(small, [piece for piece in pieces if len(batching.encode_text(piece, small.tokenizer)) > 1][:200])
old = {name: weight.clone() for name, weight in small.model.named_parameters()}
vocabulary.freeze_all_but_new_rows(small.model, first)
lines = [batching.encode_text(line, small.tokenizer)[:96] for line in "\\n".join(essays[:9]).splitlines() if len(line) > 40]
examples = [batching.Example(ids, ids) for ids in lines]
run = training.finetune(small, examples, machine, steps=30, batch_size=8, learning_rate=5e-2, seed=SEED, progress=False)
print(f"{200 * width:,} weights trained, loss {run.losses[0]:.1f} -> {sum(run.losses[-5:]) / 5:.1f} nats a token; a blind guess: {math.log(first + 200):.1f}")
assert all(torch.equal(weight[:first], old[name][:first]) for name, weight in small.model.named_parameters())""",
                VARIES,
            ),
            (
                "markdown",
                """The loss falls with 2 % of the weights and stays above a blind guess: rows alone do not teach a language to a body that has never read it. Chinese-LLaMA went on to train on Chinese text before it saw
any instruction ([Cui et al. 2023](https://arxiv.org/abs/2304.08177)).""",
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "1.7 Before training: what can it do?",
        "title": "How is a model evaluated?",
        "optional": False,
        "cells": [
            (
                "markdown",
                """## How is a model evaluated?

Today's answers are short and have one right form, so comparing them is enough. Longer ones are another matter. Each measure of the field answers its own question and is blind to others:

| measure | the question it answers | what it does not see |
|---|---|---|
| perplexity | how expected is this *text*? | whether it is true; whether the model would write it |
| exact match | is the answer this string? | the same answer in other words |
| ROUGE-L | how much of the reference, in order, is in the reply? | meaning, negation, facts |
| BLEU | how many runs of 1 to 4 words does the reply share with a reference? | the same; made for whole corpora |
| a model as judge | which reply does another model prefer? | its own biases |
| people with a rubric | does it meet these stated criteria? | it costs time, and raters differ |

The next cells try them, in about 4 seconds.""",
            ),
            (
                "code",
                """texts = ["The capital of France is Paris.", "Paris capital the is of France.", "The moon is made of rock.", "The moon is made of cheese."]
plots.table([{"text": text, "perplexity": round(evaluation.perplexity(base, [text]))} for text in texts])""",
                VARIES,
            ),
            (
                "markdown",
                """Perplexity notices word order. It does not notice truth: a moon of cheese surprises this model no more than one of rock, since both are things that people write. And it is counted per token, so two models compare only if they share a
tokenizer. Now overlap with a reference: which of these four replies is wrong?""",
            ),
            (
                "code",
                """reference = "The capital of Australia is Canberra."
replies = ["The capital of Australia is Sydney.", "Canberra is the capital city of Australia.", "It is Canberra, not Sydney.", "Canberra."]
rows = []
for reply in replies:
    exact = evaluation.normalise(reply) == evaluation.normalise(reference)
    scores = {name: round(score, 1) for name, score in evaluation.text_scores([reply], [reference]).items()}
    rows.append({"reply": reply, "exact match": exact, "contains": evaluation.contains(reply, "canberra")} | scores)
assert rows[0]["ROUGE-L"] == max(row["ROUGE-L"] for row in rows) and rows[0]["BLEU"] == max(row["BLEU"] for row in rows)
plots.table(rows)""",
                [],
            ),
            (
                "markdown",
                """The only wrong reply has the highest ROUGE-L and BLEU: it shares five of six words. (*Contains* is right here; "not Canberra" would fool it.) So people let a strong model judge. Its biases are known
([Zheng et al. 2023](https://arxiv.org/abs/2306.05685)): the *place* of a reply, its *length*, its *likeness* to what the judge itself would write. The first can be seen in our model.""",
            ),
            (
                "code",
                """trap = "It is not Canberra."
print("contains 'Canberra':", evaluation.contains(trap, "canberra"), evaluation.text_scores([trap], [reference]))""",
            ),
            (
                "code",
                """def lean(question, a, b):
    \"\"\"log p(A) - log p(B) as the next token, when the model is asked whether answer A or answer B is right.\"\"\"
    asked = f"Question: {question}\\nAnswer A: {a}\\nAnswer B: {b}\\nWhich answer is right? Reply with A or B only."
    with torch.inference_mode():
        logits = base.model(torch.tensor([evaluation.chat_prompt(base, asked)]).to(base.model.device)).logits[0, -1]
    return (logits[batching.encode_text("A", base.tokenizer)[0]] - logits[batching.encode_text("B", base.tokenizer)[0]]).item()""",
                [],
            ),
            (
                "code",
                """pairs = [("What is the capital of France?", "Paris", "Lyon"), ("How many days has a week?", "seven", "nine")]
pairs += [("What is 2 plus 3?", "5", "6"), ("What color is grass?", "green", "purple"), ("Who wrote Hamlet?", "Shakespeare", "Mozart")]
leans = [(lean(question, right, wrong), lean(question, wrong, right)) for question, right, wrong in pairs]
print("judged A, right answer in place A:", sum(first > 0 for first, _ in leans), "of", len(pairs))
print("judged A, wrong answer in place A:", sum(second > 0 for _, second in leans), "of", len(pairs))""",
                VARIES,
            ),
            (
                "markdown",
                """This judge prefers place A, whatever stands there. The remedy for any judge: ask in both orders, and count only verdicts that agree. And give the judge, model or person, a **rubric**, so that "better" means the same to all:

| criterion | 0 | 1 | 2 |
|---|---|---|---|
| right | a statement is wrong | right, with a gap | right and complete |
| does what was asked | another task | in part | all of it, and no more |
| form | not the one asked for | nearly | as asked: length, language, JSON |
| supported | made up | cannot be told | follows from the input or is common knowledge |

Two people rate the same twenty replies first; where they differ, the rubric is unclear.""",
            ),
        ],
    },
    # ------------------------------------------------------------------------------------------------------------------------
    {
        "after": "The table of the week",
        "title": "Optional · Data quality",
        "optional": True,
        "cells": [
            (
                "markdown",
                """## Optional · Data quality

Alpaca's 52,000 answers came from a model, and some of them are wrong. What does that cost? On `tiny` all answers are known, so we can spoil them on purpose: a fifth of the 1,080 training records gets the answer of
another record of the same task. The form stays right, only the facts are wrong.""",
            ),
            (
                "code",
                """from course_lib import world

clean = world.read_world("train")
spoilt = world.corrupt_answers(clean, share=0.2, seed=0)
wrong = [(a, b) for a, b in zip(clean, spoilt) if a.output != b.output]
print(len(wrong), "of", len(clean), "answers are wrong now")
plots.table([{"instruction": a.instruction, "input": a.input, "right": a.output, "trained on": b.output} for a, b in wrong[:5]])""",
                [],
            ),
            (
                "markdown",
                """Two rows for comparison: a fifth *left out*, and a fifth *replaced by copies* of others, which keeps the size and costs variety. Each row is trained for 150 steps of 16 and tested on the same 540 records about other people and words, three seeds
(`data/recipes/measure_data_quality.py`). Compare "wrong" with "left out": both hold 864 right records.""",
            ),
            (
                "code",
                """quality = experiments.read_outcomes(runtime.data_folder() / experiments.QUALITY_FILE)
columns = ("method", "response loss", "exact match", "not hard", "seeds")
plots.table([{name: row[name] for name in columns} for row in experiments.summary(quality)])""",
                [],
            ),
        ],
    },
]
