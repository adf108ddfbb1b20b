"""`radlads card`: the model card of a folder, from its manifest, its run's record and its last verification."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from radlads.cli.options import arg, opt

if TYPE_CHECKING:
    from radlads.folder import ModelFolder


@dataclass(kw_only=True)
class CardOptions:
    """Which folder."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    license: str | None = opt(None, "Licence as the Hub spells it, instead of the last card's or the teacher's.", metavar="NAME")
    stdout: bool = opt(False, "Print the card and write nothing.", "--stdout")
    overwrite: bool = opt(False, "Replace a card that radlads did not write.", "--overwrite")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class CardResult:
    """Where the card lies, empty if it was only printed, and its text."""

    card: str
    license: str
    text: str

    def blocks(self) -> list[str]:
        """The card itself, or where it was written."""
        if not self.card:
            return [self.text.rstrip("\n")]
        from radlads.provenance import UNKNOWN

        unknown = " The licence is not known: give --license." if self.license == UNKNOWN else ""
        return [f"{self.card} is written.{unknown}"]


def card(options: CardOptions) -> CardResult:
    """Write README.md; R204 without a manifest, R401 where a card of somebody else would be lost."""
    from radlads.errors import fail
    from radlads.files import write_file
    from radlads.folder import MANIFEST, open_folder
    from radlads.provenance import CARD, card_head
    from radlads.weights_tools.card import card as card_text

    folder = open_folder(options.model)
    if folder.manifest is None:
        why = f"it has no {MANIFEST} to write a card from"
        raise fail("R204", where=folder.path, why=why, fix="Give a folder that radlads wrote")
    text = card_text(folder, read_verdict(folder), license=options.license)
    path = folder.path / CARD
    if not options.stdout:
        tags = card_head(path).get("tags")
        ours = isinstance(tags, list) and "radlads" in tags
        if path.exists() and not ours and not options.overwrite:
            raise fail("R401", where=path, why="a card of somebody else stands there", fix="Move it away, or pass --overwrite")
        write_file(path, text)
    terms = text.partition("\nlicense: ")[2].partition("\n")[0]
    return CardResult("" if options.stdout else str(path), terms, text)


def read_verdict(folder: "ModelFolder") -> dict[str, Any] | None:
    """verify.json if it is about this very manifest, else None."""
    from radlads.errors import RadladsError
    from radlads.files import read_json, sha256
    from radlads.folder import MANIFEST, VERDICT

    try:
        verdict = read_json(folder.path / VERDICT)
    except RadladsError:
        return None
    same = isinstance(verdict, dict) and verdict.get("manifest") == sha256(folder.path / MANIFEST)
    return verdict if same else None
