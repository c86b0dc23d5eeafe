"""Threads that wait, alone and beside other work.

torch's OpenMP threads spin while they wait for each other. As soon as another process has a core,
each barrier waits for the scheduler. A policy is what is set in the environment of a process before
torch is imported. *Beside a busy process*: it computes on one core without a pause. *Beside another
training run*: it trains the same model on both cores, its threads as torch comes. *Two side by
side*: two processes with the policy. SmolLM2-135M: forward and backward of 4 rows of the task of
the week; the tiny model: 10 optimizer steps of 16 rows of its world. Medians of five repeats, or of
as many as were done in 20 seconds, since a catastrophe takes minutes.

The course sets `GOMP_SPINCOUNT=2000` when it is imported, unless the variable or `OMP_WAIT_POLICY`
is set already.
"""

import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPEATS = 5
CHOSEN = "spin count 2,000"
POLICIES = {
    "as torch comes": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin count 1,000": {"GOMP_SPINCOUNT": "1000"},
    CHOSEN: {"GOMP_SPINCOUNT": "2000"},
    "spin count 10,000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WORK = """
import json, sys
from time import perf_counter
import torch
from course_lib import batching, evaluation, models, objective, runtime, world

name, repeats = sys.argv[1], int(sys.argv[2])
base = models.load(name, runtime.detect())
small = name == "smollm2-135m"
records = evaluation.read_task("train")[:4] if small else world.read_world("train")[:160]
examples = batching.encode_records(records, base.tokenizer, 256).examples
rows = min(16, len(examples))
groups = [examples[at : at + rows] for at in range(0, len(examples), rows)]
batches = [batching.collate(group, base.tokenizer.pad_token_id) for group in groups]
optimizer = torch.optim.AdamW(base.model.parameters(), lr=0.0)
seconds = []
print("ready", flush=True)
sys.stdin.readline()
begun = perf_counter()
for _ in range(repeats + 1):
    if len(seconds) > 1 and perf_counter() - begun > 20 and repeats < 100:
        break
    start = perf_counter()
    for batch in batches:
        objective.supervised_loss(base.model, batch).backward()
        if name == "tiny":
            optimizer.step()
        base.model.zero_grad()
    seconds.append(perf_counter() - start)
print(json.dumps(seconds[1:]), flush=True)
"""


@contextmanager
def workers(name, policy, number=1, repeats=REPEATS):
    """Processes that have loaded the model and wait for a line; at the end they are gone."""
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    environment = {key: value for key, value in os.environ.items() if key not in unset} | policy
    command = [sys.executable, "-c", WORK, name, str(repeats)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        "env": environment,
    }
    started = [subprocess.Popen(command, **pipes) for _ in range(number)]
    try:
        for process in started:
            while process.stdout.readline() != "ready\n":
                assert process.poll() is None, "a worker ended before it was ready"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@contextmanager
def busy_process():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def training_run(name):
    with workers(name, {}, repeats=10_000) as (process,):
        start(process)
        yield


def start(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def median_seconds(started):
    for process in started:
        start(process)
    return statistics.median(
        second for process in started for second in json.loads(process.stdout.readline())
    )


def measure(name, policy, where):
    with workers(name, policy, 2 if where == "two side by side" else 1) as started:
        neighbour = {
            "beside a busy process": busy_process,
            "beside another training run": lambda: training_run(name),
        }
        with neighbour.get(where, nullcontext)():
            return median_seconds(started)


@pytest.mark.parametrize(("name", "what"), [("smollm2-135m", "SmolLM2"), ("tiny", "tiny")])
def test_the_chosen_policy_is_never_catastrophic(name, what, row):
    for policy, environment in POLICIES.items():
        alone = measure(name, environment, "alone")
        row(f"{what}, {policy}: alone", alone, "s")
        for where in ("beside a busy process", "beside another training run", "two side by side"):
            seconds = measure(name, environment, where)
            row(f"{what}, {policy}: {where}", seconds, "s")
            if policy == CHOSEN:
                row(f"{what}, {policy}: {where} / alone", seconds / alone, "times", at_most=3)
