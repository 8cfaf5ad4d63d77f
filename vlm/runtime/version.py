"""Which vlm this is: written into whatever must tell later what made it."""

from importlib import metadata


def installed_version() -> str:
    """The version of the installed package; "0+uninstalled" in a bare source tree."""
    try:
        return metadata.version("vlm")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+uninstalled"
