"""What relabel.py and train_eval.py start from: the distilled images of a run, or of any folder (--images),
and the results of the phases behind them."""
import argparse
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from models.pruning import channel_scales
from utils import fail
from utils.cli import call
from utils.data import check_count, describe, list_folder, load_folder, load_split, read_class_map
from utils.files import load_json
from utils.labels import OnlineLabels, StoredLabels, draw_labels
from utils.processes import rank0_first
from utils.provenance import check_classes, check_data, check_inputs, fingerprint, fingerprints, image_set
from utils.teachers import check_models, check_same_data, load_teachers
from utils.train import channels_last


def earlier_result(phase: str, args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """-> the result of recover.py or relabel.py, {phase: arguments} of all phases up to that one"""
    command = call(f"{phase}.py", args, images=args.images, class_map=args.class_map)
    keys = "args", "upstream", "made_from", "classes", *["image_set"] * (phase == "recover")
    result = load_json(folder / "result.json", f"run: {command}", keys)
    return result, result["upstream"] | {phase: result["args"]}


def images_hash(folder: Path, recovered: dict) -> str:
    """Fingerprint of the images that recover.py wrote (recovered: its result), or of any folder ({})."""
    return recovered["image_set"] if recovered else image_set(folder, list_folder(folder)[2])


def class_map_hash(args: argparse.Namespace) -> dict[str, str]:
    """What decides over the classes of --images, for `check_inputs`; {} without a --class-map."""
    found = read_class_map(args.class_map)
    return {"class map": fingerprint(json.dumps(found, sort_keys=True))} if found else {}


def load_images(args: argparse.Namespace, folder: Path, data: dict, expected: str,
                labels: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images with the fingerprint `expected`: that of recover.py's result, or the one for which `labels` were
    made.   data: of teachers, labels or `describe`   -> images uint8 [N, 3, S, S], classes [N]"""
    images, classes, _, files = load_folder(folder, data["image_size"], args.workers, data["classes"],
                                            read_class_map(args.class_map))
    if args.images:
        check_count(classes, args.ipc, folder)
    if image_set(folder, files) != expected:
        recovered = {} if args.images else earlier_result("recover", args, folder.parent)[0]
        if labels and recovered.get("image_set") != expected:
            fail(f"{labels} was made for other images than {folder} holds; run relabel.py --overwrite")
        fail(f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them "
             "with --images")
    return images, classes


def check_recovered(recovered: dict, args: argparse.Namespace, paths: SimpleNamespace, data: dict,
                    records: dict[str, dict]) -> None:
    """Stop unless recover.py's images have these classes and, if it ran with the same --teachers, were made
    with these teachers. With --recipe teachers may be added or left out, but none may have changed."""
    path, had = paths.run / "result.json", recovered["made_from"].get("weights", {})
    made = had or recovered["made_from"].get("first backbone", {})   # it chose the images, or their starts
    check_data(recovered["made_from"].get("data"), args, path)
    check_classes(recovered["classes"], data["classes"], path, "the data set or the teachers now")
    if records and made and recovered["args"]["teachers"] == args.teachers:
        names = had.keys() | records.keys() if had and not args.recipe else made.keys() & records.keys()
        remedy = (f"name the same --backbones, run recover.py --overwrite, or name --images {paths.images} "
                  "under another --tag")
        check_inputs({"weights": {name: made.get(name) for name in names}},
                     fingerprints({name: records[name] for name in names & records.keys()}), path, remedy)


def load_sources(args: argparse.Namespace, paths: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    """What the students are made from, but for the images.
    -> before: result of the phase before, {} for images of other origin; data: of the teachers or the labels;
    teachers, records: of --labels online; starts, origins: {student: the model that --protocol prune begins
    with}, {student: its record}; hashes: {student: for `check_inputs`}; upstream: {phase: arguments}"""
    before, upstream, data = {}, {}, None
    teachers, records, starts, origins = {}, {}, {}, {}
    if args.labels == "stored":
        before, upstream = earlier_result("relabel", args, paths.labels)
        data, made_from = before["data"], before["made_from"]
        if set(args.backbones) != set(made_from["weights"]):
            fail(f"--backbones {' '.join(args.backbones)}: {paths.labels} was made with "
                 f"{' '.join(made_from['weights'])}; name the same")
        made_from = made_from | {"labels": fingerprint(json.dumps([before["args"], made_from]))}
    else:
        if not args.images:
            before, upstream = earlier_result("recover", args, paths.run)
        if args.labels == "online":
            teachers, records, data = load_teachers(args, paths.teachers, device)
        made_from = {"images": images_hash(args.images or paths.images, before)}
        made_from |= fingerprints(records) if records else {}
    made_from |= class_map_hash(args)
    hashes = dict.fromkeys(args.students, made_from)
    if args.protocol == "prune":                                     # train_piece sets the precision
        named = argparse.Namespace(**vars(args) | {"backbones": args.students, "precision": "fp32"})
        starts, origins, _ = load_teachers(named, paths.teachers, device)
        hashes = {name: made_from | {"teacher": origins[name]["fingerprint"]} for name in args.students}
    for name, model in starts.items():
        if not channel_scales(model):
            fail(f"--students {name}: no BatchNorm scale decides over a channel of it; prune one such as "
                 "vgg11_bn or resnet18")
    if squeezed := {name: record["args"] for name, record in (records | origins).items()}:
        upstream["squeeze"] = upstream.get("squeeze", {}) | squeezed
    return SimpleNamespace(before=before, data=data, teachers=teachers, records=records, starts=starts,
                           origins=origins, hashes=hashes, upstream=upstream)


def load_train_data(args: argparse.Namespace, paths: SimpleNamespace, sources: SimpleNamespace,
                    device: torch.device) -> dict:
    """All that students are trained and tested on.
    -> {images uint8 [N, 3, S, S], classes [N], labels (utils/labels.py), test, data, mean_std [2, 3]}"""
    data = sources.data if args.labels != "hard" else describe(
        args.dataset, args.data_dir, args.image_size, args.workers, args.data_set["fingerprint"])
    folder, stored = args.images or paths.images, args.labels == "stored"
    check_data(data.get("fingerprint"), args, paths.labels if stored else folder)
    if sources.before and not stored:
        check_recovered(sources.before, args, paths, data, sources.records)
    images, classes = load_images(args, folder, data, sources.hashes[args.students[0]]["images"],
                                  paths.labels if stored else None)
    if stored:
        used = min(args.epochs, args.label_epochs or args.epochs)
        try:
            labels = StoredLabels(paths.labels, sources.before["args"]["mix"], used)
        except ValueError as error:
            fail(error)
        if used > (there := len(labels.logits)):
            fail(f"--{'label-' * (used < args.epochs)}epochs {used} is more than the {there} in "
                 f"{paths.labels}; use --label-epochs {there}, or run relabel.py --epochs {used} --overwrite")
    else:
        teachers = [channels_last(teacher) for teacher in sources.teachers.values()]
        labels = OnlineLabels(partial(draw_labels, args, data["image_size"]), args.mix, len(images), teachers,
                              args.logit_norm)
    check_models("--students", args.students, len(data["classes"]), data["image_size"])
    for name, record in sources.origins.items():
        check_same_data(record["data"], data, paths.teachers / f"{name}.pt", "what students are trained on")
    with rank0_first():
        test = load_split(args.dataset, args.data_dir, "test", data["image_size"], args.workers,
                          args.download, args.holdout).to(device)
    check_classes(test.classes, data["classes"], "the test images", folder)
    return {"images": images.to(device), "classes": classes.to(device), "labels": labels, "test": test,
            "data": data, "mean_std": torch.tensor([data["mean"], data["std"]], device=device)}
