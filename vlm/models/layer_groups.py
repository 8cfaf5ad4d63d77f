"""The parameters of an encoder or a head in groups, from its input to its output."""

from collections import defaultdict

from torch import nn

from vlm.models.image_encoder import ImageEncoder

_FIRST = ("norm_pre",)  # before the blocks, which timm's pattern for `norm` doesn't see


def layer_groups(part: nn.Module) -> list[list[nn.Parameter]]:
    """Embeddings, then each block (the last with the norm after it), then the projection.

    Args:
        part: An image encoder, whose backbone timm divides; or what has `blocks`, as the text
            encoder and the captioner.
    """
    if isinstance(part, ImageEncoder):
        return _of_image_encoder(part)
    blocks = part.get_submodule("blocks").children()
    groups: list[list[nn.Parameter]] = [[], *(list(block.parameters()) for block in blocks)]
    head: list[nn.Parameter] = []
    for name, parameter in part.named_parameters():
        if name.startswith("projection"):
            head.append(parameter)
        elif name.startswith("norm."):
            groups[-1].append(parameter)
        elif not name.startswith("blocks."):
            groups[0].append(parameter)
    return [group for group in (*groups, head) if group]


def _of_image_encoder(encoder: ImageEncoder) -> list[list[nn.Parameter]]:
    from timm.models import group_parameters

    trunk: nn.Module = encoder.trunk
    found = group_parameters(trunk, encoder.trunk.group_matcher(), reverse=True)
    groups: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trunk.named_parameters():
        groups[0 if name.startswith(_FIRST) else found[name]].append(parameter)
    inside = {id(parameter) for parameter in trunk.parameters()}
    head = [parameter for parameter in encoder.parameters() if id(parameter) not in inside]
    return [*(groups[number] for number in sorted(groups)), head]
