"""How much of a script's time is the networks' own: its loop against the bare work in it, interleaved in one
process.

Each row is one case; `ratio` is the speed of the script over that of the bare work, 1 at best (augment,
labels: over the customary way; recover: see there). Medians of several rounds; the times of one case are
comparable, those of different cases hardly.

python -m tests.bench                                      # all
python -m tests.bench relabel train_eval --json            # some, a JSON object a line
"""
import argparse
import io
import json
import statistics
import time
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import recover
import relabel
import squeeze
import train_eval
from models import build_model
from tests.helpers import counted_operations, saved_bytes
from tests.scale import bench_scale
from utils.augment import apply_epoch, draw_epoch, normalize
from utils.checkpoint import Checkpoint
from utils.closed_form import ClosedFormMatching, conv_stats, freeze
from utils.data import Split
from utils.device import pick_device
from utils.labels import LabelWriter, StoredLabels
from utils.losses import mse_gt_loss
from utils.run import generator
from utils.stats import Matching, layer_inputs, layer_weights, matched_layers
from utils.train import Graphed, NonFinite, Training, channels_last, with_precision

UNITS = [[0.49, 0.48, 0.45], [0.25, 0.24, 0.26]]
DATA = {"classes": [str(label) for label in range(10)], "image_size": 32, "mean": UNITS[0], "std": UNITS[1]}
BOUNDS = [torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)]
CIFAR = "resnet18", "convnet_w128", "mobilenetv2_05", "wrn16_2", "shufflenetv2_05"
# in place of a Checkpoint
NOTHING_KEPT = SimpleNamespace(result=Path("bench"), load=lambda *_: None, save_if_due=lambda *_, **how: None)


def interleaved(functions, rounds):
    """Median seconds of each function over `rounds` rounds in which each runs once, after one that does not
    count."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, times):
            started = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds[1:]) for seconds in times]


def ratio(times):
    """The columns of a script's loop against the bare work."""
    return {"ratio": times[1] / times[0], "script_ms": 1e3 * times[0], "bare_ms": 1e3 * times[1]}


def pixels(count, size=32):
    """uint8 [count, 3, size, size], noise"""
    return torch.randint(256, (count, 3, size, size), generator=generator("bench"), dtype=torch.uint8)


def network(name, last=True):
    model = build_model(name, 10, 32)
    return channels_last(model) if last else model


