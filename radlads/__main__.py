"""`python -m radlads` is the `radlads` command."""

import sys

from radlads.cli.main import main

sys.exit(main())
