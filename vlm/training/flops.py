"""The FLOPs that a training step needs: counted once on the model's shapes, then arithmetic.

A multiply-add is 2 FLOPs; only matrix products and convolutions count. Attention counts whole,
causal or not, as in the field's figures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.heads.coca import Coca
from vlm.heads.language import MASKED
from vlm.heads.model import VisionLanguageModule
from vlm.losses.pairs import TILE_BYTES
from vlm.models.dual_encoder import DualEncoder
from vlm.training.objective import Objective

Number = int | float

_aten = torch.ops.aten
_FACTORS = {  # which arguments are multiplied
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.convolution: (0, 1),
}


@dataclass(frozen=True)
class Flops:
    """Of one part of a step.

    Attributes:
        forward: Of its forward pass.
        needed: Of its forward and its backward pass: a product costs as much again for each of its
            two factors that has a gradient, so mostly three times `forward`, and once if frozen.
    """

    forward: float = 0.0
    needed: float = 0.0

    @property
    def backward(self) -> float:
        """Of its backward pass alone."""
        return self.needed - self.forward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.needed + other.needed)

    def __mul__(self, factor: Number) -> "Flops":
        return Flops(self.forward * factor, self.needed * factor)


@dataclass(frozen=True)
class StepFlops:
    """Of one rank's part of a training step.

    Attributes:
        image: Of the image encoder.
        text: Of the text encoder, its language head included.
        captioner: Of the captioning head.
        loss: Of the similarities, and of the teacher they learn from.
        recomputed: What is computed a second time to save memory: not needed, and not in `needed`.
    """

    image: Flops
    text: Flops
    captioner: Flops
    loss: Flops
    recomputed: float

    @property
    def needed(self) -> float:
        """Of all parts, forward and backward."""
        return self.image.needed + self.text.needed + self.captioner.needed + self.loss.needed


@dataclass(frozen=True)
class PartFlops:
    """Of a part, for any batch: fixed + rows (row + length (linear + length quadratic))."""

    row: Flops = Flops()
    linear: Flops = Flops()
    quadratic: Flops = Flops()
    fixed: Flops = Flops()

    def __call__(self, rows: Number, length: Number = 0) -> Flops:
        """Of so many samples of so many tokens."""
        a_row = self.row + self.linear * length + self.quadratic * length**2
        return self.fixed + a_row * rows


@dataclass(frozen=True)
class ModelFlops:
    """Of a model, for any batch; `count_flops` makes it, and asking it costs microseconds.

    Attributes:
        image: Of the image encoder; it has no length.
        text: Of the text encoder.
        captioner: Of the captioning head.
        language: Of the language head, and of the text encoder's second pass with masked tokens.
        product: Of one image's similarity with one text, in all its forms.
        teacher_image: Of the teacher's image encoder.
        teacher_text: Of its text encoder.
        keeps_tiles: The loss computes no tile twice.
    """

    image: PartFlops
    text: PartFlops
    captioner: PartFlops
    language: PartFlops
    product: Flops
    teacher_image: PartFlops
    teacher_text: PartFlops
    keeps_tiles: bool

    def step(
        self,
        rows: int,
        text_length: Number,
        *,
        negatives: Number = 0,
        pictures: Number | None = None,
        captioned_rows: Number = 0,
        global_rows: int | None = None,
        micro_batch_size: int | None = None,
        tile_bytes: int = TILE_BYTES,
    ) -> StepFlops:
        """Of a training step.

        Args:
            rows: Samples of this rank.
            text_length: Tokens of the longest text of the batch, to which all are padded; a mean
                over steps will do.
            negatives: False texts beside them, of the same length.
            pictures: Those of them that have one; None for all.
            captioned_rows: Samples whose captions are learned, each of `text_length - 1` tokens.
            global_rows: Samples of all ranks; `rows` if there is one.
            micro_batch_size: `train.micro_batch_size`.
            tile_bytes: Of logits that may exist at a time.
        """
        columns = global_rows or rows
        image = self.image(rows if pictures is None else pictures)
        text = self.text(rows + negatives, text_length) + self.language(rows, text_length)
        captioner = self.captioner(captioned_rows, text_length - 1) if captioned_rows else Flops()
        similarities = self.product * (rows * columns)
        loss = similarities + self.teacher_image(rows) + self.teacher_text(rows, text_length)
        recomputed = 0.0
        if micro_batch_size is not None and micro_batch_size < rows:
            again = 1 - micro_batch_size / rows  # all but the last, which has its share of texts
            recomputed += again * (image.forward + text.forward + captioner.forward)
        if not self.keeps_tiles and 4 * rows * columns > tile_bytes:  # bytes of fp32 logits
            recomputed += similarities.forward
        return StepFlops(image, text, captioner, loss, recomputed)


def count_flops(module: VisionLanguageModule, objective: Objective | None = None) -> ModelFlops:
    """Count a model as it is: in its mode, with the parameters that now have gradients.

    Runs each part a few times on the meta device: shapes without numbers, in a second or two.
    Attention there is two plain products, so which kernel a device prefers makes no difference.

    Args:
        module: The model.
        objective: Whose prefixes and teacher count; None for neither.
    """
    encoders, head = module.encoders, module.captioner
    image_tokens = _image_tokens(encoders, 2)
    has_gradient = [
        any(p.requires_grad for p in part.parameters()) for part in (encoders.image, encoders.text)
    ]

    def captioner(length: int) -> None:
        assert head is not None
        read = torch.zeros(2, length, dtype=torch.long, device="meta")
        if isinstance(head, Coca):
            read = torch.zeros(2, length, head.vocabulary.shape[1], device="meta")
            read.requires_grad_(has_gradient[1])
        hidden = _on_meta(head, image_tokens, read)
        weight = head.vocabulary
        vocabulary = torch.empty_like(weight, device="meta", requires_grad=weight.requires_grad)
        torch.mm(hidden.flatten(0, 1), vocabulary.T)  # as the loss does, tile by tile

    teacher = objective.teacher.model.model.encoders if objective and objective.teacher else None
    dim = encoders.image.projection.out_features
    forms = {*objective.loss.matryoshka_dims, dim} if objective else {dim}
    one = 2.0 * (sum(forms) + (dim if teacher else 0))
    product = Flops(one, one * (1 + sum(has_gradient)))
    if teacher:
        theirs = 2.0 * teacher.image.projection.out_features
        product += Flops(theirs, theirs)
    return ModelFlops(
        image=_of_images(encoders),
        text=_of_texts(encoders),
        captioner=PartFlops() if head is None else _by_length(captioner),
        language=PartFlops() if module.language_head is None else _of_language(module),
        product=product,
        teacher_image=_of_images(teacher) if teacher else PartFlops(),
        teacher_text=_of_texts(teacher) if teacher else PartFlops(),
        keeps_tiles=encoders.logit_bias is not None,
    )


def _image_tokens(encoders: DualEncoder, rows: int) -> Tensor:
    size = encoders.image.image_size
    tokens: Tensor = _on_meta(encoders.image, torch.empty(rows, 3, size, size, device="meta"))[1]
    return tokens


def _of_images(encoders: DualEncoder) -> PartFlops:
    return _affine(lambda rows: _image_tokens(encoders, rows))


def _of_texts(encoders: DualEncoder) -> PartFlops:
    tokens = torch.zeros(2, encoders.text.context_length, dtype=torch.long, device="meta")
    return _by_length(lambda length: _on_meta(encoders.text, tokens[:, :length]))


def _of_language(module: VisionLanguageModule) -> PartFlops:
    """The head on every position, the vocabulary's product on those that are predicted."""
    text, head = module.encoders.text, module.language_head
    weight = text.token_embedding.weight
    learns = any(p.requires_grad for p in text.parameters())

    def run(length: int) -> None:
        num = length - text.causal  # nothing follows the last
        states = torch.empty(2, num, weight.shape[1], device="meta").requires_grad_(learns)
        if not text.causal:  # a second pass, which sees the mask
            tokens = torch.zeros(2, length, dtype=torch.long, device="meta")
            states = _on_meta(text, tokens)[1]
        _on_meta(head, states)

    part, share = _by_length(run), 1.0 if text.causal else MASKED
    product = 2.0 * weight.numel() * share
    whole = Flops(product, product * (2 + weight.requires_grad))
    row = part.row + whole * -1 if text.causal else part.row
    return replace(part, row=row, linear=part.linear + whole)


