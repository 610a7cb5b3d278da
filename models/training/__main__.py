"""Runs one training in its own process: `python -m models.training [JOB_DIR]`. See `models.training.trainer_process`."""

import argparse
import os
import sys
from pathlib import Path

from models.training.trainer_process import be_modest, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m models.training", description="Run the job that JOB_DIR holds.")
    parser.add_argument("folder", metavar="JOB_DIR", type=Path, nargs="?", help="without it, it is read from stdin")
    parser.add_argument("--dry-run", action="store_true", help="audit, split and estimate; train nothing")
    options = parser.parse_args()
    be_modest()  # before torch is imported, which takes seconds of CPU time
    code = main(options.folder, dry_run=options.dry_run)
    sys.stderr.flush()
    os._exit(code)  # all is written, and torch's clean-up takes seconds
