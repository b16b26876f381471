"""`elastic-hf publish`: put a trained model on the Hugging Face Hub, in one commit.

    elastic-hf publish outputs/shop org/shop-recommender --dry_run          # what would be published
    elastic-hf publish outputs/shop org/shop-recommender --private --tag v1

The commit holds weights, configuration, item tokenizer, code, model card and results. It needs a token with write
access, from `hf auth login` or the variable HF_TOKEN. The model is loaded and tried first. Where nothing has changed
there is no commit; an upload that is refused or interrupted leaves the repository as it was.
"""

import argparse
import sys
from collections.abc import Sequence

import huggingface_hub
import transformers

from ..sharing.hub import publish
from ..sharing.repository import files_to_publish


def main(argv: Sequence[str]) -> None:
    """Publish a folder, or print what would be published."""
    args = parse_arguments(argv)
    for library in (huggingface_hub, transformers):
        library.logging.set_verbosity_error()  # an error is one line
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # and those of huggingface_hub
    options = {"license": args.license, "tag": args.tag, "include_personal_data": args.include_personal_data}
    if args.dry_run:
        operations = files_to_publish(args.folder, args.repo_id, **options)
        for operation in operations:
            print(f"{operation.upload_info.size:14,}  {operation.path_in_repo}")
        (card,) = [operation for operation in operations if operation.path_in_repo == "README.md"]
        with card.as_file() as file:
            print("", file.read().decode(), sep="\n", end="")
        return
    commit = publish(
        args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr, **options
    )
    if commit is None:
        print(f"{args.repo_id} holds this model already: nothing to commit")
    else:
        print(f"{args.repo_id}: {commit.pr_url or commit.commit_url}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="elastic-hf publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="Output folder of a training.")
    parser.add_argument("repo_id", help="Model repository, as namespace/name; it is created if there is none.")
    parser.add_argument("--private", action="store_true", default=None, help="Create the repository as a private one.")
    parser.add_argument("--revision", help="Branch to commit to, which must exist; main by default.")
    parser.add_argument("--tag", help="Name for this version, made after the commit; the card asks for it.")
    parser.add_argument("--create_pr", action="store_true", help="Propose the commit as a pull request.")
    parser.add_argument("--license", help="Hub id of the licence of the weights, such as mit, for the card.")
    parser.add_argument(
        "--include_personal_data",
        action="store_true",
        help="Publish the results as they are, with a user's id, history and next item and the paths of this machine.",
    )
    parser.add_argument("--dry_run", action="store_true", help="List the files, print the card, publish nothing.")
    return parser.parse_args(argv)
