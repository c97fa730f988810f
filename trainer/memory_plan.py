"""Memory of a rank by part, from the recipe alone: what `rerankvpr plan` prints and refuses by.

docs/training.md explains each formula. Sizes follow what DeepSpeed 0.19, torch's optimizers and the network's blocks
really allocate; `benchmarks/giant.py` holds them against measured peaks, `benchmarks/simulate.py` against counts.
"""

from __future__ import annotations

import math

from configs.image_size import ImageSize, height_width, num_pixels
from configs.registry import LOSSES
from configs.schema import Recipe
from memory.strategies import is_for_tiles
from trainer.activations import block_activations, mlp_widths
from trainer.aggregator_cost import aggregator_cost
from trainer.engine import BUCKET, DTYPES, GIVEN_BACK, LIVE, reduce_bucket
from trainer.engine_state import keepers
from trainer.flops import num_trained_blocks
from trainer.guided import guided_bytes
from trainer.hard_cost import chunk_images, composing_bytes
from trainer.memory_parts import HEAP, MemoryPlan, Part, Phase
from trainer.parameter_sizes import Sizes, parameter_sizes

GB = 1e9
FP32 = 4
REDUCE_ALL = 500_000_000  # elements that DeepSpeed adds up at a time at stage 0
CPU_PROCESS = 0.74e9  # a rank on a CPU that trains a network of no size: packages, libraries, process group, threads
GPU_PROCESS = 2.3e9  # CUDA context, cuBLAS and NCCL's buffers of a rank; an H100 in a group of one has 1.3e9
GRIDS = 10  # of RandAugment: five operations move pixels, each in two directions (data_pipeline/warp.py)
FAISS_SCRATCH = 256 << 20  # of a search on a GPU, which goes to the CPU where the index does not fit beside it


def plan_memory(
    recipe: Recipe,
    *,
    ranks: int,
    on_cpu: bool,
    sizes: Sizes | None = None,
    saves_between_steps: bool = True,
    shard_bytes: float = math.inf,
    hard_candidates: int = 0,
) -> MemoryPlan:
    """The memory of one of `ranks` ranks, of which each reads its part of `shard_bytes` of shards.

    Without `saves_between_steps` the only checkpoint is that of the last step. `hard_candidates` are the places that
    hard places are chosen from at a time, by rank 0.
    """
    sizes = sizes or parameter_sizes(recipe)
    parts = [
        Part("process", CPU_PROCESS if on_cpu else GPU_PROCESS),
        *_engine_parts(recipe, sizes, ranks, on_cpu),
        *_activation_parts(recipe, sizes, ranks),
        *_memory_parts(recipe, sizes, ranks),
        Part("guided loss", guided_bytes(recipe, ranks), phases=("loss", *running_back(recipe, sizes))),
        *_data_parts(recipe, ranks, on_cpu, shard_bytes),
        _checkpoint_part(recipe, sizes, ranks, saves_between_steps),
        *_hard_parts(recipe, sizes, hard_candidates),
        *_evaluation_parts(recipe, sizes, on_cpu),
    ]
    heap = GIVEN_BACK if recipe.engine.zero_stage == 3 else HEAP
    return MemoryPlan(tuple(part for part in parts if part.device or part.host), on_cpu, heap)


def element_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of an element of a trained and of a frozen weight."""
    trained = FP32 if recipe.engine.precision == "fp32" else 2
    return trained, 2 if recipe.model.frozen_precision == "bf16" else trained


def frozen_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of the frozen weights; in blocks with LoRA only matrices that have it are in model.frozen_precision."""
    each, each_frozen = element_bytes(recipe)
    narrow = sizes.frozen_narrow if recipe.model.frozen_precision == "bf16" else sizes.frozen
    return narrow * each_frozen + (sizes.frozen - narrow) * each


def sends_wide(recipe: Recipe) -> bool:
    """Whether gradients of 16 bits are sent in fp32."""
    return recipe.engine.precision != "fp32" and recipe.engine.reduce_precision == "fp32"


