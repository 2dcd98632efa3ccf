#!/usr/bin/env python3
"""ptxas.py NVCC: compiles every kernel with nvcc for each architecture and precision and prints what the assembler made of it, then builds
and links the programs as a machine with a GPU does. Fails on a spill, a stack frame or a warning. Without nvcc it says so and succeeds."""
import os
import re
import subprocess
import sys
import time

SIZES = {"bf16": (2, 4), "float": (4, 4), "double": (8, 8)}  # bytes of floatX and real
PRECISIONS = list(SIZES)
# Per multiprocessor: warps, blocks, bytes of shared memory (CUDA programming guide, compute capabilities). All have 65,536 registers.
LIMITS = {80: (64, 32, 164 << 10), 90: (64, 32, 228 << 10), 100: (64, 32, 228 << 10), 120: (48, 24, 100 << 10)}
UNBOUNDED = 256  # threads of a block, where __launch_bounds__ does not say (kThreads)
# Another make that runs this one has a number of jobs for all.
JOBS = [] if "jobserver" in os.environ.get("MAKEFLAGS", "") else [f"-j{os.cpu_count()}"]


def dynamic_shared(kernel, split, floatX, real):
    """Bytes of shared memory that a launch asks for (ScanThread, LoopKept and rmsnorm_backward in moemamba.cu); None if it is not known."""
    threads = 1024 // floatX
    warps, channels, columns = threads // 32, threads // (split or 1), 8 * (split or 1)
    if kernel in ("scan_forward_kernel", "scan_backward_from_zero_kernel"):
        steps = min(32, threads * (16 // floatX) // channels, 128 // split)
        return steps * channels * (real + 2 * floatX) + (steps * columns + 2 * channels) * real
    if kernel == "scan_backward_kernel":
        return 64 * channels * (real + 3 * floatX) + (64 * columns + 2 * channels + warps * 4 * columns) * real
    if kernel == "closed_loop_backward_kernel":  # LoopKept
        threads = 32 if real == 8 else 64
        return real * (208 * threads + 2 * 16 * 64 * threads // 32)
    if kernel in ("rmsnorm_backward_kernel", "slice_norm_backward_kernel"):  # at the width of the 100m presets; at the rank of jamba-v0.1
        width = 768 if kernel[0] == "r" else 256
        return min(8, (48 << 10) // (width * real)) * width * real
    return None


def round_up(n, unit):
    return -(-n // unit) * unit


def occupancy(arch, threads, registers, shared):
    """Share of a multiprocessor's warps that are resident. Registers go to a warp 256 at a time and to four warps alike; shared memory
    goes to a block 128 bytes at a time, after 1 KB for the system."""
    max_warps, max_blocks, max_shared = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = 65536 // round_up(max(registers, 1) * 32, 256) // 4 * 4 // warps
    by_shared = max_shared // round_up(shared + 1024, 128)
    return min(max_blocks, max_warps // warps, by_registers, by_shared) * warps / max_warps


def make(nvcc, precision, targets, *options):
    run = subprocess.run(["make", "--no-print-directory", "-k", *JOBS, "CUDA=1", "WERROR=1", f"NVCC={nvcc}", f"PRECISION={precision}", *options,
                          *targets], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, close_fds=False)
    if run.returncode:
        lines = [l for l in run.stdout.splitlines() if not l.startswith(nvcc)]
        print("\n".join(lines[-40:]))
    return run.returncode == 0


def demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"^void |\(anonymous namespace\)::|\bgpu::", "", re.sub(r"\((?!anonymous).*", "", line)) for line in out]
    return dict(zip(names, short))


def read_kernels(ptx, log):
    """Mangled name -> registers, shared, spill, stack, threads, dynamic (does it use dynamic shared memory)."""
    bounds = {}
    for name, head, body in re.findall(r"^(?:\.visible )?\.entry (\w+)\(.*?\)(.*?)^\{(.*?)^\}", ptx, re.S | re.M):
        threads = re.search(r"\.maxntid (\d+)", head)
        bounds[name] = dict(threads=int(threads[1]) if threads else UNBOUNDED, dynamic=bool(dynamic_names(ptx) & set(re.findall(r"\w+", body))))
    kernels = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.S):
        def number(pattern):
            return sum(int(n) for n in re.findall(pattern, text))
        kernels[name] = dict(registers=number(r"Used (\d+) registers"), shared=number(r"(\d+) bytes smem"), stack=number(r"(\d+) bytes stack frame"),
                             spill=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"), **bounds[name])
    return kernels


def dynamic_names(ptx):
    return set(re.findall(r"\.extern \.shared .*?(\w+)\[\]", ptx))


def main():
    nvcc = sys.argv[1] if len(sys.argv) > 1 else ""
    if not nvcc:
        print("skipped: no nvcc here, so nothing is known of registers and spills")
        return 0
    start = time.monotonic()
    faults = []
    table = {}  # (kernel, precision) -> {architecture: figures}
    for precision in PRECISIONS:
        build = f"build/cuda-{precision}"
        if not make(nvcc, precision, [f"{build}/sm_{arch}.txt" for arch in LIMITS]):
            faults.append(f"nvcc does not compile moemamba.cu in {precision}")
            continue
        for arch in LIMITS:
            log, ptx = (open(f"{build}/{name}").read() for name in (f"sm_{arch}.txt", f"compute_{80 if arch < 100 else 100}.ptx"))
            faults += [f"{build}/sm_{arch}.txt: {line}" for line in log.splitlines() if "warning" in line]
            kernels = read_kernels(ptx, log)
            if not kernels:
                faults.append(f"{build}/sm_{arch}.txt names no kernel")
            names = demangle(list(kernels))
            for mangled, k in kernels.items():
                name = names[mangled]
                table.setdefault((name, precision), {})[arch] = k
                where = f"{name}, {precision}, sm_{arch}"
                if k["spill"] or k["stack"]:
                    faults.append(f"{where}: {k['spill']} bytes spilled, {k['stack']} bytes of stack")
                if k["dynamic"]:
                    split = re.search(r"<(?:\(int\))?(\d+)", name)
                    asked = dynamic_shared(name.split("<")[0], split and int(split[1]), *SIZES[precision])
                    if asked is None:
                        faults.append(f"{where}: dynamic_shared in {sys.argv[0]} does not know it")
                    k["shared"] += asked or 0
                k["occupancy"] = f"{100 * occupancy(arch, k['threads'], k['registers'], k['shared']):.0f}"

    archs = "/".join(str(arch) for arch in LIMITS)
    width = max([len(name) for name, _ in table] + [6])
    print(f"{'kernel':{width}} {'':6} {'block':>5} {'registers':>11} {'shared':>13} {'spill':>5} {'stack':>5}  occupancy, % (each on sm_{archs})")
    for (name, precision), by_arch in sorted(table.items(), key=lambda row: (row[0][0], PRECISIONS.index(row[0][1]))):
        def column(key):
            values = [str(k[key]) for k in by_arch.values()]
            return values[0] if len(set(values)) == 1 else "/".join(values)
        print(f"{name:{width}} {precision:6} {column('threads'):>5} {column('registers'):>11} {column('shared'):>13} {column('spill'):>5} "
              f"{column('stack'):>5}  {column('occupancy')}")

    programs = [f"build/nvcc/{name}" for name in ("train", "infer", "test_kernels", "bench", "kernels")]  # all that knows CUDA
    if not make(nvcc, "bf16", programs, "ARCHS=90", "BUILD=build/nvcc", "OPTIMIZE=-O0"):
        faults.append("nvcc does not build the programs")
    kernels = len({name for name, _ in table})
    for fault in faults:
        print(f"FAILED: {fault}")
    print(f"{kernels} kernels on sm_{archs} in {', '.join(PRECISIONS)}, and the programs on sm_90: {len(faults) or 'no'} "
          f"fault{'s' * (len(faults) != 1)}, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    sys.exit(main())
