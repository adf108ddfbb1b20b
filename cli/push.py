"""`radlads push`: a verified folder to the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, note, size

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(kw_only=True)
class PushOptions:
    """What to upload, and where to."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    repo: str = arg("Repository on the Hub.", metavar="OWNER/NAME", flag="--upload-repo")
    private: bool = opt(False, "Make the repository private if it is new.", "--private")
    create_pr: bool = opt(False, "Open a pull request instead of writing to the branch.", "--create-pr")
    revision: str | None = opt(None, "Branch to write to.", metavar="NAME")
    message: str | None = opt(None, "Commit message.", metavar="TEXT")
    dry_run: bool = opt(False, "Check everything, list the files, send nothing.", "--dry-run")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class PushResult:
    """What was sent; `commit` is its address, empty for a dry run."""

    repo: str
    files: dict[str, int]
    commit: str

    def blocks(self) -> list[Table | str]:
        """The files, and where they are now."""
        rows = [(name, size(count)) for name, count in self.files.items()]
        done = f"Pushed: {self.commit}" if self.commit else f"Nothing was sent to {self.repo} (dry run)."
        return [Table(("file", "size"), rows, right=("size",)), done]


def push(options: PushOptions) -> PushResult:
    """Upload the files of the manifest, the card and the verdict; R501 for one without a verdict or licence, R104, R101."""
    from radlads.errors import fail

    if not REPOSITORY.fullmatch(options.repo):
        raise fail("R101", where=options.repo, why="it is no repository's name", fix="Write OWNER/NAME")
    files = sendable(Path(options.model))
    if options.dry_run:
        return PushResult(options.repo, files, "")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        fix = "Run `pip install huggingface_hub`"
        raise fail("R104", where="push", why="huggingface_hub is not installed", fix=fix) from None
    api: Any = HfApi(library_name="radlads")
    try:
        note(f"uploading {len(files)} files to {options.repo}")
        api.create_repo(options.repo, private=options.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=options.repo,
            folder_path=options.model,
            allow_patterns=list(files),
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.message or "Upload by radlads",
        )
    except HFValidationError as error:
        raise fail("R101", where=options.repo, why=str(error), fix="Write OWNER/NAME") from None
    except Exception as error:  # the Hub's own errors, and whatever its HTTP library of the day raises
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise fail("R407", where=options.repo, why=why, fix="Check the connection and `hf auth whoami`") from None
    return PushResult(options.repo, files, str(commit.commit_url))


def sendable(path: Path) -> dict[str, int]:
    """Files to upload with their sizes; R501 unless the folder is as it was when verified, and its card names a licence."""
    from radlads.cli.card import read_verdict
    from radlads.errors import fail
    from radlads.folder import MANIFEST, VERDICT, open_folder
    from radlads.provenance import CARD, UNKNOWN, card_head
    from radlads.verify import check_files

    folder = open_folder(path)
    again = f"Run `radlads verify {path}`"
    if folder.manifest is None:
        raise fail("R501", where=path, why=f"it has no {MANIFEST}", fix="Push a folder that radlads wrote")
    verdict = read_verdict(folder)
    if verdict is None:
        raise fail("R501", where=path, why="it is not verified, or was changed since", fix=again)
    if verdict.get("passed") is not True:
        raise fail("R501", where=path, why="its last verification failed", fix=again)
    found = check_files(path, folder.manifest)
    if found.status != "passed":
        raise fail("R501", where=path, why=found.detail, fix=again)
    if not (path / CARD).is_file():
        raise fail("R501", where=path, why="it has no model card", fix=f"Run `radlads card {path}`")
    if card_head(path / CARD).get("license") in (None, "", UNKNOWN):
        fix = f"Run `radlads card {path} --license NAME`; the teacher's licence says which are possible"
        raise fail("R501", where=path / CARD, why="the licence is not known", fix=fix)
    names = sorted({*folder.manifest["files"], MANIFEST, VERDICT, CARD})
    return {name: (path / name).stat().st_size for name in names}
