"""On every rank: runs the commands of a JSON file, one after another, as `ernie-train` would.

`{rank}` in an argument is the rank's number. A command that begins with "cd", DIRECTORY runs there.

Exit statuses go to `<file>.status-<rank>.json`.
"""

import json
import os
import sys
from pathlib import Path

import ernie_train  # noqa: F401
from ernie_train.cli.main import main
from ernie_train.core import process_group
from tests.kept_workers import kept_workers

path = Path(sys.argv[1])
statuses = []
for arguments in json.loads(path.read_text()):
    own = [argument.replace("{rank}", str(process_group.rank())) for argument in arguments]
    if own[0] == "cd":
        os.chdir(own[1])
        own = own[2:]
    with kept_workers():
        try:
            main(own)
        except SystemExit as stopped:
            statuses.append(int(stopped.code or 0))
path.with_suffix(f".status-{process_group.rank()}.json").write_text(json.dumps(statuses))
