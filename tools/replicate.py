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


def run_training(experiment, seed, smoke):
    """One run, from where it was stopped; its result."""
    flags = command(experiment, seed)
    out = f"{WORK}/{'smoke' if smoke else 'runs'}/{experiment['name']}/{seed}"
    if smoke:
        flags += " --steps 2 --eval-every 0"
    resume = " --resume" if os.path.exists(f"{out}/model.safetensors") else ""
    start = time.monotonic()
    subprocess.run(["./train", *shlex.split(f"--data {prepare(experiment['data'])} --out {out} {flags}{resume}")], check=True, stdout=subprocess.DEVNULL)
    result = summary(f"{out}/log.jsonl")
    result["wall_seconds"] = round(time.monotonic() - start, 1)
    result["peak_memory"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"name": experiment["name"], "seed": seed, "command": command(experiment, seed), **result}


def keep(result):
    """A line at the end of the experiment's file, whole or not at all."""
    path = result_of(result["name"])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    old = open(path, encoding="utf-8").read() if os.path.exists(path) else ""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(old + json.dumps(result, separators=(",", ":")) + "\n")
    os.replace(path + ".tmp", path)


def main():
    argparse.ArgumentParser.error = lambda self, message: fail(message)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments whose names begin so; all, if there is none")
    parser.add_argument("--list", action="store_true", help="print what there is, and what is done")
    parser.add_argument("--smoke", action="store_true", help="two steps of each, kept nowhere")
    arguments = parser.parse_args()
    experiments = [e for e in read_experiments() if not arguments.names or any(e["name"].startswith(n) for n in arguments.names)]
    if not experiments:
        fail(f"no experiment of {FOLDER}/experiments.ini begins with {' or '.join(arguments.names)}")
    todo = [(e, int(seed)) for e in experiments for seed in e["seeds"].split() if arguments.smoke or int(seed) not in finished(e)]
    if arguments.list:
        for e in experiments:
            print(f"{e['name']:32} {len(finished(e))} of {len(e['seeds'].split())} seeds  {command(e, 'N')}")
        return
    spent, done = 0.0, 0
    for experiment, seed in todo:
        left = f", about {spent / done * (len(todo) - done) / 60:.0f} minutes left" if done else ""
        print(f"{done + 1}/{len(todo)}  {experiment['name']}, seed {seed}{left}", flush=True)
        start = time.monotonic()
        result = run_training(experiment, seed, arguments.smoke)
        if not arguments.smoke:
            keep(result)
        spent, done = spent + time.monotonic() - start, done + 1


if __name__ == "__main__":
    main()
