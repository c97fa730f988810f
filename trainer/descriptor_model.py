"""The code of a logged model: MLflow copies this file and runs it where the model is loaded."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

from configs.plugins import load_kept
from eval.given_images import GivenImage, as_list
from eval.weights_file import describer_of_file

SERVED_FOLDER = "RERANKVPR_SERVE_FOLDER"  # in the environment: the folder whose files a scoring server may open
SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # set by MLflow's scoring server


class DescriptorModel(PythonModel):
    """Images in, global descriptors out; on a GPU where there is one."""

    _skip_type_hint_validation = True  # images have more forms than MLflow's types; it would warn each who loads this

    def load_context(self, context: Any) -> None:
        """Builds the network and the rule for its pixels, as the file's metadata describes them."""
        if plugins := context.artifacts.get("plugins"):
            load_kept(Path(plugins))
        self.describer = describer_of_file(Path(context.artifacts["network"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ARG002
        """Images of any size -> float32 L2-normalised descriptors [B, D].

        `model_input` is one image or several, in a list, an array or a DataFrame of one column; each a file's name, a
        file's bytes, these in base64 (also as a `data:` address), or RGB numbers [H, W, 3] or [3, H, W]: integers from
        0 to 255, or floats from 0 to 1. All are resized as in the training. A scoring server opens no files but those
        below `RERANKVPR_SERVE_FOLDER`. Raises MlflowException naming the image.
        """
        try:
            return self.describer.describe([_image(given) for given in _rows(model_input)])
        except (ValueError, TypeError, OSError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _rows(model_input: Any) -> list[Any]:
    """The images of what MLflow hands over."""
    if isinstance(model_input, pd.DataFrame):
        if model_input.shape[1] != 1:
            raise ValueError(f"{model_input.shape[1]} columns; expected one, of images")
        return list(model_input.iloc[:, 0])
    if isinstance(model_input, pd.Series):
        return list(model_input)
    if isinstance(model_input, dict):
        if len(model_input) != 1:
            raise ValueError(f"keys {', '.join(map(str, model_input))}; expected one, of images")
        return _rows(next(iter(model_input.values())))
    if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "OUS":
        return list(model_input.ravel())
    if isinstance(model_input, list) and _is_number(_first(model_input)):
        return as_list(np.array(model_input))
    return as_list(model_input)


def _image(given: Any) -> GivenImage:
    """One image as `Describer` takes it; text is base64 of a photograph or else a file's name."""
    if isinstance(given, list | tuple):
        return np.array(given)
    if isinstance(given, np.bytes_):
        return bytes(given)
    if not isinstance(given, str):
        image: GivenImage = given
        return image
    _, comma, text = given.partition(",") if given.startswith("data:") else ("", "", given)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if comma or (data and not _names_a_file(given)):
        return data
    return _allowed(Path(given))


def _names_a_file(text: str) -> bool:
    """Whether text that is valid base64 is a file's name all the same, such as `left` or `a/b`."""
    return len(text) < 256 and not text.startswith(("/9j/", "iVBOR", "UklGR", "R0lGOD", "data:"))


def _allowed(path: Path) -> Path:
    """The path, unless this is a server that may not open it: its clients choose names, and they may be strangers."""
    if os.environ.get(SERVING, "").lower() != "true":
        return path
    folder = os.environ.get(SERVED_FOLDER)
    if not folder:
        raise ValueError(f"this server opens no files: send a photograph in base64, or start it with {SERVED_FOLDER}")
    found = (Path(folder) / path).resolve()
    if Path(folder).resolve() not in found.parents:
        raise ValueError(f"{path} is not below this server's folder of photographs")
    return found


def _first(values: Any) -> Any:
    """The first value of nested lists."""
    while isinstance(values, list) and values:
        values = values[0]
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


mlflow.models.set_model(DescriptorModel())
