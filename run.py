"""What a user types: `python run.py strategy=cotta scenario=imagenet_c`."""

import sys

from driftline.runs.command import main

if __name__ == "__main__":
    sys.exit(main())
