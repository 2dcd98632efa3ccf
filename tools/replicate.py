#!/usr/bin/env python3
"""Runs the experiments of docs/replication/experiments.ini, or those that the arguments name: each names one, or else all that begin so.

    tools/replicate.py [NAME...] [--list] [--smoke] [--again SEED] [--jobs N]

What is in docs/replication/results/ is not run again, and a run that was stopped goes on where it was. Runs of training have one thread each, and
as many of them go side by side as there are cores; what is timed (decode) has the machine to itself. --smoke: two steps of each experiment on a
text at hand, kept nowhere. --again: runs this seed of each once more from scratch, keeps nothing, and says how it differs. The programs are in
the folder PROGRAMS_DIR, or here."""
import argparse
import concurrent.futures
import configparser
import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

FOLDER, WORK = "docs/replication", "build/replicate"
EXPERIMENTS = f"{FOLDER}/experiments.ini"
CURVE_POINTS = 60
VOCABULARY = 4096  # of the text


def fail(message):
    sys.exit(f"error: {message}")


class Failed(Exception):  # of one experiment, while others run
    pass


def in_one_line(main):
    """main(), with its errors said so."""
    try:
        main()
    except Failed as wrong:
        fail(wrong)
    except OSError as wrong:
        fail(f"{wrong.filename or 'a file'}: {wrong.strerror}")


# ---- experiments: what each key's value looks like; other keys are words to put in the place of %(KEY)s
DATA = r"english|(recall|induction|copying)-\d+"
KEYS = {"flags": r"--.*", "seeds": r"\d+( \d+)*", "data": DATA, "run": r"--.*", "meanwhile": r"--.*", "score": rf"({DATA})( ({DATA}))*", "gains": r"\d+( \d+)*",
        "decode": r"\d+:\d+( \d+:\d+)*"}


def read_experiments():
    """What an experiment does not say itself, its group says (recall/ of recall/mamba), or else DEFAULT."""
    file = configparser.RawConfigParser(default_section="")
    try:
        with open(EXPERIMENTS, encoding="utf-8") as f:
            file.read_file(f)
    except (configparser.Error, UnicodeDecodeError) as e:
        fail(f"{EXPERIMENTS}: {' '.join(str(e).split())}")
    except OSError as e:
        fail(f"{EXPERIMENTS}: {e.strerror}; this runs in the repository's root")
    words = {word for section in file.sections() for value in file[section].values() for word in re.findall(r"%\((\w+)\)s", value)}
    experiments = []
    for name in file.sections():
        where, group = f"{EXPERIMENTS}: [{name}]", name[:name.find("/") + 1]
        for key in file[name]:
            if key not in KEYS and key not in words:
                fail(f"{where}: {key} is no key, and nothing has %({key})s in it")
        if name in ("DEFAULT", group):
            continue
        said = {}
        for section in ("DEFAULT", group, name):
            said.update(file[section] if section in file else {})

        def filled(key, within=()):
            if key not in said or key in within:
                fail(f"{where} wants {key}, " + ("which nothing says" if key not in said else "which wants itself"))
            return re.sub(r"%\((\w+)\)s", lambda word: filled(word[1], (*within, key)), said[key])

        e = {"name": name, **{key: filled(key) for key in KEYS if key in said}}
        for key in ("flags", "seeds") if "decode" in e else ("flags", "seeds", "data", "run", "meanwhile"):
            filled(key)
        for key, value in e.items():
            if key in KEYS and not re.fullmatch(KEYS[key], value) or "%(" in value:
                fail(f"{where}: {key} cannot be {value!r}")
            try:
                shlex.split(value)
            except ValueError as wrong:
                fail(f"{where}: {key}: {wrong}")
        if len(set(e["seeds"].split())) < len(e["seeds"].split()):
            fail(f"{where}: a seed twice")
        experiments.append(e)
    return experiments


