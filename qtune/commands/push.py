"""`qtune push`: upload a run to the Hugging Face hub."""

from argparse import ArgumentParser, Namespace

from qtune.commands import arguments, terminal
from qtune.commands.verb import Verb


def add_arguments(parser: ArgumentParser) -> None:
    arguments.run_argument(parser)
    parser.add_argument("address", metavar="OWNER/NAME", help="the repository; made where there is none")
    parser.add_argument(
        "--what", choices=("adapter", "merged"), default="adapter", help="the adapter, or the model it was merged into"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    parser.add_argument("--yes", action="store_true", help="upload without asking")


def act(options: Namespace) -> None:
    from qtune.rundir import RunDir, reading

    run = RunDir.open(options.run)
    console = terminal.console_of(options)
    from huggingface_hub import HfApi

    from qtune.share import push

    api = HfApi()
    push.refuse_without_token(api)
    with reading(run):
        upload = push.prepare(run, options.address, options.what)
    console.print(push.table(upload, options.public))
    if not options.yes and not terminal.is_agreed(f"Upload to {options.address}?", "uploaded"):
        console.print("Nothing was uploaded.")
        return
    place = push.push(upload, options.public, api)
    console.print(f"uploaded: {place}", markup=False)
    if options.json:
        terminal.print_json({"address": place, "files": [name for name, _ in upload.files], "bytes": upload.bytes})


VERB = Verb(
    name="push",
    help="upload the adapter, with its model card, to the Hugging Face hub",
    arguments=add_arguments,
    act=act,
    order=140,
)
