#!/usr/bin/env python3
"""Write qtune/evaluate/general.txt: dictionary entries that the demo base was not trained on, an entry a line.

They are the first of the synsets that scripts/build_demo_base.py holds out, from WordNet 3.0 (Debian package
`wordnet-base`; its licence is beside the demo base's weights).
"""

import argparse
from pathlib import Path

from build_demo_base import ROOT, parted_synsets

ENTRIES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    held_out, _ = parted_synsets(parser.parse_args().wordnet)
    lines = [f"{', '.join(synset.words)}: {synset.gloss}\n" for synset in held_out[:ENTRIES]]
    (ROOT / "qtune" / "evaluate" / "general.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
