"""Stories of the demo world (data/demo.py), and the items of its four tasks."""

import argparse
import sys

from data.demo import documents, write_tasks


def main() -> None:
    """Show stories or write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="print N stories of the training split")
    parser.add_argument("--write-tasks", action="store_true", help="write the four tasks' items under data/tasks/")
    args = parser.parse_args()
    if args.sample:
        stream = documents("train")
        sys.stdout.write("\n\n".join(next(stream) for _ in range(args.sample)) + "\n")
    if args.write_tasks:
        write_tasks()


if __name__ == "__main__":
    main()