def sends_beside_backward(recipe: Recipe) -> bool:
    """Whether a bucket of gradients is sent as soon as it is full, and not when backward has ended."""
    return recipe.engine.zero_stage >= 2 or recipe.engine.overlap


def blocks_behind_first_bucket(recipe: Recipe, sizes: Sizes) -> int | None:
    """Blocks that backward has left behind when the first bucket is full and sent; None if all are sent after it."""
    return sizes.blocks_behind(reduce_bucket(recipe.engine)) if sends_beside_backward(recipe) else None


def running_back(recipe: Recipe, sizes: Sizes) -> tuple[Phase, ...]:
    """The moments of backward before its end."""
    return ("backward",) if blocks_behind_first_bucket(recipe, sizes) is None else ("backward", "bucket")


def images_at_once(recipe: Recipe, ranks: int) -> int:
    """Images whose activations a rank holds at a time."""
    images = recipe.data.places_per_batch * recipe.data.images_per_place // ranks
    return math.ceil(images / recipe.engine.encode_chunks)


def _engine_parts(recipe: Recipe, sizes: Sizes, ranks: int, on_cpu: bool) -> list[Part]:
    """Weights, gradients, optimizer and buffers, by stage and offload."""
    engine, trained = recipe.engine, sizes.trained
    stage, offloads, chunks = engine.zero_stage, engine.offload != "none", engine.encode_chunks
    each, each_frozen = element_bytes(recipe)
    half = each < FP32
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if recipe.optim.beta1 else 0}[recipe.optim.name]
    share = 1 / ranks if stage else 1.0
    # A bucket on a GPU is taken whole; on a CPU only what is written to it takes memory.
    elements = reduce_bucket(engine)
    bucket = (min(elements, trained) if on_cpu else elements) * each * (2 if engine.overlap and stage < 3 else 1)
    sent = each + FP32 if sends_wide(recipe) else each  # bytes of an element of the copies that are sent
    flattened = min(elements, trained) * sent
    # One flat group is updated at a time. torch's Adam makes its denominator in two steps on a CPU, and nothing on a
    # GPU, where it is fused; SGD adds weight decay to a copy of the gradients.
    group = (sizes.largest if on_cpu and not stage and not half else sizes.largest_group * share) * FP32
    of_adam = 2 if on_cpu or offloads else 0
    temporaries = group * ((recipe.optim.weight_decay > 0) if recipe.optim.name == "sgd" else of_adam)
    # DeepSpeed copies the group's gradients: flat, and in 16 bits once more as fp32. Below stage 3 it then frees them.
    flat = group * each / FP32
    stepping = max(group + (flat if half else 0), group + temporaries - (flat if stage < 3 else 0))

    back = running_back(recipe, sizes)
    sending: tuple[Phase, ...] = (*back[1:], "reduce")
    # Gradients of one chunk grow while its activations are freed; of earlier chunks they are all there.
    while_they_grow: tuple[Phase, ...] = (*back, "reduce") if chunks > 1 else ("reduce",)

    def placed(name: str, num_bytes: float, host: bool, *phases: Phase, tensor: float = math.inf) -> Part:
        return Part(name, 0.0 if host else num_bytes, num_bytes if host else 0.0, phases or ("always",), tensor)

    if stage == 3:
        wide = FP32 / each if sends_wide(recipe) else 1.0  # a bucket is of the type that is sent
        partitioned = (trained * each + frozen_bytes(recipe, sizes)) / ranks
        whole = sizes.kept_whole * each + sizes.kept_whole_frozen * each_frozen
        # Autograd's reference to a weight that gradients go through keeps it whole from forward to backward, though
        # ZeRO-3 lets it go: a trained one, or all of a block with LoRA.
        blocks = num_trained_blocks(recipe.model)
        passed = sizes.total * blocks // recipe.model.spec.depth
        kept = 0 if engine.activation_checkpointing else passed if recipe.model.finetune == "lora" else trained
        left = 1 - min(blocks_behind_first_bucket(recipe, sizes) or 0, blocks) / max(blocks, 1)
        gathered, still_gathered, let_go = (
            min(sizes.total, LIVE + BUCKET + most) * max(each, each_frozen) for most in (kept, kept * left, 0)
        )
        if ranks == 1 and (on_cpu or engine.offload != "all"):
            gathered = still_gathered = let_go = 0  # one rank uses its only part as it is
        # In fp32 the optimizer works on the weights themselves, unless they must be on the host.
        masters = FP32 if half or offloads else 0
        composes: tuple[Phase, ...] = ("compose",) if recipe.data.hard_share else ()
        # Encoded in chunks, without autograd, forward leaves no weight behind, and holds most while some are on their
        # way; else at its end, when all have come.
        while_forward = gathered if chunks == 1 else let_go + min(BUCKET, sizes.total) * each * bool(gathered)
        parts = [
            placed("weights, partitioned", partitioned, engine.offload == "all"),
            placed("weights, small ones whole", whole, False),
            placed("weights, as built", trained / ranks * FP32, False, "build", tensor=sizes.largest / ranks * FP32),
            placed("weights, gathered to encode", while_forward, False, *composes, "forward"),
            placed("weights, gathered", gathered, False, *(("loss",) if chunks == 1 else ()), "backward"),
            placed("gradients", trained / ranks * (each + (FP32 if offloads else 0)), offloads),
            placed("optimizer", trained / ranks * (masters + FP32 * moments), offloads),
            placed("optimizer, while it steps", temporaries if offloads else stepping, offloads, "update"),
            placed("reduce bucket", bucket * wide, False),
            placed("reduce bucket, as sent", min(elements, trained) * each * wide * (1 + 1 / ranks), False, *sending),
        ]
        if "bucket" in back:
            parts.append(placed("weights, still gathered", still_gathered, False, "bucket"))
        return parts
    weights = trained * each + frozen_bytes(recipe, sizes)
    if stage == 0:
        masters = FP32 if half else 0
        return [
            placed("weights", weights, False),
            placed("gradients", trained * each, False, *while_they_grow, "update", tensor=sizes.largest * each),
            placed("gradients, as sent", min(trained, REDUCE_ALL) * sent, False, "reduce"),
            placed("optimizer", trained * (masters + FP32 * moments), False),
            placed("optimizer, while it steps", temporaries + trained * masters, False, "update"),
        ]
    buffers: tuple[Phase, ...] = sending if on_cpu else (*back, "reduce")
    parts = [
        placed("weights", weights, False),
        placed("weights, as built", trained * FP32, False, "build", tensor=sizes.largest * FP32),
        placed("optimizer", trained / ranks * (FP32 + FP32 * moments), offloads),
        placed("reduce bucket", bucket, False, *buffers),
        placed("reduce bucket, as sent", flattened, False, *sending),
    ]
    # Stage 1 keeps all gradients until backward is done, but for those that overlap moves into buckets; stage 2 sends
    # each bucket as it fills, and keeps its own part.
    if stage == 1 and not (engine.overlap and chunks == 1):
        parts.append(placed("gradients", trained * each, False, *while_they_grow, tensor=sizes.largest * each))
    if offloads:
        return [
            *parts,
            placed("gradients of the optimizer", trained / ranks * (FP32 + each), True),
            placed("optimizer, while it steps", temporaries, True, "update"),
            placed("gradient buffers", sizes.largest * each, True),
        ]
    of_earlier_chunks: tuple[Phase, ...] = ("backward",) if stage == 2 and chunks > 1 else ()
    return [
        *parts,
        placed("gradients of the optimizer", trained / ranks * each, False, *of_earlier_chunks, *sending, "update"),
        placed("optimizer, while it steps", stepping, False, "update"),
    ]