def _affine(run: Callable[[int], object]) -> PartFlops:
    """What runs on a number of samples; 2 at least, for batch norm's sake.

    Some backbones multiply parameters with each other, once for the whole batch (Swin v2's biases).
    """
    two, four = _count(run, 2), _count(run, 4)
    row = (four + two * -1) * 0.5
    return PartFlops(row=row, fixed=two + row * -2)


def _by_length(run: Callable[[int], object]) -> PartFlops:
    """What runs on 2 samples of a length: a polynomial of degree 2, through three points."""
    one, two, three = (_count(run, length) * 0.5 for length in (1, 2, 3))
    quadratic = (one + two * -2 + three) * 0.5
    linear = two + one * -1 + quadratic * -3
    return PartFlops(one + (linear + quadratic) * -1, linear, quadratic)


def _count(run: Callable[[int], object], size: int) -> Flops:
    counter = _Counter()
    with sdpa_kernel(SDPBackend.MATH), counter:
        run(size)
    return counter.flops


def _on_meta(part: nn.Module | None, *inputs: Tensor) -> Any:
    """The part's output with weights that have a shape and no memory."""
    assert part is not None
    return functional_call(part, weights_on_meta(part), inputs)


def weights_on_meta(part: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the meta device; what has a gradient has one there."""
    tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    return {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in tensors.items()
    }


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Adds up what runs. Below autograd, yet tensors still tell whether they have a gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.flops = Flops()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _FACTORS:
            left, right = (args[i] for i in _FACTORS[packet])
            depth = right.shape[1:].numel() if packet == _aten.convolution else left.shape[-1]
            forward = 2.0 * out.numel() * depth
            with_gradient = int(left.requires_grad) + int(right.requires_grad)
            self.flops += Flops(forward, forward * (1 + with_gradient))
        return out