def definition(experiment):
    """What a result depends on, beside the seed: if it changes, the experiment is run again."""
    keys = ("decode",) if "decode" in experiment else ("data", "run", "meanwhile", "score", "gains")
    return " ".join([experiment["flags"], *(experiment[key] for key in keys if experiment.get(key))])


def seeds_of(experiment):
    return [int(seed) for seed in experiment["seeds"].split()]


def named(experiments, names):
    """Those of these names, or of what begins so; all, if there are no names."""
    chosen = []
    for name in names:
        found = [e for e in experiments if e["name"] == name] or [e for e in experiments if e["name"].startswith(name)]
        if not name or not found:
            fail(f"no experiment of {EXPERIMENTS} begins with {name or repr(name)}; --list shows what there is")
        chosen += found
    return [e for e in experiments if e in chosen or not names]


# ---- results: one JSON line for each run, in one file for each group (the name up to its "/")

def results_of(name):
    return f"{FOLDER}/results/{name.split('/')[0]}.jsonl"


def read_lines(path):
    results = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                result = json.loads(line)
                result["name"].split, result["seed"] + 0, result["definition"].split
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f"{path}, line {number}: this is no result; remove it, and its experiment is run again")
            results.append(result)
    return results


def read_results(name):
    """Of an experiment, by seed."""
    path = results_of(name)
    return {line["seed"]: line for line in (read_lines(path) if os.path.exists(path) else []) if line["name"] == name}


def finished(experiment):
    return {seed for seed, line in read_results(experiment["name"]).items() if line["definition"] == definition(experiment)}


def write_whole(path, text):
    """The file is whole at any time."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise Failed(f"{path}: {e.strerror}")


keeping = threading.Lock()


def keep(result):
    """Puts a line in place of an older one, or at the end."""
    path = results_of(result["name"])
    with keeping:
        same = lambda line: (line["name"], line["seed"]) == (result["name"], result["seed"])
        lines = [line for line in (read_lines(path) if os.path.exists(path) else []) if not same(line)] + [result]
        write_whole(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


# ---- programs

PROGRAMS = os.environ.get("PROGRAMS_DIR", ".")
running = {}  # processes by pid, for Ctrl-C


def run(program, flags, threads=1):
    """Its standard output."""
    words = [f"{PROGRAMS}/{program}", *shlex.split(flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    except OSError as e:
        raise Failed(f"{words[0]}: {e.strerror}; build it with make, or say in PROGRAMS_DIR where it is")
    running[process.pid] = process
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    out = process.stdout.read()
    process.wait()
    reader.join()
    del running[process.pid]
    if process.returncode:
        said = errors[0].strip().split("\n")[-1].removeprefix("error: ") or f"exit status {process.returncode}"
        reason = said if process.returncode > 0 else f"killed by signal {-process.returncode}"
        raise Failed(f"{reason}: {' '.join(words)}")
    return out


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
        print(run("data_prep", f"--input {' '.join(texts)} --train-tokenizer {VOCABULARY} --val-fraction 0.02 --output {folder}").strip(), flush=True)
    return folder


@functools.cache  # each run asks, and no dataset changes meanwhile
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


def check_data(experiment, experiments):
    """What is kept of others on this data must be of the same tokens."""
    mine = fingerprint(prepare(experiment["data"], False))
    for other in experiments:
        for seed, line in read_results(other["name"]).items() if other.get("data") == experiment["data"] and "decode" not in other else ():
            if line.get("data") != mine:
                raise Failed(f"{experiment['data']}: its tokens are not those of {other['name']}, seed {seed}: another version of the texts. "
                             f"Move {FOLDER}/results away to begin anew")


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
    run("train", f"--data {data} --out {out} {flags}")
    result = {"data": fingerprint(data), **summary(f"{out}/log.jsonl")}
    for name in experiment.get("score", "").split():
        text = run("infer", f"--checkpoint {out} --score {prepare(name, smoke)} --score-tokens 131072")
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
        text = run("infer", f"--bench {model} --samples {batch} --bench-prompt {context}", os.cpu_count())
        lines = {line.split()[0]: line.split() for line in text.splitlines()}
        points.append({"batch": batch, "context": context, "decode": float(lines["decode"][1]), "prompt": float(lines["prompt"][1]),
                       "cache_mb": float(lines["state"][1]), "recurrent_mb": float(lines["state"][7]), "peak_memory": int(1e6 * float(lines["memory"][1]))})
    return {"points": points}


def perform(experiment, seed, smoke, folder):
    result = decode(experiment, smoke) if "decode" in experiment else train(experiment, seed, smoke, folder)
    return {"name": experiment["name"], "seed": seed, "definition": definition(experiment), **result}


def compare(experiment, seed, again):
    lines = read_results(experiment["name"])
    if all(lines[seed].get(key) == again.get(key) for key in ("data", "loss", "validation", "score", "gains")):
        return "the same bits"
    loss = lambda line: line["validation"][-1][1]
    losses = [loss(line) for line in lines.values()]
    near = "within" if abs(loss(again) - loss(lines[seed])) <= max(losses) - min(losses) else "beyond"
    return (f"other {'bits' if lines[seed]['data'] == again['data'] else 'data'}: validation {loss(lines[seed])} before, {loss(again)} now, "
            f"{near} the spread of its seeds, {min(losses)} to {max(losses)}")


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
                    print(f"{done}/{len(todo)}  {experiment['name']}, seed {seed}: {said}, {seconds:.0f} s" +
                          (f"; about {left / 60:.0f} minutes left" if done < len(todo) else ""), flush=True)
            except BaseException:
                for future in waiting:
                    future.cancel()
                for process in list(running.values()):
                    process.send_signal(signal.SIGINT)  # it saves
                raise


def interrupt(*_):
    """Once: a second signal, as timeout sends it, would end in the midst of what the first began."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