def _activation_parts(recipe: Recipe, sizes: Sizes, ranks: int) -> list[Part]:
    """Activations: of the frozen part while it runs, of the trained blocks until backward has passed them."""
    spec, side, images = recipe.model.spec, recipe.data.image_size, images_at_once(recipe, ranks)
    each, each_frozen = element_bytes(recipe)
    trained, again = num_trained_blocks(recipe.model), recipe.engine.activation_checkpointing
    stream = images * spec.num_tokens(side) * spec.channels * each  # bytes of all tokens
    width, _ = mlp_widths(spec)
    wide, block = max(width, 3), images * block_activations(recipe.model, side, each)  # MLP, or query, key and value
    narrow = 7 * stream  # of a block's: what has one number a channel
    while_backward = stream * (1 + 2 * width) + (block if again else 0)  # gradients of tokens, and around activations
    running = stream / each * (each_frozen if trained < spec.depth else each) * (2 + 2 * width)
    pixels = images * 3 * num_pixels(side)
    grid, precision = spec.grid(*height_width(side)), DTYPES[recipe.engine.precision]
    head = aggregator_cost(recipe.model, spec.num_tokens(side), grid, precision)
    back = running_back(recipe, sizes)
    # With chunks the loss has descriptors alone; a chunk runs once more, with its activations, to go backward.
    both: tuple[Phase, ...] = ("backward",) if recipe.engine.encode_chunks > 1 else ("loss", "backward")
    behind = min(blocks_behind_first_bucket(recipe, sizes) or 0, trained)
    of_head = () if behind else back[1:]  # where its own gradients fill the bucket

    def kept(blocks: int, when: str, *phases: Phase) -> list[Part]:
        narrow_ones, all_of_it = (blocks * stream,) * 2 if again else (blocks * narrow, blocks * block)
        return [
            Part(f"activations{when}, one a channel", narrow_ones + 2 * stream, phases=phases, tensor=stream),
            Part(f"activations{when}, wider", all_of_it - narrow_ones, phases=phases, tensor=wide * stream),
        ]

    parts = [
        *kept(trained, "", *both),
        Part("activations, while a block runs", running, phases=("forward",), tensor=wide * stream),
        Part(
            "activations, while a block runs back",
            while_backward if trained else 0.0,
            phases=back,
            tensor=wide * stream,
        ),
        Part("activations, aggregator", images * head.kept, phases=(*both, *of_head)),
        Part("images, normalised", pixels * (FP32 + (each if each < FP32 else 0)), phases=("forward",)),
    ]
    if "bucket" in back:
        parts += kept(trained - behind, ", at the first bucket", "bucket")
    return parts


