#!/usr/bin/env python3
"""Runs the experiments of docs/replication/experiments.ini, or those whose names begin with one of the arguments.

    tools/replicate.py [NAME...] [--list] [--smoke] [--again SEED] [--jobs N]

What is in docs/replication/results/ is not run again, and a run that was stopped goes on where it was. Runs of training have one thread each, and
as many of them go side by side as there are cores; what is timed (decode) has the machine to itself. --smoke: two steps of each experiment on a
text at hand, kept nowhere. --again: runs this seed of each once more from scratch, keeps nothing, and says how it differs. The programs are in
the folder PROGRAMS_DIR, or here."""
import argparse
import concurrent.futures
import configparser
import fcntl
import glob
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

FOLDER, WORK = "docs/replication", "build/replicate"
CURVE_POINTS = 60


def fail(message):
    sys.exit(f"error: {message}")


def read_experiments():
    """What an experiment does not say itself, its group says (recall/ of recall/mamba), or else DEFAULT."""
    file = configparser.RawConfigParser(default_section="")
    try:
        with open(f"{FOLDER}/experiments.ini", encoding="utf-8") as f:
            file.read_file(f)
    except configparser.Error as e:
        fail(" ".join(str(e).split()))
    experiments = []
    for name in file.sections():
        group = name[:name.find("/") + 1]
        if name not in ("DEFAULT", group):
            e = {"name": name, **file["DEFAULT"], **(file[group] if group in file else {}), **file[name]}
            try:
                for key in e:
                    while "%(" in e[key]:
                        e[key] %= e
                definition(e), e["seeds"]
            except KeyError as missing:
                fail(f"{FOLDER}/experiments.ini: [{name}] wants {missing}, which nothing says")
            experiments.append(e)
    return experiments


# ---- results: one JSON line for each run, in one file for each group (the name up to its "/")

def results_of(name):
    return f"{FOLDER}/results/{name.split('/')[0]}.jsonl"