def training_steps(model, optimizer, batches, loss):
    """The bare work of training: batches of (network input, whatever the loss takes beside the logits)."""
    def run():
        model.train()
        for images, *targets in batches:
            value = loss(model(images), *targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return run


def frozen(name, device):
    """A backbone as squeeze.py leaves it, but for what it knows, with the statistics of noise; and targets
    for it."""
    torch.manual_seed(0)
    model, noise = build_model(name, 10, 32).to(device).requires_grad_(False), torch.randn(50, 3, 32, 32,
                                                                                           device=device)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(noise)
    with layer_inputs(model.eval()) as inputs, torch.no_grad():
        model(noise + 1)
    return model, {layer: [vector[0] for vector in conv_stats(inputs[layer], 4)] for layer, module
                   in matched_layers(model).items() if isinstance(module, torch.nn.Conv2d)}


def bench_recover(rounds, quick, device):
    """recover.py: a whole iteration's time over that of the bare forward and backward pass (float32, to the
    input) of the same network as squeeze.py leaves it, with drop rates 0 and 0.4; the same as one would first
    write it (--statistics plain, a loop over classes); operations dispatched, and bytes saved for the
    backward pass over the bare ones."""
    classes, iterations, sums = (2, 2, {}) if quick else (5, 6, {})
    labels = torch.arange(classes, device=device).repeat_interleave(10)[None]
    pixels = torch.randn(1, 10 * classes, 3, 32, 32, generator=generator("bench")).to(device)
    for name in ("convnet_w8", "wrn10_1") if quick else CIFAR:
        bounds = [bound.to(device) for bound in BOUNDS]
        model, targets = frozen(name, device)
        weights = layer_weights(model, 0.01, 0.01, 10.0)
        forms = {"plain": Matching(model, targets, weights),
                 "closed": ClosedFormMatching(freeze(deepcopy(model)), targets, weights)}

        def bare(count=1):
            for _ in range(count):
                leaf = pixels[0].clone().requires_grad_()
                F.cross_entropy(model(leaf), labels[0]).backward()

        def run(form, drop, count=iterations):
            draws = recover.draw_iterations(count, [forms[form]], 32, seed=0, drop_rate=drop)
            for _ in recover.recover_batch(pixels.clone(), labels, [forms[form]], draws, bounds=bounds,
                                           dd_autograd=form == "plain"):
                pass

        cases = {"drop 0": ("closed", 0), "drop 0.4": ("closed", 0.4), "plain 0": ("plain", 0),
                 "plain 0.4": ("plain", 0.4)}
        alone, *times = interleaved([lambda: bare(2), *(partial(run, *case) for case in cases.values())],
                                    rounds)
        columns = {case: seconds / iterations / (alone / 2) for case, seconds in zip(cases, times)}
        for case in "drop 0", "drop 0.4":
            sums[case] = sums.get(case, 0) + columns[case] * alone
        sums["bare"] = sums.get("bare", 0) + alone
        ops = {form: counted_operations(partial(run, form, 0, 2))
               - counted_operations(partial(run, form, 0, 1))
               for form in forms}
        kept, leaf = torch.ones(len(weights), dtype=torch.bool,
                                device=device), pixels[0].clone().requires_grad_()
        saved = {form: saved_bytes(matching.model, lambda: recover.matching_gradient(
            matching, labels, 1.0, pixels, {}, kept, matching.start(1))) for form, matching in forms.items()}
        only = saved_bytes(model, lambda: F.cross_entropy(model(leaf), labels[0]))
        yield name, {**columns, "ops": ops["closed"], "plain ops": ops["plain"],
                     "bare ops": counted_operations(bare),
                     "saved": saved["closed"] / only, "plain saved": saved["plain"] / only,
                     "bare_ms": 500 * alone}
    yield "all five, by time", {case: sums[case] / sums["bare"] for case in ("drop 0", "drop 0.4")}


def bench_passes(rounds, quick, device):
    """recover.py: a pass over several batches of 50, forward and backward with statistics, against that of
    the bare frozen backbone; on a GPU both as CUDA graphs, and of 20 batches too."""
    for name in ("convnet_w8", "wrn10_1") if quick else CIFAR:
        bounds = [bound.to(device) for bound in BOUNDS]
        model, targets = frozen(name, device)
        matching = ClosedFormMatching(freeze(deepcopy(model)), targets,
                                      layer_weights(model, 0.01, 0.01, 10.0))
        kept = torch.ones(len(matching.targets), dtype=torch.bool, device=device)
        for groups in (2, 20) if device.type == "cuda" else (2,):
            labels = torch.arange(5, device=device).repeat_interleave(2 if quick else 10).repeat(groups, 1)
            images = torch.randn(*labels.shape, 3, 32, 32, generator=generator("bench")).to(device)
            view = {"crop": torch.tensor([[2, 3, 25, 20]], device=device).repeat(groups, 1)}

            def matched(x):
                return recover.matching_gradient(matching, labels, 1.0, x, view, kept,
                                                 matching.start(groups))[:1]

            def bare(x):
                leaf = x.flatten(0, 1).requires_grad_()
                return torch.autograd.grad(F.cross_entropy(model(leaf), labels.flatten()), leaf)

            functions = [Graphed(function) if device.type == "cuda" else function
                         for function in (matched, bare)]
            # a graph is caught in the third
            times = interleaved([partial(function, images) for function in functions], rounds + 2)
            yield f"{name}, {groups} batches of {labels.shape[1]}", ratio(times)


def bench_keeping(rounds, quick, device):
    """recover.py on a CPU: iterations that look out for numbers that are not finite and keep their state when
    it is time to, over the same ones without the time that this takes; keeping once, and its share of the 5
    minutes between two times."""
    classes, iterations = (2, 2) if quick else (5, 20)
    labels = torch.arange(classes, device=device).repeat_interleave(10)[None]
    pixels = torch.randn(1, 10 * classes, 3, 32, 32, generator=generator("bench")).to(device)
    for name in ("convnet_w8",) if quick else ("convnet_w128", "wrn16_2"):
        bounds = [bound.to(device) for bound in BOUNDS]
        model, targets = frozen(name, device)
        matching = ClosedFormMatching(freeze(model), targets, layer_weights(model, 0.01, 0.01, 10.0))
        args, states = recover.get_parser().parse_args(["--iterations", str(iterations)]), []
        with TemporaryDirectory() as folder, Checkpoint(Path(folder, "result.json"), args) as work:
            def run():
                nonfinite, spent = NonFinite(["ce", "bn", "conv", "dd", "pixel"], device), []

                def timed(function, *what):
                    started = time.perf_counter()
                    function(*what)
                    spent.append(time.perf_counter() - started)

                started, images = time.perf_counter(), pixels.clone()
                draws = recover.draw_iterations(iterations, [matching], 32, seed=0)
                for t, losses, state in recover.recover_batch(images, labels, [matching], draws,
                                                              bounds=bounds):
                    timed(lambda: nonfinite.update(t, *(losses[term] for term in nonfinite.names[:-1]),
                                                   images.sum()))
                    states[:] = [state]
                    timed(work.save_if_due, state)
                kept.append(sum(spent)), bare.append(time.perf_counter() - started - sum(spent))

            kept, bare = [], []
            interleaved([run], rounds)
            kept, bare = statistics.median(kept[1:]), statistics.median(bare[1:])
            state = states[0]()
            save, = interleaved([lambda: work.save(state)], rounds)
        yield name, {"ratio": 1 + kept / bare, "iteration_ms": 1e3 * bare / iterations, "save_ms": 1e3 * save,
                     "share of 5 min": save / 300}


def bench_relabel(rounds, quick, device):
    """relabel.py: draws, mixing, teachers, Eq. 8 and writing, against the teachers' forward passes of the
    same batches."""
    units = torch.tensor(UNITS, device=device)
    for what, names, count, size, epochs in [
            ("shapes, two teachers, 100 images at once", ("convnet_w64", "wrn16_2"), 100, 100, 5),
            ("CIFAR, five teachers, 100 images at once", CIFAR, 100, 100, 1),
            ("CIFAR, five teachers, 500 images by 64", CIFAR, 500, 64, 1)]:
        if quick:
            names, count, size, epochs = ("convnet_w8", "wrn10_1"), count // 10, size // 10, 1
        images = pixels(count).to(device)
        models = [channels_last(network(name).to(device).eval().requires_grad_(False)) for name in names]
        draw = draw_epoch(count, 32, size, "cutmix", generator("relabel", 0, 0))
        mixed = [apply_epoch(images, draw, batch, "cutmix", units) for batch in draw["order"].split(size)]

        @torch.inference_mode()
        def bare():
            for _ in range(epochs):
                for batch in mixed:
                    for model in models:
                        model(batch)

        with TemporaryDirectory() as folder:
            times = interleaved([lambda: label(images, units, models, size, 10, epochs, folder), bare],
                                rounds)
        yield what, ratio(times)


def bench_train_eval(rounds, quick, device):
    """train_eval.py: a student trained on stored labels, with an evaluation on ten images, against its bare
    steps."""
    test = Split(np.zeros((10, 32, 32, 3), np.uint8), range(10), DATA["classes"], 32).to(device)
    for name, count, epochs in [
            ("convnet_w128", 100, 5), ("resnet18", 100, 2), ("convnet_w128", 500, 1), ("resnet18", 500, 1)]:
        if quick:
            name, count, epochs = "convnet_w8", count // 10, 2
        args = train_eval.for_student(train_eval.get_parser().parse_args(["--epochs", str(epochs),
                                                                          "--evaluations", "1"]), name)
        images, classes = pixels(count).to(device), torch.arange(count, device=device) % 10
        with TemporaryDirectory() as folder:
            store_labels(Path(folder), epochs, count, 10)
            labels = StoredLabels(Path(folder), "cutmix")
            train_data = {"images": images, "classes": classes, "labels": labels, "test": test, "data": DATA,
                          "mean_std": torch.tensor(UNITS, device=device)}
            draw, batches = labels.epoch(0), []
            batch_size = train_eval.full_batch(count, args.whole_up_to, args.batch_size)
            for rows in torch.arange(count).split(batch_size):
                mixed = apply_epoch(images.cpu(), draw, rows, "cutmix", UNITS).to(device)
                batches.append((mixed, labels.soft_logits(0, rows, mixed), classes[rows]))
            model = network(name).to(device)
            optimizer = torch.optim.AdamW(train_eval.parameter_groups(model, 0), lr=1e-3,
                                          fused=device.type == "cuda")
            times = interleaved([
                lambda: train_eval.train_student(name, 0, train_data, args, NOTHING_KEPT, "seed0"),
                training_steps(model, optimizer, batches * epochs, lambda *x: mse_gt_loss(*x, args.gamma))],
                                rounds)
        yield f"{name}, {count} images by {len(batches[0][0])}", ratio(times)


def bench_squeeze(rounds, quick, device):
    """squeeze.py: an epoch with padded crops and flips against its bare steps, and these without
    channels_last."""
    count = 32 if quick else 256
    split = Split(pixels(count).permute(0, 2, 3, 1).numpy(), torch.arange(count) % 10, DATA["classes"],
                  32).to(device)
    batches = [(normalize(images, *UNITS), labels) for images, labels in split.batches(64)]
    training = Training("squeeze", 1, 64, 0.05, 0.0, schedule="constant", crop="pad4")
    for name in ("convnet_w8", "wrn10_1") if quick else CIFAR:
        def bare(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=training.lr, momentum=training.momentum,
                                        fused=device.type == "cuda")
            return training_steps(model, optimizer, batches, F.cross_entropy)

        trained, last, first = (network(name, last).to(device) for last in (True, True, False))
        rows, units = torch.arange(count), torch.tensor(UNITS, device=device)
        times = interleaved([
            lambda: list(squeeze.train(trained, split, rows, units, training, NOTHING_KEPT)),
            bare(last), bare(first)], rounds)
        yield f"{name}, {count} images by 64", {**ratio(times), "bare/channels_first": times[1] / times[2]}


def bench_precision(rounds, quick, device):
    """--precision bf16: how many times as fast as float32 are a training step of 64 images (squeeze.py) and
    of 25 (train_eval.py), the labels of 100 (relabel.py) and a frozen network's pass of 50 (recover.py)."""
    for name in ("convnet_w8", "wrn10_1") if quick else CIFAR:
        functions = []
        for precision in "fp32", "bf16":
            trained = with_precision(network(name).to(device), device, precision)
            fixed = frozen(name, device)[0]
            matched, labelling = (with_precision(model, device, precision)
                                  for model in (freeze(deepcopy(fixed)), channels_last(fixed)))
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
            large, small = (training_steps(trained, optimizer, [(torch.randn(count, 3, 32, 32, device=device),
                            torch.arange(count, device=device) % 10)], F.cross_entropy) for count in (64, 25))
            images = torch.randn(100, 3, 32, 32, device=device)

            def forward(model=labelling, images=images):
                with torch.inference_mode():
                    model(images)

            def step(model=matched, images=images[:50]):
                leaf = images.clone().requires_grad_()
                F.cross_entropy(model(leaf), torch.arange(50, device=device) % 10).backward()

            functions.append([large, small, forward, step])
        times = interleaved([function for pair in zip(*functions) for function in pair], rounds)
        yield name, {what: times[2 * i] / times[2 * i + 1] for i, what
                     in enumerate(("squeeze", "train_eval", "relabel", "recover"))}


def bench_augment(rounds, quick, device):
    """Batched crops, flips and normalisation of utils/augment.py, draws included, against torchvision's on
    PIL images."""
    for count, size in (100, 32), (100, 64), (20, 224):
        count = 2 if quick else count
        raw, units = pixels(count, size), torch.tensor(UNITS, device=device)
        images, pictures = raw.to(device), [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in raw]
        customary = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(),
                                        transforms.ToTensor(), transforms.Normalize(*UNITS)])

        def batched():
            draw = draw_epoch(count, size, count, "none", generator("bench"))
            return apply_epoch(images, draw, draw["order"], "none", units)

        ours, theirs = interleaved([batched, lambda: torch.stack([customary(picture)
                                                                  for picture in pictures])], rounds)
        yield f"{count} images of {size} pixels", {"ratio": theirs / ours, "ours_ms": 1e3 * ours,
                                                   "pil_ms": 1e3 * theirs}