def _memory_parts(recipe: Recipe, sizes: Sizes, ranks: int) -> list[Part]:
    """Queue, drift probe, and what the loss holds at once."""
    memory, data, size = recipe.memory, recipe.data, sizes.descriptor
    batch = data.places_per_batch * data.images_per_place
    shards = ranks if memory.placement == "sharded" else 1
    name = recipe.loss.name
    arrays = LOSSES.build(name, recipe.loss.args).arrays if is_for_tiles(LOSSES, name) else 4
    anchors, columns = batch if shards > 1 else batch // ranks, (batch + memory.size) / shards
    column = max(FP32 * arrays, 13 if memory.min_negative_m else 0)  # or similarity, float64 distance and answer
    copies = 3 if shards > 1 else 2  # of the batch's descriptors: gathered, as gradients, as anchors of all ranks
    until_queued: tuple[Phase, ...] = (*running_back(recipe, sizes), "reduce", "update")
    tile = min(memory.tile_mb << 20, anchors * columns * column)
    parts = [
        Part("queue", memory.size * FP32 * size / shards + memory.size * 16),
        Part("loss", tile + copies * batch * size * FP32 + 24 * (batch + memory.size), phases=("loss",)),
        Part("descriptors of the batch", batch * size * FP32, phases=until_queued),
    ]
    if memory.size and memory.drift_every:
        parts.append(Part("drift probe", memory.drift_images * (3 * num_pixels(data.image_size) + size * FP32)))
    return parts


