"""`VisionLanguageModel`: encoders, preprocessing, tokenizer and heads; what a user holds."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from vlm.config.schema import ModelConfig
from vlm.data.pictures import Picture, each_picture, opened
from vlm.data.samples import BadSample
from vlm.data.transforms import EvalTransform, normalize
from vlm.errors import ConfigError, DataError
from vlm.heads.class_names import resolve_class_names
from vlm.heads.generate import Decoding, generate
from vlm.heads.model import VisionLanguageModule
from vlm.heads.zero_shot import Prediction, ZeroShotClassifier, zero_shot_classifier
from vlm.models.linear import quicken
from vlm.models.text_encoder import text_lengths, trim
from vlm.runtime.files import disk_error, write_synced, written_whole
from vlm.tokenizer import Tokenizer

FORMAT_VERSION = 1
GREEDY = Decoding()
_BATCHES_SORTED = 64  # texts are sorted by length over so many batches
T = TypeVar("T")


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its pictures; part of every evaluation's protocol."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


class VisionLanguageModel:
    """A trained model, ready to embed, classify and caption; see `vlm.load`.

    Args:
        model: The weights.
        config: What they are weights of.
        tokenizer: Of the text encoder and the captioner.
        device: Where to compute.
    """

    def __init__(
        self,
        model: VisionLanguageModule,
        config: ModelConfig,
        tokenizer: Tokenizer,
        device: torch.device,
    ) -> None:
        self.model = model.to(device).eval()
        if device.type == "cpu":
            quicken(self.model)
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        image = config.image
        self.preprocess = Preprocess(image.image_size, image.mean, image.std)
        self.transform = EvalTransform(image.image_size)

    @property
    def embed_dim(self) -> int:
        """D of the shared space."""
        return self.config.embed_dim

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature."""
        return float(self.model.encoders.scale().detach())

    @torch.inference_mode()
    def encode_image(
        self, pixels: Float[Tensor, "B 3 S S"], normalize: bool = False
    ) -> Float[Tensor, "B D"]:
        """open_clip's own meaning: preprocessed pixels in, features out, on the model's device."""
        return self.model.encoders.encode_image(pixels.to(self.device), normalize=normalize)

    @torch.inference_mode()
    def encode_text(
        self, tokens: Int[Tensor, "B L"], normalize: bool = False
    ) -> Float[Tensor, "B D"]:
        """open_clip's own meaning: tokens in, features out; trimming padding changes nothing."""
        tokens = trim(tokens, self.tokenizer.eot_id).to(self.device)
        return self.model.encoders.encode_text(tokens, normalize=normalize)

    def encode_pixels(
        self, images: UInt8[Tensor, "B 3 S S"], normalize: bool = True
    ) -> Float[Tensor, "B D"]:
        """Features of pictures that are cut to size but still uint8."""
        return self.encode_image(self._normalized(images), normalize=normalize)

    @torch.inference_mode()
    def image_tokens(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B N W"]:
        """What the captioner reads of pictures that are cut to size but still uint8."""
        return self.model.encoders.image.tokens(self._normalized(images))

    def pixels(self, pictures: Sequence[Picture]) -> UInt8[Tensor, "B 3 S S"]:
        """Pictures cut to the model's size, still uint8.

        Raises:
            ConfigError: A file that cannot be read, or what is no picture at all.
            DataError: A picture is damaged, or of a format that is not read.
        """
        return torch.stack([self._pixel(picture) for picture in pictures])

    def _pixel(self, picture: Picture) -> Tensor:
        try:
            return self.transform(opened(picture))
        except BadSample as error:
            kind = f"a picture ({type(picture).__name__})"
            name = picture if isinstance(picture, str | Path) else kind
            raise DataError(f"{name}: no readable picture: {error}") from error

    def embed_images(
        self, images: Picture | Iterable[Picture], *, batch_size: int = 64
    ) -> Float[Tensor, "N D"]:
        """L2-normalised fp32 features on the CPU, one row a picture.

        Args:
            images: Paths, encoded bytes, PIL images, uint8 arrays [H, W, 3] or tensors
                [3, H, W]; one or any iterable of them.
            batch_size: Pictures at a time.
        """
        return self._by_batch(images, batch_size, lambda p: self.encode_pixels(p).float().cpu())

    def embed_texts(
        self, texts: str | Iterable[str], *, batch_size: int = 256
    ) -> Float[Tensor, "N D"]:
        """L2-normalised fp32 features on the CPU, one row a text.

        Texts of about one length go together, for each batch is as long as its longest.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        for chunk in _chunks(texts, _BATCHES_SORTED * batch_size):
            tokens = self.tokenizer(chunk)
            order = text_lengths(tokens, self.tokenizer.eot_id).argsort()
            parts = [
                self.encode_text(tokens[some], normalize=True).float().cpu()
                for some in torch.split(order, batch_size)
            ]
            rows.append(torch.cat(parts)[order.argsort()])
        return torch.cat(rows) if rows else torch.empty(0, self.embed_dim)

    def classifier(
        self, labels: str | Path | Sequence[str], templates: str | Sequence[str] = "simple"
    ) -> ZeroShotClassifier:
        """What `classify` takes in place of labels: it can be saved, and encodes no label again.

        Args:
            labels: Class names; or imagenet, cifar10, cifar100, or a file with one name a line.
            templates: A named set of prompts, a file with one a line, or a list of them.

        Raises:
            ConfigError: No labels, blank or repeated ones, or unknown templates.
        """
        return zero_shot_classifier(self, resolve_class_names(labels), templates)

    def classify(
        self,
        images: Picture | Iterable[Picture],
        labels: str | Path | Sequence[str] | ZeroShotClassifier,
        *,
        templates: str | Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """The likeliest label of each picture, with probabilities at the model's own temperature.

        Args:
            images: As for `embed_images`.
            labels: As for `classifier`, or what that returned.
            templates: As for `classifier`; "simple" by default.
            batch_size: Pictures at a time.

        Raises:
            ConfigError: As `classifier`, or templates beside one, or one of another model.
        """
        if not isinstance(labels, ZeroShotClassifier):
            labels = self.classifier(labels, "simple" if templates is None else templates)
        elif templates is not None:
            raise ConfigError("templates are part of a classifier; make one with these instead")
        else:
            labels.check_model(self)
        features = self.embed_images(images, batch_size=batch_size)
        return labels.predict(features, logit_scale=self.logit_scale)

    def caption(
        self,
        images: Picture | Iterable[Picture],
        *,
        prompt: str | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """A text for each picture: a caption, or what follows a prompt, as an answer a question.

        Args:
            images: As for `embed_images`.
            prompt: What the text goes on from; it is not repeated.
            num_beams: As the following five: see `vlm.heads.generate.Decoding`.
            length_penalty: Likewise.
            no_repeat_ngram: Likewise.
            top_p: Likewise.
            temperature: Likewise.
            seed: Likewise.
            max_length: Of prompt and text in tokens; the model's context length if not given.
            batch_size: Pictures at a time.

        Raises:
            ConfigError: The model has no captioner, or a value is out of range.
        """
        decoding = Decoding(
            num_beams, length_penalty, no_repeat_ngram, top_p, temperature, seed, max_length
        )
        captions: list[str] = []
        for chunk in _chunks(each_picture(images), batch_size):
            pixels = self.pixels(chunk)
            captions += self.caption_pixels(pixels, prompt=prompt, decoding=decoding)
        return captions

    @torch.inference_mode()
    def caption_pixels(
        self,
        images: UInt8[Tensor, "B 3 S S"],
        *,
        prompt: str | Sequence[str] | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[str]:
        """Texts for pictures that are cut to size but still uint8; see `caption`.

        Args:
            images: B pictures.
            prompt: One for all, or one each.
            decoding: How tokens are chosen.
        """
        decoder = self.model.decoder()
        prompts = (
            [prompt or ""] * len(images) if prompt is None or isinstance(prompt, str) else prompt
        )
        starts = [self.tokenizer.encode(text)[:-1] for text in prompts]  # without the end of text
        image_tokens = self.image_tokens(images)
        longest = min(decoding.max_length or decoder.context_length, decoder.context_length)
        texts = [""] * len(images)
        for length in sorted({len(start) for start in starts}):  # one length at a time: no padding
            rows = [row for row, start in enumerate(starts) if len(start) == length]
            tokens = generate(
                decoder,
                image_tokens[rows],
                torch.tensor([starts[row] for row in rows], device=self.device),
                decoding,
                eot_id=self.tokenizer.eot_id,
                max_length=max(longest, length),
            )
            for row, text in zip(rows, tokens[:, length:].tolist(), strict=True):
                texts[row] = self.tokenizer.decode(text)
        return texts

    def save(self, folder: str | Path) -> None:
        """Write a model folder that works offline and by itself: config, weights, tokenizer.

        Raises:
            ConfigError: The folder exists and is not empty.
            DiskError: It cannot be written; nothing of it is there.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists; give a new folder")
        weights = {n: t.detach().contiguous().cpu() for n, t in self.model.state_dict().items()}
        data = tensor_bytes(weights)
        config = {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.config),
            "preprocess": asdict(self.preprocess),
        }
        try:
            with written_whole(folder) as temporary:
                write_synced(temporary / "model.safetensors", data)
                self.tokenizer.save(temporary / "tokenizer.json")
                write_synced(temporary / "config.json", json.dumps(config, indent=1).encode())
        except OSError as error:
            raise disk_error(folder, error, len(data)) from error

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images.to(self.device), self.preprocess.mean, self.preprocess.std)

    def _by_batch(
        self,
        images: Picture | Iterable[Picture],
        batch_size: int,
        encode: Callable[[Tensor], Tensor],
    ) -> Tensor:
        rows = [encode(self.pixels(chunk)) for chunk in _chunks(each_picture(images), batch_size)]
        return torch.cat(rows) if rows else torch.empty(0, self.embed_dim)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
