"""`torchrun ... -m trainer RECIPE`."""

import sys

from rerankvpr import check_packages, end_with, prepare_libraries, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    check_packages()
    prepare_libraries()
    from trainer.command import main

    end_with(lambda: main(sys.argv[1:]))
