"""The code of a logged model: MLflow copies this file and runs it where the model is loaded."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import torch
import yaml
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from safetensors import safe_open

from configs.schema import ModelConfig
from data_pipeline.images import normalise
from model.network import build_model


class DescriptorModel(PythonModel):
    """Images in, global descriptors out; on a GPU where there is one."""

    def load_context(self, context: Any) -> None:
        """Builds the network that the file's metadata describes, with the file's weights."""
        file = context.artifacts["network"]
        with safe_open(file, framework="pt") as content:
            stored = yaml.safe_load(content.metadata()["recipe"])["model"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = build_model(ModelConfig.model_validate({**stored, "weights": file})).to(self.device).eval()

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> NDArray[np.float32]:  # noqa: ARG002
        """uint8 RGB images [B, 3, H, W] -> float32 L2-normalised descriptors [B, D]; H and W multiples of the patch."""
        shape, patch = tuple(model_input.shape), self.network.spec.patch
        if len(shape) != 4 or shape[1] != 3 or shape[2] % patch or shape[3] % patch:
            raise ValueError(f"images are {shape}; expected [B, 3, H, W] with H and W multiples of {patch}")
        images_B3HW = torch.from_numpy(np.array(model_input, dtype=np.uint8)).to(self.device)
        with torch.inference_mode():
            descriptors_BD: NDArray[np.float32] = self.network(normalise(images_B3HW)).float().cpu().numpy()
        return descriptors_BD


mlflow.models.set_model(DescriptorModel())
