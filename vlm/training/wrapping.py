"""What is put around the model: frozen parts, checkpointed and compiled blocks, DDP or FSDP2."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vlm.config.schema import TrainConfig
from vlm.errors import ConfigError
from vlm.heads.model import VisionLanguageModule
from vlm.models.image_encoder import ImageEncoder
from vlm.models.layer_groups import layer_groups
from vlm.runtime.communication import listen_to
from vlm.runtime.device import can_compile
from vlm.runtime.distributed import Ranks
from vlm.training.flops import weights_on_meta


def freeze(module: VisionLanguageModule, trainable_groups: Mapping[str, int]) -> None:
    """Let only the last layer groups of some parts learn; statistics of frozen norms stay, too.

    What a backbone has and its features don't need (a norm before a classifier that isn't there)
    is frozen first: DDP would wait for its gradient.

    Args:
        module: Whose parameters' `requires_grad` is set.
        trainable_groups: Number of groups that learn, by part: `encoders.image`, `encoders.text`,
            `captioner`.

    Raises:
        ConfigError: The model has no such part, or the part not so many groups.
    """
    for parameter in _unused(module.encoders.image):
        parameter.requires_grad_(False)
    parts: dict[str, nn.Module] = {
        "encoders.image": module.encoders.image,
        "encoders.text": module.encoders.text,
    }
    if module.captioner is not None:
        parts["captioner"] = module.captioner
    for name, num_trainable in trainable_groups.items():
        if name not in parts:
            raise ConfigError(
                f"optim.trainable_groups: the model has no {name}; its parts are {', '.join(parts)}"
            )
        groups = [g for g in layer_groups(parts[name]) if any(p.requires_grad for p in g)]
        if num_trainable > len(groups):
            raise ConfigError(
                f"optim.trainable_groups: {name} has {len(groups)} layer groups, "
                f"not {num_trainable}"
            )
        for group in groups[: len(groups) - num_trainable]:
            for parameter in group:
                parameter.requires_grad_(False)
        for norm in parts[name].modules():
            learns = any(parameter.requires_grad for parameter in norm.parameters())
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not learns:
                norm.eval()


def _unused(encoder: ImageEncoder) -> list[nn.Parameter]:
    """Parameters that the encoder's outputs don't depend on."""
    weights, size = weights_on_meta(encoder), encoder.image_size
    pixels = torch.empty(2, 3, size, size, device="meta")  # two, for batch norm's sake
    features, _ = functional_call(encoder, weights, (pixels,))
    learning = [name for name, weight in weights.items() if weight.requires_grad]
    gradients = torch.autograd.grad(
        features.sum(), [weights[name] for name in learning], allow_unused=True
    )
    return [
        encoder.get_parameter(name)
        for name, gradient in zip(learning, gradients, strict=True)
        if gradient is None
    ]


def checkpoint_blocks(module: nn.Module) -> None:
    """Let blocks keep their inputs alone, and compute what is inside again in the backward pass.

    Raises:
        ConfigError: There are none.
    """
    if not any(blocks(module)):
        raise ConfigError("train.checkpoint_activations: no part of the model has blocks")
    for block in blocks(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wrap(
    module: VisionLanguageModule, train: TrainConfig, device: torch.device, ranks: Ranks
) -> nn.Module:
    """The module as the step calls it; blocks are changed in place.

    Checkpointing, done before, is inside of compilation, and both are inside of FSDP2, so that
    recomputation finds gathered weights.
    """
    if train.compile == "always" and not any(blocks(module)):
        raise ConfigError("train.compile: no part of the model has blocks; remove it")
    if train.compile == "always" or (train.compile == "auto" and can_compile(device)):
        for block in blocks(module):
            block.compile()
    if ranks.world_size == 1:
        return module
    if train.strategy == "fsdp":
        return _shard(module, device, ranks)
    # Compiled blocks let gradients go one by one; dynamo would cut each at the size of a bucket.
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Every Transformer block (and convolutional one): what is in a `blocks` of some part."""
    for name, inner in module.named_modules():
        if name.rpartition(".")[2] == "blocks":
            yield from inner.children()


def _shard(module: VisionLanguageModule, device: torch.device, ranks: Ranks) -> nn.Module:
    """FSDP2 (PyTorch's `fully_shard`), a block at a time.

    Weights are gathered in fp32 and autocast chooses the arithmetic, so that a step computes what
    it computes under DDP.
    """
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy()
    encoders = module.encoders
    for name in ("logit_scale", "logit_bias"):  # fully_shard takes no scalars
        scalar = getattr(encoders, name)
        if scalar is not None:
            setattr(encoders, name, nn.Parameter(scalar.detach().reshape(1)))
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for sharded in (*blocks(module), module):
        listen_to(sharded)
    return module
