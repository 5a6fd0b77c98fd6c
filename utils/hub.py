"""A run to publish: a data set for Hugging Face, or its images in one file (see utils/convert.py)."""
import json
import re
import shutil
import zipfile
from pathlib import Path

from utils import fail
from utils.data import list_folder, opened, unreadable_fails
from utils.files import load_json, whole_file
from utils.provenance import AGAIN, fingerprint


def without_places(result: dict) -> dict:
    """A result whose absolute paths are cut to their last name, which tells nothing of this machine."""
    return json.loads(re.sub(r'"/[^"]*?([^"/]*)/*"', r'"\1"', json.dumps(result)))


def fill_card(result: dict, labelled: dict, size: str) -> str:
    """Text of hub_card.md for the results of recover.py and of relabel.py ({}: without labels)."""
    card = Path(__file__).with_name("hub_card.md").read_text(encoding="utf-8")
    args, labels = result["args"], labelled.get("args", {})
    if not labelled:
        card = card[:card.index("\n## Reading the soft labels")]
    settings = ", ".join(f"{flag} {value}" for flag, value in args.items()
                         if value is not None and value is not False and value != [])
    return card.format(dataset=result["dataset"], ipc=args["ipc"], method=args["method"], size=size,
                       images=result["images"], classes=len(result["classes"]), settings=settings,
                       epochs=labels.get("epochs"), teachers=", ".join(labels.get("backbones", [])))


def write_hub(run: Path, folder: Path) -> None:
    """Fill an empty folder: images with metadata.jsonl, grid.png, a card, and the labels if there are any."""
    result, labelled = (without_places(load_json(path, AGAIN)) if path.exists() else {}
                        for path in (run / "result.json", run / "labels" / "result.json"))
    if labelled and labelled["made_from"]["images"] != result["image_set"]:
        fail(f"{run}/labels was made for other images than {run}/images holds; run relabel.py --overwrite, "
             "or remove it")
    labels, _, files = list_folder(run / "images", result["classes"])
    shutil.copytree(run / "images", folder / "images")
    shutil.copy(run / "grid.png", folder)
    rows = [{"file_name": file, "label": label, "class": result["classes"][label]}
            for file, label in zip(files, labels.tolist())]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if labelled:
        shutil.copytree(run / "labels", folder / "labels", ignore=shutil.ignore_patterns(".*"))
        (folder / "labels" / "result.json").write_text(json.dumps(labelled, indent=1) + "\n")
    with unreadable_fails(), opened(run / "images" / files[0]) as image:
        size = f"{image.width} x {image.height}"
    (folder / "README.md").write_text(fill_card(result, labelled, size), encoding="utf-8")


def write_zip(run: Path, out: Path) -> str:
    """images/<class>/<id>.png, uncompressed; equal bytes for equal images; and <out>.sha256.   -> sha256"""
    with whole_file(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in list_folder(run / "images")[2]:
            archive.writestr(zipfile.ZipInfo(f"images/{file}"), (run / "images" / file).read_bytes())
    digest = fingerprint(out)
    out.with_name(f"{out.name}.sha256").write_text(f"{digest}  {out.name}\n")
    return digest
