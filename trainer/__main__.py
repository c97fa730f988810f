"""`torchrun ... -m trainer RECIPE`."""

import os
import sys

from rerankvpr import check_packages, end_with, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    check_packages()
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    from trainer.command import main

    end_with(lambda: main(sys.argv[1:]))
