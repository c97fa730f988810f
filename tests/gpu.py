"""GPUs are hidden from tests: those of several ranks need one each, and what they compare was computed on CPUs.

With RERANKVPR_TEST_GPU set, as `make gpu` sets it for the tests of a device, they are there.
"""

import os

from trainer.devices import promised_gpu

ON_GPU = "RERANKVPR_TEST_GPU"
GPU = promised_gpu()  # before it is hidden


def hide_gpus() -> None:
    """Has torch find no GPU, in this process and in those that it starts."""
    if GPU and not os.environ.get(ON_GPU):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