def bench_labels(rounds, quick, device):
    """Soft labels of relabel.py, written by epoch and read by batch, against a file of torch.save for each
    batch."""
    epochs, count, classes, size = (2, 20, 10, 8) if quick else (40, 1000, 100, 64)
    logits = torch.randn(count, classes, generator=generator("bench")).half()
    batches = torch.randperm(count, generator=generator("bench")).split(size)
    with TemporaryDirectory() as folder:
        ours, files = Path(folder, "ours"), Path(folder, "files")
        files.mkdir()
        store_labels(ours, epochs, count, classes)                   # the draws, which reading needs too
        stored = StoredLabels(ours, "cutmix")

        def write():
            writer = LabelWriter(Path(folder, "written"), epochs, count, classes)
            writer.files = {"logits": writer.files["logits"]}        # the others write no draws either
            writer.create()
            for epoch in range(epochs):
                writer.write(epoch, logits, {})

        def write_files():
            for epoch in range(epochs):
                for i, batch in enumerate(batches):
                    torch.save(logits[batch], files / f"{epoch}-{i}.pt")

        def read():
            for epoch in range(epochs):
                for batch in batches:
                    stored.soft_logits(epoch, batch, logits)

        def read_files():
            for epoch in range(epochs):
                for i in range(len(batches)):
                    torch.load(files / f"{epoch}-{i}.pt", weights_only=True)

        for what, *pair in ("write", write, write_files), ("read", read, read_files):
            mine, theirs = (1e3 * seconds / epochs for seconds in interleaved(pair, rounds))
            yield (f"{what} an epoch of {count} x {classes}, page cache warm",
                   {"ratio": theirs / mine, "ours_ms": mine, "files_ms": theirs})


