"""Every setting there is: frozen dataclasses, one a section, with defaults, units and meaning."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Scalar = bool | int | float | str
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
_COMPARISON = r"(>=|<=|==|!=|>|<) *[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?"
Comparison = Annotated[str, Field(pattern=f"^{_COMPARISON}( and {_COMPARISON})*$")]


@dataclass(frozen=True, config=STRICT)
class AugmentConfig:
    """What a training picture goes through; the random numbers come from (seed, epoch, sample)."""

    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.9  # smallest share of the area a crop keeps
    max_aspect: Annotated[float, Field(ge=1)] = (
        4 / 3
    )  # crops are between 1 / max_aspect and max_aspect
    horizontal_flip: Fraction = 0.0  # probability; left and right matter to captions
    color_jitter: Fraction = 0.0  # brightness, contrast, saturation: factors within 1 +- this
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0  # largest turn to either side
    shuffle_tags: bool = False  # a caption's comma-separated parts in random order
    erase: Fraction = 0.0  # probability of a rectangle of noise, arXiv 1708.04896


@dataclass(frozen=True, config=STRICT)
class FilterConfig:
    """Which samples of a source are trained on: resolved before step 0, every drop is told."""

    min_image_side: CountOrZero = 0  # pixels of the shorter side
    max_aspect: Annotated[float, Field(ge=1)] | None = None  # longer side / shorter side
    min_caption_chars: CountOrZero = 0  # of the longest caption
    max_caption_chars: Count | None = None
    fields: dict[str, Comparison] = field(  # numbers of the json: {similarity: ">= 0.28"}
        default_factory=dict
    )
    allow_ids: str | None = None  # a file, one id a line: KEY or SHARD.tar/KEY; only these
    deny_ids: str | None = None  # the same; none of these
    dedup: Literal["none", "exact", "perceptual"] = "none"  # of what is left: the first is kept
    dedup_bits: Annotated[int, Field(ge=0, le=10)] = 4  # perceptual: of 64 bits, so many may differ


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """One of several sources of training samples."""

    data: str  # DATA
    name: str | None = None  # in the log, the ledger and metrics; the text of `data` if absent
    weight: Positive | None = None  # share of all samples seen; absent: the number of samples
    image_column: str | None = None  # of a table; guessed and printed when absent
    caption_column: str | None = None
    filter: FilterConfig = field(default_factory=FilterConfig)


def _form(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


Sources = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[SourceConfig, ...], Tag("list")],
    Discriminator(_form),
]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where samples come from. DATA is a shard pattern, an image folder, or a table."""

    train: Sources | None = None  # DATA, or a list of sources; required to train
    image_column: str | None = None  # of a table; guessed and printed when absent
    caption_column: str | None = None
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # held out by a hash of the image bytes
    streams: Count = 1  # part of the order; never changes with the world size
    num_workers: CountOrZero = 2  # loader processes a rank; no part of the order
    questions: str | None = None  # json field with [{question, answer}], which the captioner learns
    question_fraction: Fraction = 0.5  # of visits to samples with some; in the others, the caption
    hard_negatives: str | None = None  # json field: a text that is nearly true, or one a caption
    cache_gib: Annotated[float, Field(ge=0)] = 0.0  # memory for decoded small pictures, a rank
    cache_dir: str | None = None  # packs, indexes and remote shards; $XDG_CACHE_HOME/vlm if null
    shard_cache_gib: Positive = 100.0  # of remote shards, on each node; those used longest ago go
    max_bad_fraction: Fraction = 0.01  # more undecodable samples than this end the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, config=STRICT)
class ImageConfig:
    """The image encoder: any timm backbone, with pooling and a projection."""

    name: str = "vit_base_patch32_224"  # timm's name
    image_size: Count = 224  # pixels a side
    pool: Literal["token", "avg", "map", "queries"] = "token"
    num_queries: Annotated[int, Field(ge=2)] = 256  # of pool=queries; CoCa, 2205.01917, section 3.2
    stem_channels: tuple[Count, ...] = ()  # convolutional stem in place of the patch embedding
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # FLIP, arXiv 2212.00794, section 3
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    kwargs: dict[str, Scalar] = field(default_factory=dict)  # passed to timm.create_model


@dataclass(frozen=True, config=STRICT)
class TextConfig:
    """The text encoder: a Transformer, CLIP's by default."""

    tokenizer: str = "clip"  # clip | bpe:SIZE (trained on the training captions) | a tokenizer.json
    context_length: Annotated[int, Field(ge=3)] = 77
    width: Count = 512
    depth: Count = 12
    num_heads: Count = 8
    attention: Literal["causal", "bidirectional"] = "causal"
    pool: Literal["eot", "cls", "mean"] = "eot"  # cls: at a class token of its own, as CoCa
    language_head: bool = False  # predicts the next token; of bidirectional attention, masked ones


