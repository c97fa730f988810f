"""`torchrun ... -m trainer RECIPE`."""

from rerankvpr import check_packages, end_with, prepare_arguments, prepare_libraries, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    check_packages()
    prepare_libraries()
    argv = prepare_arguments()
    from trainer.command import main

    end_with(lambda: main(argv))
