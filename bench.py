"""Benchmarks: ``make bench``, or ``python bench.py SECTION ...``. Writes results/bench/<device>.json and .md.

    steps       forward + backward + optimiser step of Swin-B (192 px) and ViT-B (224 px), against transformers' SimMIM
    input       each source of images against one batch that is used again and again
    size        time per image and memory for sets of 1,000 to 60,000 images
    runs        on a CPU: a run at a time on all cores, against one on each core, whole processes; with --against,
                also against the code of another checkout, a run at a time on all cores
    start       time to import, and a `dvc repro` with nothing to do
    gpu         on a GPU: the cost of `deterministic`, and runs of a small model that share the device
    deviation   the packed source against decoding each image in every epoch: crops, pixels, the loss of a short run

Contestants take turns within one run (A B A B ...), so that a machine whose speed drifts treats them alike; figures are
medians over rounds, and ratios are medians of the ratios of a round. Nothing else should run meanwhile.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from simmimlib import DataSettings, MaskGenerator, PretrainSettings, SimMIM, create_encoder, pretrain
from simmimlib.data.batches import training_batches
from simmimlib.data.crops import random_resized_boxes
from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.machine.device import autocast, cores, pick_device, resolve_precision
from simmimlib.machine.files import whole_file
from simmimlib.pipeline.arms import stage_parameters
from simmimlib.pipeline.profiles import load_profile
from simmimlib.pipeline.stages import ENVIRONMENT
from simmimlib.train.optim import create_optimizer, parameter_groups
from simmimlib.train.run import Objective

DEVICE = pick_device()
GPU = DEVICE.type == "cuda"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MODELS = {  # name: (create_encoder's arguments, its keyword arguments, mask patch)
    "Swin-B 192": (("swin_base_patch4_window7_224", 192), {"window_size": 6}, 32),
    "ViT-B 224": (("vit_base_patch16_224", 224), {}, 32),
}


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def interleave(contestants: dict, rounds: int, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds a call of each contestant, a list over rounds."""
    seconds = {name: [] for name in contestants}
    for step in contestants.values():
        for _ in range(warm_up):
            step()
    for _ in range(rounds):
        for name, step in contestants.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(seconds: dict, slower: str, faster: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


# Steps --------------------------------------------------------------------------------------------------------------


def stepper(model, optimizer, dtype: torch.dtype, loss):
    """One step of either contestant; they differ in model and loss alone."""

    def step():
        with autocast(DEVICE, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(model_name: str, batch: int, dtype: torch.dtype, compiled=False):
    arguments, changes, patch = MODELS[model_name]
    encoder = create_encoder(*arguments, **changes)
    masks = MaskGenerator(arguments[1], patch, encoder.patch_size, 0.6)
    model = SimMIM(encoder).to(DEVICE).train()
    optimizer = create_optimizer(parameter_groups(model, 1e-4, 0.05, pretraining=True))
    objective = Objective(model, lambda model, images, masks: model(images, masks).loss)
    objective = torch.compile(objective, dynamic=False) if compiled else objective
    images = torch.randn(batch, 3, arguments[1], arguments[1], device=DEVICE)

    return stepper(model, optimizer, dtype, lambda: objective(images, masks(batch, device=DEVICE)))


def transformers_model(model_name: str, batch: int, dtype: torch.dtype):
    """The same sizes, masks, optimiser and precision; its own model and loss."""
    import transformers

    (_, size), _, patch = MODELS[model_name]
    if model_name.startswith("Swin"):
        config = transformers.SwinConfig(
            image_size=size, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=6,
            encoder_stride=32, drop_path_rate=0.0,
        )  # fmt: skip
        model = transformers.SwinForMaskedImageModeling(config)
    else:
        config = transformers.ViTConfig(image_size=size, patch_size=16, encoder_stride=16)
        model = transformers.ViTForMaskedImageModeling(config)
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    masks = MaskGenerator(size, patch, config.patch_size, 0.6)
    images = torch.randn(batch, 3, size, size, device=DEVICE)

    def loss():
        return model(images, bool_masked_pos=masks(batch, device=DEVICE).flatten(1)).loss

    return stepper(model, optimizer, dtype, loss)


def matrix_rate(dtype: torch.dtype) -> float:
    """Measured floating-point operations a second of one large matrix product."""
    n = 8192 if GPU else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    seconds = interleave({"product": lambda: a @ b}, rounds=5, repeats=10 if GPU else 2)
    return 2 * n**3 / min(seconds["product"])


def step_flops(model_name: str) -> int:
    """Operations of one image's forward and backward pass, counted by torch."""
    arguments, changes, patch = MODELS[model_name]
    with torch.device("meta"):
        model = SimMIM(create_encoder(*arguments, **changes))
        images = torch.randn(1, 3, arguments[1], arguments[1])
    masks = MaskGenerator(arguments[1], patch, model.encoder.patch_size, 0.6)(1).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(images, masks).loss.backward()
    return counter.get_total_flops()


def bench_steps(rounds: int) -> list[dict]:
    batch = 128 if GPU else 8
    rows = []
    for precision in ("bfloat16",) if GPU else DTYPES:  # what `precision: auto` is on a GPU
        rate = matrix_rate(DTYPES[precision])
        for name in MODELS:
            names = ["simmimlib", "simmimlib, compiled", "transformers"]
            if not GPU:
                names.remove("simmimlib, compiled")  # takes minutes to compile there, and gains little
            contestants, memory = {}, {}
            for contestant in names:
                arguments = (name, contestant, batch, precision)
                before = torch.cuda.memory_allocated() if GPU else 0
                step = contestants[contestant] = build(*arguments)
                memory[contestant] = peak_allocated(step) - before if GPU else peak_memory(*arguments)
            seconds = interleave(contestants, rounds, repeats=10 if GPU else 1, warm_up=3 if GPU else 2)
            for contestant, times in seconds.items():
                speed = batch / statistics.median(times)
                rows.append(
                    {
                        "model": name,
                        "precision": precision,
                        "batch": batch,
                        "contestant": contestant,
                        "images/s": speed,
                        "times transformers": ratio(seconds, "transformers", contestant),
                        "share of the matrix rate": speed * step_flops(name) / rate,
                        "peak memory, GB": memory[contestant] / 1e9,
                    }
                )
                print(rows[-1], flush=True)
            del contestants, step
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def build(model_name: str, contestant: str, batch: int, precision: str):
    if contestant == "transformers":
        return transformers_model(model_name, batch, DTYPES[precision])
    return ours(model_name, batch, DTYPES[precision], "compiled" in contestant)


def peak_allocated(step) -> int:
    """Bytes that torch allocates on the GPU in two steps, at most."""
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return torch.cuda.max_memory_allocated()


def peak_memory(*arguments) -> float:
    """Resident bytes of a process of its own that takes two steps."""
    code = (
        "import sys, json, bench\n"
        "step = bench.build(*json.loads(sys.argv[1])); step(); step()\n"
        "print(bench.peak_resident_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"peak memory of {arguments} is not known: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return float("nan")
    return int(done.stdout.split()[-1])


# Input --------------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, size=(320, 256)) -> None:
    """JPEG files with the statistics of pictures: noise whose power falls with frequency, as in natural images."""
    rng = np.random.default_rng(0)
    fx, fy = np.meshgrid(np.fft.rfftfreq(size[0]), np.fft.fftfreq(size[1]))
    falloff = 1 / np.maximum(np.hypot(fx, fy), 1 / max(size))[..., None]
    for split, part in (("train", count), ("val", max(2, count // 20))):
        for label in "ab":
            (folder / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(part):
            spectrum = falloff * np.exp(2j * np.pi * rng.random((*falloff.shape[:2], 3)))
            pixels = np.fft.irfft2(spectrum, s=size[::-1], axes=(0, 1))
            pixels = 127 + 50 * pixels / pixels.std()
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / split / "ab"[i % 2] / f"{i}.jpg", quality=90)


def pack_photographs(folder: Path, count: int, size: int) -> None:
    photographs(folder, count)
    out = str(folder / "packed")
    pack(DataSettings(data="folder", path=str(folder), size=size, channels=3, statistics="imagenet", out=out))


def input_settings(folder: Path, **changes) -> PretrainSettings:
    """On a GPU the paper's geometry with Swin-T; on a CPU a small ViT, fast enough for the input to matter."""
    values = {"data": str(folder / "packed"), "image_size": 192, "mask_patch_size": 32, "mask_ratio": 0.6}
    values |= {"crop_scale": 0.67, "flip": True, "base_lr": 1e-4, "out": str(folder / "run")}
    if GPU:
        values |= {"encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": {"window_size": 6}, "batch_size": 256}
    else:
        values |= {"encoder_kwargs": {"patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}, "batch_size": 32}
    return PretrainSettings(**values | changes)


def bench_input(rounds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pack_photographs(folder, 2048 if GPU else 512, 256)
        data = open_packed(str(folder / "packed"))
        contestants = {}
        for source in ("resident", "packed", "files") if GPU else ("packed", "files"):
            settings = input_settings(folder, source="files" if source == "files" else "packed")
            step, batches = training_step(settings, data)
            if source == "packed" and GPU:
                batches.images.resident = None  # as if the set did not fit there
            contestants[source] = Epochs(step, batches).next_step
        step, batches = training_step(input_settings(folder), data)
        repeated = next(iter(batches))
        contestants["one batch, repeated"] = lambda: step(*repeated)
        seconds = interleave(contestants, rounds, repeats=len(batches), warm_up=len(batches) + 1)
        for name, times in seconds.items():
            rows.append(
                {
                    "source": name,
                    "images/s": batches.batch_size / statistics.median(times),
                    "share of the repeated batch": ratio(seconds, "one batch, repeated", name),
                }
            )
            print(rows[-1], flush=True)
        del contestants
    return rows


def training_step(settings: PretrainSettings, data):
    dtype = resolve_precision("auto", DEVICE)
    model = settings.model(3, data.mean, data.std).to(DEVICE).train()
    optimizer = create_optimizer(parameter_groups(model, 1e-4, 0.05, pretraining=True))

    def step(images, masks):
        with autocast(DEVICE, dtype):
            loss = model(images, masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    masks = settings.masks(model.encoder.patch_size)
    return step, training_batches(settings, data.train, data, DEVICE, masks)


class Epochs:
    """Steps through a source, epoch after epoch."""

    def __init__(self, step, batches):
        self.step = step
        self.inputs = (inputs for epoch in range(10**6) for inputs in batches.epoch(epoch))

    def next_step(self):
        self.step(*next(self.inputs))


def bench_size(rounds: int) -> list[dict]:
    """Each set is read in a process of its own, so that the memory is that of one set."""
    rows = []
    for count in (1000, 10_000, 60_000):
        with tempfile.TemporaryDirectory() as folder:
            write_noise(Path(folder), count)
            code = "import sys, bench; bench.read_set(sys.argv[1])"
            done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        rows.append({"images": count, "set, MB": count * 64 * 64 * 3 / 1e6} | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def write_noise(folder: Path, count: int, size: int = 64, channels: int = 3) -> None:
    """A packed set of square images."""
    shape = (size, size, channels)
    arrays = {"labels": np.zeros(count, np.int64), "sizes": np.full((count, 2), size, np.int32)}
    arrays["files"] = np.zeros(count, "S1")
    for split in ("train", "val"):
        for name, array in arrays.items():
            np.save(folder / f"{split}_{name}.npy", array)
        images = np.lib.format.open_memmap(folder / f"{split}_images.npy", "w+", np.uint8, (count, *shape))
        for start in range(0, count, 1000):
            images[start : start + 1000] = np.random.default_rng(start).integers(
                0, 255, (len(images[start : start + 1000]), *shape)
            )
    manifest = {"data": "noise", "classes": ["a"], "size": size, "channels": channels}
    manifest |= {"mean": [0.5] * channels, "std": [0.3] * channels, "digest": ""}  # nothing here resumes or compares
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_set(folder: str) -> None:
    """Prints the time an image takes, in microseconds, and what three epochs add to the memory of the process."""
    data = open_packed(folder)
    settings = PretrainSettings(image_size=64, batch_size=100, crop_scale=0.67, flip=True)
    batches, seconds = training_batches(settings, data.train, data, DEVICE), []
    for epoch in range(3):
        start = time.perf_counter()
        for step, (images, _) in enumerate(batches.epoch(epoch)):
            images.sum().item()
            if epoch == 0 and step == 0:
                before = peak_resident_memory()
        seconds.append((time.perf_counter() - start) / len(data.train.images))
    grown = (peak_resident_memory() - before) / 1e6
    print(json.dumps({"µs an image": 1e6 * min(seconds), "resident memory grew by, MB": grown}))


def peak_resident_memory() -> int:
    """Bytes. Not from getrusage, whose maximum a process inherits from the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# Runs ---------------------------------------------------------------------------------------------------------------

RUN = """import json, sys
try:
    from simmimlib.pretrain import PretrainSettings, pretrain  # the modules of 0.1.0
except ImportError:
    from simmimlib import PretrainSettings, pretrain
pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))"""


def short_run(params: dict, seed: int, folder: str, epochs: int) -> dict:
    """Parameters of a pre-training with a profile's model and recipe on a packed set in ``folder``."""
    values = stage_parameters(params, "pretrain", "default", seed)
    return values | {"data": folder, "epochs": epochs, "out": f"{folder}/{seed}", "warmup_epochs": 0}


def train_side_by_side(runs: list[dict], environment: dict, code=".") -> None:
    """Whole processes, one a run, with the library of the folder ``code``."""
    environment = os.environ | environment | {"PYTHONPATH": str(Path(code).resolve())}  # -P: not the working directory
    commands = [[sys.executable, "-P", "-c", RUN, json.dumps(values)] for values in runs]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in started]  # of all, also after one has failed
    assert not any(codes)


def bench_runs(rounds: int) -> list[dict]:
    """Seconds a run takes of the machine, a short pre-training with its start, for the models of two profiles."""
    count, rows = cores(), []
    if GPU or count == 1:
        return rows
    for name, images, epochs in (("quick", 4000, 8), ("cifar10-cpu", 16000, 1)):
        params = load_profile(name)
        with tempfile.TemporaryDirectory() as folder:
            write_noise(Path(folder), images, 32, params["data"]["channels"])

            def run(jobs: int, threads: int, against="", folder=folder, params=params, epochs=epochs) -> None:
                runs = [short_run(params, seed, folder, epochs) for seed in range(jobs)]
                environment = {} if against else ENVIRONMENT
                train_side_by_side(runs, environment | {"OMP_NUM_THREADS": str(threads)}, against or ".")

            one, many = f"one at a time, {count} threads", f"{count} side by side, a thread each"
            ways = {one: lambda run=run: run(1, count), many: lambda run=run: run(count, 1)}
            if ARGUMENTS.against:
                there = ["git", "-C", ARGUMENTS.against, "rev-parse", "--short", "HEAD"]
                commit = subprocess.run(there, capture_output=True, text=True, check=True).stdout.strip()
                one = f"commit {commit}, one at a time, {count} threads"
                ways = {one: lambda run=run: run(1, count, ARGUMENTS.against), **ways}
            seconds = interleave(ways, rounds, 1, 0)
            seconds[many] = [time / count for time in seconds[many]]
            for way, times in seconds.items():
                share = ratio(seconds, one, way)
                rows.append(
                    {"profile": name, "runs": way, "seconds a run": statistics.median(times), "times the first": share}
                )
                print(rows[-1], flush=True)
    return rows


# Start --------------------------------------------------------------------------------------------------------------


def bench_start(rounds: int) -> list[dict]:
    commands = {
        "python -c 'import torch, timm'": [sys.executable, "-c", "import torch, timm"],
        "python -c 'import simmimlib'": [sys.executable, "-c", "import simmimlib"],
        "python -c 'from simmimlib import SimMIM'": [sys.executable, "-c", "from simmimlib import SimMIM"],
        "python -c 'import simmimlib.train.pretrain'": [sys.executable, "-c", "import simmimlib.train.pretrain"],
    }
    dvc = shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if dvc and subprocess.run([dvc, "status", "-q"], capture_output=True).returncode == 0:
        commands["dvc repro, nothing to do"] = [dvc, "repro"]
    else:
        print("dvc repro is left out: DVC is missing, or stages are not up to date", flush=True)

    def call(command):
        return lambda: subprocess.run(command, check=True, capture_output=True)

    seconds = interleave({name: call(command) for name, command in commands.items()}, rounds, 1)
    rows = [{"command": name, "seconds": statistics.median(times)} for name, times in seconds.items()]
    print(*rows, sep="\n", flush=True)
    return rows


# GPU ----------------------------------------------------------------------------------------------------------------


def bench_gpu(rounds: int) -> list[dict]:
    if not GPU:
        print("gpu: left out, there is none", flush=True)
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "packed")
        packed.mkdir()
        write_noise(packed, 1024, 256)
        for round_ in range(rounds):
            for deterministic in (False, True):
                changes = {"epochs": 10, "deterministic": deterministic, "seed": round_}
                metrics = pretrain(input_settings(Path(folder), **changes))
                run = f"Swin-T, deterministic = {deterministic}"
                rows.append({"run": run, "images/s": metrics["images_per_second"]})
    with tempfile.TemporaryDirectory() as folder:  # the small model of `cifar10-cpu`
        params = load_profile("cifar10-cpu")
        write_noise(Path(folder), 16_000, 32)
        for together in sorted({1, 4, cores()}):
            values = [short_run(params, seed, folder, epochs=2) for seed in range(together)]
            train_side_by_side(values, ENVIRONMENT)
            metrics = [json.loads(Path(one["out"], "metrics.json").read_text()) for one in values]
            rate = sum(one["images_per_second"] for one in metrics)
            rows.append({"run": f"{together} small runs in as many processes", "images/s": rate})
    print(*rows, sep="\n", flush=True)
    return rows


# Deviation ----------------------------------------------------------------------------------------------------------


def bench_deviation(rounds: int) -> list[dict]:
    """What the packed source changes; on pictures of our own making, or on ``--data``, a packed set of files."""
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.functional import pil_to_tensor, resized_crop

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        packed = ARGUMENTS.data
        if not packed:
            pack_photographs(folder, 512, 224)
            packed = str(folder / "packed")
        data = open_packed(packed)
        rows.append({"what": f"training pictures: {data.name}", "value": len(data.train.images)})
        # the same 20,000 images, in turn, through both ways of drawing a crop
        sizes = torch.from_numpy(data.train.sizes[np.arange(20_000) % len(data.train.images)]).float()
        boxes = random_resized_boxes(sizes, 0.67, torch.Generator().manual_seed(0))
        own = boxes * sizes.repeat(1, 2)
        torch.manual_seed(0)
        theirs = torch.tensor(
            [
                RandomResizedCrop.get_params(torch.empty(1, int(h), int(w)), [0.67, 1.0], [3 / 4, 4 / 3])
                for w, h in sizes
            ]
        ).float()  # top, left, height, width
        own = torch.stack([own[:, 1], own[:, 0], own[:, 3] - own[:, 1], own[:, 2] - own[:, 0]], 1)
        for name, index in (("top", 0), ("left", 1), ("height", 2), ("width", 3)):
            gap = kolmogorov_smirnov(own[:, index], theirs[:, index])
            rows.append({"what": f"crops, {name}: largest gap between the distributions", "value": gap})
        rows.append({"what": "gap that two samples of one distribution exceed in 5 % of cases", "value": 1.36 * 1e-2})
        # the same box cut from the file and from the array
        settings = input_settings(folder, data=packed, out=str(folder / "run"))
        batches = training_batches(settings, data.train, data, torch.device("cpu"))
        source, total, count = batches.images, 0.0, 256
        source.seed, source.flip = 0, False
        index = torch.arange(min(count, len(data.train.images)))
        drawn = source._boxes(0, 0, index) * source.sizes[index].repeat(1, 2)
        images = next(source(0, [(0, index)])) * source.std + source.mean
        for i, box, image in zip(index, drawn.round().int().tolist(), images, strict=True):
            picture = Image.open(os.fsdecode(data.train.files[i])).convert("RGB")
            left, top, right, bottom = box
            cut = resized_crop(picture, top, left, bottom - top, right - left, [192, 192])
            total += (pil_to_tensor(cut).float() - image).abs().mean().item()
        rows.append({"what": "mean difference of a pixel, of 255, same crops", "value": total / len(index)})
        for seed in range(rounds):
            for kind in ("packed", "files"):
                changes = {"data": packed, "source": kind, "epochs": 4, "seed": seed, "base_lr": 4e-3}
                metrics = pretrain(input_settings(folder, **changes))
                rows.append(
                    {"what": f"validation loss of a short run, {kind}, seed {seed}", "value": metrics["val_loss"]}
                )
    print(*rows, sep="\n", flush=True)
    return rows


def kolmogorov_smirnov(a: torch.Tensor, b: torch.Tensor) -> float:
    values = torch.cat([a, b]).unique()
    shares = [torch.searchsorted(x.sort()[0], values, right=True) / len(x) for x in (a, b)]
    return (shares[0] - shares[1]).abs().max().item()


# All of it ----------------------------------------------------------------------------------------------------------

SECTIONS = {
    "steps": bench_steps,
    "input": bench_input,
    "size": bench_size,
    "runs": bench_runs,
    "start": bench_start,
    "gpu": bench_gpu,
    "deviation": bench_deviation,
}


def markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    out = Path("results/bench")
    name = torch.cuda.get_device_name(DEVICE) if GPU else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    path = out / f"{name.lower().replace(', ', '-').replace(' ', '-')}.json"
    report = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    for section in ARGUMENTS.sections or SECTIONS:
        start = time.perf_counter()
        rows = SECTIONS[section](ARGUMENTS.rounds)
        if rows:
            report["sections"][section] = {"rows": rows, "seconds": time.perf_counter() - start, "versions": versions}
        report |= {"device": name}
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        with whole_file(path.with_suffix(".md")) as temporary:
            parts = [f"# Benchmarks on {name}\n\nWritten by `make bench`; what each section does: `bench.py`."]
            for title, part in report["sections"].items():
                parts.append(f"## {title}\n\n{part['versions']}; {part['seconds']:.0f} s\n\n{markdown(part['rows'])}")
            temporary.write_text("\n\n".join(parts) + "\n")


ARGUMENTS = argparse.Namespace(against="", data="", rounds=3, sections=[])
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="", help="deviation: a folder packed from image files")
    parser.add_argument("--against", default="", help="runs: the folder of another checkout")
    ARGUMENTS = parser.parse_args()
    main()