def read_results(name):
    """Of an experiment, by seed."""
    try:
        with open(results_of(name), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
    except FileNotFoundError:
        return {}
    return {line["seed"]: line for line in lines if line["name"] == name}


def definition(experiment):
    """What a result depends on, beside the seed: if it changes, the experiment is run again."""
    keys = ("decode",) if "decode" in experiment else ("data", "run", "meanwhile", "score", "gains")
    return " ".join([experiment["flags"], *(experiment[key] for key in keys if experiment.get(key))])


def finished(experiment):
    return {seed for seed, line in read_results(experiment["name"]).items() if line["definition"] == definition(experiment)}


keeping = threading.Lock()


def keep(result):
    """Puts a line in place of an older one, or at the end; the file is whole at any time."""
    path = results_of(result["name"])
    with keeping:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lines = open(path, encoding="utf-8").read().splitlines() if os.path.exists(path) else []
        same = lambda line: (line["name"], line["seed"]) == (result["name"], result["seed"])
        lines = [line for line in lines if not same(json.loads(line))] + [json.dumps(result, separators=(",", ":"))]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
        os.replace(path + ".tmp", path)


# ---- programs

class Failed(Exception):
    pass


PROGRAMS = os.environ.get("PROGRAMS_DIR", ".")
running = {}  # processes by pid, for Ctrl-C


def run(program, flags, threads=1):
    """Its standard output, and its peak memory in bytes."""
    words = [f"{PROGRAMS}/{program}", *shlex.split(flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    running[process.pid] = process
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    del running[process.pid]
    if process.returncode:
        raise Failed(f"{' '.join(words)}\n{errors[0].strip()}")
    return out, usage.ru_maxrss * 1024


preparing = threading.Lock()


def prepare(data, smoke):
    """A dataset's directory; made, if need be. English: the kernel's documentation, without translations, and the King James Bible, from the
    packages linux-doc and bible-kjv. A task: its name and the length of its examples, like recall-64."""
    folder = f"{WORK}/{'smoke' if smoke else 'data'}/{data}"
    with preparing:
        if os.path.exists(f"{folder}/dataset.json"):
            return folder
        if data != "english":
            task, length = data.rsplit("-", 1)
            run("data_prep", f"--task {task} --task-length {length} --task-examples {200 if smoke else 200000} --output {folder}")
            return folder
        if smoke:
            texts = sorted(glob.glob("cpu/*.*") + glob.glob("formats/*.*") + glob.glob("*.cu"))
        else:
            texts = sorted(name for name in glob.glob("/usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz", recursive=True)
                           if "/translations/" not in name)
            if not texts or not shutil.which("bible"):
                fail("the text is in the distribution's packages: apt-get install linux-doc bible-kjv")
            bible = subprocess.run("bible -f gen1:1-rev22:21 | cut -d ' ' -f 2-", shell=True, check=True, stdout=subprocess.PIPE).stdout
            os.makedirs(WORK, exist_ok=True)
            texts.append(f"{WORK}/bible.txt")
            with open(texts[-1], "wb") as f:
                f.write(bible)
        print(run("data_prep", f"--input {' '.join(texts)} --train-tokenizer 4096 --val-fraction 0.02 --output {folder}")[0].strip(), flush=True)
    return folder


def fingerprint(folder):
    with open(f"{folder}/train_000000.bin", "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


# ---- the kinds of experiments

def summary(log):
    """What is kept of a run's log: means over CURVE_POINTS parts of it, and validations."""
    with open(log, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    first = next(line for line in lines if line["kind"] == "run")
    train = list({line["step"]: line for line in lines if line["kind"] == "train"}.values())  # of a step that was repeated, the last
    if train[-1]["step"] < first["training"]["steps"]:
        raise Failed(f"{log}: stopped after step {train[-1]['step']} of {first['training']['steps']}")
    part = max(1, len(train) // CURVE_POINTS)
    parts = [train[i:i + part] for i in range(0, len(train) - part + 1, part)]
    mean = lambda group, key: round(sum(line[key] for line in group) / len(group), 4)
    result = {"parameters": first["parameters"], "active_parameters": first["active_parameters"], "steps": train[-1]["step"],
              "tokens_per_step": first["training"]["batch"] * first["training"]["seq-len"] * first["training"]["grad-accum"],
              "seconds": round(sum(line["ms"] for line in train) / 1000, 1), "step": [group[-1]["step"] for group in parts],
              "loss": [mean(group, "loss") for group in parts]}
    if "E" in first["config"]["layers"]:
        result.update(expert_load=[mean(group, "expert_load") for group in parts], dropped=[mean(group, "dropped") for group in parts])
    if "mean_gains" in train[-1]:
        result["gain"] = [round(max(group[-1]["largest_gains"]), 4) for group in parts]
    validations = {line["step"]: line["loss"] for line in lines if line["kind"] == "val"}
    result["validation"] = [[step, round(loss, 6)] for step, loss in validations.items()]
    return result


def run_folder(folder, experiment, seed):
    """Of another definition it is another, so that no run goes on as what it did not begin."""
    return f"{folder}/{experiment['name']}/{seed}-{hashlib.sha256(definition(experiment).encode()).hexdigest()[:8]}"


def train(experiment, seed, smoke, folder):
    """A run, from where it was stopped; then, of its model: losses on other datasets (score), gains after so many tokens (gains)."""
    out = run_folder(folder, experiment, seed)
    data = prepare(experiment["data"], smoke)
    if os.path.exists(f"{out}/model.safetensors"):
        flags = f"--resume {experiment['meanwhile']} --peak-flops 1e11"
    else:
        flags = f"{experiment['flags']} {experiment['run']} {experiment['meanwhile']} --seed {seed} --peak-flops 1e11"
        if smoke:
            flags = last_of_each(flags + " --steps 2 --batch 1 --eval-every 0")
    _, memory = run("train", f"--data {data} --out {out} {flags}")
    result = {"data": fingerprint(data), "peak_memory": memory, **summary(f"{out}/log.jsonl")}
    for name in experiment.get("score", "").split():
        text, _ = run("infer", f"--checkpoint {out} --score {prepare(name, smoke)} --score-tokens 131072")
        words = text.split(": ")[1].split()
        result.setdefault("score", {})[name] = {"loss": float(words[0]), "known": float(words[4])}
    for tokens in experiment.get("gains", "").split()[:1 if smoke else None]:
        probe = f"{out}/gains-{tokens}"  # one step that changes nothing
        batch = max(1, (256 if smoke else 4096) // int(tokens))
        shutil.rmtree(probe, ignore_errors=True)
        run("train", f"--data {data} --init-from {out} --out {probe} --steps 1 --lr 1e-30 --seq-len {tokens} --batch {batch} --peak-flops 1e11 "
                     "--eval-every 0")
        with open(f"{probe}/log.jsonl", encoding="utf-8") as f:
            step = next(line for line in map(json.loads, f) if line["kind"] == "train")
        rounded = lambda values: [round(value, 5) for value in values]
        result.setdefault("gains", []).append([int(tokens), rounded(step["mean_gains"]), rounded(step["largest_gains"])])
        shutil.rmtree(probe)
    return result


def last_of_each(flags):
    words = shlex.split(flags)
    return " ".join(f"{flag} {value}" for flag, value in dict(zip(words[::2], words[1::2])).items())


def decode(experiment, smoke):
    """Speeds of decoding at each point BATCH:CONTEXT, with every core."""
    points = []
    model = experiment["flags"].replace("-10m", "-tiny") if smoke else experiment["flags"]
    for point in experiment["decode"].split()[:1 if smoke else None]:
        batch, context = (2, 8) if smoke else map(int, point.split(":"))
        text, memory = run("infer", f"--bench {model} --samples {batch} --bench-prompt {context}", os.cpu_count())
        lines = {line.split()[0]: line.split() for line in text.splitlines()}
        points.append({"batch": batch, "context": context, "decode": float(lines["decode"][1]), "prompt": float(lines["prompt"][1]),
                       "cache_mb": float(lines["state"][1]), "recurrent_mb": float(lines["state"][7]), "peak_memory": memory})
    return {"points": points}


def perform(experiment, seed, smoke, folder):
    result = decode(experiment, smoke) if "decode" in experiment else train(experiment, seed, smoke, folder)
    return {"name": experiment["name"], "seed": seed, "definition": definition(experiment), **result}


def compare(experiment, seed, again):
    kept = read_results(experiment["name"]).get(seed)
    if not kept or "decode" in experiment:
        return "no result to compare it with"
    if kept["data"] != again["data"]:
        difference = "other data"
    elif all(kept.get(key) == again.get(key) for key in ("loss", "validation", "score", "gains")):
        return "the same bits"
    else:
        difference = "other bits"
    return f"{difference}: validation {kept['validation'][-1][1]} before, {again['validation'][-1][1]} now"


# ---- all of them

def run_all(todo, jobs, job):
    """todo: (experiment, seed)s. Timed ones last, one at a time."""
    start, done = time.monotonic(), 0
    timed = [item for item in todo if "decode" in item[0]]
    timed.sort(key=lambda item: item[1])  # round by round, so that a ratio is of neighbours
    rest = [item for item in todo if "decode" not in item[0]]

    def one(item):
        began = time.monotonic()
        return item, job(*item), time.monotonic() - began

    for items, workers in ((rest, jobs), (timed, 1)):
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(one, item) for item in items]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    (experiment, seed), said, seconds = future.result()
                    done += 1
                    left = (time.monotonic() - start) / done * (len(todo) - done)
                    print(f"{done}/{len(todo)}  {experiment['name']}, seed {seed}: {said}, {seconds:.0f} s; about {left / 60:.0f} minutes left",
                          flush=True)
            except BaseException:
                for future in waiting:
                    future.cancel()
                for process in list(running.values()):
                    process.send_signal(signal.SIGINT)  # it saves
                raise


def main():
    argparse.ArgumentParser.error = lambda self, message: fail(message)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments whose names begin so; all, if there is none")
    parser.add_argument("--list", action="store_true", help="print what there is, and what is done")
    parser.add_argument("--smoke", action="store_true", help="two steps of each, kept nowhere")
    parser.add_argument("--again", type=int, metavar="SEED", help="run this seed once more from scratch, keep nothing, compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        fail(f"--jobs {arguments.jobs}: must be at least 1")
    experiments = [e for e in read_experiments() if not arguments.names or any(e["name"].startswith(n) for n in arguments.names)]
    if not experiments:
        fail(f"no experiment of {FOLDER}/experiments.ini begins with {' or '.join(arguments.names)}")
    seeds = lambda e: [int(seed) for seed in e["seeds"].split()]
    if arguments.list:
        for e in experiments:
            print(f"{e['name']:32} {len(finished(e) & set(seeds(e)))} of {len(seeds(e))} seeds  {definition(e)}")
        return
    for name in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        signal.signal(name, signal.default_int_handler)
    anew = arguments.smoke or arguments.again is not None
    folder = f"{WORK}/{'smoke' if arguments.smoke else 'again' if anew else 'runs'}"
    os.makedirs(folder, exist_ok=True)
    lock = open(f"{folder}/lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another tools/replicate.py is at work there")
    if anew:
        for name in os.listdir(folder):
            shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
        todo = [(e, seeds(e)[0] if arguments.smoke else arguments.again) for e in experiments]
    else:
        todo = [(e, seed) for e in experiments for seed in seeds(e) if seed not in finished(e)]

    def job(experiment, seed):
        result = perform(experiment, seed, arguments.smoke, folder)
        if arguments.smoke:
            return "runs"
        if arguments.again is not None:
            return compare(experiment, seed, result)
        keep(result)
        shutil.rmtree(run_folder(folder, experiment, seed), ignore_errors=True)  # a checkpoint of each would fill a disk
        return f"validation {result['validation'][-1][1]:.4f}" if result.get("validation") else "measured"

    try:
        run_all(todo, arguments.jobs, job)
    except Failed as e:
        fail(e)
    except KeyboardInterrupt:
        sys.exit("interrupted; the next `make replicate` goes on from here")


if __name__ == "__main__":
    main()