@dataclass(frozen=True, config=STRICT)
class CaptionerConfig:
    """The captioning head: a Transformer decoder that attends to the image encoder's tokens."""

    kind: Literal["captioner", "coca"] = "captioner"  # coca: goes on from the text encoder's states
    width: Count = 512
    depth: Count = 6
    num_heads: Count = 8


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Two encoders into one embedding space, and an optional captioning head."""

    embed_dim: Count = 512
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # of the text encoder
    init_logit_scale: Positive = 1 / 0.07  # CLIP, section 2.5; kept in log space
    max_logit_scale: Positive = 100.0
    init_logit_bias: float | None = None  # of the sigmoid loss; SigLIP, section 3.3: -10, scale 10
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    captioner: CaptionerConfig | None = None


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """What is minimised: contrastive, and the other terms times their weights."""

    contrastive: Literal["info_nce", "sigmoid"] = "info_nce"  # CLIP's; SigLIP's, arXiv 2303.15343
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of info_nce
    duplicates: Literal["positive", "ignore", "negative"] = "positive"  # equal captions in a batch
    matryoshka_dims: tuple[Count, ...] = ()  # prefixes of features that serve alone, 2205.13147
    distill: str | None = None  # a teacher's run or model folder: its similarities are learned too
    distill_weight: Annotated[float, Field(ge=0)] = 1.0
    caption_weight: Annotated[float, Field(ge=0)] = 1.0  # used when model.captioner is set
    language_weight: Annotated[float, Field(ge=0)] = 1.0  # used with model.text.language_head
    hard_negative_weight: Annotated[float, Field(ge=0)] = 1.0  # used with data.hard_negatives
    caption_every: Count = 1  # n: every n-th pair of a global batch is captioned


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW or Muon, the learning rate's schedule, and what learns."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside blocks; the rest AdamW
    lr: Positive = 5e-4
    lr_scale: dict[str, Positive] = field(default_factory=dict)  # {captioner: 2.0}: factors by part
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-6
    warmup_steps: CountOrZero = 2000
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # wsd: stays, decays at the end
    decay_fraction: Fraction = 0.2  # of all steps, the last ones, under wsd (2405.18392, section 3)
    min_lr_fraction: Fraction = 0.0  # of lr, towards which cosine and wsd decay
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 turns clipping off
    trainable_groups: dict[str, CountOrZero] = field(  # {encoders.image: 2}: of this part only the
        default_factory=dict  # last layer groups learn; 0: none (LiT, 2111.07991)
    )


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How long, how large, on what."""

    steps: Count | None = None  # give steps or epochs
    epochs: Positive | None = None
    global_batch_size: Annotated[int, Field(ge=2)] = 1024  # samples a step, over all ranks
    micro_batch_size: Count | None = None  # of a rank, in memory at a time; the gradient is of all
    memory_budget_gib: Positive | None = None  # of a rank: chooses the above; a GPU has its own
    precision: Literal["auto", "fp32", "tf32", "bf16"] = (
        "auto"  # auto: bf16 where the hardware has it
    )
    device: str = "auto"  # auto | cpu | cuda | mps
    seed: CountOrZero = 0
    init_from: str | None = None  # a run or model folder whose weights it begins with, where it has
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0: no averaged weights
    strategy: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights and moments lie spread over the ranks
    compile: Literal["auto", "always", "never"] = "auto"  # blocks, by torch.compile; auto: on CUDA
    checkpoint_activations: bool = False  # keep no activations inside blocks, compute them again


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """What is measured when training ends, and on the way."""

    suite: str | None = None  # a suite's YAML file
    every_steps: CountOrZero = 0  # on the way, too, after so many steps each time


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Where a run lives and what it keeps."""

    dir: str = "runs/default"
    save_every_steps: CountOrZero = 0
    save_every_minutes: Annotated[float, Field(ge=0)] = 15.0
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the newest; older ones are deleted
    keep_best: Annotated[str, Field(pattern=r"^(min|max):\S+$")] | None = (
        None  # "min:loss": keeps the best too, by the last log line before each save
    )
    async_save: bool = True  # save in a thread, from a copy in host memory, while training goes on
    log_every_steps: Count = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # get the log's lines, too
    wandb_project: str = "vlm"  # of the tracker wandb
    step_timeout_s: Positive = 900.0  # a step that takes longer ends the run; thrice for the first
    rank_timeout_s: Positive = 1800.0  # ranks wait for each other so long, start-up included


@dataclass(frozen=True, config=STRICT)
class Config:
    """A whole run; `config.yaml` in the run folder holds it resolved and reruns it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
