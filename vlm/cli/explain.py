"""`vlm explain MODEL IMAGE TEXT`: which regions and which words make a similarity."""

import argparse
from typing import TYPE_CHECKING

from vlm.cli.arguments import add_device, add_model, png

if TYPE_CHECKING:
    from rich.console import Console

    from vlm.eval.explain import Explanation
    from vlm.eval.faithfulness import Faithfulness

HELP = "show which regions of a picture and which words of a text make them similar"
_BAR = 24  # columns of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("text", metavar="TEXT", help="what the picture is compared with")
    parser.add_argument("--out", metavar="FILE", type=png, help="PNG: a heat map over the picture")
    parser.add_argument(
        "--faithfulness",
        action="store_true",
        help="measure it: what the similarity does as the most relevant regions are hidden or "
        "shown first, against random orders and untrained models",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Explain, and print the similarity and its words.

    Raises:
        ConfigError: The picture cannot be read, the model cannot be explained, or --out exists.
        DataError: The picture is damaged.
        DiskError: The PNG cannot be written.
    """
    from rich.console import Console

    from vlm.eval.explain import explain
    from vlm.eval.faithfulness import faithfulness
    from vlm.hub.load import load
    from vlm.retrieval.tables import refuse_existing

    refuse_existing(args.out)
    model = load(args.model, device=args.device)
    explanation = explain(model, args.image, args.text)
    console = Console(highlight=False)
    _print(console, explanation)
    if args.faithfulness:
        _print_faithfulness(console, faithfulness(model, args.image, args.text))
    if args.out is not None:
        explanation.save(args.out)
        print(f"written: {args.out}")
    return 0


def _print(console: "Console", explanation: "Explanation") -> None:
    from rich.table import Table
    from rich.text import Text

    from vlm.config.find import printable

    shares = explanation.regions.flatten().sort(descending=True).values
    num_half = int((shares.cumsum(0) < 0.5).sum()) + 1
    print(f"similarity {explanation.similarity:.3f}")
    print(f"half of the relevance lies in {num_half} of {len(shares)} regions")
    table = Table("word", "adds", "", box=None, pad_edge=False)
    longest = max((abs(value) for _, value in explanation.words), default=0.0)
    for word, value in explanation.words:
        bar = "█" * round(_BAR * abs(value) / longest) if longest else ""
        style = "blue" if value >= 0 else "yellow"  # told apart with any colour vision
        table.add_row(Text(printable(word, 40)), f"{value:+.3f}", Text(bar, style))
    console.print(table)


def _print_faithfulness(console: "Console", measured: "Faithfulness") -> None:
    from rich.table import Table

    table = Table("area under the curve", "hidden first", "shown first", box=None, pad_edge=False)
    orders = {
        "most relevant regions": measured.explained,
        "those of untrained models": measured.fresh,
    }
    for name, areas in orders.items():
        table.add_row(name, f"{areas.deletion:.3f}", f"{areas.insertion:.3f}")
    table.add_row("random regions", f"{measured.random:.3f}", f"{measured.random:.3f}")
    console.print(table)
