"""`torchrun ... -m trainer RECIPE`."""

import os
import sys

from rerankvpr import check_packages

if __name__ == "__main__":
    check_packages()
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    from trainer.command import main

    sys.exit(main(sys.argv[1:]))
