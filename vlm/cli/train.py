"""`vlm train`: train a model as a config says, on one process or under torchrun."""

import argparse
from pathlib import Path

HELP = "train a model as CONFIG says; the same command runs under torchrun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a shipped config's name")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings to change"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="validate, print the plan, and stop")
    instead.add_argument(
        "--profile",
        action="store_true",
        help="take a few steps with fresh weights, print where their time goes, and stop: by part "
        "of the step, with the arithmetic it needs and the share of the machine's peak that it "
        "reaches, and by operator; writes only profile/trace.json (for ui.perfetto.dev) and "
        "profile/profile.json into the run folder; a run that is there stays as it is",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: continue the run folder's newest checkpoint, if there is one",
    )


def run(args: argparse.Namespace) -> int:
    """Check, profile or train; a run ends with its report."""
    from vlm.config.load import load_config
    from vlm.runtime.preemption import stop_signals

    config = load_config(args.config, args.overrides)
    if args.check:
        from vlm.runtime import torchvision_guard

        torchvision_guard.install()
        from vlm.runtime.distributed import ranks_from_environment
        from vlm.training.plan import print_plan

        print_plan(config, ranks_from_environment())
        return 0
    if args.profile:
        from vlm.runtime import torchvision_guard

        torchvision_guard.install()
        from vlm.runtime.distributed import ranks_from_environment
        from vlm.training.profile import profile_run

        profile_run(config, ranks_from_environment())
        return 0
    with stop_signals(
        Path(config.run.dir), until_exit=True
    ):  # before the imports: they take seconds
        from vlm.runtime import torchvision_guard

        torchvision_guard.install()
        from vlm.runtime.distributed import ranks_from_environment
        from vlm.training.loop import train

        finished = train(config, resume=args.resume)
        if ranks_from_environment().is_main:
            from vlm.report.page import write_report

            print(f"model:  {finished.folder / 'model'}")
            print(f"report: {write_report(finished.folder)}")
    return 0
