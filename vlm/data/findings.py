"""What there is to tell of shards that were opened: what was left out, and what is of no use."""

from collections import Counter
from collections.abc import Iterator, Sequence

from vlm.config.find import printable
from vlm.data.grouping import IMAGE_SUFFIXES
from vlm.data.index_file import ShardIndex


def useless(shard: ShardIndex, *, needs_images: bool = True) -> str | None:
    """Why nothing can be read from a shard, if that is so."""
    if shard.num_samples and not (shard.texts_alone and needs_images):
        return None
    fields = shard.details().fields
    if not any(suffix in fields for suffix in IMAGE_SUFFIXES):
        images, found = ", ".join(IMAGE_SUFFIXES), ", ".join(sorted(fields))
        heads = "a model.captioner or model.text.language_head"
        rule = f"; texts alone train {heads}" if shard.texts_alone else ""
        return (
            f"{shard.name}: no sample has an image field ({images}); its fields are: {found}{rule}"
        )
    return f"{shard.name}: every sample was rejected: {_counts(shard)}"


def _counts(shard: ShardIndex) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in shard.rejects.items())


def left_out(shards: Sequence[ShardIndex], limit: int = 10) -> Iterator[str]:
    """Yields a line for each of the first shards from which something was left out."""
    damaged = [shard for shard in shards if shard.rejects]
    for shard in damaged[:limit]:
        first = shard.details().quarantine[0]
        yield (
            f"{printable(shard.name)}: {shard.num_samples} samples; left out: {_counts(shard)}; "
            f"first: {first.reason} {printable(str(first), 300)}"
        )
    if len(damaged) > limit:
        yield f"and {len(damaged) - limit} more shards from which something was left out"


def left_out_of_all(name: str, shards: Sequence[ShardIndex]) -> Iterator[str]:
    """Yields one line for a joined index from which something was left out; opens no shard's."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.rejects)
    if counts:
        found = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        samples = sum(shard.num_samples for shard in shards)
        yield f"{name}: {samples} samples; left out: {found}; vlm data check lists them"


def without_captions(shards: Sequence[ShardIndex]) -> str:
    """Tells the fields of shards that have no caption."""
    fields = sorted(set().union(*(shard.details().fields for shard in shards)))
    names = [shard.name for shard in shards]
    shown = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return (
        f'{shown}: no sample has a caption (txt, or json with "captions" or "caption"); '
        f"the fields are: {', '.join(fields)}"
    )
