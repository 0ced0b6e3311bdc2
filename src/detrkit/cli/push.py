"""Upload a model with its card to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from detrkit.cli._options import CommonOptions, Switch
from detrkit.cli._terminal import Outcome, Terminal, shell


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Upload a model with its card to the Hugging Face hub.

    The card tells what the run left behind: categories, counts of the data, recipe, figures, curves and samples; of
    paths only the last name. The token is that of `hf auth login`, or HF_TOKEN.
    """

    run: tyro.conf.Positional[Path]
    """Run folder or model folder."""
    name: tyro.conf.Positional[str]
    """What the model is to be called on the hub: organisation/name."""
    private: Switch = False
    """A new model is visible to its owners only; one that is there stays as it is."""
    license: str = ""
    """Licence that the card names, as the hub spells it, such as apache-2.0."""
    pictures: bool = True
    """Upload the run's curves and samples; samples show validation images."""
    dry_run: Path | None = None
    """Folder to write what would be uploaded into; nothing is uploaded."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Upload, or write what would be uploaded.

    Raises:
        MissingExtraError: the extra `hub` is not installed.
        ModelError: there is no model, or the hub cannot be reached or refuses.
        UsageError: no such name is possible, there is no token, or the folder holds something.
    """
    from detrkit.card import assemble, push

    if options.dry_run is not None:
        files = assemble(options.run, options.name, options.dry_run, license=options.license, pictures=options.pictures)
        text = f"Nothing was uploaded. {', '.join(files)} lie in {options.dry_run}; read README.md first."
        return Outcome({"folder": options.dry_run, "files": list(files), "uploaded": False}, text=text)
    terminal.note(f"Uploading to {options.name} …")
    address = push(
        options.run, options.name, private=options.private, license=options.license, pictures=options.pictures
    )
    use = f"Use it:  detrkit predict {shell(options.name)} IMAGES --out found"
    return Outcome({"address": address, "uploaded": True}, text=f"{address}\n{use}")