def main():
    argparse.ArgumentParser.error = lambda self, message: fail(message)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="an experiment, or what the names of several begin with; all, if there is none")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print what there is, and what is done")
    modes.add_argument("--smoke", action="store_true", help="two steps of each, kept nowhere")
    modes.add_argument("--again", type=int, metavar="SEED", help="run this seed once more from scratch, keep nothing, compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs < 1:
        fail(f"--jobs {arguments.jobs}: must be at least 1")
    every = read_experiments()
    experiments = named(every, arguments.names)
    if arguments.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for e in experiments:
            print(f"{e['name']:32} {len(finished(e) & set(seeds_of(e)))} of {len(seeds_of(e))} seeds  {definition(e)}")
        return
    if arguments.again is not None:
        if not arguments.names:
            fail("--again: which experiments? Name them")
        for e in experiments:
            if "decode" in e:
                fail(f"{e['name']}: is timed, and never the same twice")
            if arguments.again not in finished(e):
                fail(f"{e['name']}: no result of seed {arguments.again} to compare with; there are {sorted(finished(e))}")
    for name in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        signal.signal(name, interrupt)
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
        todo = [(e, seeds_of(e)[0] if arguments.smoke else arguments.again) for e in experiments]
    else:
        todo = [(e, seed) for e in experiments for seed in seeds_of(e) if seed not in finished(e)]
        if not todo:
            print("all of it is done; --again SEED runs a seed once more, tools/report.py makes tables and pictures")
            return
        write_whole(results_of("writable"), "")  # if results cannot be kept, rather now than after a run
        os.remove(results_of("writable"))

    def job(experiment, seed):
        if not anew and "decode" not in experiment:
            check_data(experiment, every)
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
    except KeyboardInterrupt:
        sys.exit("interrupted" + ("" if anew else "; the next `make replicate` goes on from here"))


if __name__ == "__main__":
    in_one_line(main)