def store_labels(folder, epochs, count, classes):
    """Labels as of relabel.py for images of 32 pixels, of no teacher."""
    weights = torch.randn(48, classes, generator=generator("bench"))
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(),
                                torch.nn.Linear(48, classes, bias=False)).eval()
    model[2].weight.data = weights.T
    with redirect_stdout(io.StringIO()):
        label(pixels(count), torch.tensor(UNITS), [model], count, classes, epochs, folder)


def label(images, units, models, size, classes, epochs, folder):
    """relabel.py without its main."""
    count, pixels = len(images), images.shape[-1]
    writer = LabelWriter(folder, epochs, count, classes)
    writer.create()
    for epoch in range(epochs):
        draw = draw_epoch(count, pixels, size, "cutmix", generator("relabel", 0, epoch))
        logits = relabel.label_epoch(images, units, draw, size, models, "cutmix", True)
        writer.write(epoch, logits.half().cpu(), draw)
    writer.sync()


BENCHES = {"recover": bench_recover, "passes": bench_passes, "keeping": bench_keeping,
           "relabel": bench_relabel, "train_eval": bench_train_eval, "squeeze": bench_squeeze,
           "precision": bench_precision, "augment": bench_augment, "labels": bench_labels,
           "scale": bench_scale}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=" ".join(BENCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="sizes that tell nothing but that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.benches) - set(BENCHES):
        parser.error(f"{' '.join(unknown)} is none of {' '.join(BENCHES)}")
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    where = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": args.threads,
             "rounds": args.rounds,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    if not args.json:
        print("  ".join(f"{key} {value}" for key, value in where.items()))
    for name in args.benches or BENCHES:
        if not args.json:
            print(f"\n{BENCHES[name].__doc__}")
        for what, columns in BENCHES[name](args.rounds, args.quick, device):
            columns = {key: float(f"{value:.4g}") for key, value in columns.items()}
            told = f"{what:<45}" + "".join(f"  {key} {value:<7}" for key, value in columns.items())
            print(json.dumps({"bench": name, "case": what, **columns, **where}) if args.json
                  else told.rstrip(), flush=True)


if __name__ == "__main__":
    main()
