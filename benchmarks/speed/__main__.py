"""``python -m benchmarks.speed NAME [options]``; without a name, what there is to measure."""

import importlib
import sys

MEASURES = {
    "steps": "(a), (a'), (j): stored answers against plain training, and what metrics cost",
    "pipeline": "(b): the input pipeline against a batch in memory",
    "live": "(k): files that are decoded in every epoch, against torchvision's tensors",
    "compute": "(c): arithmetic against the machine's best",
    "filling": "(d), (g): bytes of a record, and the speed of recording",
    "starting": "(e), (f): from nothing to the first step, and --help",
    "race": "(h): against a tutorial's loop, torchdistill and timm",
    "scaling": "time and memory against images, classes, views and teachers",
}


def main() -> None:
    """Hand over to one of the measures."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MEASURES:
        lines = [f"  {each:<10} {text}" for each, text in MEASURES.items()]
        sys.exit("\n".join([__doc__ or "", *lines]))
    importlib.import_module(f"benchmarks.speed.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
