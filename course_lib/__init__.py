"""The helper package of Seven Days of LLM Fine-Tuning.

Arrows point one way, from top to leaf. Importing `course_lib` imports nothing heavy.

| layer  | module          | duty                                                                 |
|--------|-----------------|----------------------------------------------------------------------|
| leaf   | `runtime`       | which machine this is, and why; seeds; seconds, peak memory          |
| leaf   | `sealing`       | folders that are whole or absent: checksums, atomic publication      |
| leaf   | `text`          | words of any script; texts that say nothing                          |
| leaf   | `jsonfile`      | rows of JSON files, read strictly; what is wrong, and where          |
| leaf   | `plots`         | arrays in, matplotlib Axes out                                       |
| middle | `hub`           | is the Hugging Face Hub reachable, asked once and briefly            |
| middle | `alpaca`        | read and check instruction records, the two prompt templates, split  |
| middle | `world`         | the generated world of `tiny`: facts, and instruction tasks over it  |
| middle | `models`        | the base models by name, where each comes from, fallbacks            |
| middle | `batching`      | tokenize, mask the prompt, pad, pack; `show_mask`                    |
| middle | `objective`     | the loss at supervised positions, in training and in evaluation      |
| middle | `vocabulary`    | new pieces for a tokenizer, new rows for the embeddings              |
| middle | `memory`        | bytes of weights, gradients, optimizer states; activations, counted  |
| middle | `surgery`       | find and replace linear layers by name, default targets, counting    |
| middle | `shapes`        | configs of known models by name, memory of GPUs                      |
| middle | `lora`          | LoRA: add, switch, blend, merge; several adapters in one batch       |
| middle | `adalora`       | AdaLoRA: P Λ Q, importance of triplets, the budget that prunes       |
| middle | `qlora`         | QLoRA: NF4, packed bytes, constants quantised again, packed layers   |
| middle | `prefix`        | virtual tokens: prompt tuning, P-tuning, prefixes in every layer     |
| middle | `adapters`      | small layers beside frozen ones; IA3, BitFit, norms, MAM, UniPELT    |
| middle | `dryrun`        | a forward pass on shapes: what training would keep, block by block   |
| middle | `tensor_files`  | a config and tensors in a folder: written whole, read strictly       |
| middle | `lora_files`    | LoRA and AdaLoRA in peft's format, and what trains beside them       |
| middle | `adapter_files` | adapters of every kind as files that peft reads, and the reverse     |
| upper  | `checkpoints`   | a training run kept on disk: whole or absent, of this run or refused |
| upper  | `training`      | `finetune()`: the training loop, with two seams                      |
| upper  | `fusion`        | several LoRA jobs trained in one batch                               |
| upper  | `evaluation`    | `evaluate()`: valid JSON, right topic, exact match, retention        |
| upper  | `experiments`   | methods over seeds in one table: a day's sweeps, the week's table    |
| upper  | `planner`       | does a training fit: the bill, what saves most, how sure             |
| top    | `explorables`   | small interactive figures that need no kernel and no network         |
| top    | `checks`        | `use("E1.1", my_function)`: exercises that say what is wrong         |
| top    | `preflight`     | what would stop the course on this machine, with the next step       |
| top    | `__main__`      | the command line                                                     |

The way of a record to a trained adapter and a score: `alpaca.read_records` and `check_records`,
`Record.prompt`; `batching.encode` and `collate`; `lora.add_lora`, which puts a `LoRALinear` with a
`LowRank` where a linear layer was; `training.finetune`, whose loop is `_train` with
`_forward_backward`; `objective.supervised_logits`, the loss of training and of scoring;
`adapter_files.save_adapter` and `load_adapter`; `evaluation.score_answers`.
"""

import logging
import os

# Before torch is imported: how long its OpenMP threads spin while they wait for each other. As
# torch comes, every step takes many times as long as soon as another process has a core; short
# spins cost little when alone (docs/benchmarks.md, "Threads that wait").
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# On some CPUs bitsandbytes advises to install a package that fetches kernels from the Hub; the
# course works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
