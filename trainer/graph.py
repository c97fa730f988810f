"""A network as a graph of fixed image size: one file for `torch.export` or ONNX, which needs none of our code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from configs.files import partial_of, remove, remove_abandoned
from configs.image_size import height_width
from configs.schema import Recipe
from data_pipeline.images import normalise
from eval.pixels import as_trained, pixel_rule
from model.licences import licence_metadata
from model.network import PlaceModel

Takes = Literal["uint8", "float"]
GRAPHS = (".pt2", ".onnx")
EXTRA = ("onnx", "onnxscript", "onnxruntime")
LEAST_COSINE = 1 - 1e-4
TRIED = (1, 3)  # images in a batch, when a written graph is compared with the network
MOST_BYTES = (
    2_000_000_000  # one message of ONNX's format holds less than 2^31; weights beyond lie in a file of their own
)
BATCH = "batch"


class ImagesToDescriptors(nn.Module):
    """uint8 RGB, or normalised floats, [B, 3, H, W] -> float32 L2-normalised descriptors [B, D]."""

    def __init__(self, network: PlaceModel, takes: Takes) -> None:
        super().__init__()
        self.network = network
        self.takes = takes
        normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # keeps constants, which a trace would make fakes of

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises uint8 and encodes."""
        descriptors: torch.Tensor = self.network(normalise(images) if self.takes == "uint8" else images)
        return descriptors


def check_graph(out: Path, recipe: Recipe, image_size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a graph's images: as given, else the recipe's.

    Raises ValueError if `out`'s format cannot be written here, or for sides that the patches do not cover.
    """
    if out.suffix == ".onnx" and (missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]):
        raise ValueError(f"export to {out}: {', '.join(missing)} not installed; pip install 'rerankvpr[onnx]'")
    if len(image_size) > 2:
        raise ValueError(f"--image-size {' '.join(map(str, image_size))}: expected a side, or height and width")
    if not image_size and recipe.eval.resize != "square":
        raise ValueError(
            f"{out}: a graph has one size of images, and the recipe's eval.resize is {recipe.eval.resize}; give "
            "--image-size HEIGHT WIDTH"
        )
    height, width = image_size * 2 if len(image_size) == 1 else image_size or height_width(recipe.eval.image_size)
    recipe.model.spec.check_side((height, width), "--image-size")
    return height, width


def write_graph(network: PlaceModel, recipe: Recipe, out: Path, size: tuple[int, int], takes: Takes) -> float:
    """Writes `out` (.pt2 or .onnx), and returns the least cosine between its descriptors and the network's.

    The batch is of any size, the images of one; whatever of the network depends on the size alone, such as the resized
    position table, is a constant in the file. The file (and its weights beside it, for an ONNX of more than 2 GB)
    appears once it has been read again and compared. Raises ValueError if the two disagree.
    """
    module = ImagesToDescriptors(network.float().eval().requires_grad_(False), takes)
    program = export_program(module, size)
    metadata = describe(recipe, size, takes, network.descriptor_size) | licence_metadata(recipe.model.spec)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    folder = partial_of(out)
    folder.mkdir()
    try:
        partial = folder / out.name
        if out.suffix == ".pt2":
            torch.export.save(program, partial, extra_files={"rerankvpr.json": json.dumps(metadata)})
        else:
            _write_onnx(program, partial, metadata, large=_bytes_of(network) > MOST_BYTES)
        least = _least_cosine(module, partial, size)
        if least < LEAST_COSINE:
            raise ValueError(f"{out}: its descriptors are not the network's: cosine {least:.6f}; it is not written")
        for file in sorted(folder.iterdir(), key=lambda file: file == partial):  # the weights first
            file.replace(out.parent / file.name)
    finally:
        remove(folder)
    return least


def describe(recipe: Recipe, size: tuple[int, int], takes: Takes, descriptor_size: int) -> dict[str, str]:
    """What a graph says of itself: its input and output in words, and how photographs become this input."""
    numbers = {
        "uint8": "uint8 RGB, 0 to 255; the graph normalises",
        "float": "float32 RGB from 0 to 1, minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)",
    }
    return {
        "input": f"images [{BATCH}, 3, {size[0]}, {size[1]}]: {numbers[takes]}",
        "output": f"descriptors [{BATCH}, {descriptor_size}]: float32, L2-normalised; cosine is their inner product",
        "pixels": f"trained and evaluated with {pixel_rule(as_trained(recipe.eval, recipe.data))}",
    }


@torch.no_grad()
def export_program(module: nn.Module, size: tuple[int, int]) -> ExportedProgram:
    """The module as a graph for any batch of images of one size, its constants folded."""
    takes = getattr(module, "takes", "float")
    images = torch.zeros(2, 3, *size, dtype=torch.uint8 if takes == "uint8" else torch.float32)
    shapes = ({0: Dim.DYNAMIC},)
    graph = torch.export.export(module, (images,), dynamic_shapes=shapes).module()
    assert isinstance(graph, torch.fx.GraphModule)
    fold_constants(graph)
    return torch.export.export(graph, (images,), dynamic_shapes=shapes)


def fold_constants(module: torch.fx.GraphModule) -> None:
    """Replaces what is computed from parameters and buffers alone by its value, computed once by the same operators."""
    graph, values = module.graph, dict[torch.fx.Node, Any]()
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
        elif node.op == "call_function" and not _is_random(node) and all(n in values for n in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    for number, node in enumerate(list(graph.nodes)):
        if node in values and values[node] is None:  # a check of types, which would keep what it checks
            graph.erase_node(node)
            continue
        used = any(user not in values for user in node.users)
        if node not in values or node.op == "get_attr" or not used or not isinstance(values[node], torch.Tensor):
            continue
        name = f"folded_{number}"
        module.register_buffer(name, values[node].detach().clone())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()
    module.recompile()


def _is_random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _write_onnx(program: ExportedProgram, file: Path, metadata: dict[str, str], *, large: bool) -> None:
    import onnx_ir

    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["descriptors"])
    assert made is not None
    graph = made.model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = onnx_ir.Shape([BATCH, *list(value.shape)[1:]])
    made.model.metadata_props.update(metadata)
    made.save(file, external_data=large)


@torch.inference_mode()
def _least_cosine(module: ImagesToDescriptors, file: Path, size: tuple[int, int]) -> float:
    """The least cosine of a written graph's descriptors with the network's, over images of noise."""
    cosines, graph = [], load_graph(file)
    for count in TRIED:
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
        given = images if module.takes == "uint8" else normalise(images)
        cosines.append((module(given).double() * graph(given).double()).sum(dim=1))
    return float(torch.cat(cosines).min())


def load_graph(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A graph as a function from its own input to descriptors, by torch or, on the CPU, onnxruntime."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
