"""The distilled images of a run, or of any folder (--images), as relabel.py and train_eval.py take them."""
from utils import fail
from utils.checkpoint import load_json
from utils.cli import call
from utils.data import check_count, list_folder, load_folder, read_class_map
from utils.provenance import check_classes, check_data, check_inputs, fingerprints, image_set


def earlier_result(phase, args, folder):
    """The result of recover.py or relabel.py.   -> it, {phase: arguments} of all phases up to there"""
    command = call(f"{phase}.py", args, images=args.images, class_map=args.class_map)
    keys = "args", "upstream", "made_from", "classes", *["image_set"] * (phase == "recover")
    result = load_json(folder / "result.json", f"run: {command}", keys)
    return result, result["upstream"] | {phase: result["args"]}


def images_hash(folder, recovered):
    """Fingerprint of the images that recover.py wrote, or of any folder.   recovered: its result, or {}"""
    return recovered["image_set"] if recovered else image_set(folder, list_folder(folder)[2])


def load_images(args, folder, data, expected, labels=None):
    """Images with the fingerprint `expected`: that of recover.py's result, or the one for which `labels` were
    made.   data: of `load_teachers`   -> images uint8 [N, 3, S, S], classes [N]"""
    images, classes, _, files = load_folder(folder, data["image_size"], args.workers, data["classes"],
                                            read_class_map(args.class_map))
    if args.images:
        check_count(classes, args.ipc, folder)
    if image_set(folder, files) != expected:
        fail(f"{labels} was made for other images than {folder}; run relabel.py --overwrite" if labels else
             f"{folder} holds other images than recover.py wrote; run recover.py --overwrite, or name them "
             "with --images")
    return images, classes


def check_recovered(recovered, args, paths, data, records):
    """Stop unless recover.py's images have these classes and, if its teachers were of this --teachers set,
    were made with these. Under another --recipe teachers may be added or left out, but none may have
    changed."""
    path, had = paths.run / "result.json", recovered["made_from"].get("weights", {})
    check_data(recovered["made_from"].get("data"), args, path)
    check_classes(recovered["classes"], data["classes"], path, "the data set or the teachers now")
    if records and had and recovered["args"]["teachers"] == args.teachers:
        names = had.keys() & records.keys() if args.recipe else had.keys() | records.keys()
        remedy = (f"name the same --backbones, run recover.py --overwrite, or name --images {paths.images} "
                  "under another --tag")
        check_inputs({"weights": {name: had.get(name) for name in names}},
                     fingerprints({name: records[name] for name in names & records.keys()}), path, remedy)
