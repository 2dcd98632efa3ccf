#!/usr/bin/env python3
"""Runs the experiments of docs/replication/experiments.ini, one after the other, or those whose names begin with one of the arguments.

    tools/replicate.py [NAME...] [--list] [--smoke]

A run that is in docs/replication/results/ is not run again; one that was stopped goes on where it was. --smoke: two steps of each, kept nowhere."""
import argparse
import configparser
import json
import os
import resource
import shlex
import subprocess
import sys
import time

FOLDER, WORK = "docs/replication", "build/replicate"
# Each dataset: flags of data_prep. English is what every Debian has: the kernel's documentation (linux-doc) and the King James Bible (bible-kjv).
DATA = {
    "english": "--input build/replicate/text --train-tokenizer 4096 --val-fraction 0.02",
    "recall": "--task recall --task-length 64 --task-examples 100000",
    "induction": "--task induction --task-length 64 --task-examples 100000",
    "copying": "--task copying --task-length 64 --task-examples 100000",
}


def fail(message):
    sys.exit(f"error: {message}")


def read_experiments():
    file = configparser.ConfigParser()
    with open(f"{FOLDER}/experiments.ini", encoding="utf-8") as f:
        file.read_file(f)
    return [{"name": name, **file[name], "steps": file[name].getint("steps")} for name in file.sections()]


def result_of(name):
    return f"{FOLDER}/results/{name.replace('/', '-')}.jsonl"


def finished(experiment):
    """Seeds of which there is a result, with the flags that the experiment has now."""
    try:
        with open(result_of(experiment["name"]), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
    except FileNotFoundError:
        return {}
    return {line["seed"]: line for line in lines if line["command"] == command(experiment, line["seed"])}


def command(experiment, seed):
    """The flags that define a run."""
    return f"{experiment['flags']} {experiment['run']} --steps {experiment['steps']} --seed {seed}"


def summary(log):
    """Loss of a step as means over 50 parts of the run, and validations."""
    with open(log, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    train = [line for line in lines if line["kind"] == "train"]
    run = next(line for line in lines if line["kind"] == "run")
    part = max(1, len(train) // 50)
    parts = [train[i:i + part] for i in range(0, len(train), part)]
    mean = lambda group, key: round(sum(line[key] for line in group) / len(group), 5)
    result = {"parameters": run["parameters"], "active_parameters": run["active_parameters"], "device": run["device"],
              "tokens_per_step": run["training"]["batch"] * run["training"]["seq-len"] * run["training"]["grad-accum"],
              "seconds": round(sum(line["ms"] for line in train) / 1000, 1),
              "curve": [[group[-1]["step"], mean(group, "loss"), mean(group, "expert_load"), mean(group, "dropped")] for group in parts],
              "validation": [[line["step"], round(line["loss"], 6)] for line in lines if line["kind"] == "val"]}
    if "mean_gains" in train[-1]:
        result["gains"] = [[line["step"], line["mean_gains"], line["largest_gains"]] for line in train[::part]]
    return result


def prepare(data):
    folder = f"{WORK}/data/{data}"
    if not os.path.exists(f"{folder}/dataset.json"):
        run("data_prep", DATA[data] + f" --output {folder}")
    return folder


def run(program, flags):
    done = subprocess.run([f"./{program}", *shlex.split(flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"./{program} {flags}\n{done.stderr.strip()}")
    return done.stdout
