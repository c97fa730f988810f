"""What programs and checks of tests need, imported once: processes of tests are forks of one that has imported this.

Beside what ranks of a launch come with (`launch.torchrun.preload`), it is what verbs and checks import in addition.
"""

from __future__ import annotations

import gc
import importlib

from launch.torchrun import preload

MODULES = (
    *(
        "pytest",
        "hypothesis",
        "torch.distributed.run",
        "torch.distributed.launcher.api",
        "faiss",
        "pandas",
        "scipy.spatial",
        "pytorch_metric_learning.losses",
    ),
    *("mlflow.pyfunc", "mlflow.system_metrics.metrics.cpu_monitor", "trainer.mlflow_sender", "trainer.logged_model"),
    *("trainer.preflight", "trainer.plan", "trainer.fit", "trainer.export_formats", "memory.library_loss"),
    *("eval.index.index", "eval.report.locations", "eval.report.written", "eval.report.training_curves"),
    *("model.dinov2", "matplotlib.figure", "matplotlib.backends.backend_agg", "pillow_heif", "pyarrow.dataset"),
    *("sqlalchemy.dialects.sqlite", "alembic.command", "mlflow.store.tracking.sqlalchemy_workspace_store"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.comm.mori", "tests.photos", "launch.cli"),
    *("data_pipeline.sources.gsv_cities", "data_pipeline.shards", "data_pipeline.stream", "data_pipeline.town.render"),
)

for entry in (*preload(["train"]), *preload(["eval"]), *preload(["index"]), *MODULES):
    module, _, function = entry.partition(":")
    imported = importlib.import_module(module)
    if function:
        getattr(imported, function)()
gc.collect()
gc.freeze()  # a collection in a fork leaves what is shared alone: it is millions of objects