def _data_parts(recipe: Recipe, ranks: int, on_cpu: bool, shard_bytes: float) -> list[Part]:
    """Decoded batches ahead of the step, bytes read ahead of the decoder, and the step's own images."""
    data = recipe.data
    batch = data.places_per_batch * data.images_per_place // ranks * 3 * num_pixels(data.image_size)
    ahead = data.prefetch_batches + 2 if data.decode_threads else 1
    augmented = 2 if data.augmentation == "randaugment" else 0
    mixed = data.stream_buffer_places * 250e3 if data.access == "stream" else 0.0  # bytes of a place in GSV-Cities
    read = min(data.read_ahead_mb * 2.0**20 + mixed / ranks, shard_bytes / ranks)
    parts = [Part("decoded batches", 0.0, ahead * batch), Part("read ahead", 0.0, read)]
    if not on_cpu and data.decode_threads:  # one on its way, and for a moment the last one and the next but one
        parts.append(Part("batches copied ahead", 2.0 * batch))
    if augmented:
        parts.append(Part("augmentation's grids", GRIDS * num_pixels(data.image_size) * 2.0 * FP32))
    kept = 0 if on_cpu and not augmented else 1  # a copy on the GPU, or what augmentation makes of it
    return [
        *parts,
        Part("images of the step", float(kept * batch)),
        Part("images, while augmented", batch * (augmented + (0 if on_cpu else 1) - kept), phases=("augment",)),
    ]


def _checkpoint_part(recipe: Recipe, sizes: Sizes, ranks: int, saves_between_steps: bool) -> Part:
    """The copy that a checkpoint is written from, while training continues: weights, masters and moments in fp32."""
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if recipe.optim.beta1 else 0}[recipe.optim.name]
    of_trained = 1 + moments + (1 if recipe.engine.precision != "fp32" else 0)
    shares = [0.0] * ranks
    for (numel, trains), keeper in zip(sizes.by_parameter, keepers(sizes.by_parameter, ranks), strict=True):
        shares[keeper] += numel * FP32 * (of_trained if trains else 1)
    queue = next(part.device for part in _memory_parts(recipe, sizes, ranks) if part.name == "queue")
    return Part("checkpoint being written", 0.0, max(shares) + queue, ("always",) if saves_between_steps else ("save",))


def _hard_parts(recipe: Recipe, sizes: Sizes, candidates: int) -> list[Part]:
    """What encoding and composing hard places hold, between steps."""
    forward = _forward_bytes(recipe, chunk_images(recipe, candidates), recipe.data.image_size)
    return [
        Part("hard places, a forward pass", forward, phases=("compose",)),
        Part("hard places, composing", 0.0, composing_bytes(candidates, sizes.descriptor), ("compose",)),
    ]


def _forward_bytes(recipe: Recipe, images: int, side: ImageSize) -> float:
    """Activations of a forward pass without gradients."""
    spec, (each, _) = recipe.model.spec, element_bytes(recipe)
    return images * spec.num_tokens(side) * spec.channels * each * (2 + 2 * mlp_widths(spec)[0])


def _evaluation_parts(recipe: Recipe, sizes: Sizes, on_cpu: bool) -> list[Part]:
    """A forward pass of evaluation, the search, and at ZeRO-3 the whole weights that it runs on."""
    if not (recipe.eval.benchmarks or recipe.data.held_out):
        return []
    each, _ = element_bytes(recipe)
    forward = _forward_bytes(recipe, recipe.eval.batch_size, recipe.eval.image_size)
    parts = [Part("evaluation, a forward pass", forward, phases=("evaluate",))]
    if not on_cpu:
        parts.append(Part("evaluation, search", FAISS_SCRATCH, phases=("evaluate",)))
    if recipe.engine.zero_stage == 3:
        whole = sizes.trained * each + frozen_bytes(recipe, sizes)
        parts.append(Part("evaluation, weights whole", whole, phases=("evaluate",)))
    return parts
