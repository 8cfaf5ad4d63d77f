"""`vlm data tokenizer`: train a byte-level BPE on the captions of a data set."""

import argparse
from pathlib import Path

from vlm.cli.arguments import add_data, data_options

HELP = "train a tokenizer on the captions of DATA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_data(parser)
    parser.add_argument("--vocab-size", type=int, default=2048, help="number of ids (default 2048)")
    parser.add_argument(
        "--context-length", type=int, default=77, help="tokens a caption, cut there (default 77)"
    )
    parser.add_argument("--out", type=Path, default=Path("tokenizer.json"), help="file to write")


def run(args: argparse.Namespace) -> int:
    """Train, save, and print how long captions are in tokens.

    Raises:
        ConfigError: The output exists, or a size is out of range.
        DataError: The data can't be read, or has no captions.
    """
    import numpy as np

    from vlm.config.find import counted
    from vlm.curate.source import open_data
    from vlm.errors import ConfigError
    from vlm.tokenizer import train_bpe

    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists; name another file or remove it")
    captions = list(
        open_data(
            args.data, **data_options(args), require_captions=True, needs_images=False
        ).captions()
    )
    tokenizer = train_bpe(captions, vocab_size=args.vocab_size, context_length=args.context_length)
    tokenizer.save(args.out)

    lengths = np.array([len(tokenizer.encode(caption)) for caption in captions])
    num_full = int((lengths == args.context_length).sum())
    print(
        f"{args.out}: {tokenizer.vocab_size} ids from {counted(len(captions), 'caption')}; "
        f"tokens a caption: mean {lengths.mean():.1f}, 99th percentile "
        f"{np.percentile(lengths, 99):.0f}; {num_full} fill all {args.context_length}"
    )
    return 0
