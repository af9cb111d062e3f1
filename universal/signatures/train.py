"""Train the scorer to tell trained matrices from null models and inits, in families that it has not seen.

    python -m universal.signatures.train

computes the signatures of the corpus and of what resembles it (`nulls.py`), saves them as signature_table.pth for the
study, and trains a member of the scorer for each family, on all the others.
"""

import argparse
import time
from pathlib import Path

from scripting import number, option_parser, output_file, run_script, save_tensors
from universal.signatures.detection import (
    SIGNATURES,
    areas_of,
    certainty_by_size,
    held_out_logits,
    labelled_signatures,
    trained_scorer,
)
from universal.signatures.matrices import CORPUS, load_corpus
from universal.signatures.scorer import SCORER
from universal.signatures.statistics import SCORED


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the scorer of signatures.", seed=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="the corpus of trained weights")
    parser.add_argument("--matrices", type=number(int, 1, 10_000), default=40, help="most of a family to learn from")
    parser.add_argument("--steps", type=number(int, 1, 10**7), default=2500, help="batches of signatures to learn from")
    parser.add_argument("--table", type=output_file(".pth"), default=str(SIGNATURES), help="signatures to write")
    parser.add_argument("--out", type=output_file(".pth"), default=str(SCORER), help="file of the scorer to write")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    corpus = load_corpus(options.corpus)
    start = time.perf_counter()
    labelled = labelled_signatures(corpus, options.matrices, options.seed, options.device)
    save_tensors(options.table, labelled._asdict())
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(labelled.kind):,} signatures of {len(corpus)} families saved to {options.table}, {minutes:.1f} min")
    start = time.perf_counter()
    scorer = trained_scorer(labelled, options.steps, options.seed, options.device)
    scorer.certainty.copy_(certainty_by_size(scorer, labelled))
    minutes = (time.perf_counter() - start) / 60
    print(f"Scorer of {len(corpus)} members trained, {minutes:.1f} min")
    areas = areas_of(held_out_logits(scorer, labelled), labelled)
    print(f"Held-out area under the curve, mean over null models, inits and families: {areas.nanmean():.3f}")
    state = {name: tensor.cpu() for name, tensor in scorer.state_dict().items()}
    save_tensors(options.out, {"statistics": list(SCORED), "settings": scorer.settings, "state_dict": state})
    print(f"Scorer saved to {options.out}")


if __name__ == "__main__":
    run_script(main)
